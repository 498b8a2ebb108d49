"""The files of a new package: names, and templates filled in."""

from __future__ import annotations

import keyword
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template
from typing import Final, Literal

from kaito_core import __version__
from kaito_core.plugins.types import API_VERSION, normalised
from kaito_core.problems import UserError

Kind = Literal["preset", "provisioner", "tuner", "runtime"]

KINDS: Final[Mapping[Kind, str]] = {
    "preset": "The model $name for kaito",
    "provisioner": "GPU machines for kaito from $name",
    "tuner": "The tuning method $name for kaito",
    "runtime": "The inference runtime $name for kaito",
}
"""The kinds of plugins, and what a package of one says of itself in one line."""

EXTRAS: Final[Mapping[Kind, str]] = {
    "preset": "",
    "provisioner": "",
    "tuner": "# What the container that trains needs; planning needs none of it.\ntrain = []\n",
    "runtime": '# What the container that serves needs; planning needs none of it.\nserve = ["uvicorn>=0.30"]\n',
}
"""Extras besides ``test``, as TOML."""

LONGEST: Final = 40
"""Characters of a name: a distribution of this name has a few more, and it becomes part of labels (63)."""

SUFFIX: Final = ".txt"
"""What templates end in, so that nobody takes them for Python or for a project of this repository."""


@dataclass(frozen=True)
class Names:
    """What a new plugin and its parts are called."""

    kind: Kind
    name: str
    """As a workspace writes it."""

    @staticmethod
    def of(kind: Kind, name: str) -> Names:
        """Raises `UserError` for what cannot be a name."""
        try:
            plain = normalised(name)
        except ValueError as e:
            raise UserError(str(e), f"for example `kaito new {kind} my-{kind}`", field="NAME") from None
        if len(plain) > LONGEST:
            remedy = f"choose one of {LONGEST} characters at most"
            raise UserError(f"the name {plain!r:.80} is {len(plain)} characters long", remedy, field="NAME")
        if plain.startswith(("kaito-", "kaito_")):
            short = re.sub(rf"kaito[-_](({'|'.join(KINDS)})[-_])?", "", plain)
            words = f"the package of {plain!r} would be called kaito-{kind}-{plain}"
            raise UserError(words, f"leave kaito out: `kaito new {kind} {short}`", field="NAME")
        return Names(kind, plain)

    @property
    def distribution(self) -> str:
        """What is installed with pip, in the form in which names are compared (PEP 503)."""
        return f"kaito-{self.kind}-" + re.sub(r"[-_.]+", "-", self.name)

    @property
    def module(self) -> str:
        """What is imported."""
        return self.distribution.replace("-", "_")

    @property
    def cls(self) -> str:
        """The name of its class: ``my-shop`` is ``MyShop``."""
        words = "".join(w.capitalize() for w in re.split(r"[-_.]+", self.name))
        # A class must begin with a letter, and be no word of the language: "none" would be None.
        usable = not words[0].isdigit() and not keyword.iskeyword(words)
        return words if usable else f"{self.kind.capitalize()}{words}"

    @property
    def values(self) -> dict[str, str]:
        """What templates put in the place of ``$…``."""
        return {
            "kind": self.kind,
            "name": self.name,
            "distribution": self.distribution,
            "module": self.module,
            "cls": self.cls,
            "environment": re.sub(r"[^A-Z0-9]", "_", self.name.upper()),
            "api": API_VERSION,
            "range": core_range(__version__),
            "title": Template(KINDS[self.kind]).substitute(name=self.name),
            "extras": EXTRAS[self.kind],
        }


def core_range(version: str) -> str:
    """The versions of kaito-core that a package of today is made for. Before 1.0 a minor version may break what it likes."""
    major, minor = (int(n) for n in version.split(".")[:2])
    return f">={major}.{minor},<{major}.{minor + 1}" if major == 0 else f">={major}.{minor},<{major + 1}"


def rendered(names: Names, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The text of every file by its path in the package. ``more`` are values of one kind's templates."""
    values = {**names.values, **(more or {})}
    root = files("kaito_core.scaffold").joinpath("templates")
    found = {}
    for folder in ("common", names.kind):
        for path, file in _walk(root.joinpath(folder)):
            parts = [re.sub(r"^dot-", ".", p).replace("MODULE", names.module) for p in path]
            text = file.read_text(encoding="utf-8")
            # The licence is what it is, and has no values.
            text = text if parts == ["LICENSE"] else Template(text).substitute(values)
            found["/".join(parts)] = text
    return found


def _walk(folder: Traversable) -> Iterator[tuple[tuple[str, ...], Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            for path, file in _walk(entry):
                yield (entry.name, *path), file
        elif entry.name.endswith(SUFFIX):
            yield (entry.name.removesuffix(SUFFIX),), entry


def check_place(folder: Path) -> None:
    """Nothing that is there is touched. Raises `UserError`."""
    if folder.is_symlink() or folder.exists():
        raise UserError(
            f"{folder} is there already", "choose another place with --into FOLDER, or remove it first", field="--into"
        )


def write(folder: Path, texts: Mapping[str, str], models: Mapping[str, Path] | None = None) -> None:
    """Write a new folder, whole or not at all. ``models`` are files to copy, by path in the package.

    Raises `UserError` when the folder is there already, and `OSError` when it cannot be written."""
    check_place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        for path, text in texts.items():
            place = new / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8", newline="")
        for path, source in (models or {}).items():
            place = new / path
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
        new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
