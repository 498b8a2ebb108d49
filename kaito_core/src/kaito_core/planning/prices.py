"""What an hour of a machine costs, by instance type, region and capacity type, with source and date.

The shipped prices are in ``data/prices.csv``. ``kaito catalog update`` writes newer ones into the user's data folder, one file per
cloud; where it knows a region, it wins over what is shipped. An unknown price is None, never 0.
"""

from __future__ import annotations

import csv
import functools
import importlib.resources
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kaito_core.plugins.types import CapacityType, Price
from kaito_core.problems import UserError

HEADER = "instance_type,region,capacity_type,usd_per_hour"

HIGHEST = 10_000.0
"""US dollars an hour above which a figure is taken for a mistake: the dearest machine costs some hundreds."""


@dataclass(frozen=True)
class Row:
    """One price as a file has it."""

    instance_type: str
    region: str
    capacity_type: CapacityType
    usd: float


@dataclass(frozen=True)
class Source:
    """Where the prices of a cloud come from."""

    cloud: str
    name: str
    date: str
    licence: str = ""
    notice: str = ""
    reference_region: str = ""


class PriceTable:
    """All known prices. Compared by identity, so that what was made from one is remembered with it."""

    def __init__(self) -> None:
        self._prices: dict[tuple[str, str, str], tuple[float, Source]] = {}
        self._regions: dict[str, dict[str, float]] = {}
        self._covered: set[tuple[str, str]] = set()
        self.sources: dict[str, Source] = {}
        """The newest source of each cloud."""

    def add(self, rows: Iterable[Row], source: Source) -> None:
        """Further prices of a cloud. They take the place of all that was known of their regions and capacity types."""
        rows = list(rows)
        replaced = {(r.region, r.capacity_type) for r in rows}
        if any((source.cloud, region) in self._covered for region, _ in replaced):
            for key in [k for k, (_, s) in self._prices.items() if s.cloud == source.cloud and k[1:] in replaced]:
                del self._prices[key]
                if key[2] == "on-demand":
                    del self._regions[key[0]][key[1]]
        for row in rows:
            name = row.instance_type.lower()
            self._prices[name, row.region, row.capacity_type] = (row.usd, source)
            if row.capacity_type == "on-demand":
                self._regions.setdefault(name, {})[row.region] = row.usd
                self._covered.add((source.cloud, row.region))
        self.sources[source.cloud] = source

    def price(self, cloud: str, instance_type: str, region: str, capacity_type: CapacityType) -> Price | None:
        """None when it is not known."""
        found = self._prices.get((instance_type.lower(), region, capacity_type))
        if found is None or found[1].cloud != cloud:
            return None
        usd, source = found
        return Price(usd, source.name, source.date)

    def regions(self, instance_type: str) -> Mapping[str, float]:
        """Where a type is known to be sold, with its price on demand."""
        return self._regions.get(instance_type.lower(), {})

    def covers(self, cloud: str, region: str) -> bool:
        """Whether the prices of this region are known, so that what has none there is not sold there."""
        return (cloud, region) in self._covered


def folder() -> Path:
    """Where newer prices are kept: ``catalogue`` in kaito's data folder.

    That folder is `kaito_core.local.home.home`'s, which stands above planning and cannot be asked; a test compares the two."""
    named = os.environ.get("KAITO_HOME")
    if named:
        return Path(named).expanduser().absolute() / "catalogue"
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "kaito" / "catalogue"


def table() -> PriceTable:
    """The prices as they are known now: read once, and again when a file of the user has changed."""
    where = folder()
    stamps = []
    for cloud in shipped_sources():
        path = where / f"{cloud}.csv"
        try:
            status = path.stat()
        except OSError:
            continue
        stamps.append((cloud, str(path), status.st_mtime_ns, status.st_size))
    return _table(tuple(stamps))


@functools.lru_cache(maxsize=2)
def _table(stamps: tuple[tuple[str, str, int, int], ...]) -> PriceTable:
    made = PriceTable()
    by_cloud: dict[str, list[Row]] = {}
    clouds = _cloud_of_types()
    for row in parse(_data("prices.csv").splitlines()[1:]):
        by_cloud.setdefault(clouds[row.instance_type], []).append(row)
    for cloud, rows in by_cloud.items():
        made.add(rows, shipped_sources()[cloud])
    for cloud, path, _, _ in stamps:
        made.add(*read(cloud, Path(path)))
    return made


def _data(name: str) -> str:
    return importlib.resources.files("kaito_core.planning").joinpath("data", name).read_text(encoding="utf-8")


def _cloud_of_types() -> dict[str, str]:
    lines = _data("instance_types.csv").splitlines()[1:]
    return {name: cloud for cloud, name, _ in (line.split(",", 2) for line in lines)}


@functools.cache
def shipped_sources() -> Mapping[str, Source]:
    """Where the shipped prices come from, by cloud."""
    rows = csv.DictReader(_data("sources.csv").splitlines())
    return {
        r["cloud"]: Source(r["cloud"], r["source"], r["date"], r["licence"], r["notice"], r["reference_region"])
        for r in rows
    }


def reference_region(cloud: str) -> str:
    """The region whose prices stand for a cloud when nobody says where."""
    known = shipped_sources().get(cloud)
    return known.reference_region if known else ""


def parse(lines: Iterable[str]) -> list[Row]:
    """The rows of a price file. ValueError, with the line, for one that is not a price."""
    rows = []
    for line in lines:
        try:
            name, region, kind, usd = line.split(",")
            rows.append(Row(name, region, _kind(kind), _usd(usd)))
        except ValueError as e:
            raise ValueError(f"{line[:80]!r} is not a price: {e}") from e
    return rows


def _kind(text: str) -> CapacityType:
    if text == "on-demand":
        return "on-demand"
    if text == "spot":
        return "spot"
    raise ValueError("the capacity type is neither on-demand nor spot")


def _usd(text: str) -> float:
    usd = float(text)
    if not (0 < usd <= HIGHEST and math.isfinite(usd)):
        raise ValueError(f"{text} US dollars an hour cannot be")
    return usd


def read(cloud: str, path: Path) -> tuple[list[Row], Source]:
    """A file that `write` wrote. UserError when it is none."""
    try:
        source, date, header, *lines = path.read_text(encoding="utf-8").splitlines()
        if not source.startswith("# source: ") or not date.startswith("# date: ") or header != HEADER:
            raise ValueError("its first three lines are not those of a price file")
        return parse(lines), Source(cloud, source.removeprefix("# source: "), date.removeprefix("# date: "))
    except (ValueError, OSError) as e:
        raise UserError(f"{path} cannot be read: {e}", "run `kaito catalog update` again, or remove the file") from e


def write(source: Source, rows: Sequence[Row]) -> Path:
    """Keep the prices of a cloud for all later plans. Either the whole file is new or nothing has changed."""
    path = folder() / f"{source.cloud}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# source: {source.name}", f"# date: {source.date}", HEADER]
    lines += sorted(f"{r.instance_type},{r.region},{r.capacity_type},{r.usd:.6f}" for r in rows)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
