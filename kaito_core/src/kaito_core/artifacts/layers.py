"""Reading the layers of an image that somebody else made: which files lie under ``/data``, or another folder, at the end.

Layers are hostile input. Nothing of a layer is written under a name that it chose: contents go into numbered files, and
what a layer does to others (replace, whiteout) is done to a mapping of names. Links and devices are never made. All that
is read, after decompression, is bounded, and so is the number of entries.

Whiteouts are those of the OCI image specification ("Representing Changes").
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from kaito_core.problems import Failure

DATA = "data"
MAX_FILES = 10_000
MAX_CHANGES = 2 * MAX_FILES
"""Entries under ``/data`` of all layers together: files, folders and whiteouts."""
MAX_ENTRIES = 2_000_000
"""Entries of all layers together; the largest public images have some hundred thousand."""

_MAX_HEADER = 1 << 20
_MAX_NAME = 1024
_MAX_PART = 255
"""Bytes of one part of a path that Linux's file systems take."""
_READ_BYTES = 256 << 10
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


class DataFiles:
    """The files under ``/data``, layer by layer. ``scratch`` is a folder for contents, ``max_bytes`` a bound.

    ``roots`` are the folders of the image whose files are wanted, ``/data`` when nothing else is said."""

    def __init__(self, scratch: Path, max_bytes: int, roots: tuple[str, ...] = (DATA,)) -> None:
        self.files: dict[str, Path] = {}
        """Path in the image (``data/config.json``) → the file with its content."""
        self._roots = tuple(tuple(root.split("/")) for root in roots)
        self._scratch = scratch
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._entries = 0
        self._changes = 0
        self._folders: set[str] = set()  # every folder that any file has lain in
        self._written = 0

    def state(self) -> dict[str, Any]:
        """What `resume` needs to go on after the layers so far, as JSON."""
        files = {name: [path.name, path.stat().st_size] for name, path in self.files.items()}
        counts = {"left": self._left, "entries": self._entries, "changes": self._changes, "written": self._written}
        return {"files": files, **counts}

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Go on from a `state` whose contents are still in ``scratch``; False, and nothing is changed, if they are not."""
        try:
            files = {str(name): self._scratch / Path(content).name for name, (content, _) in state["files"].items()}
            sizes = [int(size) for _, size in state["files"].values()]
            if [path.stat().st_size for path in files.values()] != sizes:
                return False
            left, entries, changes, written = (int(state[k]) for k in ("left", "entries", "changes", "written"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        self.files, self._left, self._entries, self._changes, self._written = files, left, entries, changes, written
        self._folders = {name[:i] for name in files for i, c in enumerate(name) if c == "/"}
        return True

    def add_file(self, content: Path, name: str, where: str) -> None:
        """A layer that is one file, called ``name`` below ``/data``; ``content`` is moved into ``scratch``."""
        clean = f"{DATA}/{file_name(name, where)}"
        if clean in self.files:
            raise Failure(f"{where}: two layers are called {name[:100]!r}", "do not use this image")
        if len(self.files) >= MAX_FILES:
            raise Failure(f"{where}: the image has more than {MAX_FILES:,} files", "pack them into fewer files")
        self._spend(content.stat().st_size)
        target = self._scratch / str(self._written)
        self._written += 1
        content.replace(target)
        self.files[clean] = target

    def add_layer(self, path: Path, where: str, below: str = "") -> None:
        """Lay one layer over those before it. A `Failure`, in which ``where`` names the layer, if it is not sound.

        ``below`` is the folder of the image that the layer's paths begin at; an image's own layers begin at its root."""
        try:
            with path.open("rb") as raw:
                magic = raw.read(4)
                raw.seek(0)
                if magic == _ZSTD:
                    raise Failure(
                        f"{where} is compressed with zstd, which cannot be read", "push the image with gzip layers"
                    )
                stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if magic.startswith(_GZIP) else raw
                self._read_tar(_Forward(stream, self._spend), where, below)
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

    def _read_tar(self, stream: _Forward, where: str, below: str) -> None:
        above: set[str] = set()  # what this layer itself has put there; a whiteout is about the layers below
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:", errorlevel=2) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every entry otherwise
                self._entries += 1
                if self._entries > MAX_ENTRIES:
                    raise Failure(f"{where}: the image has more than {MAX_ENTRIES:,} entries", "use a smaller image")
                if member.size < 0:
                    raise Failure(f"{where}: {member.name!r} has a negative size")
                if name := self._wanted(member, where, below):
                    self._apply(tar, member, name, above, where)
        if stream.last.strip(b"\0"):  # tarfile takes a damaged header for the end, and what follows would be lost
            raise ValueError("a damaged header")

    def _wanted(self, member: tarfile.TarInfo, where: str, below: str) -> str:
        """The entry's clean path from the root on if it concerns a wanted folder, else nothing. Refuses what climbs out."""
        if member.name.startswith("/"):
            raise Failure(
                f"{where}: {member.name!r} is an absolute path", "build the image anew, with paths below data/"
            )
        parts = [p for p in (*below.split("/"), *member.name.split("/")) if p not in ("", ".")]
        if ".." in parts:
            raise Failure(f"{where}: {member.name!r} climbs out of its folder", "do not use this image")
        if not parts or not any(_concerns(parts, root) for root in self._roots):
            return ""
        if len(member.name) > _MAX_NAME or any(ord(c) < 32 for c in member.name):
            raise Failure(f"{where}: no file may be called {member.name[:100]!r}", "do not use this image")
        return "/".join(parts)

    def _is_inside(self, name: str) -> bool:
        parts = tuple(name.split("/"))
        return any(len(parts) > len(root) and parts[: len(root)] == root for root in self._roots)

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
        elif name != DATA and not self._is_inside(name):  # in place of a folder that would lead to a wanted one
            self._remove(lambda p: p.startswith(name + "/") and p not in above)
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


def file_name(name: str, where: str) -> str:
    """The name of a file as an annotation gives it, as a clean relative path. A `Failure` if it leads anywhere else."""
    parts = [p for p in name.split("/") if p not in ("", ".")]
    if name.startswith("/"):
        raise Failure(f"{where}: its file name {name[:100]!r} is an absolute path", "do not use this image")
    if ".." in parts or not parts:
        raise Failure(f"{where}: its file name {name[:100]!r} climbs out of its folder", "do not use this image")
    if len(name) > _MAX_NAME or max(len(p.encode()) for p in parts) > _MAX_PART or any(ord(c) < 32 for c in name):
        raise Failure(f"{where}: no file may be called {name[:100]!r}", "do not use this image")
    return "/".join(parts)


def _concerns(parts: list[str], root: tuple[str, ...]) -> bool:
    """Whether an entry is in this folder, or decides whether there is one: what leads to it, and whiteouts of that."""
    if tuple(parts[: len(root)]) == root:
        return True
    above, last = tuple(parts[:-1]), parts[-1]
    if above != root[: len(above)]:
        return False
    return last in (_OPAQUE, _WHITEOUT + root[len(above)], root[len(above)])


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
