"""uvicorn's connection, with an end for clients that do not get on with the head of their request.

uvicorn has time-outs between requests and none for a request: a client that sends a header now and then keeps its connection for ever, and with
it one of the files that a process may have open. Bodies are bounded by the face (`kaito_core.serving.intake`)."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from kaito_core.serving.errors import HttpError

HEAD_SECONDS: Final = 10.0
"""For the head of a request, from its first byte (of the first one: from the start of the connection); the activator's too."""


class Connection(H11Protocol):
    """One connection of a client."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    @property
    def _has_request(self) -> bool:
        # uvicorn declares that there always is one.
        cycle = cast(Any, self.cycle)
        return cycle is not None and not cycle.response_complete

    def _look(self) -> None:
        if self._has_request or self.transport.is_closing():
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._has_request or self.transport.is_closing():
            return
        if cast(Any, self.cycle) is None:
            error = HttpError(
                408, f"the head of the request did not come within {HEAD_SECONDS:g} s", code="request_timeout"
            )
            body = json.dumps(error.body()).encode()
            head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()
