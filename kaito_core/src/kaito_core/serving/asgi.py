"""The little of ASGI that the face needs: types, an answer in one piece, and a call of the application behind it.

The specification is https://asgi.readthedocs.io/en/latest/specs/www.html."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CLIENT_GONE: Final = 499
"""nginx' code for a client that closed the connection before the answer was complete."""

_OF_THE_BODY: Final = frozenset({
    b"accept", b"accept-encoding", b"content-encoding", b"content-length", b"content-type", b"expect", b"range",
    b"transfer-encoding",
})  # fmt: skip
"""Headers that are about the outer request's body or the form of its answer: an inner call has its own."""


@dataclass(frozen=True)
class Answer:
    """What an application answered to an inner call."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON; None when it is not."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


async def call(app: App, scope: Scope, receive: Receive, method: str, path: str, body: Any = None) -> Answer:
    """Ask the application itself, within the process, as the client of ``scope`` would, and wait for the whole answer.

    ``receive`` is the outer request's, its body read: a client that goes away is thereby told to the application."""
    content = b"" if body is None else json.dumps(body).encode()
    headers = [(name, value) for name, value in scope["headers"] if name not in _OF_THE_BODY]
    headers += [(b"content-length", str(len(content)).encode()), (b"accept", b"*/*")]
    if body is not None:
        headers.append((b"content-type", b"application/json"))
    root = scope.get("root_path", "")
    inner: Scope = {
        **scope,
        "method": method,
        "path": root + path,
        "raw_path": (root + path).encode(),
        "query_string": b"",
        "headers": headers,
        "extensions": {},
        "state": dict(scope.get("state") or {}),
    }
    status, answered, parts = 0, {}, []

    async def inner_send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            answered.update({k.decode("latin-1").lower(): v.decode("latin-1") for k, v in message.get("headers", ())})
        elif message["type"] == "http.response.body":
            parts.append(bytes(message.get("body", b"")))

    await app(inner, once_more(content, receive), inner_send)
    return Answer(status, answered, b"".join(parts))


def once_more(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives this body, and then what ``receive`` has, whose body was read."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


async def respond(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    """One whole answer."""
    pairs = [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
    pairs.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def respond_json(send: Send, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
    """One whole answer of JSON."""
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    await respond(send, status, body, {"content-type": "application/json", **(headers or {})})


class Watched:
    """Passes messages on to ``send`` and remembers the status and whether the answer was sent to its end."""

    __slots__ = ("_send", "ended", "status")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.ended = False

    def __call__(self, message: Message) -> Awaitable[None]:
        # No coroutine of its own: this is called for every token of a stream.
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif not message.get("more_body", False):
            self.ended = True
        return self._send(message)

    @property
    def code(self) -> int:
        """The status, or 499 when the answer has not come to its end."""
        return self.status if self.ended else CLIENT_GONE
