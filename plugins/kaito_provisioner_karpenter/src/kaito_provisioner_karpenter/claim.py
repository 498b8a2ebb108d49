"""NodeClaims as they are asked for. Pure functions: a request in, objects out.

A claim's spec can never be changed, so that everything that matters is in it from the start: what may be chosen among, no
expiry (the default takes the machine away after 30 days), and the taint that keeps other pods off."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kaito_core.api.labels import REQUEST, RESERVED_SELECTOR_KEYS
from kaito_core.plugins.types import CapacityType, NodeRequest, Offer, Unsupported
from kaito_provisioner_karpenter.flavours import NODE_CLAIMS, NodeClass

Object = dict[str, Any]

GPUS: Final = "kaito.sh/gpus"
NODES: Final = "kaito.sh/nodes"
"""Annotations: GPUs that the node must show before it is of use, and how many claims make the whole request."""

NODE_POOL: Final = "karpenter.sh/nodepool"
CAPACITY_TYPE: Final = "karpenter.sh/capacity-type"
DO_NOT_DISRUPT: Final = "karpenter.sh/do-not-disrupt"
INSTANCE_TYPE: Final = "node.kubernetes.io/instance-type"
ZONE: Final = "topology.kubernetes.io/zone"
REGION: Final = "topology.kubernetes.io/region"
OS: Final = "kubernetes.io/os"
ARCH: Final = "kubernetes.io/arch"
HOSTNAME: Final = "kubernetes.io/hostname"

CHOSEN: Final = frozenset({INSTANCE_TYPE, ZONE, REGION, OS, ARCH, CAPACITY_TYPE})
"""Labels that the cloud gives: wished for by a requirement, never set."""

TAINT: Final[Object] = {"key": "sku", "value": "gpu", "effect": "NoSchedule"}
"""KAITO's; its device plugin and our pods tolerate it."""

MOST_TYPES: Final = 60
"""Instance types in one claim: more would only make it harder to read, and the definition has limits of its own."""

_DIGITS: Final = "123456789abcdefghijklmnopqrstuvwxyz"
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")
_AGENT_POOL: Final = re.compile(r"[a-z][a-z0-9]{0,11}\Z")
_LABEL_VALUE: Final = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?\Z")
_LABEL: Final = 63


@dataclass(frozen=True)
class Choice:
    """What the controller may choose among. Every combination of it was offered."""

    instance_types: tuple[str, ...]
    capacity_types: tuple[CapacityType, ...]
    zones: tuple[str, ...] = ()
    """Empty: any."""


def choice(request: NodeRequest, node_class: NodeClass) -> Choice:
    """The widest choice that holds nothing but what was offered.

    Karpenter combines every type with every capacity type: on-demand together with spot only where each type was offered as
    both, else only as the first offer is. Raises `Unsupported` for what the controller would pass over in silence."""
    first, wanted = request.offer, request.requirements
    zones = tuple(_zone(z, first, node_class) for z in wanted.zones or ((first.zone,) if first.zone else ()))
    if node_class.flavour.one_type:
        if first.capacity_type != "on-demand":
            raise Unsupported(f"{node_class.flavour.name} gets machines on demand only")
        if zones:
            raise Unsupported(f"{node_class.flavour.name} cannot choose a zone")
        return Choice((first.instance_type,), ("on-demand",))
    alike = [first, *(o for o in request.also if _alike(o, first))]
    capacity = {o.capacity_type for o in alike}
    types = list(dict.fromkeys(o.instance_type for o in alike))
    offered = {(o.instance_type, o.capacity_type) for o in alike}
    both = [t for t in types if all((t, c) in offered for c in capacity)]
    if len(both) == len(types):
        order: tuple[CapacityType, ...] = ("on-demand", "spot")
        return Choice(tuple(types[:MOST_TYPES]), tuple(c for c in order if c in capacity), zones)
    same = [t for t in types if (t, first.capacity_type) in offered]
    return Choice(tuple(same[:MOST_TYPES]), (first.capacity_type,), zones)


def asked_for(claim: Mapping[str, Any]) -> Choice:
    """What a claim lets the controller choose among, as it was written."""
    wished = {w["key"]: tuple(w.get("values") or ()) for w in claim["spec"].get("requirements") or ()}
    return Choice(wished.get(INSTANCE_TYPE, ()), wished.get(CAPACITY_TYPE, ("on-demand",)), wished.get(ZONE, ()))


def among(chosen: Choice, offers: Iterable[Offer]) -> tuple[Offer, ...]:
    """Those of the offers that the controller may choose."""
    return tuple(
        o for o in offers if o.instance_type in chosen.instance_types and o.capacity_type in chosen.capacity_types
    )


def became(request: NodeRequest, claims: Iterable[Mapping[str, Any]]) -> Offer | None:
    """The offer that all these claims have become, by the labels that Karpenter gives a claim once it has a machine; None when they
    do not say so, or are not alike."""
    labels = [c["metadata"].get("labels") or {} for c in claims]
    kinds = {(has.get(INSTANCE_TYPE), has.get(CAPACITY_TYPE)) for has in labels}
    if len(kinds) != 1:
        return None
    kind = kinds.pop()
    return next((o for o in (request.offer, *request.also) if (o.instance_type, o.capacity_type) == kind), None)


