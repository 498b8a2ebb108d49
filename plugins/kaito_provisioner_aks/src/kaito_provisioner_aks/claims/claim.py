"""A NodeClaim: whose it is, and the agent pool that it asks for. Pure functions.

The names, limits and words are those of Azure/gpu-provisioner 0.4.3, which KAITO's users know. Beyond it: spot machines, zones,
a size of the disk when none is asked for, and tags that say whose a pool is."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from kaito_core.api import labels
from kaito_core.existing.node import quantity
from kaito_core.kube.kinds import Kind, Object
from kaito_provisioner_aks import pool
from kaito_provisioner_aks.pool import CREATED, MACHINE_TYPE, MANAGED_BY, NODE_POOL, Pool
from kaito_provisioner_aks.settings import SMALLEST_DISK_GB, Settings

NODE_CLAIMS: Final = Kind("karpenter.sh/v1", "NodeClaim", "nodeclaims", namespaced=False)

FINALIZER: Final = "karpenter.sh/termination"
GROUP, CLASS_KIND = "kaito.sh", "KaitoNodeClass"
OWNER: Final = "aks-provisioner"

INSTANCE_TYPE: Final = "node.kubernetes.io/instance-type"
ZONE: Final = "topology.kubernetes.io/zone"
CAPACITY_TYPE: Final = "karpenter.sh/capacity-type"
REGISTERED, INITIALIZED = "karpenter.sh/registered", "karpenter.sh/initialized"

IMAGE_FAMILIES: Final = {"ubuntu": "Ubuntu", "azurelinux": "AzureLinux"}


def is_ours(claim: Object) -> bool:
    """Whether this controller looks after it."""
    wanted = claim.get("spec", {}).get("nodeClassRef") or {}
    has = claim["metadata"].get("labels") or {}
    named = wanted.get("group") == GROUP and wanted.get("kind") == CLASS_KIND
    return named or labels.WORKSPACE in has or labels.RAG_ENGINE in has


def is_claims(found: Pool) -> bool:
    """Whether a pool was got for a NodeClaim: by this controller, or by gpu-provisioner before it."""
    if found.owner:
        return found.owner == OWNER
    return NODE_POOL in found.labels and (labels.WORKSPACE in found.labels or labels.RAG_ENGINE in found.labels)


def values(claim: Object, key: str) -> list[str]:
    """What the claim's requirements allow for this label; empty: anything."""
    for requirement in claim.get("spec", {}).get("requirements") or ():
        if requirement.get("key") == key and requirement.get("operator") == "In":
            return [str(v) for v in requirement.get("values") or ()]
    return []


def problem(claim: Object) -> str:
    """Why no agent pool can be made for it; empty when one can."""
    name = claim["metadata"]["name"]
    if wrong := pool.name_problem(name):
        return wrong
    if not values(claim, INSTANCE_TYPE):
        return "nodeClaim spec has no requirement for instance type"
    return ""


def created(claim: Object) -> float:
    """When it was made; seconds since the epoch."""
    return datetime.fromisoformat(str(claim["metadata"]["creationTimestamp"])).timestamp()


def body(claim: Object, settings: Settings, now: float) -> Object:
    """The body of the PUT that gets its machine. Of several instance types the first is taken."""
    metadata = claim["metadata"]
    size = values(claim, INSTANCE_TYPE)[0]
    gpu = "standard_n" in size.lower()
    has: Mapping[str, str] = metadata.get("labels") or {}
    marks = {MANAGED_BY: OWNER, CREATED: pool.timestamp(now)}
    whose = {k: v for k, v in has.items() if k in labels.RESERVED_SELECTOR_KEYS}
    family = (metadata.get("annotations") or {}).get(labels.NODE_IMAGE_FAMILY, "").lower()
    properties: Object = {
        **pool.common(size, 1, settings, gpu=gpu),
        "osSKU": IMAGE_FAMILIES.get(family, settings.os_sku),
        "osDiskSizeGB": _disk(claim, settings),
        "nodeLabels": {
            NODE_POOL: "kaito",
            **{k: v for k, v in has.items() if not pool.is_reserved(k)},
            **marks,
            MACHINE_TYPE: "gpu" if gpu else "cpu",
        },
        "nodeTaints": [taint(t) for t in claim["spec"].get("taints") or ()],
        "tags": pool.as_tags({**whose, **marks}),
    }
    if zones := values(claim, ZONE):
        properties["availabilityZones"] = list(dict.fromkeys(pool.zone(z) for z in zones))
    if is_spot(claim):
        properties |= pool.SPOT
    return {"properties": properties}


def is_spot(claim: Object) -> bool:
    """Karpenter takes spot machines where both kinds are allowed."""
    return "spot" in values(claim, CAPACITY_TYPE)


def _disk(claim: Object, settings: Settings) -> int:
    """GB of the disk: Azure's GB are GiB."""
    asked = ((claim["spec"].get("resources") or {}).get("requests") or {}).get("storage", 0)
    size = int(quantity(asked)) >> 30
    return max(size, SMALLEST_DISK_GB) if size else settings.os_disk_gb


def taint(told: Mapping[str, Any]) -> str:
    """``key=value:Effect``, as agent pools take it."""
    return f"{told['key']}={told.get('value') or ''}:{told['effect']}"
