"""How a request's body comes in: whole or not at all, bounded in bytes and in seconds, and in what all clients together make us hold."""

from __future__ import annotations

import asyncio
from typing import Final

from kaito_core.serving.asgi import Receive, Scope
from kaito_core.serving.errors import HttpError

SMALL_BODY_BYTES: Final = 64 << 10
"""A body of at most this size is taken in however many come at once: a conversation of ten thousand words."""

LARGE_BODIES_AT_ONCE: Final = 16
"""So many bodies of the largest size may be half here at once."""

RETRY_SECONDS: Final = 5


class Intake:
    """Reads bodies of at most ``most`` bytes, each in at most ``seconds``."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self.held = 0
        """Bytes of all bodies that are being read."""

    async def read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when the client went away first. Raises `HttpError`: 408 too slow, 413 too large, 429 too many large
        ones at once."""
        if _content_length(scope) > self._most:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                while (message := await receive())["type"] == "http.request":
                    piece = message.get("body", b"")
                    body += piece
                    self.held += len(piece)
                    if len(body) > self._most:
                        raise self._too_large()
                    if len(body) > SMALL_BODY_BYTES and self.held > LARGE_BODIES_AT_ONCE * self._most:
                        raise HttpError(429, "too many large requests are being sent at once: try again in a few seconds",
                                        code="rate_limit_exceeded", headers={"retry-after": str(RETRY_SECONDS)})  # fmt: skip
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise HttpError(
                408, f"the body of the request did not come within {self._seconds:g} s", code="request_timeout"
            ) from None
        finally:
            self.held -= len(body)
        return None

    def _too_large(self) -> HttpError:
        return HttpError(413, f"a request may have {self._most:,} bytes and not more", code="request_too_large")


def _content_length(scope: Scope) -> int:
    """What the client says; 0 when it says nothing that is a number: the body is counted in any case."""
    value = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
    # Python refuses to read numbers of more than 4,300 digits; 19 are more than any server can hold.
    return int(value.lstrip(b"0")[:19] or b"0") if value.isdigit() else 0