def _alike(other: Offer, first: Offer) -> bool:
    """Whether it can be had through the same claim: a machine of the same place, with as many GPUs of the same vendor."""
    vendors = [o.gpu.vendor if o.gpu and o.gpus else "" for o in (other, first)]
    return (
        vendors[0] == vendors[1]
        and other.gpus >= first.gpus
        and (other.region, other.zone) == (first.region, first.zone)
        and not other.retired
    )


def _zone(zone: str, offer: Offer, node_class: NodeClass) -> str:
    """Azure's nodes say ``eastus-1`` where its API says ``1``."""
    numbered = node_class.flavour.cloud == "azure" and zone.isdigit() and offer.region
    return f"{offer.region}-{zone}" if numbered else zone


def claim_names(request_id: str, count: int, node_class: NodeClass) -> list[str]:
    """The names of a request's claims, the same whenever they are asked for. Raises `Unsupported` for what can be none."""
    if not _NAME.match(request_id) or len(request_id) > _LABEL:
        raise Unsupported(f"{request_id!r} cannot be the name of a NodeClaim")
    if node_class.flavour.agent_pool:
        names = [request_id, *(f"{request_id}{d}" for d in _DIGITS)]
        if count > len(names) or not all(_AGENT_POOL.match(n) for n in names[:count]):
            raise Unsupported(f"{count} machines for {request_id!r} cannot be named as agent pools, of 12 characters")
        return names[:count]
    return [request_id, *(f"{request_id}-{n}" for n in range(1, count))]


def claims(request: NodeRequest, node_class: NodeClass, pool: str = "") -> list[Object]:
    """The NodeClaims of a request, one a machine. ``pool`` replaces the flavour's node pool label.

    Raises `Unsupported` when the controller could not do what is asked."""
    flavour = node_class.flavour
    pool = pool or flavour.pool
    chosen = choice(request, node_class)
    labels = _labels(request)
    wishes: list[Object] = [_in(INSTANCE_TYPE, chosen.instance_types), _in(OS, ("linux",))]
    if not flavour.one_type:
        wishes.append(_in(CAPACITY_TYPE, chosen.capacity_types))
        if chosen.zones:
            wishes.append(_in(ZONE, chosen.zones))
    named = {w["key"] for w in wishes}
    for key, value in sorted(request.requirements.labels.items()):
        if key in CHOSEN:
            _agree(key, value, wishes)
            if key not in named:
                wishes.append(_in(key, (value,)))
    if pool:
        labels[NODE_POOL] = pool
        wishes.append(_in(NODE_POOL, (pool,)))
    spec: Object = {
        "nodeClassRef": {
            "group": flavour.node_class.group,
            "kind": flavour.node_class.kind,
            "name": node_class.name,
        },
        "requirements": wishes,
        "expireAfter": "Never",
        "taints": [dict(TAINT)],
    }
    requests = _resources(request.offer, flavour.storage)
    if requests:
        spec["resources"] = {"requests": requests}
    names = claim_names(request.id, request.requirements.count, node_class)
    annotations = {DO_NOT_DISRUPT: "true", GPUS: str(_gpus(request.offer)), NODES: str(len(names))}
    return [
        {
            "apiVersion": NODE_CLAIMS.api_version,
            "kind": NODE_CLAIMS.kind,
            "metadata": {"name": name, "labels": dict(labels), "annotations": dict(annotations)},
            "spec": spec,
        }
        for name in names
    ]


def _labels(request: NodeRequest) -> dict[str, str]:
    """What nodes get: the user's labels, who they are for, and the request. Raises `Unsupported` for what can be no label."""
    asked = request.requirements.labels
    if HOSTNAME in asked:
        raise Unsupported(f"a new machine cannot have a {HOSTNAME} that is chosen beforehand")
    wished = {k: v for k, v in asked.items() if k not in CHOSEN and k not in RESERVED_SELECTOR_KEYS}
    labels = {**wished, **request.tags, REQUEST: request.id}
    for key, value in labels.items():
        if len(value) > _LABEL or not _LABEL_VALUE.match(value):
            raise Unsupported(f"{value!r} cannot be the value of the label {key}: 63 letters, digits, '-', '_' and '.'")
    return labels


def _agree(key: str, value: str, wishes: Sequence[Object]) -> None:
    for wish in wishes:
        if wish["key"] == key and wish["values"] != [value]:
            if value not in wish["values"]:
                raise Unsupported(f"the label {key}={value} contradicts what is offered: {', '.join(wish['values'])}")
            wish["values"] = [value]


def _resources(offer: Offer, storage: str) -> dict[str, str]:
    """What a claim requests. Karpenter holds a node back until it shows all of it, so GPUs wait for the device plugin.

    gpu-provisioner gets KAITO's own form, a disk and nothing else."""
    if storage:
        return {"storage": storage}
    if not _gpus(offer):
        return {}
    vendor = offer.gpu.vendor if offer.gpu else "nvidia"
    return {"amd.com/gpu" if vendor == "amd" else "nvidia.com/gpu": str(offer.gpus)}


def _gpus(offer: Offer) -> int:
    return offer.gpus if offer.gpu else 0


def _in(key: str, values: Sequence[str]) -> Object:
    return {"key": key, "operator": "In", "values": list(values)}
