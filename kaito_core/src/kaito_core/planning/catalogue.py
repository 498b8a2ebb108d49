"""The instance types that kaito knows: facts about GPU machines, as data, read once.

A row says what is in a machine and how much of its GPU memory can really be used. Prices, regions and the rest of the
market come from node provisioners, behind the same `Offer`.
"""

from __future__ import annotations

import csv
import difflib
import functools
import importlib.resources
from collections.abc import Iterator, Mapping

from kaito_core.plugins.types import Gpu, Offer

MIB = 1 << 20
GIB = 1 << 30

USABLE_RAM = 0.9
"""Share of a machine's RAM that a pod can have: the kubelet, the system and the device plugin keep the rest."""

_PROVISIONERS = {"azure": "kaito-provisioner-aks", "aws": "kaito-provisioner-karpenter"}


def _rows(name: str) -> Iterator[dict[str, str]]:
    text = importlib.resources.files("kaito_core.planning").joinpath("data", name).read_text(encoding="utf-8")
    yield from csv.DictReader(text.splitlines())


def _capability(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


@functools.cache
def instance_types() -> Mapping[str, Offer]:
    """Every known GPU machine by lower-case name, as an offer that nobody sells yet (``provisioner`` is empty)."""
    gpus = {r["gpu"]: r for r in _rows("gpus.csv")}
    found = {}
    for row in _rows("instance_types.csv"):
        kind = gpus[row["gpu"]]
        gpu = Gpu(row["gpu"], int(row["gpu_usable_mib"]) * MIB, _capability(kind["compute_capability"]), kind["vendor"])
        found[row["instance_type"].lower()] = Offer(
            instance_type=row["instance_type"],
            cpus=int(row["vcpus"]),
            memory=int(float(row["memory_gib"]) * GIB * USABLE_RAM),
            gpu=gpu,
            gpus=int(row["gpus"]),
            cloud=row["cloud"],
            retired=row["retired"],
        )
    return found


def close_matches(instance_type: str) -> list[str]:
    """Known instance types that look like this one, for "did you mean"."""
    known = instance_types()
    return [known[m].instance_type for m in difflib.get_close_matches(instance_type.lower(), known, n=3, cutoff=0.6)]


def provisioner_package(cloud: str) -> str:
    """The distribution whose plugin can get machines of this cloud."""
    return _PROVISIONERS.get(cloud, "")
