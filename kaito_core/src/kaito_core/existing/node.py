"""What a Node object says of a machine: its GPUs, its size, and whether it takes pods. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from kaito_core.planning import catalogue
from kaito_core.plugins.types import Gpu, Offer
from kaito_core.workloads.kubernetes import GPU_TOLERATIONS

INSTANCE_TYPE: Final = "node.kubernetes.io/instance-type"
PRODUCT: Final = "nvidia.com/gpu.product"
MEMORY: Final = "nvidia.com/gpu.memory"
COUNT: Final = "nvidia.com/gpu.count"
REPLICAS: Final = "nvidia.com/gpu.replicas"
"""GPU feature discovery's labels: the model, MiB per GPU, GPUs, and how many pods share each of them."""

CAPABILITY: Final = (
    ("nvidia.com/gpu.compute.major", "nvidia.com/gpu.compute.minor"),
    ("nvidia.com/cuda.compute.major", "nvidia.com/cuda.compute.minor"),
)
"""The labels of the compute capability: discovery's present ones, and those that KAITO's documentation names."""

GPU_RESOURCES: Final = {"nvidia.com/gpu": "nvidia", "amd.com/gpu": "amd"}
MIG: Final = "nvidia.com/mig-"

DRIVER_SHARE: Final = 0.983
"""Share of what the driver counts, which is what discovery reports, that CUDA gives out: the least of the kinds in
``planning/data/gpus.csv`` (T4: 15109 of 15360 MiB)."""

PLAIN: Final = "node"
"""The instance type of a node that has no label for it and no GPU."""

MIB: Final = 1 << 20
_UNITS: Final = {
    "m": 1e-3, "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15,
    "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50,
}  # fmt: skip
_QUANTITY = re.compile(r"(\d+(?:\.\d*)?(?:[eE]\d+)?)([a-zA-Z]*)\Z")


def quantity(text: object) -> float:
    """A Kubernetes quantity as a number: ``3920m`` is 3.92, ``16Gi`` is 17179869184. 0 for what is none."""
    found = _QUANTITY.match(str(text))
    return float(found[1]) * _UNITS[found[2]] if found and found[2] in _UNITS else 0.0


@dataclass(frozen=True)
class Node:
    """One node, as a machine that a job could run on."""

    name: str
    labels: Mapping[str, str]
    offer: Offer
    """What is in it and free for pods, whether it takes any now or not."""
    trouble: str = ""
    """Why it takes no pods now; empty when it does. "the node NAME …" goes before it."""
    lack: str = ""
    """What keeps its GPUs from being used, though the node itself is well."""

    @property
    def usable(self) -> bool:
        """Whether a pod could run there now; whether there is room is the scheduler's business."""
        return not self.trouble and not self.lack

    @property
    def why_not(self) -> str:
        return self.trouble or self.lack

    @cached_property
    def kind(self) -> str:
        """Equal for nodes of which one is as good as the other."""
        return kind(self.offer)


def kind(offer: Offer) -> str:
    """What makes machines alike, as text that is quick to compare. Their RAM is left out: it differs by some KiB between
    machines of one type."""
    unnamed = offer.cpus if offer.instance_type == PLAIN else 0
    return repr((offer.instance_type.lower(), offer.gpu, offer.gpus, unnamed))


def read_node(node: Mapping[str, Any]) -> Node:
    """What a Node object says. Never fails: what cannot be read counts as not there."""
    metadata, status = node["metadata"], node.get("status") or {}
    labels: Mapping[str, str] = metadata.get("labels") or {}
    allocatable: Mapping[str, Any] = status.get("allocatable") or {}
    resource = next((r for r in GPU_RESOURCES if quantity(allocatable.get(r, 0)) >= 1), "")
    gpus = int(quantity(allocatable.get(resource, 0)))
    known = catalogue.instance_types().get(labels.get(INSTANCE_TYPE, "").lower())
    gpu = _gpu(labels, known, GPU_RESOURCES[resource]) if gpus else None
    offer = Offer(
        instance_type=labels.get(INSTANCE_TYPE) or (labels.get(PRODUCT) if gpu else "") or PLAIN,
        cpus=int(quantity(allocatable.get("cpu", 0))),
        memory=int(quantity(allocatable.get("memory", 0))),
        gpu=gpu,
        gpus=gpus if gpu else 0,
        provisioner="existing",
        cloud=known.cloud if known else "",
    )
    return Node(metadata["name"], labels, offer, _trouble(node), _lack(labels, allocatable, known, resource, gpu))


