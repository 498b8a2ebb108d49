"""HTTP/1.1 of the activator: what its two sides, to clients and to endpoints, have in common."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

PIECE: Final = 64 << 10
"""Bytes that are read or sent at once."""

Headers = list[tuple[bytes, bytes]]

HOP_BY_HOP: Final = frozenset({
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade",
})  # fmt: skip
"""Headers that are about one connection (RFC 9110 section 7.6.1); a ``Connection`` header may name more."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the activator bears: times in seconds, sizes in bytes."""

    head: float = 10.0
    """For the head of a request, from its first byte (of the first one: from the start of the connection)."""
    idle: float = 60.0
    """Between two requests on a connection."""
    silence: float = 60.0
    """In which a client that sends a body or takes an answer must get on; nginx gives it as long."""
    body_seconds: float = 30.0
    """For the body of a request that wants to wait, or as much of it as is held: what is half sent wakes no endpoint."""
    comment: float = 10.0
    """Between two signs of life to a client that streams."""
    wake: float = 30.0
    """Between two calls of ``wake`` for an endpoint."""
    connect: float = 5.0
    """For a connection to the endpoint's server."""
    body: int = 1 << 20
    """Of a request's body that are held while it waits; the rest stays in the client until the endpoint is there."""
    held: int = 128 << 20
    """Of all bodies together. When they are used up, `PIECE` of each further request."""


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class CutOff(Exception):
    """The answer that the client is getting cannot be completed."""


class Malformed(Exception):
    """What the client sends is not HTTP, or too much, or too slow."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Unreachable(Exception):
    """No connection to the endpoint's server: the request was not sent."""


class BrokenOff(Exception):
    """The connection to the endpoint's server ended before its answer did."""


class NoAnswer(Exception):
    """What the endpoint's server sends is not HTTP."""


def end_to_end(headers: Iterable[tuple[bytes, bytes]], without: Iterable[bytes] = ()) -> Headers:
    """The headers that a proxy hands on, in their order and spelling; ``without`` are further names, in lower case."""
    headers = list(headers)
    named = b",".join(value for name, value in headers if name.lower() == b"connection")
    dropped = {*HOP_BY_HOP, *without, *(name.strip().lower() for name in named.split(b","))}
    # The length is not a header that the other side may call its own.
    dropped.discard(b"content-length")
    return [(name, value) for name, value in headers if name.lower() not in dropped]


def watch_peer(sock: socket.socket) -> None:
    """Let the kernel find out within about half a minute that the other machine is gone without a word."""
    with suppress(OSError):  # it is gone already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def hung_up(sock: socket.socket) -> bool:
    """Whether the other side has closed or reset the connection, also when there are bytes that nobody has read yet."""
    if sock.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))


def host_and_port(address: str) -> tuple[str, int]:
    """``http://HOST:PORT`` in its parts. Raises ValueError for anything else."""
    parts = urlsplit(address)
    if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path.strip("/") or parts.query:
        raise ValueError(f"{address!r} is not an address of the form http://HOST:PORT")
    return parts.hostname, parts.port


def path_of(target: bytes) -> bytes | None:
    """The target of a request as a path with its query, also where it was written for a proxy (``http://HOST/PATH``); None when
    it is neither."""
    lower = target[:8].lower()
    if lower.startswith((b"http://", b"https://")):
        rest = target.partition(b"://")[2]
        slash = min((i for i in (rest.find(b"/"), rest.find(b"?")) if i >= 0), default=len(rest))
        path = rest[slash:]
        return path if path.startswith(b"/") else b"/" + path
    return target if target.startswith(b"/") or target == b"*" else None
