"""Agent pools: a request as the body of a PUT, and the body of an answer as what is known. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from kaito_core.api.labels import WORKSPACE
from kaito_core.plugins.types import NodeRequest, Requirements, Unsupported
from kaito_provisioner_aks.errors import Said, read_error
from kaito_provisioner_aks.settings import DRIVERS, Settings

Object = dict[str, Any]

NAME: Final = re.compile(r"[a-z][a-z0-9]{0,11}\Z")
"""What AKS lets a Linux pool be called (Microsoft's "Create node pools" page)."""

AGENT_POOL: Final = "kubernetes.azure.com/agentpool"
OLD_AGENT_POOL: Final = "agentpool"
"""The labels by which AKS says which pool a node is of; the older one has been there for longer."""

ACCELERATOR: Final = "accelerator"
"""``nvidia`` on AKS's GPU machines."""

MANAGED_BY: Final = "kaito.sh/managed-by"
CREATED: Final = "kaito.sh/creation-timestamp"
MACHINE_TYPE: Final = "kaito.sh/machine-type"
NODE_POOL: Final = "karpenter.sh/nodepool"

OWNER: Final = "kaito-controller"
"""Who got the pools of Workspaces; those of NodeClaims are another's (`kaito_provisioner_aks.claims`)."""

TIMESTAMP: Final = "%Y-%m-%dT%H-%M-%SZ"
"""As gpu-provisioner writes it: a colon is not for labels."""

GPU_TAINT: Final = "sku=gpu:NoSchedule"
"""KAITO's: only who means to use a GPU gets onto such a node."""

_RESERVED: Final = ("kubernetes.azure.com", "kubernetes.io", "k8s.io")
"""Domains, with all below them, whose labels AKS does not let a pool have."""

_ZONE: Final = re.compile(r"(?:.*-)?([1-9])\Z")
"""``1``, or as nodes say it ``eastus-1``."""

SPOT: Final[Mapping[str, Any]] = {"scaleSetPriority": "Spot", "scaleSetEvictionPolicy": "Delete", "spotMaxPrice": -1}
"""Evicted machines are deleted: deallocated ones would go on using the quota. -1: up to the on-demand price."""

Phase = Literal["pending", "succeeded", "failed", "deleting"]


# --- what a pool shall be


def body(request: NodeRequest, settings: Settings, location: str, now: float) -> Object:
    """The body of the PUT that gets the machines of this request. `Unsupported` when no agent pool can be like that."""
    offer, requirements = request.offer, request.requirements
    if problem := name_problem(request.id) or labels_problem(requirements, offer.instance_type, location):
        raise Unsupported(problem)
    gpu = bool(offer.gpus)
    marks = {**request.tags, MANAGED_BY: OWNER, CREATED: timestamp(now)}
    labels = {k: v for k, v in requirements.labels.items() if not is_reserved(k)}
    zones = (offer.zone,) if offer.zone else requirements.zones
    properties: Object = {
        **common(offer.instance_type, requirements.count, settings, gpu=gpu),
        "osDiskSizeGB": settings.os_disk_gb,
        "nodeLabels": {**labels, **marks, MACHINE_TYPE: "gpu" if gpu else "cpu"},
        "nodeTaints": [GPU_TAINT] if gpu else [],
        "tags": as_tags(marks),
    }
    if zones:
        properties["availabilityZones"] = list(dict.fromkeys(zone(z) for z in zones))
    if offer.capacity_type == "spot":
        properties |= SPOT
    return {"properties": properties}


def common(instance_type: str, count: int, settings: Settings, *, gpu: bool) -> Object:
    """What all our pools have."""
    properties: Object = {
        "mode": "User",
        "type": "VirtualMachineScaleSets",
        "count": count,
        "vmSize": instance_type,
        "osType": "Linux",
        "osSKU": settings.os_sku,
        # AKS would take an ephemeral disk where it fits into the cache, which is one more constraint on the allocation.
        "osDiskType": "Managed",
        "enableAutoScaling": False,
        "scaleDownMode": "Delete",
    }
    if settings.subnet:
        properties["vnetSubnetID"] = settings.subnet
    if (
        gpu and settings.gpu_driver != DRIVERS[0]
    ):  # what AKS does by itself need not be said, and AMD's GPUs have no such choice
        properties["gpuProfile"] = {"driver": settings.gpu_driver}
    return properties


def name_problem(name: str) -> str:
    """Why a pool cannot be called so; empty when it can."""
    if NAME.match(name):
        return ""
    return f"agentpool name({name}) is invalid, must match regex pattern: ^[a-z][a-z0-9]{{0,11}}$"


def labels_problem(requirements: Requirements, instance_type: str, location: str) -> str:
    """Why the nodes of a pool cannot have the labels that are asked for; empty when they can."""
    own = _own_labels(instance_type, location)
    for key, value in requirements.labels.items():
        if key.partition("/")[0] == "karpenter.sh":
            return f"the label {key} is Karpenter's: who finds it on an agent pool takes the pool for one of its own"
        if is_reserved(key) and (key not in own or own[key].lower() != value.lower()):
            return (
                f"AKS does not let an agent pool have the label {key}={value}: take another for resource.labelSelector"
            )
    return ""


def _own_labels(instance_type: str, location: str) -> dict[str, str]:
    """What AKS puts on the nodes of such a pool by itself (Microsoft's "Use labels in AKS" page)."""
    return {
        "node.kubernetes.io/instance-type": instance_type,
        "topology.kubernetes.io/region": location,
        "kubernetes.azure.com/instance-sku": instance_type,
        "kubernetes.azure.com/mode": "user",
        "kubernetes.azure.com/role": "agent",
        "kubernetes.azure.com/managedby": "aks",
        "kubernetes.azure.com/accelerator": "nvidia",
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        ACCELERATOR: "nvidia",
    }


def is_reserved(key: str) -> bool:
    """Whether AKS keeps this label for itself."""
    domain, slash, _ = key.partition("/")
    if not slash:
        return key in (OLD_AGENT_POOL, ACCELERATOR)
    return any(domain == r or domain.endswith(f".{r}") for r in _RESERVED)


def zone(text: str) -> str:
    """A zone as Azure numbers them. `Unsupported` when it is none."""
    found = _ZONE.match(text)
    if not found:
        raise Unsupported(f"{text!r} is not a zone of Azure: write 1, 2 or 3, or as nodes say it, eastus-1")
    return found[1]


def as_tags(marks: Mapping[str, str]) -> dict[str, str]:
    """Labels as Azure tags: their names may have no slash (karpenter-provider-azure does it so, too)."""
    return {k.replace("/", "_"): v for k, v in marks.items()}


def timestamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime(TIMESTAMP)


# --- what a pool is


@dataclass(frozen=True)
class Pool:
    """What an answer says of a pool."""

    name: str
    phase: Phase
    state: str
    """Azure's word for it: ``Creating``."""
    vm_size: str = ""
    count: int = 1
    """As wanted; it says nothing of how many there are."""
    spot: bool = False
    etag: str = ""
    stopped: bool = False
    image: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, str] = field(default_factory=dict)
    """Labels and tags, which say the same unless somebody has replaced either."""
    error: Said | None = None
    """Why it failed, as far as the pool itself says."""

    def age(self, now: float) -> float:
        """Seconds since it was asked for; infinite when it does not say."""
        try:
            asked = datetime.strptime(self.marks.get(CREATED, ""), TIMESTAMP).replace(tzinfo=UTC)
        except ValueError:
            return float("inf")
        return max(0.0, now - asked.timestamp())

    @property
    def owner(self) -> str:
        """Who of us got it; empty when it was somebody else."""
        return self.marks.get(MANAGED_BY, "")


