"""The world around an activator: a real server behind it that can be told to misbehave, and clients that speak raw bytes."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11

from kaito_core.serving.activator import Activator
from kaito_core.serving.activator_http import Limits

KEY = ("team", "phi")

IMPATIENT = Limits(comment=0.1, wake=0.3)


def until(true: Callable[[], Any], what: str = "it did not happen", seconds: float = 20.0) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def sockets() -> int:
    """How many this process has open."""
    count = 0
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            count += str(fd.readlink()).startswith("socket:")
    return count


@contextmanager
def nothing_left() -> Iterator[None]:
    """No socket and no thread more than before."""
    before, threads = sockets(), set(threading.enumerate())
    yield
    until(lambda: sockets() <= before, "sockets are left")
    until(lambda: not [t for t in threading.enumerate() if t not in threads], "threads are left")


@dataclass
class Wakes:
    """Remembers whom the activator woke."""

    keys: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, key: tuple[str, str]) -> None:
        self.keys.append(key)


@contextmanager
def activating(wake: Callable[[tuple[str, str]], None] | None = None, **options: Any) -> Iterator[Activator]:
    """An activator that has left nothing behind in the end, neither before it was stopped nor after."""
    activator = Activator("127.0.0.1", wake or Wakes(), **{"limits": IMPATIENT, **options})
    with nothing_left():
        activator.start()
        try:
            yield activator
            if not activator._stopping.is_set():
                until(lambda: tasks(activator) == 1, "tasks are left")
            assert activator._held.bytes == 0
        finally:
            activator.stop(1.0)


def tasks(activator: Activator) -> int:
    """How many there are on its loop; one of them is the activator's own."""

    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    assert activator._loop is not None
    return asyncio.run_coroutine_threadsafe(count(), activator._loop).result(10)


class Wire:
    """A client that sends what it wants. A context manager."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)

    def send(self, data: bytes) -> Wire:
        self.socket.sendall(data)
        return self

    def until(self, end: bytes) -> bytes:
        """What comes, up to and with these bytes."""
        data = b""
        while not data.endswith(end):
            piece = self.socket.recv(1)
            assert piece, f"the connection ended after {data!r}"
            data += piece
        return data

    def rest(self) -> bytes:
        """What comes until the connection ends."""
        data = bytearray()
        while piece := self.socket.recv(65536):
            data += piece
        return bytes(data)

    def ended(self) -> bool:
        """Wait for the end of the connection, clean or not; whether it was clean."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            return False
        return True

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """As when the process was killed with unread data, or by a firewall."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


class Talk:
    """One connection to the server in the pod."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.http = h11.Connection(h11.SERVER)
        self.reader, self.writer = reader, writer
        self.body = b""

    async def head(self) -> h11.Request | None:
        event = await self.event()
        return event if isinstance(event, h11.Request) else None

    async def event(self) -> Any:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self.reader.read(65536))
        return event

    async def read(self) -> bytes:
        while isinstance(event := await self.event(), h11.Data):
            self.body += event.data
        return self.body

    async def send(self, event: Any) -> None:
        self.writer.write(self.http.send(event) or b"")
        await self.writer.drain()

    async def answer(self, status: int, body: bytes, headers: Any = ()) -> None:
        await self.send(h11.Response(status_code=status, headers=[*headers, ("Content-Length", str(len(body)))]))
        if body and self.http.our_state is h11.SEND_BODY:
            await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()


Behaviour = Callable[[Talk, h11.Request], Awaitable[None]]


async def echo(talk: Talk, request: h11.Request) -> None:
    """Answers with what it was sent."""
    await talk.answer(200, await talk.read(), [("Content-Type", "application/octet-stream")])


class Pod:
    """A real HTTP server in a thread. A context manager."""

    def __init__(self, behaviour: Behaviour = echo, port: int = 0) -> None:
        self.behaviour = behaviour
        self.seen: list[h11.Request] = []
        self.open = 0
        self._port = port
        self._started = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Pod:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Killed."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, backlog=2048)
        self._port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        talk = Talk(reader, writer)
        try:
            while (request := await talk.head()) is not None:
                self.seen.append(request)
                await self.behaviour(talk, request)
                if talk.http.our_state is not h11.DONE or talk.http.their_state is not h11.DONE:
                    break
                talk.http.start_next_cycle()
        except (OSError, h11.ProtocolError):
            pass
        finally:
            self.open -= 1
            with suppress(RuntimeError):
                writer.close()


def free_port() -> int:
    """One where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def free_ports(count: int) -> range:
    """So many one after the other where nobody listens."""
    while True:
        first = free_port()
        found = range(first, min(first + count, 65536))
        with ExitStack() as stack, suppress(OSError):
            for port in found:
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            if len(found) == count:
                return found


class Asking(threading.Thread):
    """A request in a thread, whose answer can be waited for."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        super().__init__()
        self._ask = ask
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._ask()
        except BaseException as e:
            self._error = e

    def result(self) -> Any:
        self.join(30)
        assert not self.is_alive(), "no answer"
        if self._error:
            raise self._error
        return self._result
