"""The node provisioner ``karpenter``: machines as standalone NodeClaims, for any controller with Karpenter's core.

The claim is the record: its name is the request, so that nothing is written down elsewhere, and a controller that comes after
a crash finds everything. One thing a claim cannot tell: that it was, and that Karpenter gave it up. On a lack of capacity
Karpenter writes an event and deletes the claim at once, so that a claim that is not there was either never made or given up.
It is looked for in three places: in the claim that is still being deleted, in the events of that name (kept for an hour), and
in what this process has seen. Where all three fail (restarted, and the event lost), the claim is made a second time: nothing is
bought twice, because the first never got a machine; Karpenter says no once more, and this time somebody listens."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, TypeVar

from kaito_core.api.labels import NODE_CLASS_NAME, REQUEST, WORKSPACE, WORKSPACE_NAMESPACE
from kaito_core.kube.errors import ApiError, Forbidden, Invalid, NotFound, TooManyRequests
from kaito_core.kube.kinds import CONFIG_MAPS, CRDS, EVENTS, NODES
from kaito_core.plugins.types import (
    Cluster,
    Held,
    NodeProvisioner,
    NodeRequest,
    NodeStatus,
    NotAuthorized,
    Offer,
    ProvisioningError,
    Requirements,
    Transient,
    Unsupported,
    Watched,
)
from kaito_provisioner_karpenter import offers as market
from kaito_provisioner_karpenter.claim import NODES as NODES_ANNOTATION
from kaito_provisioner_karpenter.claim import REGION, Choice, among, asked_for, became, choice, claims
from kaito_provisioner_karpenter.flavours import (
    NODE_CLAIMS,
    WITH_OBJECTS,
    Flavour,
    NodeClass,
    other_flavours,
    pick,
    read_node_class,
)
from kaito_provisioner_karpenter.reading import Reading, age, evidence, gone_without_word, read_claim

NODE_CLASS: Final = "KAITO_NODE_CLASS"
"""``NAME``, ``KIND/NAME`` or ``KIND`` of the node class for new machines, where the cluster has several."""
POOL: Final = "KAITO_NODE_POOL"
"""The value of the label ``karpenter.sh/nodepool`` on new claims; unset: none, or what the controller needs."""
ENV_REGION: Final = "KAITO_REGION"
"""The region of the cluster, where its nodes have no label for it."""
OFFERS: Final = "KAITO_KARPENTER_OFFERS"
"""``NAMESPACE/NAME`` of a ConfigMap that lists the machines in place of the catalogue."""

REMEMBERED: Final = 60.0
"""Seconds that it is remembered between two plannings whether there is a Karpenter, and with which node class."""

FRESH: Final = 3.0
"""Seconds that the node classes and the list of machines are remembered: many claims are made at once. A claim that names a node
class which was lost in between is thrown away by Karpenter with an event, and made again."""

EVENT_COMES: Final = 15.0
"""Seconds that the reason of a claim's end is waited for: Karpenter writes events beside its work, not before it."""

EVENTS_NAMESPACE: Final = "default"
"""Where events about objects without a namespace are."""

log = logging.getLogger("kaito.provisioner.karpenter")

Object = Mapping[str, Any]
T = TypeVar("T")


@dataclass
class Memory:
    """What this process has seen of one claim: no more than a help, see the module."""

    said: tuple[str, str] = ("", "")
    registered: bool = False
    asked: Choice | None = None
    gone: float | None = None
    """When it was first found gone; None while it is there."""


