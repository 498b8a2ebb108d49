"""A model as an OCI image that containerd, Kubernetes image volumes and kaito can read, pushed without a copy of it.

One layer holds one file, below ``/data`` like an adapter's. The layers are not compressed: weights do not get smaller, and a layer
that is not compressed is the file between a tar header and some zeros, so that it is read from where it lies, once for its digest
and once to be sent. Nothing else is written or held. No clock, no owner and no name of this machine goes in: the same files have the
same digests, and what the registry has is not sent again.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kaito_core import __version__
from kaito_core.artifacts.contents import MODEL_FILE, contents
from kaito_core.artifacts.credentials import Credentials
from kaito_core.artifacts.layers import DATA, DataFiles
from kaito_core.artifacts.manifest import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Descriptor, canonical
from kaito_core.artifacts.model_files import model_files
from kaito_core.artifacts.pull import choose, lay, open_images
from kaito_core.artifacts.registry import CHUNK_BYTES, RegistryClient
from kaito_core.oci_reference import Reference
from kaito_core.problems import Failure, UserError

LICENCES = "org.opencontainers.image.licenses"
REVISION = "org.opencontainers.image.revision"
SOURCE = "org.opencontainers.image.source"
"""The specification's keys for where an image comes from (OCI image specification, "Annotations")."""
VERSION = "sh.kaito.version"
"""The version of kaito that made it."""

READ_BYTES = 1 << 20
_BLOCK = tarfile.BLOCKSIZE
_CONFIG_BYTES = 1 << 20

Step = Literal["read", "push"]
OnProgress = Callable[[Step, str, int, int], None]
"""Called with what is done (``read``: for the digest), the file, and bytes done and to do of all files."""


