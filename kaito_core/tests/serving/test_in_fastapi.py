"""The face as vLLM loads it: a middleware class of a FastAPI application, whose own handling of errors lies around and within it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from kaito_core.serving.face import Face
from kaito_core.serving.settings import Settings

fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    from fastapi.responses import PlainTextResponse, StreamingResponse

    app = fastapi.FastAPI()

    async def chat(body: dict) -> dict[str, Any]:  # type: ignore[type-arg]
        if body["model"] != "demo" or body["messages"][0]["content"] == "break":
            raise RuntimeError("a detail of the inside")
        return {"choices": [{"message": {"content": "forty-two"}}]}

    async def stream() -> Any:
        async def forever() -> AsyncIterator[str]:
            while True:
                yield "data: x\n\n"
                await asyncio.sleep(0.01)

        return StreamingResponse(forever())

    async def metrics() -> Any:
        return PlainTextResponse("engine_up 1\n")

    app.post("/v1/chat/completions")(chat)
    app.post("/v1/completions")(stream)
    app.get("/metrics")(metrics)
    app.get("/health")(lambda: {})
    app.add_middleware(Face, settings=Settings(chat_model="demo", max_requests=4, max_body=1000))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    with (
        socket.create_server(("127.0.0.1", 0)) as s,
        httpx.Client(base_url=f"http://127.0.0.1:{s.getsockname()[1]}", trust_env=False, timeout=30) as client,
    ):
        thread = threading.Thread(target=server.run, kwargs={"sockets": [s]}, daemon=True)
        thread.start()
        yield client
        server.should_exit = True
        thread.join(30)


def test_chat_health_and_metrics(http: httpx.Client) -> None:
    assert http.post("/chat", json={"prompt": "Who?"}).json() == {"Result": "Who?\nforty-two"}
    assert http.get("/healthz").json() == {"status": "Healthy"}
    assert http.get("/metrics").text.startswith("engine_up 1\n# HELP kaito_requests_total")


def test_an_engine_that_breaks(http: httpx.Client) -> None:
    answer = http.post("/chat", json={"prompt": "break"})
    assert answer.status_code == 500
    assert "inside" not in answer.text
    assert answer.json()["error"]["message"] == "the engine broke while it answered; its log says how"


def test_a_body_that_grows_too_large_while_fastapi_reads_it(http: httpx.Client) -> None:
    """FastAPI makes a 400 of whatever goes wrong there; the client still hears what it is."""
    for path in ("/v1/chat/completions", "/chat"):
        answer = http.post(path, content=(b"[" * 100 for _ in range(11)))
        assert answer.status_code == 413, path


def test_a_client_that_goes_away_ends_the_stream(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/completions", json={}) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        assert "\nkaito_requests_in_flight 1\n" in http.get("/metrics").text
    while "\nkaito_requests_in_flight 0\n" not in http.get("/metrics").text:
        pass