class KarpenterNodes(NodeProvisioner):
    """See the module. ``environ`` and ``clock`` are for tests."""

    name: ClassVar[str] = market.NAME
    patience: ClassVar[float] = 1200.0
    """Karpenter deletes a claim that is not launched after 5 minutes, and one whose node has not joined after 15; for a GPU that
    never shows it has no limit. Five minutes more are for drivers and the device plugin."""

    watches: ClassVar[tuple[Watched, ...]] = (
        Watched(NODE_CLAIMS, index=REQUEST),
        Watched(EVENTS, EVENTS_NAMESPACE, fields=f"involvedObject.kind={NODE_CLAIMS.kind}"),
    )

    def __init__(self, environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.time) -> None:
        self._environ = environ
        self._clock = clock
        self._cluster: Cluster | None = None
        self._seen: dict[str, Memory] = {}
        self._class: tuple[float, NodeClass | Unsupported | None] = (0.0, None)
        self._read_at: dict[Any, tuple[float, Any]] = {}
        self._aws: Any = None

    def attach(self, cluster: Cluster) -> None:
        self._cluster = cluster

    # --- what there is

    def offers(self, requirements: Requirements) -> Iterable[Offer]:
        """The machines of Karpenter's cloud in the cluster's region. None where there is no Karpenter. What stands in the way of all
        of them is said by one; a question that fails costs no other provisioner its offers."""
        if self._cluster is None:
            return []
        try:
            with _typed("what Karpenter offers"):
                return self._offers(requirements)
        except ProvisioningError as e:
            log.warning("karpenter offers nothing now: %s", e)
            return []

    def _offers(self, requirements: Requirements) -> list[Offer]:
        try:
            node_class = self._remembered_class()
        except Unsupported as e:
            return market.none_because(self._market("", requirements), str(e))
        if node_class is None:
            return []
        found = self._market(node_class.flavour.cloud, requirements)
        if node_class.flavour.one_type:
            found = [o for o in found if o.capacity_type == "on-demand"]
        if node_class.trouble:
            return market.none_because(found, f"the node class {node_class} is not ready: {node_class.trouble}")
        return self._checked(found) if node_class.flavour.cloud == "aws" else found

    def _market(self, cloud: str, requirements: Requirements) -> list[Offer]:
        named = self._environ.get(OFFERS, "")
        if named:
            namespace, _, name = named.rpartition("/")
            config_map = self._lately(named, lambda: self._of.get(CONFIG_MAPS, name, namespace or "default"))
            if config_map is None:
                raise Unsupported(f"{OFFERS} names the ConfigMap {named}, and there is none")
            return market.asked_for(market.listed(config_map), requirements)
        # Which cloud it is may be what cannot be said; a type that the user has named is enough to say why not.
        clouds = [cloud] if cloud else ["azure", "aws"] if requirements.instance_types else []
        found = [o for c in clouds for o in market.of_cloud(c, self._region(), requirements.capacity_types)]
        return market.asked_for(found, requirements)

    def _checked(self, offers: list[Offer]) -> list[Offer]:
        """What AWS says of them beforehand, where boto3 is installed and may ask. Never in the way of a plan."""
        region = self._region()
        if not region or not offers:
            return offers
        try:
            from kaito_provisioner_karpenter import aws

            if self._aws is None:
                self._aws = aws.Market(clock=self._clock, environ=self._environ)
            found: list[Offer] = self._aws.checked(region, offers)
            return found
        except ImportError:
            return offers

    def _region(self) -> str:
        for node in self._of.list(NODES):
            region = (node["metadata"].get("labels") or {}).get(REGION)
            if region:
                return str(region)
        return self._environ.get(ENV_REGION, "")

    # --- getting machines

    def ensure(self, request: NodeRequest) -> NodeStatus:
        """Makes the claims that were never made, and reads the others. One that Karpenter has given up is not made again."""
        try:
            with _typed(f"NodeClaims of {request.id}"):
                return self._ensure(request)
        except ProvisioningError as e:
            return NodeStatus(request.id, "failed", message=str(e), failure=e)

    def _ensure(self, request: NodeRequest) -> NodeStatus:
        there = self._claims(request.id)
        readings = {n: self._read(c) for n, c in there.items()}
        failed = next((r for r in readings.values() if r.failure is not None), None)
        if failed is not None and failed.failure is not None:
            return self._failed(request, failed.name, failed.failure)
        leaving = [r for r in readings.values() if r.phase == "leaving"]
        lost = [r for r in leaving if r.registered]
        if lost:
            # A machine that was there: the host begins anew, with another request.
            return NodeStatus(request.id, "releasing", message="; ".join(r.message for r in lost))
        alone = [n for n in self._nodes_of(request.id) if _is_alone(n, there)]
        if alone:
            # The claim went before its machine. Another one beside it would be one too many.
            return NodeStatus(request.id, "releasing", message=_left(alone))
        if len(there) >= request.requirements.count and not leaving:
            return self._status(request, there, readings, len(there))
        node_class = self._node_class(request)
        wanted = claims(request, node_class, self._environ.get(POOL, ""))
        missing = [c for c in wanted if c["metadata"]["name"] not in there]
        # A claim that is on its way out and never had a node is one that Karpenter has given up, too.
        doubtful = [*(c["metadata"]["name"] for c in missing), *(r.name for r in leaving)]
        events = list(self._of.list(EVENTS, EVENTS_NAMESPACE))
        said = [self._given_up(request, name, events, name in there, node_class) for name in doubtful]
        # What is certain of one of them comes before what is awaited of another.
        for status in sorted((s for s in said if s is not None), key=lambda s: s.phase != "failed"):
            return status
        if node_class.trouble:
            # Karpenter would throw the claim away without a word.
            words = f"the node class {node_class} is not ready: {node_class.trouble}"
            return NodeStatus(request.id, "pending", message=words)
        for claim in missing:
            if node_class.flavour.in_turn and not all(r.registered for r in readings.values()):
                break
            name = claim["metadata"]["name"]
            there[name] = self._of.apply(NODE_CLAIMS, claim)
            readings[name] = self._read(there[name])
            log.info("made the NodeClaim %s", name)
        return self._status(request, there, readings, len(wanted))

    def _status(
        self, request: NodeRequest, there: Mapping[str, Object], readings: Mapping[str, Reading], count: int
    ) -> NodeStatus:
        status = _status(request.id, [readings[n] for n in sorted(readings)], count)
        return replace(status, offer=became(request, there.values())) if status.phase == "ready" else status

    def _failed(self, request: NodeRequest, name: str, failure: ProvisioningError) -> NodeStatus:
        memory = self._seen.get(name)
        asked = among(memory.asked, request.also) if memory and memory.asked else ()
        return NodeStatus(request.id, "failed", message=str(failure), failure=failure, asked=asked)

    def _given_up(
        self, request: NodeRequest, name: str, events: list[Object], still_there: bool, node_class: NodeClass
    ) -> NodeStatus | None:
        """What to say of a claim that is gone, or going, before it had a node; None: it may be made."""
        memory = self._seen.get(name)
        said = evidence(events, name)
        if isinstance(said, Transient) and not still_there:
            # The node class was not ready. It is looked at before the next claim, so that this one may be made again.
            self._seen.pop(name, None)
            return None
        if said is not None:
            if memory is None:  # restarted: the claim is gone, and the same request makes the same claim
                self._seen[name] = Memory(asked=choice(request, node_class))
            return self._failed(request, name, said)
        if memory is None or memory.registered:
            if still_there:
                return NodeStatus(request.id, "pending", message=f"{name} is being taken away")
            # Never made, or its machine was lost after it had come: then another one takes its place.
            self._seen.pop(name, None)
            return None
        now = self._clock()
        memory.gone = now if memory.gone is None else memory.gone
        if now - memory.gone < EVENT_COMES:
            return NodeStatus(request.id, "pending", message=f"Karpenter has given {name} up; waiting for the reason")
        if node_class.trouble and not still_there:
            self._seen.pop(name, None)
            return None
        return self._failed(request, name, gone_without_word(*memory.said))

    def observe(self, request_id: str) -> NodeStatus:
        """How far the claims of the request are; ``absent`` when there is none. Raises `ProvisioningError`."""
        if self._cluster is None:
            return NodeStatus(request_id, "absent")
        with _typed(f"NodeClaims of {request_id}"):
            there = self._claims(request_id)
            readings = [self._read(there[n]) for n in sorted(there)]
            if not readings:
                left = self._nodes_of(request_id)
                return (
                    NodeStatus(request_id, "releasing", message=_left(left))
                    if left
                    else NodeStatus(request_id, "absent")
                )
            failed = next((r for r in readings if r.failure is not None), None)
            if failed is not None:
                return NodeStatus(request_id, "failed", message=failed.message, failure=failed.failure)
            if all(r.phase == "leaving" for r in readings):
                return NodeStatus(request_id, "releasing", message="; ".join(r.message for r in readings))
            return _status(request_id, readings, max(_count(c) for c in there.values()))

    # --- giving them back

    def release(self, request_id: str) -> NodeStatus:
        """Deletes the claims; Karpenter drains and ends the machines. ``absent`` when no claim and no Node of the request is left. Raises
        `ProvisioningError` when that cannot be found out."""
        if self._cluster is None:
            return NodeStatus(request_id, "absent")
        with _typed(f"NodeClaims of {request_id}"):
            # A cache that is behind would call gone what was just made.
            there = self._claims(request_id) or self._claims(request_id, fresh=True)
            for name, claim in there.items():
                if "deletionTimestamp" not in claim["metadata"]:
                    self._of.delete(NODE_CLAIMS, name)
                    log.info("deleted the NodeClaim %s", name)
            left = self._nodes_of(request_id, fresh=not there)
            if there:
                words = f"Karpenter is giving {', '.join(sorted(there))} back"
                return NodeStatus(request_id, "releasing", tuple(n["metadata"]["name"] for n in left), message=words)
            for node in left:
                # Its claim went without it (somebody took the finalizer off). Karpenter's finalizer on the Node ends the machine.
                if "deletionTimestamp" not in node["metadata"]:
                    self._of.delete(NODES, node["metadata"]["name"])
            if left:
                return NodeStatus(
                    request_id, "releasing", tuple(n["metadata"]["name"] for n in left), message=_left(left)
                )
            for name in [n for n in self._seen if n == request_id or n.startswith(request_id)]:
                self._seen.pop(name, None)
            return NodeStatus(request_id, "absent")

    def held(self) -> Iterable[Held]:
        """Every request that a claim, or a Node without one, carries the label of. Claims that KAITO or somebody else made do not."""
        if self._cluster is None:
            return ()
        with _typed("NodeClaims"):
            objects = [*self._list_claims(fresh=True), *self._of.list(NODES, fresh=True)]
        now, found = self._clock(), dict[str, Held]()
        for obj in objects:
            labels = obj["metadata"].get("labels") or {}
            request_id = labels.get(REQUEST)
            if not request_id:
                continue
            tags = {k: labels[k] for k in (WORKSPACE, WORKSPACE_NAMESPACE) if k in labels}
            before = found.get(request_id)
            old = max(age(obj, now), before.age if before else 0.0)
            found[request_id] = Held(request_id, before.tags if before else tags, old)
        return tuple(found.values())

    # --- looking

    @property
    def _of(self) -> Cluster:
        if self._cluster is None:
            raise Unsupported("Karpenter works in a cluster, and there is none")
        return self._cluster

    def _list_claims(self, labels: Mapping[str, str] | None = None, *, fresh: bool = False) -> list[Object]:
        try:
            return list(self._of.list(NODE_CLAIMS, "", labels, fresh=fresh))
        except NotFound:  # no Karpenter (any more): its claims went with the definition
            return []

    def _claims(self, request_id: str, *, fresh: bool = False) -> dict[str, Object]:
        return {c["metadata"]["name"]: c for c in self._list_claims({REQUEST: request_id}, fresh=fresh)}

    def _nodes_of(self, request_id: str, *, fresh: bool = False) -> list[Object]:
        return list(self._of.list(NODES, "", {REQUEST: request_id}, fresh=fresh))

    def _read(self, claim: Object) -> Reading:
        node_name = (claim.get("status") or {}).get("nodeName", "")
        node = self._of.get(NODES, node_name) if node_name else None
        reading = read_claim(claim, node, self._clock())
        memory = self._seen.setdefault(reading.name, Memory())
        memory.registered = reading.registered
        memory.asked = asked_for(claim)
        memory.said = reading.said if reading.said[1] else memory.said
        if "deletionTimestamp" not in claim["metadata"]:
            memory.gone = None
        return reading

    # --- the node class

    def _remembered_class(self) -> NodeClass | None:
        """The node class, remembered for a minute; None where there is no Karpenter. Raises `Unsupported`."""
        when, known = self._class
        if known is None or self._clock() - when > REMEMBERED:
            try:
                known = self._find_class(self._environ.get(NODE_CLASS, "")) if self._has_karpenter() else None
            except Unsupported as e:
                known = e
            self._class = (self._clock(), known)
        if isinstance(known, Unsupported):
            raise known
        return known

    def _has_karpenter(self) -> bool:
        try:
            self._of.list(NODE_CLAIMS, "", {REQUEST: "none"})
        except NotFound:
            return False
        return True

    def _node_class(self, request: NodeRequest) -> NodeClass:
        """As it is now. The request's own wish, where the host hands the annotation on, comes before the environment's."""
        return self._find_class(request.tags.get(NODE_CLASS_NAME) or self._environ.get(NODE_CLASS, ""))

    def _find_class(self, wanted: str) -> NodeClass:
        found = [c for flavour in WITH_OBJECTS for c in self._classes(flavour)]
        if not found and not wanted.startswith("KaitoNodeClass"):
            found = [c for flavour in other_flavours(self._definitions()) for c in self._classes(flavour)]
        azure = not found and any(
            str(n.get("spec", {}).get("providerID", "")).startswith("azure") for n in self._of.list(NODES)
        )
        return pick(found, wanted, azure_nodes=azure)

    def _definitions(self) -> list[Object]:
        return self._lately(CRDS, lambda: list(self._of.list(CRDS)))

    def _classes(self, flavour: Flavour) -> list[NodeClass]:
        def read() -> list[NodeClass]:
            try:
                return [read_node_class(flavour, o) for o in self._of.list(flavour.node_class)]
            except NotFound:
                return []

        return self._lately(flavour, read)

    def _lately(self, key: Any, read: Callable[[], T]) -> T:
        """What was read of it within `FRESH`, or is now."""
        now = self._clock()
        when, found = self._read_at.get(key, (now - FRESH, None))
        if now - when >= FRESH:
            found = read()
            self._read_at[key] = (now, found)
        return found  # type: ignore[return-value]


