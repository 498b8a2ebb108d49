"""Holds the first requests to an endpoint while it comes back from zero.

The controller puts the address of the activator into the Service of an endpoint that has no ready pod. A request that arrives
there asks the controller to bring the endpoint back (`wake`), waits, and is handed to the pod when there is one. Once the pod is
in the Service itself, nothing passes through here any more.

    client ──> Service ──> Activator ──wake()──> controller ──> machine, pod
                              └────────── ready() ──────────────────┘

A thread with an event loop of its own; everything public may be called from any thread and returns at once. What is known is
lost when the process ends: clients see their connection break and try again, at the next leader's.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import queue
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

from kaito_core.problems import Failure
from kaito_core.serving.activator_client import Client, Held
from kaito_core.serving.activator_endpoint import Endpoint, Key
from kaito_core.serving.activator_gate import Gate, Lock
from kaito_core.serving.activator_http import PIECE, Limits, host_and_port
from kaito_core.serving.activator_requests import converse
from kaito_core.serving.open_files import allow_many

T = TypeVar("T")

SPARE: Final = 512
"""Connections of an endpoint beyond the requests that may wait: those that get a 429, probes, idle ones."""

FULL: Final = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 10\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

ANSWER: Final = 30.0
"""Seconds in which the loop must have done what it is asked for; it takes milliseconds."""

log = logging.getLogger("kaito_core.serving.activator")


class _Stopped(Exception):
    pass


class Activator:
    """Listens for endpoints that are not there.

    ``host`` is the address to listen on, empty for all; ``ports`` those that may be used, by default whatever the system gives.
    A port is not used again before all others were, since a Service may still send requests to its old one for some seconds:
    let ``ports`` have many more than there are endpoints. ``wake`` is called in a thread of its own, and so is ``lock``, which says
    what API key an endpoint asks for. A request waits for ``patience`` seconds at most, ``waiting`` of them per endpoint.
    """

    def __init__(
        self,
        host: str,
        wake: Callable[[Key], None],
        *,
        lock: Callable[[Key], Lock] = lambda key: Lock(),
        ports: range | None = None,
        patience: float = 600.0,
        waiting: int = 1000,
        limits: Limits | None = None,
    ) -> None:
        self._host, self._wake, self._lock_of, self._ports = host, wake, lock, ports
        self._patience, self._most, self._limits = patience, waiting, limits or Limits()
        self._held = Held(self._limits.held)
        self._next_port = 0
        self._endpoints: dict[Key, Endpoint] = {}
        self._servers: dict[Key, tuple[int, asyncio.Server]] = {}
        self._tasks: dict[asyncio.Task[None], tuple[Client, Endpoint]] = {}
        self._wakes: queue.SimpleQueue[Key | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = asyncio.Event()
        self._lock = asyncio.Lock()
        self._timeout = 0.0

    def start(self) -> None:
        """Begin; returns when `listen` may be called."""
        assert self._thread is None, "an activator starts once"
        allow_many()
        started = threading.Event()
        threading.Thread(target=self._call_wake, name="activator-wake", daemon=True).start()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(started)), name="activator", daemon=True)
        self._thread.start()
        started.wait()

    def stop(self, timeout: float) -> None:
        """No more requests. Those that wait get a 503 now, those that are being answered have ``timeout`` seconds to end."""
        if self._thread is None:
            return

        def begin() -> None:
            self._timeout = timeout
            self._stopping.set()

        self._post(begin)
        self._thread.join(timeout + ANSWER)

    def listen(self, key: Key) -> int:
        """Listen for this endpoint, if that is not done yet; the port. Raises `Failure` when there is none."""
        return self._ask(lambda: self._listen(key))

    def forget(self, key: Key) -> None:
        """Listen no more; what is being answered is ended. Take the address out of the Service some seconds before: what
        arrives afterwards finds the port closed."""
        self._post(self._forget, key)

    def ready(self, key: Key, address: str) -> None:
        """The endpoint is there, as ``http://HOST:PORT``: what waits is sent to it, and what comes. Raises ValueError."""
        host_and_port(address)
        self._post(lambda: self._endpoint(key).ready(address))

    def asleep(self, key: Key, words: str = "") -> None:
        """The endpoint is not there. ``words`` say what is being waited for, to clients: ``waiting for a machine``."""
        self._post(lambda: self._endpoint(key).asleep(words))

    def refuse(self, key: Key, message: str) -> None:
        """The endpoint will not come: what waits gets a 503 with these words, and so does what comes until it is time for the
        next `wake`."""
        self._post(lambda: self._endpoint(key).refuse(message))

    def waiting(self, key: Key) -> int:
        """How many requests wait for this endpoint."""
        endpoint = self._endpoints.get(key)
        return len(endpoint.waiters) if endpoint else 0

    # Between threads

    def _post(self, what: Callable[..., None], *args: Any) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: stopped
                self._loop.call_soon_threadsafe(partial(what, *args))

    def _ask(self, what: Callable[[], Coroutine[Any, Any, T]]) -> T:
        failure = Failure("the activator does not run", "it ends with the controller; start that again")
        if self._loop is None or self._loop.is_closed():
            raise failure
        asked = asyncio.run_coroutine_threadsafe(what(), self._loop)
        try:
            return asked.result(ANSWER)
        except (_Stopped, TimeoutError, CancelledError):
            asked.cancel()
            raise failure from None

    def _call_wake(self) -> None:
        while (key := self._wakes.get()) is not None:
            try:
                self._wake(key)
            except Exception:
                log.exception("%s/%s could not be woken", *key)

    # On the loop

    async def _main(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        started.set()
        await self._stopping.wait()
        for key in list(self._servers):
            self._close(self._servers.pop(key)[1])
        for endpoint in {*self._endpoints.values(), *(e for _, e in self._tasks.values())}:
            endpoint.close("the activator ends; another takes over", everyone=True)
        self._send_idle_away()
        end = self._loop.time() + self._timeout
        # Once more for connections that were being accepted just now.
        for _ in range(2):
            while self._tasks and self._loop.time() < end:
                await asyncio.wait(set(self._tasks), timeout=end - self._loop.time())
            for task, (client, _endpoint) in self._tasks.items():
                client.abort()
                task.cancel()
            if self._tasks:
                await asyncio.wait(set(self._tasks))
            await asyncio.sleep(0)
        self._wakes.put(None)

    def _endpoint(self, key: Key) -> Endpoint:
        if key not in self._endpoints:
            gate = Gate(partial(self._lock_of, key))
            self._endpoints[key] = Endpoint(key, self._wakes.put, gate, self._most, self._limits)
        return self._endpoints[key]

    async def _listen(self, key: Key) -> int:
        # One at a time: several threads may ask for one endpoint at once.
        async with self._lock:
            while key not in self._servers:
                if self._stopping.is_set():
                    raise _Stopped
                endpoint = self._endpoint(key)
                sock = self._socket(key)
                port = sock.getsockname()[1]
                server = await asyncio.start_server(partial(self._connected, endpoint), sock=sock, limit=PIECE)
                if self._stopping.is_set() or self._endpoints.get(key) is not endpoint:
                    self._close(server)  # stopped or forgotten meanwhile
                    continue
                self._servers[key] = port, server
                log.info("holding requests to %s on port %d", endpoint, port)
            return self._servers[key][0]

    def _socket(self, key: Key) -> socket.socket:
        tries = [0] if self._ports is None else list(self._ports)
        tries = tries[self._next_port :] + tries[: self._next_port]
        reason = "there is none"
        for port in tries:
            if self._ports is not None:
                self._next_port = (self._next_port + 1) % len(self._ports)
            try:
                return _listening(self._host, port)
            except OSError as e:
                reason = f"{e.strerror or e}"
                if e.errno not in (errno.EADDRINUSE, errno.EACCES):
                    break
        where = f"a port of {self._ports.start} to {self._ports.stop - 1}" if self._ports else "a port"
        raise Failure(
            f"the activator found no port for the endpoint {'/'.join(key)}: {where} on {self._host or '*'} cannot be listened on: "
            f"{reason}",
            "give the activator more ports",
        )

    def _forget(self, key: Key) -> None:
        if key in self._servers:
            self._close(self._servers.pop(key)[1])
        if key in self._endpoints:
            endpoint = self._endpoints.pop(key)
            endpoint.close(f"the endpoint {endpoint} is not held here any more", everyone=False)
            self._send_idle_away(endpoint)

    def _close(self, server: asyncio.Server) -> None:
        """Listen no more. What was accepted a moment ago still gets its handler first: asyncio drops a connection whose server is closed
        between the two, without closing it, and its client would wait (`Server._attach` in Python 3.11 to 3.13)."""
        assert self._loop is not None
        for sock in server.sockets:
            self._loop.remove_reader(sock.fileno())
        self._loop.call_soon(server.close)

    def _send_idle_away(self, endpoint: Endpoint | None = None) -> None:
        for task, (client, its) in self._tasks.items():
            if client.idle and endpoint in (None, its):
                task.cancel()

    def _connected(self, endpoint: Endpoint, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if endpoint.connections >= self._most + SPARE:
            writer.write(FULL)
            writer.close()
            return
        client = Client(reader, writer, self._limits)
        task = asyncio.get_running_loop().create_task(
            converse(client, endpoint, self._patience, self._held, self._limits)
        )
        endpoint.connections += 1
        self._tasks[task] = client, endpoint
        task.add_done_callback(partial(self._ended, client, endpoint))

    def _ended(self, client: Client, endpoint: Endpoint, task: asyncio.Task[None]) -> None:
        endpoint.connections -= 1
        del self._tasks[task]
        # A task that was cancelled before it ran a step has closed nothing.
        client.abort()
        if not task.cancelled() and (error := task.exception()):
            log.error("a connection to %s failed", endpoint, exc_info=error)


def _listening(host: str, port: int) -> socket.socket:
    everywhere = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if everywhere or ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=everywhere)
