"""The files under ``/data`` of an image, from a registry or from an OCI layout.

Reads what people push with any tool: OCI and Docker manifests, lists for several platforms, any base image below, and artifacts
that hold files instead of a file system (`kaito_core.artifacts.contents`), all of whose files are taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kaito_core.artifacts.contents import Content, contents
from kaito_core.artifacts.credentials import Credentials
from kaito_core.artifacts.layers import DATA, DataFiles
from kaito_core.artifacts.layout import Layout
from kaito_core.artifacts.manifest import Descriptor, Manifest, is_index, read_document, read_index, read_manifest
from kaito_core.artifacts.registry import OnBytes, RegistryClient
from kaito_core.oci_reference import Reference
from kaito_core.problems import Failure, UserError

MAX_BYTES = 64 << 30
"""Default bound on an image, unpacked: more than a data set or an adapter needs, less than fills a node's disk."""

_MAX_DEPTH = 3


@dataclass(frozen=True, slots=True)
class PulledImage:
    """What came: the image manifest's digest and annotations, and the files' paths below ``into``, sorted."""

    digest: str
    annotations: Mapping[str, str]
    files: tuple[str, ...]


def pull(
    source: Reference | Path,
    into: Path,
    credentials: Credentials | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    tag: str = "",
    sleep: Callable[[float], None] = time.sleep,
) -> PulledImage:
    """Put the files that the image has under ``/data`` into the folder ``into``, which is made if need be.

    ``source`` is an image in a registry or the folder of an OCI layout (``tag`` names the image in it if there are
    several). Files of the same name in ``into`` are replaced, others stay. Nothing is put there unless the whole image is
    sound. ``max_bytes`` bounds what is downloaded and what is unpacked.
    """
    try:
        into.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # Beside the files, so that putting one in its place is a rename; it may be a mount, so not beside the folder.
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=into, prefix=".pull-")))
            images = stack.enter_context(open_images(source, credentials, tag=tag, sleep=sleep))
            digest, manifest = choose(images)
            files = _unpack(images, manifest, scratch, max_bytes)
            for name, content in files.items():
                target = into / name
                target.parent.mkdir(parents=True, exist_ok=True)
                content.chmod(0o644)
                content.replace(target)
    except OSError as e:
        raise Failure(
            f"{source} cannot be put into {into}: {e.strerror or e}", "make room there, or mend its permissions"
        ) from e
    return PulledImage(digest, manifest.annotations, tuple(sorted(files)))


class Images(Protocol):
    """Where manifests and layers come from."""

    @property
    def name(self) -> str:
        """What the person asked for, for messages."""
        ...

    def manifest(self, digest: str = "") -> tuple[Descriptor, bytes]:
        """The image that was asked for, or one by its digest."""
        ...

    def layer(self, descriptor: Descriptor, into: Path, on_bytes: OnBytes = lambda _: None) -> Path:
        """A file with the layer, checked against its digest: ``into``, or one that is not ours. A download goes on with what is in
        ``into``, and leaves there what has come when it breaks."""
        ...


@dataclass(frozen=True)
class _Remote:
    name: str
    client: RegistryClient

    def manifest(self, digest: str = "") -> tuple[Descriptor, bytes]:
        reference = self.client.reference
        return self.client.manifest(digest or reference.digest or reference.tag)

    def layer(self, descriptor: Descriptor, into: Path, on_bytes: OnBytes = lambda _: None) -> Path:
        self.client.download(descriptor, into, on_bytes, resume=True)
        return into


@dataclass(frozen=True)
class _Local:
    name: str
    layout: Layout
    tag: str

    def manifest(self, digest: str = "") -> tuple[Descriptor, bytes]:
        if not digest:
            descriptor = self.layout.find(self.tag)
        else:
            path = self.layout.path / "blobs" / "sha256" / digest.removeprefix("sha256:")
            descriptor = Descriptor("", digest, path.stat().st_size if path.is_file() else 0)
        return descriptor, self.layout.read(descriptor)

    def layer(self, descriptor: Descriptor, into: Path, on_bytes: OnBytes = lambda _: None) -> Path:
        path = self.layout.blob_path(descriptor)
        with path.open("rb") as f:
            if f"sha256:{hashlib.file_digest(f, 'sha256').hexdigest()}" != descriptor.digest:
                raise Failure(f"{self.name}: the layer {descriptor.digest} is damaged", "build the image again")
        return path


@contextlib.contextmanager
def open_images(
    source: Reference | Path,
    credentials: Credentials | None = None,
    *,
    tag: str = "",
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Images]:
    """The registry, or the OCI layout, that an image is read from."""
    if isinstance(source, Path):
        yield _Local(str(source), Layout.open(source), tag)
    else:
        with RegistryClient(source, credentials, sleep=sleep) as client:
            yield _Remote(str(source), client)


def digest_of(reference: Reference, credentials: Credentials | None = None) -> str:
    """The digest that the reference's tag has in the registry now."""
    with open_images(reference, credentials) as images:
        return images.manifest()[0].digest


def choose(images: Images) -> tuple[str, Manifest]:
    """The image itself; from a list of platforms the one for linux/amd64, else the first, for data has no platform."""
    digest = ""
    for _ in range(_MAX_DEPTH):
        descriptor, content = images.manifest(digest)
        where = f"{images.name}: the manifest {descriptor.digest}"
        document = read_document(content, where)
        if not is_index(document):
            return descriptor.digest, read_manifest(document, where)
        entries = read_index(document, where)
        if not entries:
            raise Failure(f"{where} is an empty list", "push the image anew")
        wanted = [e for e in entries if (e.platform.get("os"), e.platform.get("architecture")) == ("linux", "amd64")]
        digest = (wanted or list(entries))[0].digest
    raise Failure(f"{images.name} is a list of lists of lists", "push the image anew")


def _unpack(images: Images, manifest: Manifest, scratch: Path, max_bytes: int) -> dict[str, Path]:
    """The files by their path below ``/data``, with where their contents are."""
    size = sum(layer.size for layer in manifest.layers)
    if size > max_bytes:
        raise Failure(
            f"{images.name} has {size:,} bytes, {max_bytes:,} are allowed", "use a smaller image, or allow more bytes"
        )
    found = DataFiles(scratch, max_bytes)
    for content in contents(manifest, images.name):
        lay(images, content, found, scratch / "layer")
    if not found.files:
        raise UserError(f"{images.name} has no files under /{DATA}", f"put the files into /{DATA} of the image")
    return {name.removeprefix(f"{DATA}/"): path for name, path in found.files.items()}


def lay(images: Images, content: Content, found: DataFiles, into: Path, on_bytes: OnBytes = lambda _: None) -> None:
    """Fetch one layer, by way of the file ``into``, and lay it over those before it."""
    where = f"{images.name}: the layer {content.layer.digest}"
    path = images.layer(content.layer, into, on_bytes)
    if content.kind != "file":
        found.add_layer(path, where, DATA if content.kind == "archive" else "")
        into.unlink(missing_ok=True)
    else:
        if path != into:
            shutil.copyfile(path, into)
        found.add_file(into, content.name, where)
