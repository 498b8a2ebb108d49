"""A client that streams is told what it waits for, and then gets the endpoint's own events."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import h11
import httpx
import pytest

from kaito_core.serving.activator import Activator

from .activator_world import KEY, Asking, Pod, Talk, Wakes, Wire, activating, until

ASKS = json.dumps({"model": "phi", "stream": True, "messages": [{"role": "user", "content": "hello"}]}).encode()
EVENTS = [b'data: {"choices": [{"delta": {"content": "Hel', b'lo"}}]}\n\n', b"data: [DONE]\n\n"]
EVENT_STREAM = [("Content-Type", "text/event-stream; charset=utf-8")]


async def events(talk: Talk, request: h11.Request) -> None:
    assert await talk.read() == ASKS
    await talk.send(h11.Response(status_code=200, headers=EVENT_STREAM))
    for event in EVENTS:
        await talk.send(h11.Data(data=event))
    await talk.send(h11.EndOfMessage())


@pytest.fixture
def activator() -> Iterator[Activator]:
    with activating() as activator:
        yield activator


def request(body: bytes = ASKS, path: bytes = b"/v1/chat/completions", version: bytes = b"1.1") -> bytes:
    return b"POST %b HTTP/%b\r\nHost: phi\r\nAccept-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (
        path, version, len(body), body,
    )  # fmt: skip


def stream(activator: Activator, body: bytes = ASKS) -> tuple[Asking, list[str]]:
    """Ask; the lines that have come so far."""
    lines: list[str] = []

    def ask() -> httpx.Response:
        where = f"http://127.0.0.1:{activator.listen(KEY)}/v1/chat/completions"
        with httpx.stream("POST", where, content=body, timeout=20, trust_env=False) as answer:
            for line in answer.iter_lines():
                lines.append(line)
        return answer

    return Asking(ask), lines


def last(lines: list[str]) -> Any:
    """The error that a stream ended with."""
    said = [line for line in lines if line]
    assert said[-1] == "data: [DONE]"
    return json.loads(said[-2].removeprefix("data: "))["error"]


def test_it_is_told_what_it_waits_for_and_then_gets_the_events(activator: Activator) -> None:
    with Pod(events) as pod:
        asking, lines = stream(activator)
        until(lambda: lines.count(": waiting for the endpoint to start") >= 3)  # again and again, as a sign of life
        activator.asleep(KEY, "waiting for a machine: A10 in westus\ndata: {}")
        until(lambda: ": waiting for a machine: A10 in westus data: {}" in lines)
        activator.asleep(KEY, "loading the weights")
        until(lambda: ": loading the weights" in lines)
        activator.ready(KEY, pod.address)
        answer = asking.result()
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert "\n".join([*lines, ""]).endswith((b"".join(EVENTS)).decode())
        # Its head says that it is not compressed, so the server must not do it.
        assert b"accept-encoding" not in dict(pod.seen[0].headers)


def test_what_is_ready_answers_by_itself(activator: Activator) -> None:
    with Pod(events) as pod:
        activator.ready(KEY, pod.address)
        asking, lines = stream(activator)
        asking.result()
        assert "\n".join([*lines, ""]) == b"".join(EVENTS).decode()
        assert b"accept-encoding" in dict(pod.seen[0].headers)


def test_completions_stream_too_and_an_old_client_gets_it_without_chunks(activator: Activator) -> None:
    with Pod(events) as pod, Wire(activator.listen(KEY)) as wire:
        wire.send(request(path=b"/v1/completions", version=b"1.0"))
        head = wire.until(b": waiting for the endpoint to start\n\n")
        assert b"transfer-encoding" not in head.lower()
        activator.ready(KEY, pod.address)
        assert wire.rest().endswith(b"".join(EVENTS))


def test_the_openai_client_reads_it(activator: Activator) -> None:
    openai = pytest.importorskip("openai")
    with Pod(events) as pod:
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{activator.listen(KEY)}/v1", api_key="none", max_retries=0,
            http_client=httpx.Client(trust_env=False),
        )  # fmt: skip

        async def checked(talk: Talk, request: h11.Request) -> None:
            asked = json.loads(await talk.read())
            assert asked["stream"] is True
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "phi", "choices": [
                {"index": 0, "delta": {"content": "hello"}, "finish_reason": None}]}  # fmt: skip
            await talk.send(h11.Response(status_code=200, headers=EVENT_STREAM))
            await talk.send(h11.Data(data=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()))
            await talk.send(h11.EndOfMessage())

        def ask() -> list[str]:
            messages = [{"role": "user", "content": "hi"}]
            return [
                chunk.choices[0].delta.content
                for chunk in client.chat.completions.create(model="phi", messages=messages, stream=True)
            ]

        pod.behaviour = checked
        asking = Asking(ask)
        until(lambda: activator.waiting(KEY) == 1)
        activator.ready(KEY, pod.address)
        assert asking.result() == ["hello"]
        activator.asleep(KEY)
        asking = Asking(ask)
        until(lambda: activator.waiting(KEY) == 1)
        activator.refuse(KEY, "no quota for A10")
        with pytest.raises(openai.APIError, match="no quota for A10"):
            asking.result()
        client.close()


@pytest.mark.parametrize(
    "body",
    [b'{"stream": false}', b'{"stream": "true"}', b'{"stream": 1}', b"{}", b'"stream"', b'{"stream": true', b'["stream"]',
     b'{"stream": ' + b"[" * 100_000, b""],
)  # fmt: skip
def test_what_does_not_ask_for_a_stream_just_waits(activator: Activator, body: bytes) -> None:
    with Pod() as pod, Wire(activator.listen(KEY)) as wire:
        wire.send(request(body))
        until(lambda: activator.waiting(KEY) == 1)
        wire.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            wire.socket.recv(1)
        wire.socket.settimeout(20)
        activator.ready(KEY, pod.address)
        assert wire.rest().endswith(body)


@pytest.mark.parametrize("path", [b"/chat", b"/v1/embeddings"])
def test_other_paths_know_no_stream(activator: Activator, path: bytes) -> None:
    with Pod() as pod, Wire(activator.listen(KEY)) as wire:
        wire.send(request(path=path))
        until(lambda: activator.waiting(KEY) == 1)
        activator.ready(KEY, pod.address)
        assert b"waiting" not in wire.rest()


# When it comes to nothing


def test_patience_that_ends() -> None:
    with activating(patience=0.3) as activator:
        activator.asleep(KEY, "waiting for a machine")
        asking, lines = stream(activator)
        assert asking.result().status_code == 200
        assert last(lines)["message"] == "the endpoint team/phi was not there within 0.3 s: waiting for a machine"


def test_refused_while_it_waits(activator: Activator) -> None:
    asking, lines = stream(activator)
    until(lambda: lines)
    activator.refuse(KEY, 'no "A10" left')
    asking.result()
    assert last(lines)["code"] == "endpoint_failed"
    assert 'no "A10" left' in last(lines)["message"]


def test_the_activator_ends(activator: Activator) -> None:
    asking, lines = stream(activator)
    until(lambda: lines)
    activator.stop(5)
    asking.result()
    assert last(lines)["type"] == "server_error"


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, b'{"error": {"message": "unknown model", "type": "NotFoundError", "code": 404}}', "unknown model"),
        (422, b'{"detail": "no messages"}', "no messages"),
        (500, b"Internal Server Error", "Internal Server Error"),
        (503, b"", "the endpoint answered HTTP 503"),
        (500, b"x" * 200_000, "x" * 500),
        (200, b'{"choices": []}', "the endpoint did not answer with a stream"),
    ],
)
def test_an_error_of_the_endpoint_becomes_an_event(
    activator: Activator, status: int, body: bytes, message: str
) -> None:
    async def fails(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        await talk.answer(status, body, [("Content-Type", "application/json")])

    with Pod(fails) as pod:
        asking, lines = stream(activator)
        until(lambda: lines)
        activator.ready(KEY, pod.address)
        asking.result()
        assert last(lines)["message"] == message


def test_an_endpoint_that_breaks_off_in_the_middle(activator: Activator) -> None:
    async def breaks(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        await talk.send(h11.Response(status_code=200, headers=EVENT_STREAM))
        await talk.send(h11.Data(data=EVENTS[0]))
        await asyncio.sleep(0.05)
        talk.reset()

    with Pod(breaks) as pod:
        asking, lines = stream(activator)
        until(lambda: lines)
        activator.ready(KEY, pod.address)
        asking.result()
        assert EVENTS[0].decode() in lines  # what was cut off is an event of its own, and not the error's beginning
        assert last(lines)["code"] == "endpoint_failed"


def test_a_client_that_leaves_is_not_waited_for(activator: Activator) -> None:
    with Wire(activator.listen(KEY)) as wire:
        wire.send(request()).until(b"start\n\n")
        assert activator.waiting(KEY) == 1
    until(lambda: activator.waiting(KEY) == 0)


def test_a_client_that_leaves_while_it_is_answered_frees_the_endpoint(activator: Activator) -> None:
    gone = threading.Event()

    async def endless(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        await talk.send(h11.Response(status_code=200, headers=EVENT_STREAM))
        try:
            while True:
                await talk.send(h11.Data(data=EVENTS[1]))
                await asyncio.sleep(0.01)
        finally:
            gone.set()

    wakes = Wakes()
    with Pod(endless) as pod:
        with Wire(activator.listen(KEY)) as wire:
            wire.send(request())
            wire.until(b"start\n\n")
            activator.ready(KEY, pod.address)
            wire.until(EVENTS[1])
        assert gone.wait(10)
    assert wakes.keys == []