def _status(request_id: str, readings: list[Reading], count: int) -> NodeStatus:
    nodes = tuple(r.node for r in readings if r.node)
    waiting = [r.message for r in readings if r.phase != "ready"]
    if not waiting and len(readings) >= count:
        return NodeStatus(request_id, "ready", nodes, {REQUEST: request_id})
    if count > 1:
        waiting.insert(0, f"{sum(r.phase == 'ready' for r in readings)} of {count} machines are ready")
    return NodeStatus(request_id, "pending", nodes, message="; ".join(w for w in waiting if w))


def _count(claim: Object) -> int:
    text = str((claim["metadata"].get("annotations") or {}).get(NODES_ANNOTATION, "1"))
    return int(text) if text.isdigit() else 1


def _is_alone(node: Object, there: Mapping[str, Object]) -> bool:
    """Whether the claim of this Node is gone. One that has just joined may have no owner yet."""
    owners = {o.get("uid") for o in node["metadata"].get("ownerReferences") or () if o.get("kind") == NODE_CLAIMS.kind}
    return not there or bool(owners and not owners & {c["metadata"].get("uid") for c in there.values()})


def _left(nodes: Iterable[Object]) -> str:
    return f"the NodeClaim is gone, its Node is left: {', '.join(n['metadata']['name'] for n in nodes)}"


@contextmanager
def _typed(what: str) -> Iterator[None]:
    """What the API server says no with, as the contract has it."""
    try:
        yield
    except Forbidden as e:
        raise NotAuthorized(
            f"{what}: {e}; the controller's role needs the rules of kaito-provisioner-karpenter's README"
        ) from e
    except Invalid as e:
        raise Unsupported(f"{what}: {e}") from e
    except TooManyRequests as e:
        raise Transient(f"{what}: {e}", e.retry_after) from e
    except ApiError as e:
        raise Transient(f"{what}: {e}") from e
