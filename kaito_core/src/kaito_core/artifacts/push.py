"""An image from an OCI layout to a registry: blobs first, each only if it is missing there, the manifest last.

Until the manifest is there nobody can see a half-pushed image, and pushing again goes on where this one stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from kaito_core.artifacts.credentials import Credentials
from kaito_core.artifacts.layout import Layout
from kaito_core.artifacts.manifest import is_index, read_document, read_manifest
from kaito_core.artifacts.registry import CHUNK_BYTES, RegistryClient
from kaito_core.oci_reference import Reference
from kaito_core.problems import Failure, UserError

OnProgress = Callable[[int, int], None]
"""Called with the bytes that the registry has, and with all bytes of the image."""


def push(
    layout: Path,
    reference: Reference,
    credentials: Credentials | None = None,
    on_progress: OnProgress = lambda _done, _total: None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Push the layout's image with the reference's tag (or its only image) as ``reference``; the manifest's digest.

    Blobs larger than ``chunk_bytes`` go in chunks. Raises `UserError` if the folder or the reference is not fit for it, and
    `Failure` if something goes wrong on the way; the layout is only read, so the push can be finished later.
    """
    if reference.digest:
        raise UserError(f"{reference} names a digest; a push needs a tag", f"write {reference.name}:TAG")
    source = Layout.open(layout)
    entry = source.find(reference.tag)
    content = source.read(entry)
    document = read_document(content, f"{layout}: the manifest {entry.digest}")
    if is_index(document):
        raise UserError(
            f"{layout}: {entry.digest} is a list of images, not one image", "name a layout that kaito built"
        )
    blobs = read_manifest(document, f"{layout}: the manifest {entry.digest}").blobs
    paths = [source.blob_path(blob) for blob in blobs]
    total, done = sum(blob.size for blob in blobs), 0
    with RegistryClient(reference, credentials, chunk_bytes=chunk_bytes, sleep=sleep) as client:
        for blob, path in zip(blobs, paths, strict=True):
            start = done

            def sent(size: int, start: int = start) -> None:
                on_progress(start + size, total)

            client.upload(path, blob, sent)
            done += blob.size
            on_progress(done, total)
        digest = client.put_manifest(reference.tag, entry.media_type, content)
        stored, _ = client.manifest(reference.tag)
    if stored.digest != digest:
        raise Failure(
            f"{reference}: the registry has {stored.digest} under this tag, {digest} was pushed",
            "somebody else may have pushed the same tag at the same time: look, and push again",
        )
    return digest
