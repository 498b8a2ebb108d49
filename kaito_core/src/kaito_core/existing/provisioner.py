"""The node provisioner ``existing``: the cluster's own nodes, found by their labels. It owns nothing and buys nothing.

KAITO cannot tune on such nodes, because it looks the number of GPUs up by an instance type that must be empty there (its
defect 5); here the node itself says what it has. And where KAITO waits for a mistyped label until it times out, the answer
here names the node and the label."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from kaito_core.api.labels import RESERVED_SELECTOR_KEYS, WORKSPACE
from kaito_core.api.suggest import closest
from kaito_core.existing.node import COUNT, INSTANCE_TYPE, MEMORY, PRODUCT, Node, kind, read_node
from kaito_core.kube.kinds import NODES
from kaito_core.plugins.types import (
    Cluster,
    NodeProvisioner,
    NodeRequest,
    NodeStatus,
    Offer,
    Requirements,
    Unsupported,
)

SHOWN = 3
"""Nodes that a message names; a cluster may have hundreds."""

TELLING = (INSTANCE_TYPE, PRODUCT, MEMORY, COUNT)
"""Labels that tell machines of one kind from others, the one that a replacement has most surely first."""

HOSTNAME = "kubernetes.io/hostname"


class ExistingNodes(NodeProvisioner):
    """See the module. Everything is read anew at each call, from the cache of the cluster it is attached to."""

    name: ClassVar[str] = "existing"
    holds: ClassVar[bool] = False
    patience: ClassVar[float] = math.inf
    """A node that is being mended, or a label that is to come, takes as long as it takes, and costs nothing more."""

    def __init__(self) -> None:
        self._cluster: Cluster | None = None
        self._known: dict[str, tuple[Mapping[str, Any], Node]] = {}

    def attach(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def offers(self, requirements: Requirements) -> Iterable[Offer]:
        """One offer for each kind of machine of which there are enough nodes that take pods now."""
        for nodes in _kinds(n for n in self._matching(requirements) if n.usable).values():
            if len(nodes) >= requirements.count:
                yield _offer(nodes)

    def ensure(self, request: NodeRequest) -> NodeStatus:
        """Ready when there are enough nodes of the offer's kind; else what is in the way, by node and label.

        An offer without CPUs stands for any kind. ``pending`` is what may change by itself or by a person with a label;
        ``failed`` is only that the nodes are there and are not alike, or not of the kind that was planned for."""
        requirements, count = request.requirements, request.requirements.count
        matching = self._matching(requirements)
        usable = [n for n in matching if n.usable]
        kinds = _kinds(usable)
        planned = kind(request.offer) if request.offer.cpus else max(kinds, key=lambda k: len(kinds[k]), default="")
        fitting = kinds.get(planned, [])
        if len(fitting) >= count:
            return self._ready(request, fitting, matching)
        # Of those that may yet come: a node whose GPUs do not show has no kind so far.
        coming = [n for n in matching if not n.usable and (n.kind == planned or n.lack or not n.offer.gpus)]
        if len(fitting) + len(coming) < count <= len(usable):
            failure = Unsupported(_unlike(usable, request))
            return NodeStatus(request.id, "failed", message=str(failure), failure=failure)
        return NodeStatus(request.id, "pending", message=self._why(request, matching, fitting))

    def observe(self, request_id: str) -> NodeStatus:
        """Nothing is held for anybody."""
        return NodeStatus(request_id, "absent")

    def release(self, request_id: str) -> NodeStatus:
        """The nodes were there before, and stay."""
        return NodeStatus(request_id, "absent")

    # --- which nodes

    def _nodes(self) -> list[Node]:
        """Every node by name, but those that somebody got for a Workspace: they go with it. A Node object is read once: the host's
        cache replaces an object and never changes it."""
        known, now = self._known, {}
        for obj in self._cluster.list(NODES) if self._cluster else ():
            name = obj["metadata"]["name"]
            if WORKSPACE in (obj["metadata"].get("labels") or {}):
                continue
            before = known.get(name)
            now[name] = before if before is not None and before[0] is obj else (obj, read_node(obj))
        self._known = now
        return [now[name][1] for name in sorted(now)]

    def _matching(self, requirements: Requirements) -> list[Node]:
        wanted = _wanted(requirements).items()
        types = {t.lower() for t in requirements.instance_types}
        return [
            n
            for n in self._nodes()
            if all(n.labels.get(k) == v for k, v in wanted)
            and (not types or n.labels.get(INSTANCE_TYPE, "").lower() in types)
        ]

    def _besides(self, matching: Iterable[Node]) -> list[Node]:
        names = {n.name for n in matching}
        return [n for n in self._nodes() if n.name not in names]

    def _ready(self, request: NodeRequest, fitting: list[Node], matching: Sequence[Node]) -> NodeStatus:
        selector = _wanted(request.requirements)
        others = [n for n in matching if n.kind != fitting[0].kind]
        if request.requirements.instance_types:
            # The scheduler would take any type that has the labels.
            others += self._besides(matching)
        others = [n for n in others if _has(n, selector)]
        for label in TELLING:
            values = {n.labels.get(label) for n in fitting}
            value = next(iter(values))
            if len(values) == 1 and value and any(n.labels.get(label) != value for n in others):
                selector[label] = value
                others = [n for n in others if n.labels.get(label) == value]
        # Those left look the same by label. A pod that asks for all GPUs of its machine does not fit where there are fewer.
        others = [n for n in others if n.usable and n.offer.gpus >= fitting[0].offer.gpus]
        if others:
            if request.requirements.count > 1 or HOSTNAME not in fitting[0].labels:
                words = f"no label tells {_names(fitting)} from {_names(others)}, which {_is(others)} of another kind"
                failure = Unsupported(f"{words}: give them a label of their own, and name it in resource.labelSelector")
                return NodeStatus(request.id, "failed", message=str(failure), failure=failure)
            fitting = fitting[:1]
            selector[HOSTNAME] = fitting[0].labels[HOSTNAME]
        return NodeStatus(request.id, "ready", tuple(n.name for n in fitting), selector)

    # --- why not

    def _why(self, request: NodeRequest, matching: Sequence[Node], fitting: Sequence[Node]) -> str:
        requirements = request.requirements
        said = []
        if requirements.count > 1 and matching:
            said.append(f"{len(fitting)} of {requirements.count} nodes are there" + (f" ({_names(fitting)})" if fitting else ""))  # fmt: skip
        fit = {n.name for n in fitting}
        unfit = [n for n in matching if n.name not in fit]
        said += [f"the node {n.name} {n.why_not or _has_instead(n, request.offer)}" for n in unfit[:SHOWN]]
        if len(unfit) > SHOWN:
            said.append(f"and {len(unfit) - SHOWN} more nodes cannot be used")
        if len(matching) < requirements.count:
            said.append(self._no_more(requirements, matching))
        return "; ".join(said)

    def _no_more(self, requirements: Requirements, matching: Sequence[Node]) -> str:
        """No (other) node matches: which label is to blame, and which nodes come closest."""
        nodes = self._besides(matching)
        wanted = _wanted(requirements)
        no = "no other node" if matching else "no node"
        if not nodes:
            held = " that was not got for another Workspace" if self._cluster and any(self._cluster.list(NODES)) else ""
            return "the cluster has no other node" if matching else f"the cluster has no node{held}"
        said = [
            f"{no} has the label {k}={v}{_closest_label(k, nodes)}"
            for k, v in wanted.items()
            if not any(n.labels.get(k) == v for n in nodes)
        ]
        types = {t.lower() for t in requirements.instance_types}
        if types and not any(n.labels.get(INSTANCE_TYPE, "").lower() in types for n in nodes):
            there = sorted({n.labels[INSTANCE_TYPE] for n in nodes if INSTANCE_TYPE in n.labels})
            have = f"there are {_list(there)}" if there else f"none has the label {INSTANCE_TYPE}"
            said.append(f"{no} is a {' or '.join(requirements.instance_types)} ({have})")
        if said:
            return "; ".join(said)
        # Each of them is somewhere, but not on one node.
        every = {**wanted, **({INSTANCE_TYPE: " or ".join(requirements.instance_types)} if types else {})}
        lacking = sorted(nodes, key=lambda n: len(_lacking(n, wanted, types)))[:SHOWN]
        lacks = "; ".join(f"{n.name} lacks {', '.join(_lacking(n, wanted, types))}" for n in lacking)
        return f"{no} has all of {', '.join(f'{k}={v}' for k, v in every.items())}: {lacks}"


def _wanted(requirements: Requirements) -> dict[str, str]:
    """The user's labels without those that controllers set on nodes of their own."""
    return {k: v for k, v in requirements.labels.items() if k not in RESERVED_SELECTOR_KEYS}


