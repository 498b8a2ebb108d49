"""Clients that do not get on with the head of a request, and those that do."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kaito_core.serving.asgi import respond_json

uvicorn = pytest.importorskip("uvicorn")
connection = pytest.importorskip("kaito_runtime_transformers.connection")

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(1.0 if scope["path"] == "/slow" else 0)
        await respond_json(send, 200, {})

    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, http=connection.Connection, log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(30)


def dribbled(port: int, first: bytes, then: Callable[[int], bytes]) -> bytes:
    """What a client reads that sends ``first``, and then a little now and then."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=0.1) as s:
        s.sendall(first)
        for number in range(200):
            try:
                s.sendall(then(number))
                piece = s.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                return said
            if not piece:
                return said
            said += piece
    raise AssertionError("the connection was not ended")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (b"", lambda n: b""),
        (b"GET / HTTP/1.1\r\n", lambda n: b""),
        (b"GET / HTTP/1.1\r\n", lambda n: b"X-%d: y\r\n" % n),
        (b"POST / HT", lambda n: b"x"),
    ],
    ids=["nothing", "half a head", "a header now and then", "a line that does not end"],
)
def test_a_head_that_does_not_come(port: int, first: bytes, then: Callable[[int], bytes]) -> None:
    head, _, body = dribbled(port, first, then).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_a_body_that_goes_on_behind_its_answer(port: int) -> None:
    said = dribbled(port, b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", lambda n: b"x")
    assert said.count(b"HTTP/1.1 ") == said.count(b"HTTP/1.1 200 ") == 1


def test_a_slow_second_head(port: int) -> None:
    said = dribbled(port, GET, lambda n: b"GET / HTTP/1.1\r\n" if n == 0 else b"X-%d: y\r\n" % n)
    assert said.count(b"HTTP/1.1 ") == said.count(b"HTTP/1.1 200 ") == 1


def test_answers_may_take_longer_and_connections_are_used_again(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        for path in (b"/slow", b"/", b"/slow"):
            s.sendall(GET.replace(b"/ ", path + b" "))
            said = b""
            while not said.endswith(b"{}"):
                said += s.recv(65536)
            assert said.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.6)
