"""Downloads, kept by what is in them.

    blobs/sha256/<digest>    the content, read-only; checked against its name whenever it is used again
    index/<url key>.json     what a URL held when it was last seen: digest, ETag, Last-Modified
    partial/<url key>        a download under way, with <url key>.json beside it: the validator that it goes on with

A key is the SHA-256 of the whole URL, so that a signed query never stands in a file name or a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Entry:
    """What a URL held when it was last seen."""

    sha256: str
    bytes: int
    etag: str = ""
    last_modified: str = ""


def digest_file(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, algorithm).hexdigest()


class BlobCache:
    """A folder of downloads; safe for several processes (a partial download is locked by its writer)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs, self._index, self._partial = root / "blobs" / "sha256", root / "index", root / "partial"
        for folder in (self._blobs, self._index, self._partial):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the content of this digest is, when it is there."""
        return self._blobs / digest

    def has(self, digest: str) -> bool:
        """Whether the content is there and intact; a damaged blob is thrown away."""
        path = self.path(digest)
        if not path.is_file():
            return False
        if digest_file(path) == digest:
            return True
        path.unlink(missing_ok=True)
        return False

    def entry(self, url: str) -> Entry | None:
        """What ``url`` held last time, if that is still here and intact."""
        try:
            found = Entry(**_read(self._index / f"{_key(url)}.json"))
        except TypeError:
            return None
        return found if self.has(found.sha256) else None

    def remember(self, url: str, entry: Entry) -> None:
        """Note what ``url`` holds now."""
        _write(self._index / f"{_key(url)}.json", {f: getattr(entry, f) for f in Entry.__slots__})

    @contextmanager
    def partial(self, url: str) -> Iterator[Partial]:
        """The download of ``url`` that is under way, for this process alone: waits while another one works on it."""
        import fcntl

        path = self._partial / _key(url)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Partial(path)

    def adopt(self, partial: Partial, digest: str) -> None:
        """Make a complete download a blob."""
        partial.path.chmod(0o444)  # a job's folder may hold a hard link to it
        partial.path.replace(self.path(digest))
        partial.discard()


class Partial:
    """The first bytes of a download, and what the server called the version that they are of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._about = path.with_suffix(".json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def validator(self) -> str:
        """A strong ETag or a date for ``If-Range``; empty when the download cannot be resumed."""
        value = _read(self._about).get("validator", "")
        return value if isinstance(value, str) else ""

    def restart(self, validator: str) -> None:
        """Begin again, with the version that ``validator`` names."""
        self.discard()
        _write(self._about, {"validator": validator})

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)


def place(blob: Path, target: Path) -> None:
    """Put the content at ``target``: a hard link where the file systems allow it, else a copy."""
    beside = target.with_name(f".{target.name}.part")
    beside.unlink(missing_ok=True)
    try:
        os.link(blob, beside)
    except OSError:
        with removed_on_failure(beside):
            shutil.copyfile(blob, beside)
    beside.replace(target)


@contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    """No half-written file stays behind when the block fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def _key(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value))
    beside.replace(path)
