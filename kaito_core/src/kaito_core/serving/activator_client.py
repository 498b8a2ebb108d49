"""The clients' side of the activator: one connection, and a request's body of which only so much is held."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

import h11

from kaito_core.serving.activator_http import (
    PIECE,
    ClientGone,
    Headers,
    Limits,
    Malformed,
    hung_up,
    path_of,
    watch_peer,
)

HEAD_BYTES: Final = 64 << 10
"""Bytes of a request's head, about; uvicorn's limit too."""

LINGER: Final = 2.0
"""Seconds for which what a client still sends is thrown away. A connection that is closed with unread bytes is reset, and a
reset may overtake the answer (RFC 9112 section 9.6)."""


class Held:
    """How many bytes of bodies are in memory, of all requests together."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0


class Body:
    """A request's body as far as it has come. It can be read from its beginning again until something of it was let go."""

    def __init__(self, held: Held, most: int) -> None:
        self.complete = False
        self.whole = True
        """Nothing was let go."""
        self.at_end: Callable[[], None] = lambda: None
        """Called when it is complete."""
        self.room = asyncio.Event()
        """Set when something was let go."""
        self.enough = asyncio.Event()
        """Set when it is complete, or as much of it is here as may be held."""
        self._arrived = asyncio.Event()
        self._data = bytearray()
        self._position = 0
        self._held = held
        self._most = most
        self._keep = True
        self._wanted = True

    @property
    def full(self) -> bool:
        """Whether no more should be read now."""
        return len(self._data) > self._most or (self._held.bytes > self._held.most and len(self._data) > PIECE)

    @property
    def data(self) -> bytes:
        """What is held of it."""
        return bytes(self._data)

    def add(self, data: bytes | bytearray) -> None:
        if self._wanted:
            self._data += data
            self._held.bytes += len(data)
            self._arrived.set()

    def end(self) -> None:
        self.complete = True
        self.enough.set()
        self._arrived.set()
        self.at_end()

    def rewind(self) -> None:
        """To its beginning. Only while it is whole."""
        self._position = 0

    async def piece(self) -> bytes:
        """What comes next, empty at the end. What was read is kept as long as there is room for it."""
        while self._position == len(self._data):
            if self.complete:
                return b""
            self._arrived.clear()
            await self._arrived.wait()
        piece = bytes(self._data[self._position : self._position + PIECE])
        self._position += len(piece)
        if not self._keep or (self.full and not self.complete):
            self._drop(self._position)
        return piece

    def sent_for_good(self) -> None:
        """It will not be read from the beginning again."""
        self._keep = False
        self._drop(self._position)

    async def rest(self) -> None:
        """Throw away what is there and what comes, until its end."""
        self._wanted = False
        self._drop(len(self._data))
        while not self.complete:
            self._arrived.clear()
            await self._arrived.wait()

    def close(self) -> None:
        """Give the memory back."""
        self._wanted = False
        self._drop(len(self._data))

    def _drop(self, count: int) -> None:
        del self._data[:count]
        self._position = max(0, self._position - count)
        self._held.bytes -= count
        self.whole = False
        self.room.set()


