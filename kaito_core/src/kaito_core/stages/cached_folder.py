"""Folders that are made once and shared: a model, an adapter, under a key that says what is in it.

Below the cache's ``folders``: ``KEY`` is complete, ``KEY.part`` is under way and is gone on with, ``KEY.lock`` is held by the one
process that works on it. A folder becomes ``KEY`` by a rename, so that nobody sees a part of it, and is only read from then on.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOTE = ".kaito.json"
"""In a complete folder: its files with their sizes, and what is known of it."""


@dataclass(frozen=True, slots=True)
class Cached:
    """A complete folder."""

    path: Path
    facts: Mapping[str, Any]
    """What ``fill`` said when it was made."""
    fresh: bool
    """Whether it was made by this call."""


def cached_folder(
    root: Path, key: str, fill: Callable[[Path], Mapping[str, Any]], say: Callable[[str], None]
) -> Cached:
    """The folder ``key`` of the cache ``root``; where it is not there or damaged, ``fill`` makes it.

    ``fill`` gets a folder that holds whatever an earlier call left in it, checks what it brings, and says what is worth knowing of it,
    as JSON. One that is there is not read again: its files are compared by size, which finds what a full disk or a broken volume has
    cut off. Another process that wants the same folder waits, and finds it complete."""
    folders = root / "folders"
    folders.mkdir(parents=True, exist_ok=True)
    final, part = folders / key, folders / f"{key}.part"
    with (folders / f"{key}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is fetching {key}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (note := _note(final)) is not None:
            return Cached(final, note["facts"], fresh=False)
        if final.exists():
            say(f"{final} is damaged, and is fetched again")
            shutil.rmtree(final)
        part.mkdir(exist_ok=True)
        facts = dict(fill(part))
        for path in part.iterdir():
            if path.is_file():
                _flush(path)
        sizes = {p.name: p.stat().st_size for p in part.iterdir() if p.is_file() and p.name != NOTE}
        (part / NOTE).write_text(json.dumps({"files": sizes, "facts": facts}), encoding="utf-8")
        _flush(part / NOTE)
        part.rename(final)
        return Cached(final, facts, fresh=True)


def link_files(files: Mapping[str, Path], into: Path) -> None:
    """Make ``into`` hold links to exactly these files, by name; links that were there for others go, other files stay."""
    into.mkdir(parents=True, exist_ok=True)
    for old in into.iterdir():
        if old.is_symlink() and old.name not in files:
            old.unlink()
    for name, file in files.items():
        beside = into / f".{name}.{os.getpid()}"
        beside.symlink_to(file.resolve())
        beside.replace(into / name)


def _note(folder: Path) -> dict[str, Any] | None:
    """What is noted of a folder that is complete; None when it is not."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        note = json.loads((folder / NOTE).read_bytes())
        if all((folder / name).stat().st_size == size for name, size in note["files"].items()):
            return {"facts": dict(note["facts"])}
    return None


def _flush(path: Path) -> None:
    # After a power cut a file may have its size and not its content.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
