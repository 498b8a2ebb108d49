"""What several tests share: the nodes of a cluster, and a request for machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kaito_core.api.labels import WORKSPACE, WORKSPACE_NAMESPACE
from kaito_core.kube.errors import Forbidden
from kaito_core.kube.kinds import NODES, Kind
from kaito_core.plugins.types import CapacityType, Gpu, NodeRequest, Offer, Requirements
from kaito_provisioner_aks.testing import arm_server

SIZE = "Standard_NC24ads_A100_v4"
ID = "ws012345678"
TAGS = {WORKSPACE: "phi", WORKSPACE_NAMESPACE: "team"}


class Nodes:
    """The Node objects of a cluster, as a provisioner reads them."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.forbidden = False

    def get(self, kind: Kind, name: str, namespace: str = "") -> Mapping[str, Any] | None:
        return self.objects.get(name)

    def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] | None = None
    ) -> Iterable[Mapping[str, Any]]:
        return [o for o in self.objects.values() if (labels or {}).items() <= o["metadata"]["labels"].items()]

    def apply(self, kind: Kind, obj: Mapping[str, Any]) -> Mapping[str, Any]:
        raise AssertionError("it only reads")

    def delete(self, kind: Kind, name: str, namespace: str = "") -> None:
        """It deletes what a pool has left behind, and nothing else."""
        assert (kind, namespace) == (NODES, "")
        if self.forbidden:
            raise Forbidden(f"delete nodes/{name}: forbidden")
        del self.objects[name]

    def join(self, pool: dict[str, Any]) -> None:
        """What a pool's machines do."""
        for number, name in enumerate(arm_server.node_names(pool)):
            self.objects[name] = {
                "metadata": {"name": name, "labels": arm_server.node_labels(pool)},
                "spec": {"providerID": arm_server.provider_id(pool, number)},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            }

    def leave(self, name: str) -> None:
        self.objects = {n: o for n, o in self.objects.items() if o["metadata"]["labels"]["agentpool"] != name}


def request(
    name: str = ID, *, size: str = SIZE, kind: CapacityType = "on-demand", workspace: str = "phi", **more: Any
) -> NodeRequest:
    offer = Offer(size, 24, 198 << 30, Gpu("A100-80GB", 80 << 30), 1, "aks", "azure", "eastus", capacity_type=kind)
    return NodeRequest(name, offer, Requirements(**more), {**TAGS, WORKSPACE: workspace})