def _has(node: Node, labels: Mapping[str, str]) -> bool:
    return all(node.labels.get(k) == v for k, v in labels.items())


def _kinds(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    """Nodes that are alike, together."""
    found: dict[str, list[Node]] = {}
    for node in nodes:
        found.setdefault(node.kind, []).append(node)
    return found


def _offer(alike: Sequence[Node]) -> Offer:
    """What every one of them has at least."""
    cpus, memory = min(n.offer.cpus for n in alike), min(n.offer.memory for n in alike)
    return replace(alike[0].offer, cpus=cpus, memory=memory)


# --- words


def _unlike(usable: Sequence[Node], request: NodeRequest) -> str:
    count, offer = request.requirements.count, request.offer
    if count == 1:
        return "; ".join(f"the node {n.name} {_has_instead(n, offer)}" for n in usable[:SHOWN])
    kinds = [f"{_names(nodes)} {'have' if len(nodes) > 1 else 'has'} {_has_words(nodes[0].offer)}" for nodes in _kinds(usable).values()]  # fmt: skip
    return f"the {count} nodes must be of one kind: {'; '.join(kinds[:SHOWN])}"


def _has_instead(node: Node, planned: Offer) -> str:
    """Why a node that is well is not what was planned for."""
    has = node.offer
    if not planned.cpus:
        return f"has {_has_words(has)}, unlike the others"
    if planned.gpus and has.gpu == planned.gpu:
        return f"has {has.gpus} GPU{'s' * (has.gpus != 1)} where {planned.gpus} are needed"
    if planned.gpus and not has.gpus:
        return f"advertises no nvidia.com/gpu, and {_has_words(planned)} is needed"
    return f"is a {has}, and a {planned} is needed"


def _has_words(offer: Offer) -> str:
    return f"{offer.gpus}×{offer.gpu.model}" if offer.gpu else f"{offer.cpus} CPUs and no GPU"


def _lacking(node: Node, wanted: Mapping[str, str], types: set[str]) -> list[str]:
    lacks = [f"{k}={v}" for k, v in wanted.items() if node.labels.get(k) != v]
    if types and node.labels.get(INSTANCE_TYPE, "").lower() not in types:
        lacks.append(INSTANCE_TYPE)
    return lacks


def _closest_label(key: str, nodes: Sequence[Node]) -> str:
    having = [f"{n.name} has {key}={n.labels[key]}" for n in nodes if key in n.labels]
    if having:
        return f" ({_list(having)})"
    near = closest(key, dict.fromkeys(k for n in nodes for k in n.labels))
    return f" (did you mean {near}?)" if near else ""


def _names(nodes: Sequence[Node]) -> str:
    return _list([n.name for n in nodes])


def _is(nodes: Sequence[Node]) -> str:
    return "is" if len(nodes) == 1 else "are"


def _list(words: Sequence[str]) -> str:
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more
