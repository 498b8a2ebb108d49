"""One repository of a registry: manifests and blobs (OCI distribution specification v1.1).

Blobs up to ``chunk_bytes`` go up in one request, larger ones in chunks, so that a connection that breaks after an hour
costs one chunk and not the hour. Where a session stands is asked of the registry; one that it has forgotten starts anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx

from kaito_core.addresses import Resolve, resolve
from kaito_core.artifacts.credentials import Credentials
from kaito_core.artifacts.errors import RegistryError
from kaito_core.artifacts.http import Again, Body, RegistryHttp, read_bounded
from kaito_core.artifacts.manifest import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_MANIFEST_BYTES,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    digest_of,
)
from kaito_core.oci_reference import Reference

CHUNK_BYTES = 64 << 20
READ_BYTES = 1 << 20

OnBytes = Callable[[int], None]
"""Called with how many bytes of a blob have been sent or received; a chunk that is sent again makes the number go back."""

Pieces = Callable[[int, int], Iterator[bytes]]
"""The bytes of a blob from one position to another (exclusive), in pieces; read anew for every try."""


class RegistryClient:
    """The repository of ``reference``, over a connection that is closed at the end of the ``with`` block."""

    def __init__(
        self,
        reference: Reference,
        credentials: Credentials | None = None,
        *,
        attempts: int = 5,
        chunk_bytes: int = CHUNK_BYTES,
        sleep: Callable[[float], None] = time.sleep,
        resolver: Resolve = resolve,
    ) -> None:
        self.reference = reference
        self.chunk_bytes = chunk_bytes
        self._http = RegistryHttp(reference, credentials, attempts=attempts, sleep=sleep, resolver=resolver)

    def __enter__(self) -> Self:
        self._http.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.__exit__()

    def manifest(self, tag_or_digest: str) -> tuple[Descriptor, bytes]:
        """A manifest as it was pushed, checked against its digest if it was asked for by digest."""

        def receive(response: httpx.Response) -> tuple[Descriptor, bytes]:
            content = read_bounded(response, MAX_MANIFEST_BYTES + 1)
            if len(content) > MAX_MANIFEST_BYTES:
                raise self._http.error(f"the manifest {tag_or_digest} is larger than {MAX_MANIFEST_BYTES} bytes")
            return Descriptor.of(response.headers.get("Content-Type", "").partition(";")[0].strip(), content), content

        accept = ", ".join((OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST))
        descriptor, content = self._http.retry(
            lambda: self._http.once(
                "GET",
                f"manifests/{tag_or_digest}",
                doing="pull it",
                ok=(200,),
                receive=receive,
                headers={"Accept": accept},
            )
        )
        if tag_or_digest.startswith("sha256:") and descriptor.digest != tag_or_digest:
            raise self._http.error(
                f"the registry sent a manifest with the digest {descriptor.digest} for {tag_or_digest}"
            )
        return descriptor, content

    def put_manifest(self, tag_or_digest: str, media_type: str, content: bytes) -> str:
        """Store a manifest under a tag or its digest; its digest. Everything it points to must be there already."""
        digest = digest_of(content)
        told = self._http.retry(
            lambda: self._http.once(
                "PUT",
                f"manifests/{tag_or_digest}",
                doing="push the manifest",
                ok=(200, 201, 202),
                receive=_header("Docker-Content-Digest"),
                headers={"Content-Type": media_type, "Content-Length": str(len(content))},
                body=lambda: iter((content,)),
            )
        )
        if told and told != digest:
            raise self._http.error(f"the registry stored the manifest as {told}, its digest is {digest}")
        return digest

    def has_blob(self, digest: str) -> bool:
        """Whether the repository has the blob already. Asked with the right to push, which the next step needs anyway."""
        return self._http.retry(
            lambda: self._http.once(
                "HEAD", f"blobs/{digest}", doing="push to it", ok=(200, 404), receive=lambda r: r.status_code == 200
            )
        )

    def upload(self, blob: Path | Pieces, descriptor: Descriptor, on_bytes: OnBytes = lambda _: None) -> bool:
        """Make sure that the repository has the blob (a file, or what gives its bytes); False if it had it and nothing was
        sent."""
        if self.has_blob(descriptor.digest):
            return False
        pieces = _file_pieces(blob) if isinstance(blob, Path) else blob
        if descriptor.size <= self.chunk_bytes:
            self._http.retry(lambda: self._upload_whole(pieces, descriptor, on_bytes))
        else:
            _ChunkedUpload(self, pieces, descriptor, on_bytes).run()
        return True

    def download(
        self, descriptor: Descriptor, into: Path, on_bytes: OnBytes = lambda _: None, *, resume: bool = False
    ) -> None:
        """Write the blob to the file ``into``; not one byte more than its size, and only if its digest is right.

        A broken connection is followed by a request for the rest. With ``resume`` what is in ``into`` is taken for the blob's
        beginning, and what came stays there when the registry cannot be reached any more; otherwise nothing stays."""
        download = _Download(self._http, descriptor, into, on_bytes)
        try:
            if resume and into.is_file():
                download.take_up()
            else:
                into.write_bytes(b"")
            while not download.done:
                before = download.size
                try:
                    self._http.retry(download.run)
                except RegistryError as e:
                    # A line that breaks time and again still brings tens of gigabytes, as long as it brings something.
                    if e.reason != "unreachable" or download.size < before + self.chunk_bytes:
                        raise
        except BaseException:
            if download.wrong or not resume:
                into.unlink(missing_ok=True)
            raise

    def check_push(self) -> None:
        """Prove the right to push: start an upload and cancel it. Nothing stays. Raises `RegistryError`."""
        location = self._http.retry(self._start)
        # The right is proven by now; a registry that cannot cancel drops by itself what is never finished.
        with contextlib.suppress(Again):
            try:
                self._http.once("DELETE", location, doing="push to it", ok=(200, 202, 204), receive=lambda _: None)
            except RegistryError as e:
                if (
                    not e.status
                ):  # nothing may be sent to where it wants the upload: the push would fail for the same reason
                    raise

    def _start(self) -> str:
        """Open an upload session; its address."""
        return self._http.once(
            "POST",
            "blobs/uploads/",
            doing="push to it",
            ok=(202,),
            receive=self._location,
            headers={"Content-Length": "0"},
        )

    def _location(self, response: httpx.Response) -> str:
        location = response.headers.get("Location", "")
        if not location:
            raise self._http.error("the registry did not say where to upload to")
        return str(self._http.follow(response, location))

    def _upload_whole(self, pieces: Pieces, descriptor: Descriptor, on_bytes: OnBytes) -> None:
        # A session that broke within its only request is in an unknown state: every try has its own.
        self._finish(self._start(), descriptor, descriptor.size, _body(pieces, 0, descriptor.size, on_bytes))

    def _finish(self, location: str, descriptor: Descriptor, length: int, body: Body | None) -> None:
        told = self._http.once(
            "PUT",
            f"{location}{'&' if '?' in location else '?'}digest={descriptor.digest}",
            doing="push a layer",
            ok=(201,),
            receive=_header("Docker-Content-Digest"),
            headers={"Content-Type": "application/octet-stream", "Content-Length": str(length)},
            body=body,
        )
        if told and told != descriptor.digest:
            raise self._http.error(f"the registry stored the layer as {told}, its digest is {descriptor.digest}")


@dataclass
class _ChunkedUpload:
    """One blob on its way in chunks, and where it stands: ``offset`` bytes are with the registry."""

    client: RegistryClient
    pieces: Pieces
    descriptor: Descriptor
    on_bytes: OnBytes
    location: str = ""
    offset: int = 0
    doubtful: bool = False
    """A request failed half-way: the registry must be asked how much it has."""
    sessions: int = 0

    def run(self) -> None:
        http = self.client._http
        while self.offset < self.descriptor.size:
            http.retry(self._send_chunk)
        http.retry(self._finish)

    def _send_chunk(self) -> None:
        http = self.client._http
        if self.doubtful:
            self._ask()
        if not self.location:
            self._begin()
        before, end = self.offset, min(self.offset + self.client.chunk_bytes, self.descriptor.size)
        self.doubtful = True
        try:
            http.once(
                "PATCH",
                self.location,
                doing="push a layer",
                ok=(202, 204),
                receive=self._note,
                headers={
                    "Content-Type": "application/octet-stream",
                    "Content-Range": f"{before}-{end - 1}",
                    "Content-Length": str(end - before),
                },
                body=_body(self.pieces, before, end, self.on_bytes),
            )
        except RegistryError as e:
            if e.status != 416:  # 416: it has another number of bytes than we think
                raise
            raise Again(e) from e
        if self.offset <= before:
            raise Again(http.error(f"the registry took none of bytes {before} to {end} of {self.descriptor.digest}"))

    def _begin(self) -> None:
        self.sessions += 1
        if self.sessions > self.client._http.attempts:
            raise self.client._http.error(
                f"the registry forgot {self.sessions - 1} uploads of {self.descriptor.digest}"
            )
        self.location, self.offset = self.client._start(), 0

    def _ask(self) -> None:
        try:
            self.client._http.once("GET", self.location, doing="push a layer", ok=(200, 202, 204), receive=self._note)
        except RegistryError as e:
            if e.status not in (400, 404, 416):
                raise
            self.location = ""  # the session is gone, begin again
        self.doubtful = False

    def _note(self, response: httpx.Response) -> None:
        """Take over where the registry says that the session stands: ``Range: 0-N`` means N + 1 bytes."""
        match = re.fullmatch(r"(?:bytes=)?0-(\d{1,18})", response.headers.get("Range", "0-0"))
        if not match:
            raise self.client._http.error(
                f"the registry's Range header makes no sense: {response.headers['Range'][:80]!r}"
            )
        # No bytes at all are written as 0-0 too; a chunk is never one byte long.
        self.offset = int(match[1]) + 1 if match[1] != "0" else 0
        if self.offset > self.descriptor.size:
            raise self.client._http.error(f"the registry claims to have more than all of {self.descriptor.digest}")
        if "Location" in response.headers:
            self.location = self.client._location(response)
        self.doubtful = False

    def _finish(self) -> None:
        # After a broken connection the blob may be complete although nobody said so.
        if not self.doubtful or not self.client.has_blob(self.descriptor.digest):
            self.doubtful = True
            self.client._finish(self.location, self.descriptor, 0, None)


@dataclass
class _Download:
    """One blob on its way to a file: ``size`` bytes are there, and ``sha256`` has seen them."""

    http: RegistryHttp
    descriptor: Descriptor
    into: Path
    on_bytes: OnBytes
    size: int = 0
    wrong: bool = False
    """What came is not what the digest says: nothing to go on with."""
    done: bool = False

    def __post_init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def take_up(self) -> None:
        """Go on with the bytes that an earlier call left in the file."""
        with self.into.open("rb") as f:
            while piece := f.read(READ_BYTES):
                self._sha256.update(piece)
                self.size += len(piece)
        if self.size > self.descriptor.size:
            self._begin_again()

    def run(self) -> None:
        """One request for what is missing."""
        if self.size < self.descriptor.size or not self.descriptor.size:
            headers = {"Range": f"bytes={self.size}-"} if self.size else {}
            address = f"blobs/{self.descriptor.digest}"
            try:
                self.http.once(
                    "GET", address, doing="pull a layer", ok=(200, 206), receive=self._receive, headers=headers
                )
            except RegistryError as e:
                if e.status != 416 or not self.size:
                    raise
                self._begin_again()
                raise Again(e) from e
        if f"sha256:{self._sha256.hexdigest()}" != self.descriptor.digest:
            self.wrong = True
            raise self.http.error(f"the registry sent other content than {self.descriptor.digest}")
        self.done = True

    def _receive(self, response: httpx.Response) -> None:
        begins = f"bytes {self.size}-"
        if response.status_code == 200 and self.size:  # it does not know ranges, and sends everything
            self._begin_again()
        elif response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(begins):
            raise self.http.error(f"the registry sent another part of {self.descriptor.digest} than was asked for")
        with self.into.open("r+b") as f:
            f.seek(self.size)
            for piece in response.iter_raw(READ_BYTES):
                if self.size + len(piece) > self.descriptor.size:
                    self.wrong = True
                    raise self.http.error(
                        f"the registry sent more than the {self.descriptor.size} bytes of {self.descriptor.digest}"
                    )
                f.write(piece)
                self._sha256.update(piece)
                self.size += len(piece)
                self.on_bytes(self.size)

    def _begin_again(self) -> None:
        self.into.write_bytes(b"")
        self._sha256, self.size = hashlib.sha256(), 0


def check_push(
    reference: Reference, credentials: Credentials | None = None, *, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Prove, before any work is done, that the result can be pushed. Leaves nothing in the registry.

    Raises `RegistryError`; its ``reason`` tells an unreachable host, wrong credentials, a missing right and a missing
    repository apart.
    """
    with RegistryClient(reference, credentials, attempts=3, sleep=sleep) as client:
        client.check_push()


def _header(name: str) -> Callable[[httpx.Response], str]:
    def receive(response: httpx.Response) -> str:
        value: str = response.headers.get(name, "")
        return value

    return receive


def _body(pieces: Pieces, start: int, end: int, on_bytes: OnBytes) -> Body:
    """Bytes ``start`` to ``end`` (exclusive) of a blob as the body of a request, counted as they go."""

    def body() -> Iterator[bytes]:
        position = start
        for piece in pieces(start, end):
            position += len(piece)
            yield piece
            on_bytes(position)

    return body


def _file_pieces(path: Path) -> Pieces:
    def pieces(start: int, end: int) -> Iterator[bytes]:
        with path.open("rb") as f:
            f.seek(start)
            position = start
            while position < end:
                piece = f.read(min(READ_BYTES, end - position))
                if not piece:
                    raise OSError(f"{path} became shorter while it was sent")
                position += len(piece)
                yield piece

    return pieces
