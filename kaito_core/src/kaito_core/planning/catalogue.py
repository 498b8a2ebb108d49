"""The machines with GPUs that kaito knows, and what an hour of them costs: facts as data, read when they are asked for.

A row says what is in a machine and how much of its GPU memory can really be used; where it comes from is in ``data/NOTICE``. Prices
are in `kaito_core.planning.prices`. What can really be had is for node provisioners to say; they make their offers from `offers`.
"""

from __future__ import annotations

import csv
import functools
import importlib.resources
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kaito_core.planning import prices
from kaito_core.planning.prices import PriceTable
from kaito_core.plugins.types import CapacityType, Gpu, Offer

MIB = 1 << 20
GIB = 1 << 30

USABLE_RAM = 0.9
"""Share of a machine's RAM that a pod can have: the kubelet, the system and the device plugin keep the rest."""

CLOUDS = ("azure", "aws", "gcp")

_REGIONS = {
    "aws": re.compile(r"[a-z]{2}(-[a-z]+)+-\d+\Z"),
    "gcp": re.compile(r"[a-z]+-[a-z]+\d+\Z"),
}
"""How the regions of a cloud are called of which not all are known. Of Azure, all that sell GPUs are."""

_PROVISIONERS = {"azure": "kaito-provisioner-aks", "aws": "kaito-provisioner-karpenter"}


@dataclass(frozen=True)
class Machine:
    """One instance type: what an `Offer` says of it, and what it does not."""

    offer: Offer
    """Without place and price; nobody sells it yet."""
    nvme: int | None = None
    """Bytes of local NVMe disk; None when that is not known."""
    obstacle: str = ""
    """Why kaito cannot use it though it may be had; empty when it can."""


def _rows(name: str) -> Iterator[dict[str, str]]:
    text = importlib.resources.files("kaito_core.planning").joinpath("data", name).read_text(encoding="utf-8")
    yield from csv.DictReader(text.splitlines())


def _capability(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


@functools.cache
def _gpus() -> Mapping[str, Mapping[str, str]]:
    return {r["gpu"]: r for r in _rows("gpus.csv")}


def share(gpu: Gpu) -> float:
    """How much of a whole GPU this is: 1, or less where a machine has a slice of one. 1 for a GPU that is not known."""
    whole = _gpus().get(gpu.model)
    part = gpu.memory / (int(whole["usable_mib"]) * MIB) if whole else 1.0
    return part if part < 0.9 else 1.0


def words(model: str) -> frozenset[str]:
    """The words of a GPU's name, by which two names are compared: ``A100-SXM4-80GB`` has three."""
    return frozenset(w for w in re.split(r"[^A-Z0-9]+", model.upper()) if w)


@functools.cache
def models() -> tuple[Gpu, ...]:
    """Every known GPU, as a whole one."""
    return tuple(
        Gpu(row["gpu"], int(row["usable_mib"]) * MIB, _capability(row["compute_capability"]), row["vendor"])
        for row in _gpus().values()
    )


def models_like(name: str) -> tuple[Gpu, ...]:
    """The known GPUs that a name in the words of a driver or a person means, whatever their memory: ``Tesla-V100-PCIE-16GB``."""
    has = words(name)
    return tuple(gpu for gpu in models() if _named(gpu.model) <= has)


def _named(model: str) -> frozenset[str]:
    """A model's words without the size of its memory."""
    return frozenset(w for w in words(model) if not re.fullmatch(r"\d+GB", w))


@functools.cache
def machines() -> Mapping[str, Machine]:
    """Every known GPU machine by lower-case name."""
    kinds = _gpus()
    gpus: dict[tuple[str, str], Gpu] = {}
    found = {}
    for row in _rows("instance_types.csv"):
        kind = kinds[row["gpu"]]
        key = (row["gpu"], row["gpu_usable_mib"])
        gpu = gpus.get(key)
        if gpu is None:
            gpu = Gpu(key[0], int(key[1]) * MIB, _capability(kind["compute_capability"]), kind["vendor"])
            gpus[key] = gpu
        offer = Offer(
            instance_type=row["instance_type"],
            cpus=int(row["vcpus"]),
            memory=int(float(row["memory_gib"]) * GIB * USABLE_RAM),
            gpu=gpu,
            gpus=int(row["gpus"]),
            cloud=row["cloud"],
            retired=row["retired"],
        )
        nvme = int(row["nvme_gb"]) * 10**9 if row["nvme_gb"] else None
        found[row["instance_type"].lower()] = Machine(offer, nvme, kind["obstacle"])
    return found


@functools.cache
def instance_types() -> Mapping[str, Offer]:
    """Every known GPU machine by lower-case name, as an offer that nobody sells yet (``provisioner`` is empty)."""
    return {name: machine.offer for name, machine in machines().items()}


def obstacle(offer: Offer) -> str:
    """Why kaito cannot use this machine whoever has it, in words; empty when nothing is known against it."""
    known = machines().get(offer.instance_type.lower())
    return known.obstacle if known else ""


def offers(
    cloud: str, regions: Sequence[str] = (), capacity_types: Sequence[CapacityType] = ("on-demand",)
) -> list[Offer]:
    """The machines of a cloud with region and price, for whoever can get them to put its name on.

    One offer for each type, region and capacity type. Without regions: at the cloud's reference region (``eastus``,
    ``us-east-1``, ``us-central1``), or where the type is sold if not there. In a region whose prices are known, only what is
    priced there is offered; in another one of that cloud everything is, at an unknown price. A price that is not known is None."""
    return list(
        _offers(cloud.lower(), tuple(dict.fromkeys(regions)), tuple(dict.fromkeys(capacity_types)), prices.table())
    )


def is_region(cloud: str, name: str) -> bool:
    """Whether this cloud has such a region, as far as its name tells."""
    return prices.table().covers(cloud, name) or (cloud in _REGIONS and bool(_REGIONS[cloud].match(name)))


def known_regions() -> list[str]:
    """The regions whose prices are known, of all clouds."""
    return sorted({r for name in instance_types() for r in prices.table().regions(name)})


@functools.lru_cache(maxsize=64)
def _offers(
    cloud: str, regions: tuple[str, ...], capacity_types: tuple[CapacityType, ...], table: PriceTable
) -> tuple[Offer, ...]:
    found = []
    unpriced = {r for r in regions if not table.covers(cloud, r) and is_region(cloud, r)}
    for offer in instance_types().values():
        if offer.cloud != cloud:
            continue
        sold = table.regions(offer.instance_type)
        places = [r for r in regions if r in sold or r in unpriced] if regions else [_home(offer, table)]
        for region in places:
            for kind in capacity_types:
                price = table.price(cloud, offer.instance_type, region, kind)
                found.append(replace(offer, region=region, capacity_type=kind, price=price))
    return tuple(found)


def _home(offer: Offer, table: PriceTable) -> str:
    """Where the type is priced when nobody says where: the cloud's reference region, else the cheapest that sells it."""
    reference, sold = prices.reference_region(offer.cloud), table.regions(offer.instance_type)
    if reference in sold or not sold:
        return reference if sold else ""
    return min(sold, key=lambda r: (sold[r], r))


def provisioner_package(cloud: str) -> str:
    """The distribution whose plugin can get machines of this cloud."""
    return _PROVISIONERS.get(cloud, "")
