"""The endpoint's side of the activator: one connection to the server in its pod."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Final

import h11

from kaito_core.serving.activator_http import PIECE, BrokenOff, NoAnswer, Unreachable, host_and_port, watch_peer

HEAD_BYTES: Final = 256 << 10
"""Bytes of an answer's head; it comes from our own server."""


class Server:
    """One connection to the endpoint's own server, for one request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES)
        self._reader, self._writer = reader, writer
        watch_peer(writer.get_extra_info("socket"))

    @staticmethod
    async def connect(address: str, seconds: float) -> Server:
        """``address`` is ``http://HOST:PORT``. Raises `Unreachable`."""
        host, port = host_and_port(address)
        try:
            async with asyncio.timeout(seconds):
                return Server(*await asyncio.open_connection(host, port, limit=PIECE))
        except TimeoutError:
            raise Unreachable(f"no connection to it within {seconds:g} s") from None
        except OSError as e:
            raise Unreachable(f"no connection to it: {os.strerror(e.errno) if e.errno else e}") from None

    async def upload(self, request: h11.Request, piece_of_body: Callable[[], Awaitable[bytes]]) -> None:
        """Send the request; ``piece_of_body`` gives the next piece, empty at the end. Raises `OSError` when the server does not
        want it."""
        self._writer.write(self._http.send(request) or b"")
        while piece := await piece_of_body():
            self._writer.write(self._http.send(h11.Data(data=piece)) or b"")
            await self._writer.drain()
        self._writer.write(self._http.send(h11.EndOfMessage()) or b"")
        await self._writer.drain()

    async def head(self) -> h11.Response:
        """The head of the answer. Raises `BrokenOff` and `NoAnswer`."""
        while True:
            event = await self._event()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise NoAnswer("its answer is not HTTP")

    async def piece(self) -> bytes:
        """What comes next of the answer's body, empty at the end. Raises `BrokenOff`."""
        event = await self._event()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    def close(self) -> None:
        self._writer.transport.abort()

    async def _event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        waits = self._http.their_state is not h11.SEND_BODY
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                data = await self._reader.read(PIECE)
                if not data and waits:
                    raise BrokenOff("it closed the connection without an answer")
                self._http.receive_data(data)
        except OSError as e:
            raise BrokenOff(f"the connection broke: {e.strerror or e}") from None
        except h11.RemoteProtocolError as e:
            if waits:
                raise NoAnswer(f"its answer is not HTTP: {e}") from None
            raise BrokenOff(f"its answer broke off: {e}") from None
        return event