@dataclass(frozen=True, slots=True)
class PushedModel:
    """What a push has made: the manifest's digest, the bytes of all layers, and how many of them were sent."""

    digest: str
    bytes: int
    sent: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileLayer:
    """One file as an uncompressed layer, read from where it lies: a tar of this one member."""

    path: Path
    header: bytes
    content: int
    """Bytes of the file."""
    modified: int
    """Nanoseconds, to notice a file that changes while it is pushed."""

    @classmethod
    def of(cls, path: Path) -> FileLayer:
        found = path.stat()
        member = tarfile.TarInfo(f"{DATA}/{path.name}")  # mtime 0, uid and gid 0, mode 0644, regular file
        member.size = found.st_size
        return cls(path, member.tobuf(tarfile.PAX_FORMAT), found.st_size, found.st_mtime_ns)

    @property
    def size(self) -> int:
        """Bytes of the layer: the member's header, its content up to a whole block, and the two blocks that end an archive."""
        return len(self.header) + -(-self.content // _BLOCK) * _BLOCK + 2 * _BLOCK

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Bytes ``start`` to ``end`` (exclusive) of the layer. A `Failure` if the file is not what it was."""
        begin, stop = len(self.header), len(self.header) + self.content
        if start < begin:
            yield self.header[start:end]
        position = max(start, begin)
        if position < min(end, stop):
            with self.path.open("rb") as f:
                now = os.fstat(f.fileno())
                if (now.st_size, now.st_mtime_ns) != (self.content, self.modified):
                    raise self._changed()
                f.seek(position - begin)
                while position < min(end, stop):
                    piece = f.read(min(READ_BYTES, min(end, stop) - position))
                    if not piece:
                        raise self._changed()
                    position += len(piece)
                    yield piece
        if end > max(position, stop):
            yield bytes(end - max(position, stop))

    def _changed(self) -> Failure:
        return Failure(f"{self.path} changed while it was pushed", "push again when nothing writes to it")


def push_model(
    folder: Path,
    reference: Reference,
    credentials: Credentials | None = None,
    annotations: Mapping[str, str] | None = None,
    on_progress: OnProgress = lambda _step, _name, _done, _total: None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    sleep: Callable[[float], None] = time.sleep,
) -> PushedModel:
    """Push the model's files in ``folder`` as the image ``reference``, with these annotations in its manifest.

    Raises `UserError` if the folder is no model (`model_files`) or the reference has no tag, and `Failure` if something goes wrong on
    the way; a push that broke is finished by the next one.
    """
    if reference.digest:
        raise UserError(f"{reference} names a digest; a push needs a tag", f"write {reference.name}:TAG")
    layers = [FileLayer.of(path) for path in model_files(folder)]
    total = sum(layer.size for layer in layers)
    with RegistryClient(reference, credentials, chunk_bytes=chunk_bytes, sleep=sleep) as client:
        client.check_push()  # before minutes of reading
        described: list[Descriptor] = []
        for layer in layers:
            described.append(_described(layer, on_progress, sum(d.size for d in described), total))
        done = sent = 0
        for layer, descriptor in zip(layers, described, strict=True):

            def on_bytes(size: int, start: int = done, name: str = layer.path.name) -> None:
                on_progress("push", name, start + size, total)

            if client.upload(layer.pieces, descriptor, on_bytes):
                sent += layer.size
            done += layer.size
            on_progress("push", layer.path.name, done, total)
        digest = _put(client, reference, described, {**(annotations or {}), VERSION: __version__})
    return PushedModel(digest, total, sent, tuple(layer.path.name for layer in layers))


def _described(layer: FileLayer, on_progress: OnProgress, before: int, total: int) -> Descriptor:
    sha256, size = hashlib.sha256(), 0
    for piece in layer.pieces(0, layer.size):
        sha256.update(piece)
        size += len(piece)
        on_progress("read", layer.path.name, before + size, total)
    return Descriptor(OCI_LAYER, f"sha256:{sha256.hexdigest()}", size, {MODEL_FILE: layer.path.name})


def _put(client: RegistryClient, reference: Reference, layers: list[Descriptor], annotations: Mapping[str, str]) -> str:
    rootfs = {"type": "layers", "diff_ids": [layer.digest for layer in layers]}
    content = canonical({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs})
    config = Descriptor.of(OCI_CONFIG, content)
    client.upload(lambda start, end: iter((content[start:end],)), config)
    manifest = canonical(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config.to_json(),
            "layers": [layer.to_json() for layer in layers],
            "annotations": dict(annotations),
        }
    )
    digest = client.put_manifest(reference.tag, OCI_MANIFEST, manifest)
    stored, _ = client.manifest(reference.tag)
    if stored.digest != digest:
        raise Failure(
            f"{reference}: the registry has {stored.digest} under this tag, {digest} was pushed",
            "somebody else may have pushed the same tag at the same time: look, and push again",
        )
    return digest


@dataclass(frozen=True, slots=True)
class ModelImage:
    """What an image says of itself. Sizes are bytes in the registry."""

    digest: str
    annotations: Mapping[str, str]
    files: tuple[tuple[str, int], ...]
    """Each layer: the file that it holds, or its digest where it does not say, and its size."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The model's ``config.json``; empty where it cannot be told which layer holds it."""


def look_into(
    source: Reference | Path,
    credentials: Credentials | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> ModelImage:
    """What is in a model's image or artifact; of its content only ``config.json`` is fetched."""
    import json

    with open_images(source, credentials, sleep=sleep) as images, tempfile.TemporaryDirectory() as scratch:
        digest, manifest = choose(images)
        parts = contents(manifest, images.name)
        config: Any = {}
        for part in parts:
            if part.name == "config.json" and part.layer.size <= _CONFIG_BYTES:
                found = DataFiles(Path(scratch), _CONFIG_BYTES)
                lay(images, part, found, Path(scratch) / "layer")
                path = found.files.get(f"{DATA}/config.json")
                try:
                    config = json.loads(path.read_bytes()) if path else {}
                except (ValueError, RecursionError):
                    raise Failure(f"{source}: its config.json is not JSON", "push the model anew") from None
    files = tuple((part.name or part.layer.digest, part.layer.size) for part in parts)
    return ModelImage(digest, manifest.annotations, files, config if isinstance(config, dict) else {})
