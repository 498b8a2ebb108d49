"""Clients that leave and pods that die, at every stage of a request. `activating` sees to it that nothing is left of them."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator

import h11
import httpx
import pytest

from kaito_core.serving.activator import Activator
from kaito_core.serving.activator_http import Limits

from .activator_world import KEY, Asking, Pod, Talk, Wire, activating, free_port, status, until

POST = b"POST /x HTTP/1.1\r\nHost: phi\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"


@pytest.fixture
def activator() -> Iterator[Activator]:
    with activating() as activator:
        yield activator


def ask(activator: Activator, said: bytes = POST) -> Asking:
    def asks() -> bytes:
        with Wire(activator.listen(KEY)) as wire:
            return wire.send(said).rest()

    return Asking(asks)


# Clients


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(
    "said",
    [b"", b"POST /x HT", POST[:-3], POST, POST + b"GET /y", POST + b"x" * 300_000],
    ids=["connected", "in the head", "in the body", "waiting", "pipelining", "pipelining much"],
)
def test_a_client_that_leaves_is_forgotten(activator: Activator, said: bytes, how: str) -> None:
    wire = Wire(activator.listen(KEY)).send(said)
    if said.startswith(POST):  # else it does not wait yet: it is not here
        until(lambda: activator.waiting(KEY) == 1)
    getattr(wire, how)()
    until(lambda: activator.waiting(KEY) == 0)


def test_a_client_that_leaves_with_more_than_is_held_is_forgotten(activator: Activator) -> None:
    """Nothing of its connection is read any more then, so its end is not seen by reading."""
    wire = Wire(activator.listen(KEY)).send(POST.replace(b"5", b"9000000"))
    wire.socket.setblocking(False)
    try:
        while True:
            wire.socket.send(b"x" * 65536)
    except BlockingIOError:
        pass
    until(lambda: activator.waiting(KEY) == 1 and activator._held.bytes > 1 << 20)
    wire.reset()
    until(lambda: activator.waiting(KEY) == 0)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_leaves_while_the_pod_works_frees_the_pod(activator: Activator, how: str) -> None:
    gone = threading.Event()

    async def works(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        await talk.reader.read()  # until the connection ends
        gone.set()

    with Pod(works) as pod:
        activator.ready(KEY, pod.address)
        wire = Wire(activator.listen(KEY)).send(POST)
        until(lambda: len(pod.seen) == 1)
        getattr(wire, how)()
        assert gone.wait(10)


def test_a_client_that_leaves_in_the_middle_of_its_upload_frees_the_pod(activator: Activator) -> None:
    gone = threading.Event()

    async def reads(talk: Talk, request: h11.Request) -> None:
        try:
            await talk.read()
        except h11.RemoteProtocolError:
            gone.set()

    with Pod(reads) as pod:
        activator.ready(KEY, pod.address)
        wire = Wire(activator.listen(KEY)).send(POST.replace(b"5", b"50"))
        until(lambda: len(pod.seen) == 1)
        wire.close()
        assert gone.wait(10)


def test_a_client_that_reads_nothing_is_not_waited_for_forever() -> None:
    ended = threading.Event()

    async def pours(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        try:
            await talk.answer(200, b"x" * (64 << 20))
        finally:
            ended.set()

    with activating(limits=Limits(silence=0.3)) as activator, Pod(pours) as pod:
        activator.ready(KEY, pod.address)
        with Wire(activator.listen(KEY)) as wire:
            wire.send(POST)
            assert ended.wait(20)
            wire.ended()


# Pods


def test_a_pod_that_refuses_at_first_is_tried_again(activator: Activator) -> None:
    port = free_port()
    activator.ready(KEY, f"http://127.0.0.1:{port}")
    asking = ask(activator)
    until(lambda: activator.waiting(KEY) == 1)
    time.sleep(0.3)
    with Pod(port=port):
        assert asking.result().endswith(b"hello")


def test_another_pod_is_tried_at_once(activator: Activator) -> None:
    activator.ready(KEY, f"http://127.0.0.1:{free_port()}")
    asking = ask(activator)
    until(lambda: activator.waiting(KEY) == 1)
    time.sleep(0.5)
    with Pod() as pod:
        activator.ready(KEY, pod.address)
        assert asking.result().endswith(b"hello")


def test_a_pod_that_dies_and_goes_to_sleep_is_waited_for(activator: Activator) -> None:
    activator.ready(KEY, f"http://127.0.0.1:{free_port()}")
    asking = ask(activator)
    until(lambda: activator.waiting(KEY) == 1)
    activator.asleep(KEY)
    time.sleep(0.3)
    assert activator.waiting(KEY) == 1
    with Pod() as pod:
        activator.ready(KEY, pod.address)
        assert asking.result().endswith(b"hello")


def test_a_pod_that_never_answers_ends_with_its_reason() -> None:
    with activating(patience=0.4) as activator:
        activator.ready(KEY, f"http://127.0.0.1:{free_port()}")
        answer = ask(activator).result()
        assert status(answer) == 503
        assert b"waiting for the endpoint to answer: no connection to it: Connection refused" in answer
        assert b"127.0.0.1" not in answer


@pytest.mark.parametrize("reset", [True, False])
def test_a_request_whose_pod_died_before_it_answered_is_sent_again(activator: Activator, reset: bool) -> None:
    tries = 0

    async def dies_once(talk: Talk, request: h11.Request) -> None:
        nonlocal tries
        tries += 1
        body = await talk.read()
        if tries == 1:
            talk.reset() if reset else talk.writer.close()
        else:
            await talk.answer(200, body)

    with Pod(dies_once) as pod:
        activator.ready(KEY, pod.address)
        assert ask(activator).result().endswith(b"hello")
        assert tries == 2


def test_a_request_that_kills_every_pod_is_not_sent_forever(activator: Activator) -> None:
    async def dies(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        talk.reset()

    with Pod(dies) as pod:
        activator.ready(KEY, pod.address)
        answer = ask(activator).result()
        assert status(answer) == 502
        assert len(pod.seen) == 3


def test_a_body_of_which_something_was_let_go_is_not_sent_again(activator: Activator) -> None:
    async def dies(talk: Talk, request: h11.Request) -> None:
        for _ in range(40):
            await talk.event()
        talk.reset()

    with Pod(dies) as pod, Wire(activator.listen(KEY)) as wire:
        activator.ready(KEY, pod.address)
        asking = Asking(lambda: wire.send(POST.replace(b"5", b"20000000") + b"x" * 20_000_000))
        head = wire.until(b"\r\n\r\n")
        assert status(head) == 502
        assert len(pod.seen) == 1
        wire.ended()
        asking.result()


def test_an_answer_before_the_body_was_read_arrives(activator: Activator) -> None:
    async def refuses(talk: Talk, request: h11.Request) -> None:
        await talk.answer(413, b"too large", [("Connection", "close")])
        await asyncio.sleep(0.2)

    with Pod(refuses) as pod, Wire(activator.listen(KEY)) as wire:
        activator.ready(KEY, pod.address)
        wire.send(POST.replace(b"5", b"500"))
        assert wire.rest().endswith(b"too large")


def test_an_answer_that_is_cut_off_does_not_look_complete(activator: Activator) -> None:
    async def breaks(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        await talk.send(h11.Response(status_code=200, headers=[]))
        await talk.send(h11.Data(data=b"half"))
        await asyncio.sleep(0.05)
        talk.reset()

    with Pod(breaks) as pod:
        activator.ready(KEY, pod.address)
        with pytest.raises(httpx.TransportError):
            httpx.post(f"http://127.0.0.1:{activator.listen(KEY)}/x", timeout=20, trust_env=False)
        with Wire(activator.listen(KEY)) as wire:
            # To this one the end of the connection would be the end of the answer.
            wire.send(b"GET /x HTTP/1.0\r\n\r\n")
            assert wire.ended() is False


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"HTTP/1.1 101 Switching Protocols\r\n\r\n", b"\0" * 400_000]
)
def test_what_is_no_answer_is_a_bad_gateway(activator: Activator, said: bytes) -> None:
    async def nonsense(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        talk.writer.write(said)
        await talk.writer.drain()

    with Pod(nonsense) as pod:
        activator.ready(KEY, pod.address)
        assert status(ask(activator).result()) == 502
        assert len(pod.seen) == 1


def test_a_pod_that_is_full_just_after_the_start_gets_those_that_waited_again(activator: Activator) -> None:
    tries = 0

    async def full(talk: Talk, request: h11.Request) -> None:
        nonlocal tries
        tries += 1
        body = await talk.read()
        await talk.answer(429 if tries == 1 else 200, body, [("Retry-After", "0")])

    with Pod(full) as pod:
        asking = ask(activator)
        until(lambda: activator.waiting(KEY) == 1)
        activator.ready(KEY, pod.address)
        assert status(asking.result()) == 200
        tries = 0
        assert status(ask(activator).result()) == 429  # as it would be without an activator


def test_informational_answers_are_for_the_activator(activator: Activator) -> None:
    async def hints(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        await talk.send(h11.InformationalResponse(status_code=103, headers=[("Link", "</x>")]))
        await talk.answer(200, b"done")

    with Pod(hints) as pod:
        activator.ready(KEY, pod.address)
        assert status(ask(activator).result()) == 200


# Both at once


def test_a_crowd_of_clients_of_which_many_leave_while_pods_die(activator: Activator) -> None:
    """In the end each that stayed has an answer, and nothing is left."""
    chance = random.Random(7)

    async def moody(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        mood = chance.random()
        if mood < 0.2:
            talk.reset()
        elif mood < 0.4:
            await talk.send(h11.Response(status_code=200, headers=[]))
            await talk.send(h11.Data(data=b"half"))
            talk.reset()
        else:
            await asyncio.sleep(mood / 20)
            await talk.answer(200, b"whole")

    async def one(port: int, leaves: bool, moment: float) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST)
        try:
            if leaves:
                await asyncio.sleep(moment)
                return b"left"
            return await reader.read()
        except ConnectionResetError:
            return b"cut off"
        finally:
            writer.transport.abort()

    async def crowd() -> list[bytes]:
        port = activator.listen(KEY)
        return await asyncio.gather(*(one(port, n % 3 == 0, chance.random() / 2) for n in range(300)))

    with Pod(moody) as pod:
        asking = Asking(lambda: asyncio.run(crowd()))
        while asking.is_alive():
            activator.ready(KEY, pod.address)
            time.sleep(0.05)
            activator.asleep(KEY)
            time.sleep(0.02)
        answers = asking.result()
        stayed = [a for a in answers if a not in (b"left", b"cut off")]
        assert {status(a) for a in stayed} <= {200, 502}
        assert sum(a.endswith(b"whole") for a in stayed) > 50
        until(lambda: activator.waiting(KEY) == 0)
