"""An engine that is small enough to look through, behind the face, on a real port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from kaito_core.serving.asgi import Receive, Scope, Send
from kaito_core.serving.face import Face
from kaito_core.serving.settings import Settings

uvicorn = pytest.importorskip("uvicorn")


class Engine:
    """Speaks as much of OpenAI's protocol as the tests look at, and keeps what it was asked."""

    def __init__(self) -> None:
        self.ready = True
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: dict[bytes, bytes] = {}
        self.gate = asyncio.Event()
        """Requests wait until it is set; it is, unless a test clears it."""
        self.gate.set()
        self.gone = 0
        """Clients that went away before their answer was complete."""
        self.answering = 0
        self.tokenizes = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.headers = dict(scope["headers"])
        path = scope["path"]
        if path == "/health":
            await _json(send, 200 if self.ready else 503, {})
        elif path == "/metrics":
            await _text(send, "engine_up 1\n")
        elif path == "/v1/models":
            await _json(send, 200, {"object": "list", "data": [{"id": "first", "object": "model"}]})
        elif scope["method"] == "POST":
            body = b""
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message["body"]
                if not message["more_body"]:
                    break
            await self._post(path, json.loads(body), receive, send)
        else:
            await _json(send, 404, {"detail": "Not Found"})

    async def _post(self, path: str, body: dict[str, Any], receive: Receive, send: Send) -> None:
        self.asked.append((path, body))
        if path == "/tokenize":
            text = body.get("prompt") or body["messages"][-1]["content"]
            await _json(send, 200 if self.tokenizes else 404, {"count": len(text.split())})
            return
        if body.get("model") == "broken":
            raise RuntimeError("out of memory")
        if body.get("model") == "unknown":
            await _json(send, 404, {"error": {"message": "no such model", "code": 404, "param": "model"}})
            return
        self.answering += 1
        gone = asyncio.create_task(_until_gone(receive))
        gate = asyncio.create_task(self.gate.wait())
        try:
            if body.get("stream"):
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"data: one\n\n", "more_body": True})
            await asyncio.wait([gone, gate], return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self.gone += 1
            elif body.get("stream"):
                await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
            else:
                said = (
                    {"message": {"content": "forty-two"}} if path == "/v1/chat/completions" else {"text": " there was"}
                )
                await _json(send, 200, {"choices": [said]})
        finally:
            self.answering -= 1
            gone.cancel()
            gate.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _json(send: Send, status: int, value: Any) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(value).encode(), "more_body": False})


async def _text(send: Send, text: str) -> None:
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain; version=0.0.4")]}
    )
    await send({"type": "http.response.body", "body": text.encode(), "more_body": False})


class Served:
    """An endpoint: its engine, its face and an HTTP client for it."""

    def __init__(self, engine: Engine, face: Face, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.engine, self.face, self.port, self._loop = engine, face, port, loop
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def hold(self) -> None:
        """From now on answers wait."""
        self._loop.call_soon_threadsafe(self.engine.gate.clear)

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self.engine.gate.set)

    def chat(self, **body: Any) -> httpx.Response:
        return self.http.post("/chat", json=body)


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """``serve(**settings)``: an endpoint with these settings."""
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> Served:
            listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
            ready: list[tuple[Engine, Face, asyncio.AbstractEventLoop]] = []
            up = threading.Event()
            servers: list[Any] = []

            async def run() -> None:
                engine = Engine()
                face = Face(engine, Settings(**{"chat_model": "demo", **settings}))
                config = uvicorn.Config(face, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
                servers.append(uvicorn.Server(config))
                ready.append((engine, face, asyncio.get_running_loop()))
                up.set()
                await servers[0].serve(sockets=[listening])

            thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
            thread.start()
            assert up.wait(30)
            served = Served(*ready[0][:2], listening.getsockname()[1], ready[0][2])

            def stop() -> None:
                served.http.close()
                served.release()
                servers[0].should_exit = True
                thread.join(30)
                listening.close()

            stack.callback(stop)
            return served

        yield start
