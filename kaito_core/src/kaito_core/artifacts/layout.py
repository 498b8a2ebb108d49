"""The OCI image layout: a folder that holds images as files (OCI image specification, "Image Layout").

Everything is written beside its place and then renamed, so a layout that was interrupted is either without a file or has
all of it. Names of blobs are their digests, hence writing the same one twice changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from kaito_core.artifacts.manifest import (
    MAX_MANIFEST_BYTES,
    OCI_INDEX,
    REF_NAME,
    Descriptor,
    canonical,
    digest_of,
    read_document,
    read_index,
)
from kaito_core.problems import Failure, UserError

READ_BYTES = 1 << 20


class Layout:
    """An OCI image layout in ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> Layout:
        """Make an empty layout, or go on with the one that is there."""
        layout = cls(path)
        layout._blobs.mkdir(parents=True, exist_ok=True)
        if not (path / "oci-layout").exists():
            _write(path / "oci-layout", canonical({"imageLayoutVersion": "1.0.0"}))
        if not (path / "index.json").exists():
            layout._write_index(())
        return layout

    @classmethod
    def open(cls, path: Path) -> Layout:
        """An existing layout; a `UserError` when the folder is none."""
        try:
            marker = json.loads((path / "oci-layout").read_bytes())
        except (OSError, ValueError, RecursionError):
            marker = None
        if not isinstance(marker, dict) or not str(marker.get("imageLayoutVersion")).startswith("1."):
            raise UserError(
                f"{path} is not an OCI image layout", "name the folder that holds `oci-layout` and `index.json`"
            )
        return cls(path)

    def blob_path(self, descriptor: Descriptor) -> Path:
        """The file of a blob that is there with its full size; a `Failure` otherwise."""
        path = self._blobs / descriptor.digest.removeprefix("sha256:")
        if not path.is_file():
            raise Failure(f"{self.path} lacks the blob {descriptor.digest}", "build the image again")
        if (size := path.stat().st_size) != descriptor.size:
            raise Failure(f"{path} has {size} bytes, {descriptor.size} are expected", "build the image again")
        return path

    def read(self, descriptor: Descriptor) -> bytes:
        """A small blob (a manifest, a config), checked against its digest."""
        if descriptor.size > MAX_MANIFEST_BYTES:
            raise Failure(
                f"{self.path}: the manifest {descriptor.digest} has {descriptor.size} bytes, too many for a manifest"
            )
        content = self.blob_path(descriptor).read_bytes()
        if digest_of(content) != descriptor.digest:
            raise Failure(f"{self.path}: the blob {descriptor.digest} is damaged", "build the image again")
        return content

    def add(self, media_type: str, content: bytes) -> Descriptor:
        """Write ``content`` as a blob."""
        with self.writer(media_type) as (file, finish):
            file.write(content)
            return finish()

    @contextmanager
    def writer(self, media_type: str) -> Iterator[tuple[BinaryIO, Callable[[], Descriptor]]]:
        """A file to write one blob to, and what makes a blob of it; without that call nothing stays."""
        descriptor, name = tempfile.mkstemp(dir=self._blobs, prefix=".new-")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "w+b") as file:

                def finish() -> Descriptor:
                    file.flush()
                    os.fsync(file.fileno())
                    file.seek(0)
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                    temporary.chmod(0o644)
                    temporary.replace(self._blobs / sha256)
                    return Descriptor(media_type, f"sha256:{sha256}", file.tell())

                yield file, finish
        finally:
            temporary.unlink(missing_ok=True)

    def images(self) -> tuple[Descriptor, ...]:
        """The entries of ``index.json``."""
        path = self.path / "index.json"
        try:
            content = path.read_bytes()
        except OSError as e:
            raise Failure(f"{path}: {e.strerror}", "build the image again") from e
        return read_index(read_document(content, str(path)), str(path))

    def tag(self, manifest: Descriptor, tag: str) -> None:
        """Enter ``manifest`` into the index as ``tag``; what had the tag loses it."""
        others = (d for d in self.images() if d.annotations.get(REF_NAME) != tag)
        self._write_index((*others, replace(manifest, annotations={**manifest.annotations, REF_NAME: tag})))

    def find(self, tag: str = "") -> Descriptor:
        """The image that is tagged ``tag``, or the only one there is."""
        images = self.images()
        tagged = [d for d in images if d.annotations.get(REF_NAME) == tag]
        if tag and len(tagged) == 1:
            return tagged[0]
        if len(images) == 1:
            return images[0]
        known = ", ".join(d.annotations.get(REF_NAME, d.digest) for d in images) or "none"
        raise UserError(f"{self.path} has no image {tag!r}; it holds: {known}", "name one of these tags")

    @property
    def _blobs(self) -> Path:
        return self.path / "blobs" / "sha256"

    def _write_index(self, images: tuple[Descriptor, ...]) -> None:
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [d.to_json() for d in images]}
        _write(self.path / "index.json", canonical(index))


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
