"""What Karpenter can be asked for: the catalogue's machines of the cloud, or what a ConfigMap lists. Pure functions.

Karpenter has no API that says what its cloud sells, and its instance types are in nobody's cluster. For a cloud that the
catalogue does not know, a person lists them, with prices or without."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from kaito_core.planning import catalogue
from kaito_core.plugins.types import CapacityType, Gpu, Offer, Price, Requirements, Unsupported

NAME: Final = "karpenter"
KEY: Final = "offers.csv"
COLUMNS: Final = ("instance_type", "region", "zone", "capacity_type", "price_per_hour", "gpu", "gpus", "gpu_memory_mib", "cpus", "memory_gib")  # fmt: skip
_CAPACITY: Final[Mapping[str, CapacityType]] = {"": "on-demand", "on-demand": "on-demand", "spot": "spot"}


def of_cloud(cloud: str, region: str, capacity_types: Iterable[CapacityType]) -> list[Offer]:
    """The catalogue's machines. Where the region is not known, neither is a price: that of another region would be a guess."""
    wanted = tuple(capacity_types)
    if region:
        found = catalogue.offers(cloud, (region,), wanted)
    else:
        known = [o for o in catalogue.instance_types().values() if o.cloud == cloud]
        found = [replace(o, capacity_type=c) for o in known for c in wanted]
    return [replace(o, provisioner=NAME) for o in found]


def listed(config_map: Mapping[str, Any]) -> list[Offer]:
    """The machines that a ConfigMap lists in its key ``offers.csv``. Raises `Unsupported` that names line and column.

    Only ``instance_type`` is needed for what the catalogue knows; any other also needs ``cpus``, ``memory_gib`` and, with GPUs,
    ``gpu``, ``gpus`` and ``gpu_memory_mib`` (of one GPU, as far as a job can use it)."""
    metadata = config_map["metadata"]
    where = f"ConfigMap {metadata.get('namespace', '')}/{metadata['name']}"
    text = (config_map.get("data") or {}).get(KEY)
    if text is None:
        raise Unsupported(f"the {where} has no key {KEY}")
    rows = csv.DictReader(line for line in text.splitlines() if line.strip() and not line.startswith("#"))
    unknown = set(rows.fieldnames or ()) - set(COLUMNS)
    if unknown or "instance_type" not in (rows.fieldnames or ()):
        raise Unsupported(
            f"the {where} needs the columns {', '.join(COLUMNS)}; it has {', '.join(rows.fieldnames or ())}"
        )
    date = str(metadata.get("creationTimestamp") or "")[:10]
    return [_listed(row, f"{where}, row {number}", where, date) for number, row in enumerate(rows, 1)]


def _listed(row: Mapping[str, str | None], place: str, source: str, date: str) -> Offer:
    has = {k: (v or "").strip() for k, v in row.items() if isinstance(k, str)}
    name, capacity = has["instance_type"], has.get("capacity_type", "")
    if not name or capacity not in _CAPACITY:
        raise Unsupported(f"{place}: needs an instance_type, and a capacity_type of on-demand or spot")
    known = catalogue.instance_types().get(name.lower())
    try:
        cpus = int(has.get("cpus") or (known.cpus if known else 0))
        gib = has.get("memory_gib")
        memory = int(float(gib) * catalogue.GIB * catalogue.USABLE_RAM) if gib else (known.memory if known else 0)
        gpus = int(has.get("gpus") or (known.gpus if known else 0))
        gpu = known.gpu if known else None
        if has.get("gpu"):
            gpu = Gpu(has["gpu"], int(has["gpu_memory_mib"]) * catalogue.MIB)
        price = float(has["price_per_hour"]) if has.get("price_per_hour") else None
    except (ValueError, KeyError) as e:
        raise Unsupported(f"{place}: {e} is not a number, or is missing") from e
    if not cpus or not memory or (gpus and gpu is None):
        raise Unsupported(f"{place}: {name} is in no catalogue, and needs cpus, memory_gib and, with gpus, gpu and gpu_memory_mib")  # fmt: skip
    return Offer(
        instance_type=known.instance_type if known else name,
        cpus=cpus,
        memory=memory,
        gpu=gpu if gpus else None,
        gpus=gpus,
        provisioner=NAME,
        region=has.get("region", ""),
        zone=has.get("zone", ""),
        capacity_type=_CAPACITY[capacity],
        price=None if price is None else Price(price, source, date),
    )


def asked_for(offers: Iterable[Offer], requirements: Requirements) -> list[Offer]:
    """Those that are of the named types and kinds, and where they are wanted; how large a machine must be is for the plan."""
    types = {t.lower() for t in requirements.instance_types}
    return [
        o
        for o in offers
        if (not types or o.instance_type.lower() in types)
        and o.capacity_type in requirements.capacity_types
        and (not requirements.regions or not o.region or o.region in requirements.regions)
        and (not requirements.zones or not o.zone or o.zone in requirements.zones)
    ]


def none_because(offers: Iterable[Offer], reason: str) -> list[Offer]:
    """The same machines, and why none of them can be had; one is enough to say it."""
    return [replace(o, retired=reason) for o in list(offers)[:1]] if reason else list(offers)