def read(answer: Mapping[str, Any]) -> Pool:
    """What an answer says. States that are not known are on their way to one that is."""
    properties: Mapping[str, Any] = answer.get("properties") or {}
    state = str(properties.get("provisioningState") or "")
    labels = _texts(properties.get("nodeLabels"))
    tags = _texts(properties.get("tags"))
    error = (properties.get("status") or {}).get("provisioningError")
    return Pool(
        name=str(answer.get("name") or ""),
        phase=_PHASES.get(state.lower(), "pending"),
        state=state,
        vm_size=str(properties.get("vmSize") or ""),
        count=int(properties.get("count") or 0),
        spot=str(properties.get("scaleSetPriority") or "").lower() == "spot",
        etag=str(properties.get("eTag") or ""),
        stopped=str((properties.get("powerState") or {}).get("code") or "").lower() == "stopped",
        image=str(properties.get("nodeImageVersion") or ""),
        labels=labels,
        marks={**{k.replace("_", "/", 1).lower(): v for k, v in tags.items() if "_" in k}, **labels},
        error=read_error(error) if error else None,
    )


_PHASES: Final[Mapping[str, Phase]] = {
    "succeeded": "succeeded",
    "failed": "failed",
    # Another operation came in between, or somebody aborted ours: what is there is half made.
    "canceled": "failed",
    "deleting": "deleting",
}


def _texts(found: object) -> dict[str, str]:
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, Mapping) else {}


def is_workspaces(pool: Pool) -> bool:
    """Whether it was got for a Workspace by this provisioner."""
    return pool.owner == OWNER and WORKSPACE in pool.marks


# --- its nodes


def ready_nodes(nodes: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of those that take pods now."""
    return sorted(n["metadata"]["name"] for n in nodes if is_ready(n))


def is_ready(node: Mapping[str, Any]) -> bool:
    if node["metadata"].get("deletionTimestamp") or (node.get("spec") or {}).get("unschedulable"):
        return False
    told = (node.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in told)


def of_node(node: Mapping[str, Any]) -> str:
    """The name of the pool that this Node belongs to, where it was got for a Workspace by this provisioner; else empty."""
    labels = node["metadata"].get("labels") or {}
    ours = labels.get(MANAGED_BY) == OWNER and WORKSPACE in labels
    return str(labels.get(AGENT_POOL) or labels.get(OLD_AGENT_POOL) or "") if ours else ""


def is_unready(node: Mapping[str, Any]) -> bool:
    """Whether its kubelet does not answer, or never has; a cordoned Node is another matter."""
    return _ready(node).get("status") != "True"


def unready_seconds(node: Mapping[str, Any], now: float) -> float:
    """For how many seconds it has been so; 0 when it does not say."""
    since = _ready(node).get("lastTransitionTime") or node["metadata"].get("creationTimestamp")
    return max(0.0, now - datetime.fromisoformat(since).timestamp()) if since else 0.0


def _ready(node: Mapping[str, Any]) -> Mapping[str, Any]:
    told = (node.get("status") or {}).get("conditions") or ()
    return next((c for c in told if c.get("type") == "Ready"), {})


def selector(pool: str, nodes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The label that the pool's nodes have and no others."""
    new = all((n["metadata"].get("labels") or {}).get(AGENT_POOL) == pool for n in nodes)
    return {AGENT_POOL if new else OLD_AGENT_POOL: pool}
