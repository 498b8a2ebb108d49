"""Which plugins are installed, read from the metadata that installers write.

`importlib.metadata` gives the same answer, and imports the e-mail package to read it: a sixth of what ``kaito --help`` takes.
What is read here is the entry-point specification's file (packaging.python.org, "Entry points specification"), in the folders
that installers write for a distribution, the first one of a name on the path winning.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_INFO = re.compile(r"(?P<name>.+?)(-(?P<version>[^-]+))?(-py[^-]+)?\.(dist|egg)-info\Z")


class EntryPoint(NamedTuple):
    """One line of ``entry_points.txt``, and whose it is."""

    name: str
    value: str
    """``module`` or ``module:attribute``, without extras."""
    distribution: str
    version: str

    @property
    def module(self) -> str:
        return self.value.partition(":")[0].strip()

    def load(self) -> Any:
        """The object that the entry point names; whatever importing it raises."""
        found = importlib.import_module(self.module)
        for attribute in filter(None, self.value.partition(":")[2].strip().split(".")):
            found = getattr(found, attribute)
        return found


def entry_points(group: str, path: Sequence[str]) -> list[EntryPoint]:
    """The entry points of ``group`` of all distributions on ``path``. Unreadable metadata counts as none."""
    seen: set[str] = set()
    found = []
    for folder, info in _infos(path):
        match = _INFO.match(info)
        name = re.sub(r"[-_.]+", "-", match["name"]).lower() if match else info
        if name in seen:
            continue
        seen.add(name)
        try:
            text = Path(folder, info, "entry_points.txt").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        lines = list(_lines(text, group))
        if lines:
            distribution, version = _who(Path(folder, info), name, (match and match["version"]) or "")
            found += [EntryPoint(n, v, distribution, version) for n, v in lines]
    return found


def _infos(path: Sequence[str]) -> Iterator[tuple[str, str]]:
    for folder in dict.fromkeys(path):
        try:
            names = sorted(e.name for e in os.scandir(folder or ".") if e.name.endswith(("-info",)))
        except OSError:  # a zip file, or nothing at all
            continue
        yield from ((folder or ".", n) for n in names if n.endswith((".dist-info", ".egg-info")))


def _lines(text: str, group: str) -> Iterator[tuple[str, str]]:
    inside = False
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("["):
            inside = line == f"[{group}]"
        elif inside and "=" in line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            yield name.strip(), value.partition("[")[0].strip()


def _who(info: Path, name: str, version: str) -> tuple[str, str]:
    """Name and version as the distribution writes them; from its folder's name when it does not say."""
    for file in ("METADATA", "PKG-INFO"):
        try:
            head = (info / file).read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        except OSError:
            continue
        fields = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line and not line.startswith(" "))
        return fields.get("Name", name), fields.get("Version", version)
    return name, version