def _gpu(labels: Mapping[str, str], known: Offer | None, vendor: str) -> Gpu | None:
    """Its GPU: by GPU feature discovery's labels, else by the catalogue; None when neither tells how much memory it has."""
    catalogued = known.gpu if known else None
    mib = labels.get(MEMORY, "")
    if mib.isdecimal() and int(mib):
        model = labels.get(PRODUCT, "").removeprefix("NVIDIA-") or (catalogued.model if catalogued else "GPU")
        capability = _capability(labels) or (catalogued.compute_capability if catalogued else None)
        return Gpu(model, int(int(mib) * MIB * DRIVER_SHARE), capability, vendor)
    return replace(catalogued, compute_capability=_capability(labels) or catalogued.compute_capability) if catalogued else None  # fmt: skip


def _capability(labels: Mapping[str, str]) -> tuple[int, int] | None:
    for major, minor in CAPABILITY:
        if labels.get(major, "").isdecimal():
            return int(labels[major]), int(labels[minor]) if labels.get(minor, "").isdecimal() else 0
    return None


def _lack(
    labels: Mapping[str, str], allocatable: Mapping[str, Any], known: Offer | None, resource: str, gpu: Gpu | None
) -> str:
    divided = next((r for r in allocatable if r.startswith(MIG) and quantity(allocatable[r]) >= 1), "")
    if not resource and divided:
        return f"divides its GPUs with MIG into {divided}, and kaito asks for whole ones or for those of MIG's single strategy"
    told = next((k for k in (PRODUCT, COUNT) if k in labels), INSTANCE_TYPE if known and known.gpus else "")
    if not resource and told:
        return f"advertises no nvidia.com/gpu though it has {told}={labels[told]}: is the device plugin running there?"
    if resource and gpu is None:
        return f"has {resource} of unknown memory: install GPU feature discovery, or label the node {MEMORY}=MIB"
    if resource and quantity(labels.get(REPLICAS, 1)) > 1:
        return f"shares each GPU among {labels[REPLICAS]} pods ({REPLICAS}), so that no job can count on its memory"
    return ""


def _trouble(node: Mapping[str, Any]) -> str:
    if node["metadata"].get("deletionTimestamp"):
        return "is being removed"
    conditions = (node.get("status") or {}).get("conditions") or ()
    ready: Mapping[str, str] = next((c for c in conditions if c.get("type") == "Ready"), {})
    if ready.get("status") != "True":
        words = ready.get("message") or ready.get("reason") or ""
        return f"is not Ready ({words})" if words else "is not Ready"
    spec = node.get("spec") or {}
    if spec.get("unschedulable"):
        return "is cordoned"
    for taint in spec.get("taints") or ():
        if taint.get("effect") != "PreferNoSchedule" and not any(_tolerates(t, taint) for t in GPU_TOLERATIONS):
            pair = f"{taint['key']}={taint['value']}" if taint.get("value") else taint["key"]
            return f"is tainted {pair}:{taint.get('effect', '')}, which the pods of kaito do not tolerate"
    return ""


def _tolerates(toleration: Mapping[str, str], taint: Mapping[str, str]) -> bool:
    same = toleration["key"] == taint["key"] and toleration["effect"] == taint.get("effect")
    return same and (toleration["operator"] == "Exists" or toleration.get("value") == taint.get("value"))
