"""Reading the layers of an image that somebody else made: which files lie under ``/data`` at the end.

Layers are hostile input. Nothing of a layer is written under a name that it chose: contents go into numbered files, and
what a layer does to others (replace, whiteout) is done to a mapping of names. Links and devices are never made. All that
is read, after decompression, is bounded, and so is the number of entries.

Whiteouts are those of the OCI image specification ("Representing Changes").
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO, cast

from kaito_core.problems import Failure

DATA = "data"
MAX_FILES = 10_000
MAX_CHANGES = 2 * MAX_FILES
"""Entries under ``/data`` of all layers together: files, folders and whiteouts."""
MAX_ENTRIES = 2_000_000
"""Entries of all layers together; the largest public images have some hundred thousand."""

_MAX_HEADER = 1 << 20
_MAX_NAME = 1024
_READ_BYTES = 256 << 10
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


class DataFiles:
    """The files under ``/data``, layer by layer. ``scratch`` is an empty folder for contents, ``max_bytes`` a bound."""

    def __init__(self, scratch: Path, max_bytes: int) -> None:
        self.files: dict[str, Path] = {}
        """Path below ``/data`` → the file with its content."""
        self._scratch = scratch
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._entries = 0
        self._changes = 0
        self._folders: set[str] = set()  # every folder that any file has lain in
        self._written = 0

    def add_layer(self, path: Path, where: str) -> None:
        """Lay one layer over those before it. A `Failure`, in which ``where`` names the layer, if it is not sound."""
        try:
            with path.open("rb") as raw:
                magic = raw.read(4)
                raw.seek(0)
                if magic == _ZSTD:
                    raise Failure(
                        f"{where} is compressed with zstd, which cannot be read", "push the image with gzip layers"
                    )
                stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if magic.startswith(_GZIP) else raw
                self._read_tar(_Forward(stream, self._spend), where)
        except (
            tarfile.TarError,
            EOFError,
            zlib.error,
            gzip.BadGzipFile,
            ValueError,
            OverflowError,
            RecursionError,
        ) as e:
            raise Failure(
                f"{where} is not a sound tar archive: {str(e)[:200]}", "pull again; if it stays so, push the image anew"
            ) from e

    def _read_tar(self, stream: _Forward, where: str) -> None:
        above: set[str] = set()  # what this layer itself has put there; a whiteout is about the layers below
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:", errorlevel=2) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every entry otherwise
                self._entries += 1
                if self._entries > MAX_ENTRIES:
                    raise Failure(f"{where}: the image has more than {MAX_ENTRIES:,} entries", "use a smaller image")
                if member.size < 0:
                    raise Failure(f"{where}: {member.name!r} has a negative size")
                if name := self._below_data(member, where):
                    self._apply(tar, member, name, above, where)
        if stream.last.strip(b"\0"):  # tarfile takes a damaged header for the end, and what follows would be lost
            raise ValueError("a damaged header")

    def _below_data(self, member: tarfile.TarInfo, where: str) -> str:
        """The entry's clean path from the root on if it concerns ``/data``, else nothing. Refuses what climbs out."""
        if member.name.startswith("/"):
            raise Failure(
                f"{where}: {member.name!r} is an absolute path", "build the image anew, with paths below data/"
            )
        parts = [p for p in member.name.split("/") if p not in ("", ".")]
        if ".." in parts:
            raise Failure(f"{where}: {member.name!r} climbs out of its folder", "do not use this image")
        if not parts or (parts[0] != DATA and parts not in ([_WHITEOUT + DATA], [_OPAQUE])):
            return ""
        if len(member.name) > _MAX_NAME or any(ord(c) < 32 for c in member.name):
            raise Failure(f"{where}: no file may be called {member.name[:100]!r}", "do not use this image")
        return "/".join(parts)

    def _apply(self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, above: set[str], where: str) -> None:
        self._changes += 1
        if self._changes > MAX_CHANGES or len(self.files) > MAX_FILES:
            raise Failure(
                f"{where}: the image has more than {MAX_FILES:,} files under /data", "pack them into fewer files"
            )
        folder, _, last = name.rpartition("/")
        prefix = f"{folder}/" if folder else ""
        if last == _OPAQUE:
            self._remove(lambda p: p.startswith(prefix) and p not in above)
        elif last.startswith(_WHITEOUT):
            gone = prefix + last.removeprefix(_WHITEOUT)
            self._remove(lambda p: (p == gone or p.startswith(gone + "/")) and p not in above)
        elif member.isdir():
            self._drop(name)
        elif member.isreg() and not member.issparse() and name != DATA:
            parents = [name[:i] for i, c in enumerate(name) if c == "/"]
            for same in (name, *parents):
                self._drop(same)
            if name in self._folders:
                self._remove(lambda p: p.startswith(name + "/"))
            self._folders.update(parents)
            self.files[name] = self._extract(tar, member, where)
            above.add(name)
        else:
            kind = "a link" if member.issym() or member.islnk() else "neither a file nor a folder"
            raise Failure(
                f"{where}: /{name} is {kind}; only files are taken", "build the image with plain files below /data"
            )

    def _remove(self, unwanted: Callable[[str], bool]) -> None:
        for name in [n for n in self.files if unwanted(n)]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        if content := self.files.pop(name, None):
            content.unlink(missing_ok=True)

    def _extract(self, tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> Path:
        if member.size > self._left:
            self._spend(member.size)
        source = tar.extractfile(member)
        assert source is not None  # it is a regular file
        target = self._scratch / str(self._written)
        self._written += 1
        with target.open("wb") as f:
            while piece := source.read(_READ_BYTES):
                f.write(piece)
        if target.stat().st_size != member.size:
            raise Failure(f"{where} ends within /{member.name}", "pull again; if it stays so, push the image anew")
        return target

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise Failure(
                f"the image holds more than {self._max_bytes:,} bytes when unpacked",
                "use a smaller image, or allow more bytes",
            )


class _Forward:
    """A stream that can only go forward, with what `tarfile` needs to read one: no read is larger than a header may be.

    `tarfile` reads a long header in one piece, and takes its size from the archive: without a bound a few bytes could ask
    for all memory. Skipping is reading, so that what is skipped counts as well.
    """

    def __init__(self, source: BinaryIO, spend: Callable[[int], None]) -> None:
        self._source = source
        self._spend = spend
        self._position = 0
        self.last = b""
        """What the last read gave."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise ValueError(f"a header of {size} bytes")
        data = self._source.read(size)
        while len(data) < size and (more := self._source.read(size - len(data))):
            data += more
        self._position += len(data)
        self._spend(len(data))
        self.last = data
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        if whence != 0 or position < self._position:
            raise ValueError("an entry overlaps the one before it")
        while self._position < position and self.read(min(_READ_BYTES, position - self._position)):
            pass
        return self._position

    def seekable(self) -> bool:
        return True
