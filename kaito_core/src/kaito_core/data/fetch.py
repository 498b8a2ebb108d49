"""Bring every input of a job into one folder: downloaded through the cache, or copied from this machine."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from kaito_core.data.cache import BlobCache, digest_file, place, removed_on_failure
from kaito_core.data.download import OnProgress, Policy, download, max_download_bytes
from kaito_core.data.sources import Source, parse_sources, unused_name
from kaito_core.problems import Failure, Problem, UserError

PLACED = ".kaito-fetched.json"
"""The names that an earlier fetch put into the folder: those that are no longer asked for are taken away again."""


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """One file that is ready to be read."""

    path: Path
    url: str
    """Where it came from, without secrets."""
    sha256: str
    bytes: int


def fetch(
    inputs: Iterable[str],
    into: Path,
    cache: Path,
    *,
    base: Path,
    allow_private: bool,
    max_bytes: int | None = None,
    token: str = "",
    on_progress: OnProgress | None = None,
    field: str = "tuning.input.urls",
) -> list[FetchedFile]:
    """All files of ``inputs`` in the folder ``into``, in order, each with its digest.

    ``base`` is what relative paths belong to; a folder stands for the data files in it. ``max_bytes`` bounds what is read
    from the network in all (None: ``$KAITO_MAX_DOWNLOAD_BYTES``, else 50 GiB). ``token`` goes to the Hugging Face hub only.
    Files that an earlier fetch left in ``into`` and that are no longer asked for are removed; no others are touched.
    Raises `UserError` or `Failure` that names the URL and ``field``; what was already downloaded stays in the cache.
    """
    sources = parse_sources(inputs, base=base, field=field)
    policy = Policy(allow_private, max_download_bytes() if max_bytes is None else max_bytes, token, on_progress)
    into.mkdir(parents=True, exist_ok=True)
    blobs = BlobCache(cache)
    used: set[str] = set()
    placed: set[str] = set()
    fetched: list[FetchedFile] = []
    for number, source in enumerate(sources):
        here = f"{field}[{number}]"
        try:
            if source.path is not None:
                for path in _files(source, source.path, here):
                    target = into / unused_name(path.name, used)
                    if not (target.exists() and target.samefile(path)):
                        _copy(path, target)
                        placed.add(target.name)
                    fetched.append(FetchedFile(target, source.shown, digest_file(target), target.stat().st_size))
            else:
                entry = download(source, blobs, policy, field=here)
                target = into / unused_name(source.name, used)
                place(blobs.path(entry.sha256), target)
                placed.add(target.name)
                fetched.append(FetchedFile(target, source.shown, entry.sha256, entry.bytes))
                policy = replace(policy, max_bytes=policy.max_bytes - entry.bytes)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Failure(
                    Problem(f"no disk space for {source.shown} in {into}", "free some space and try again", here)
                ) from e
            raise UserError(
                Problem(f"{source.shown}: {e.strerror or e}", "check the path and its permissions", here)
            ) from e
    _take_away_old(into, placed, used)
    return fetched


def _files(source: Source, path: Path, field: str) -> list[Path]:
    from kaito_core.data.rows import data_files

    if path.is_dir():
        return data_files(path)
    if not path.exists():
        raise UserError(Problem(f"{source.shown}: there is no such file ({path})",
                                "a relative path belongs to the folder of the YAML file", field))  # fmt: skip
    if not path.is_file():
        raise UserError(Problem(f"{source.shown}: not a regular file", "name a file or a folder of files", field))
    return [path]


def _copy(path: Path, target: Path) -> None:
    """A copy, not a link: the user's file may be edited while the job runs."""
    beside = target.with_name(f".{target.name}.part")
    with removed_on_failure(beside):
        shutil.copyfile(path, beside)
        beside.replace(target)


def _take_away_old(into: Path, placed: set[str], used: set[str]) -> None:
    note = into / PLACED
    try:
        before = json.loads(note.read_bytes())
    except (OSError, ValueError):
        before = []
    for name in before if isinstance(before, list) else []:
        if isinstance(name, str) and name.lower() not in used and Path(name).name == name:
            (into / name).unlink(missing_ok=True)
    note.write_text(json.dumps(sorted(placed)))
