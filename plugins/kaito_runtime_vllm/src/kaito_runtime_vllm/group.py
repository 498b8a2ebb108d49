"""Several machines of one endpoint live and die together.

vLLM's engine does not come back when one of its machines is gone: the others wait for it, some of them for ever (seen with 0.32.0:
a headless worker goes on when its leader is killed). So each machine keeps a connection to the first one open, over which nothing
is said but a greeting. When a connection breaks, the engine at either end is ended with exit code 1, and whoever runs the
containers starts them again: all of them, since each end breaks the other connections.

This decides nothing about the engine; it ends it."""

from __future__ import annotations

import hmac
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Final

from kaito_core.problems import Failure

PORT: Final = 29502
"""Beside vLLM's own 29501."""

PATIENCE: Final = 600.0
"""Seconds that the others wait for the first machine: it may still be pulling its image."""

DYING: Final = 15.0
"""Seconds that an engine gets to end when the group is broken."""

_GREETING: Final = 64


def lead(command: Sequence[str], environ: Mapping[str, str], greeting: str, port: int = PORT) -> int:
    """Runs the first machine's engine; its exit code, 1 when one of the others is gone."""
    lost = threading.Event()
    with socket.create_server(("", port)) as server:
        threading.Thread(target=_accept, args=(server, _bytes(greeting), lost), daemon=True).start()
        return _run(command, environ, lost, "another machine of this endpoint is gone")


def follow(
    command: Sequence[str],
    environ: Mapping[str, str],
    greeting: str,
    leader: str,
    port: int = PORT,
    patience: float = PATIENCE,
) -> int:
    """Waits for the first machine and runs this one's engine; its exit code, 1 when the first machine is gone."""
    lost = threading.Event()
    with _connected(leader, port, patience) as connection:
        connection.sendall(_bytes(greeting))
        threading.Thread(target=_watch, args=(connection, lost), daemon=True).start()
        return _run(command, environ, lost, f"the first machine of this endpoint, {leader}, is gone")


def _bytes(greeting: str) -> bytes:
    return greeting.encode()[:_GREETING].ljust(_GREETING)


def _connected(leader: str, port: int, patience: float) -> socket.socket:
    until = time.monotonic() + patience
    while True:
        try:
            connection = socket.create_connection((leader, port), timeout=10)
        except OSError as e:  # no address yet, or nothing listens yet
            if time.monotonic() > until:
                raise Failure(f"the first machine of the endpoint, {leader}:{port}, could not be reached for {patience:.0f} s: {e}",
                              "look at its pod") from e  # fmt: skip
            time.sleep(min(2.0, patience / 10))
            continue
        _keep_alive(connection)
        return connection


def _keep_alive(connection: socket.socket) -> None:
    """A machine that has lost its power says nothing: the kernel asks, and gives up after half a minute."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)


def _accept(server: socket.socket, greeting: bytes, lost: threading.Event) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=_greeted, args=(connection, greeting, lost), daemon=True).start()


def _greeted(connection: socket.socket, greeting: bytes, lost: threading.Event) -> None:
    """Whoever does not know the greeting is not one of us, and whether it stays means nothing."""
    with connection, suppress(OSError):
        connection.settimeout(10)
        said = b""
        while len(said) < _GREETING and (more := connection.recv(_GREETING - len(said))):
            said += more
        if hmac.compare_digest(said, greeting):
            _keep_alive(connection)
            _watch(connection, lost)


def _watch(connection: socket.socket, lost: threading.Event) -> None:
    with suppress(OSError):
        while connection.recv(1024):
            pass
    lost.set()


def _run(command: Sequence[str], environ: Mapping[str, str], lost: threading.Event, why: str) -> int:
    engine = subprocess.Popen(command, env=dict(environ))

    def pass_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            engine.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    while engine.poll() is None:
        if lost.wait(0.5):
            break
    if engine.poll() is not None:
        return engine.returncode if engine.returncode >= 0 else 128 - engine.returncode
    print(f"{why}: this engine ends too, and starts again with the others", file=sys.stderr, flush=True)
    engine.terminate()
    try:
        engine.wait(DYING)
    except subprocess.TimeoutExpired:
        engine.kill()
        engine.wait()
    return 1