class Client:
    """One connection of a client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: Limits) -> None:
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self.idle = True
        """No request is under way."""
        self.began = False
        """Something of the answer to the present request was sent."""
        self._reader, self._writer, self._limits = reader, writer, limits
        self._socket: socket.socket = writer.get_extra_info("socket")
        self._method = b""
        self._requests = 0
        self._cut = False
        watch_peer(self._socket)

    async def request(self) -> h11.Request | None:
        """The head of the next request; None when no more will come. Raises `Malformed`."""
        limits = self._limits
        if self._requests:
            self.http.start_next_cycle()
        self.idle, self.began, self._method = True, False, b""
        try:
            async with asyncio.timeout(limits.idle if self._requests else limits.head) as timer:
                while (event := self.http.next_event()) is h11.NEED_DATA:
                    data = await self._reader.read(PIECE)
                    if not data:
                        return None
                    if self.idle and self._requests:
                        timer.reschedule(asyncio.get_running_loop().time() + limits.head)
                    self.idle = False
                    self.http.receive_data(data)
        except TimeoutError:
            if self.idle:
                return None
            raise Malformed(408, f"the head of the request did not come within {limits.head:g} s") from None
        except h11.RemoteProtocolError as e:
            raise _malformed(e) from None
        except OSError:
            return None
        assert isinstance(event, h11.Request)
        self.idle = False
        self._requests += 1
        self._method = event.method
        names = {name for name, _ in event.headers}
        if event.http_version not in (b"1.0", b"1.1"):
            raise Malformed(505, "HTTP/1.1 and HTTP/1.0 are spoken here")
        if b"transfer-encoding" in names and (b"content-length" in names or event.http_version == b"1.0"):
            raise Malformed(400, "the request says in two ways where its body ends")
        if path_of(event.target) is None:
            raise Malformed(400, "the target of the request is not a path")
        return event

    async def take_in(self, body: Body) -> None:
        """Read the request's body as far as there is room, then wait for the client to leave; returns when it has. Raises
        `Malformed`. Whoever closes one direction only counts as gone, as with most servers."""
        try:
            for event_number in itertools.count(1):
                if body.complete:
                    break
                if body.full:
                    body.enough.set()
                    body.room.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(body.room.wait(), 1.0)
                    if body.full and hung_up(self._socket):
                        return
                    continue
                event = self.http.next_event()
                if event is h11.NEED_DATA:
                    if self.http.they_are_waiting_for_100_continue:
                        self._writer.write(self.http.send(h11.InformationalResponse(status_code=100, headers=[])))
                    async with asyncio.timeout(self._limits.silence):
                        data = await self._reader.read(PIECE)
                    if not data:
                        return
                    self.http.receive_data(data)
                elif isinstance(event, h11.Data):
                    body.add(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    body.end()
                if event_number % 256 == 0:
                    # Very many very small chunks must not hold everybody up.
                    await asyncio.sleep(0)
            while len(self.http.trailing_data[0]) < PIECE:
                data = await self._reader.read(PIECE)
                if not data:
                    return
                self.http.receive_data(data)
            while not hung_up(self._socket):
                await asyncio.sleep(1.0)
        except TimeoutError:
            raise Malformed(408, f"the body of the request did not get on for {self._limits.silence:g} s") from None
        except h11.RemoteProtocolError as e:
            raise _malformed(e) from None
        except OSError:
            return

    async def send(self, *events: h11.Event) -> None:
        """Raises `ClientGone`."""
        data = b"".join(self.http.send(event) or b"" for event in events)
        self.began = True
        self._writer.write(data)
        try:
            async with asyncio.timeout(self._limits.silence):
                await self._writer.drain()
        except (OSError, TimeoutError):
            raise ClientGone from None

    async def answer(
        self, status: int, content: bytes, content_type: str, headers: Headers | None = None, *, close: bool = False
    ) -> None:
        """One whole answer of our own. Raises `ClientGone`."""
        pairs: Headers = [
            (b"Content-Type", content_type.encode()),
            (b"Content-Length", str(len(content)).encode()),
            (b"Date", formatdate(usegmt=True).encode()),
            *(headers or ()),
        ]
        # Who was not told to go on may send the body or not: nobody could say where the next request begins.
        if close or self.http.they_are_waiting_for_100_continue:
            pairs.append((b"Connection", b"close"))
        events: list[h11.Event] = [h11.Response(status_code=status, headers=pairs, reason=HTTPStatus(status).phrase)]
        if self._method != b"HEAD":
            events.append(h11.Data(data=content))
        await self.send(*events, h11.EndOfMessage())

    @property
    def reusable(self) -> bool:
        """Whether another request may follow."""
        return self.http.our_state is h11.DONE and self.http.their_state is h11.DONE

    def abort(self) -> None:
        """End the connection now; what was not sent yet is lost."""
        self._writer.transport.abort()

    def cut_off(self) -> None:
        """End the connection in the middle of an answer, so that it does not look like a complete one. To who speaks HTTP/1.0 the
        end of the connection is the end of the answer, unless it is a reset."""
        if self.http.their_http_version != b"1.1":
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.abort()
        self._cut = True

    async def close(self) -> None:
        """End the connection when what was written has been sent."""
        ended = self.http.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED) and not self.http.trailing_data[0]
        unread = self.began and not self._cut and not ended
        try:
            if unread:
                with suppress(OSError, TimeoutError, RuntimeError):
                    self._writer.write_eof()
                    async with asyncio.timeout(LINGER):
                        while await self._reader.read(PIECE):
                            pass
            self._writer.close()
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(self._limits.silence):
                    await self._writer.wait_closed()
        finally:
            self.abort()


def _malformed(e: h11.RemoteProtocolError) -> Malformed:
    if e.error_status_hint == 431:
        return Malformed(431, f"the head of the request has more than {HEAD_BYTES} bytes")
    return Malformed(e.error_status_hint, f"this is not an HTTP request: {e}")
