"""A cluster in memory with a Karpenter in it, for tests that go through many orders of events.

It does what Karpenter's core was seen to do: a claim is launched, registered and initialized in steps; on a lack of capacity an
event is written and the claim deleted; a deleted claim goes after its Node."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from kaito_core.kube.errors import NotFound
from kaito_core.kube.kinds import CRDS, EVENTS, NODES, Kind
from kaito_provisioner_karpenter.flavours import NODE_CLAIMS

Object = dict[str, Any]


def condition(kind: str, status: str, reason: str = "", message: str = "") -> Object:
    return {"type": kind, "status": status, "reason": reason or kind, "message": message}


def node_class(api_version: str, kind: str, name: str, *conditions: Object) -> Object:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {"name": name},
        "status": {"conditions": [*conditions]},
    }


AKS_CLASS = node_class("karpenter.azure.com/v1beta1", "AKSNodeClass", "default", condition("Ready", "True"))
EC2_CLASS = node_class("karpenter.k8s.aws/v1", "EC2NodeClass", "gpu", condition("Ready", "True"))


class Cluster:
    """Holds objects by kind and name. ``before`` and ``after`` are called around every write, and may raise."""

    def __init__(self, *objects: Object, now: float = 1_800_000_000.0, karpenter: bool = True) -> None:
        self.now = now
        self.objects: dict[str, dict[str, Object]] = {}
        self.made: list[str] = []
        self.before: Callable[[str], None] = lambda verb: None
        self.after: Callable[[str], None] = lambda verb: None
        self._uids = itertools.count(1)
        for kind in (NODES, EVENTS, CRDS, *([NODE_CLAIMS] if karpenter else [])):
            self.objects[kind.kind] = {}
        for obj in objects:
            self.objects.setdefault(obj["kind"], {})[obj["metadata"]["name"]] = obj

    # --- as a provisioner sees it

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        return copy.deepcopy(self.objects.get(kind.kind, {}).get(name))

    def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] | None = None, *, fresh: bool = False
    ) -> Iterable[Object]:
        if kind.kind not in self.objects:
            raise NotFound(f"list {kind}: the server could not find the requested resource", status=404)
        has = (labels or {}).items()
        return [
            copy.deepcopy(o)
            for o in self.objects[kind.kind].values()
            if has <= (o["metadata"].get("labels") or {}).items()
        ]

    def apply(self, kind: Kind, obj: Mapping[str, Any]) -> Object:
        self.before("apply")
        name = obj["metadata"]["name"]
        there = self.objects[kind.kind].get(name)
        if there is None:
            there = copy.deepcopy(dict(obj))
            there["metadata"] |= {"uid": str(next(self._uids)), "creationTimestamp": self.time}
            self.objects[kind.kind][name] = there
            self.made.append(name)
        else:
            assert there["spec"] == obj["spec"], "the spec of a NodeClaim cannot be changed"
        self.after("apply")
        return copy.deepcopy(there)

    def delete(self, kind: Kind, name: str, namespace: str = "") -> None:
        self.before("delete")
        there = self.objects[kind.kind].get(name)
        if there is not None:
            there["metadata"].setdefault("deletionTimestamp", self.time)
        self.after("delete")

    # --- what Karpenter does

    @property
    def time(self) -> str:
        return datetime.fromtimestamp(self.now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    @property
    def claims(self) -> dict[str, Object]:
        return self.objects[NODE_CLAIMS.kind]

    @property
    def nodes(self) -> dict[str, Object]:
        return self.objects[NODES.kind]

    def node_name(self, name: str) -> str:
        """Of the machine of this very claim; another claim of its name has another one."""
        return f"node-{name}-{self.claims[name]['metadata']['uid']}"

    def conditions(self, name: str) -> dict[str, str]:
        status = self.claims[name].get("status", {})
        return {c["type"]: c["status"] for c in status.get("conditions", ())}

    def launch(self, name: str) -> None:
        """The cheapest, which here is the last that it may be; the claim gets labels of what it has become."""
        wished = {w["key"]: w["values"][-1] for w in self.claims[name]["spec"]["requirements"]}
        for key in ("node.kubernetes.io/instance-type", "karpenter.sh/capacity-type"):
            if key in wished:
                self.claims[name]["metadata"]["labels"].setdefault(key, wished[key])
        self._set(name, Launched=("True", ""), Registered=("Unknown", "NodeNotFound"))

    def launch_failed(self, name: str, message: str, reason: str = "LaunchFailed") -> None:
        self.claims[name]["status"] = {"conditions": [condition("Launched", "Unknown", reason, message)]}

    def register(self, name: str) -> None:
        """The Node joins with the claim's labels and taints; the device plugin is not there yet."""
        claim, node = self.claims[name], self.node_name(name)
        self.launch(name)
        self._set(name, Launched=("True", ""), Registered=("True", ""), Initialized=("Unknown", "NodeNotReady"))
        claim["status"]["nodeName"] = node
        self.nodes[node] = {
            "metadata": {
                "name": node,
                "labels": dict(claim["metadata"]["labels"]),
                "creationTimestamp": self.time,
                "ownerReferences": [{"kind": NODE_CLAIMS.kind, "name": name, "uid": claim["metadata"]["uid"]}],
            },
            "spec": {"providerID": f"fake://{node}"},
            "status": {"conditions": [condition("Ready", "False", message="cni not ready")], "allocatable": {}},
        }

    def initialize(self, name: str, gpus: int = 1) -> None:
        self._set(name, Launched=("True", ""), Registered=("True", ""), Initialized=("True", ""))
        self.nodes[self.node_name(name)]["status"] = {
            "conditions": [condition("Ready", "True")],
            "allocatable": {"nvidia.com/gpu": str(gpus)},
        }

    def no_capacity(self, name: str, words: str = "insufficient capacity, all requested instance types were unavailable during launch") -> None:  # fmt: skip
        """The event first, then the claim is gone."""
        self.say(name, "InsufficientCapacityError", f"NodeClaim {name} event: {words}")
        del self.claims[name]

    def say(self, name: str, reason: str, message: str) -> None:
        number = len(self.objects[EVENTS.kind])
        about = {"kind": "NodeClaim", "name": name}
        self.objects[EVENTS.kind][str(number)] = {
            "metadata": {"name": str(number)},
            "involvedObject": about,
            "reason": reason,
            "message": message,
        }

    def lose(self, name: str) -> None:
        """A spot machine is taken away: the claim and the Node go."""
        self.nodes.pop(self.node_name(name), None)
        del self.claims[name]

    def finish_deletions(self) -> None:
        """A claim that is being deleted takes its Node with it; a Node that is deleted ends its machine."""
        for name in [n for n, c in self.claims.items() if "deletionTimestamp" in c["metadata"]]:
            self.lose(name)
        for name in [n for n, o in self.nodes.items() if "deletionTimestamp" in o["metadata"]]:
            del self.nodes[name]

    def _set(self, name: str, **conditions: tuple[str, str]) -> None:
        status = self.claims[name].setdefault("status", {})
        status["conditions"] = [condition(k, s, r) for k, (s, r) in conditions.items()]
