"""The activator: holds the first requests to an endpoint while it comes back from zero."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import h11
import httpx
import pytest

from kaito_core.problems import Failure
from kaito_core.serving.activator import Activator
from kaito_core.serving.activator_http import Limits

from .activator_world import (
    IMPATIENT,
    KEY,
    Asking,
    Pod,
    Talk,
    Wakes,
    Wire,
    activating,
    free_ports,
    status,
    tasks,
    until,
)


@pytest.fixture
def wakes() -> Wakes:
    return Wakes()


@pytest.fixture
def activator(wakes: Wakes) -> Iterator[Activator]:
    with activating(wakes) as activator:
        yield activator


def url(activator: Activator, path: str = "/v1/chat/completions") -> str:
    return f"http://127.0.0.1:{activator.listen(KEY)}{path}"


def post(where: str, content: bytes = b"hello", **more: Any) -> httpx.Response:
    return httpx.post(where, content=content, timeout=20, trust_env=False, **more)


# The way of a request


def test_the_first_request_wakes_the_endpoint_waits_and_is_answered_by_it(activator: Activator, wakes: Wakes) -> None:
    with Pod() as pod:
        asking = Asking(lambda: post(url(activator)))
        until(lambda: activator.waiting(KEY) == 1)
        until(lambda: wakes.keys == [KEY])
        activator.asleep(KEY, "waiting for a machine")
        activator.ready(KEY, pod.address)
        answer = asking.result()
        assert (answer.status_code, answer.content) == (200, b"hello")
        assert activator.waiting(KEY) == 0


def test_what_comes_while_it_is_ready_goes_through_and_wakes_nobody(activator: Activator, wakes: Wakes) -> None:
    with Pod() as pod:
        activator.ready(KEY, pod.address)
        answer = post(url(activator, "/chat?x=1"), headers={"Authorization": "Bearer secret"})
        assert answer.content == b"hello"
        assert pod.seen[0].target == b"/chat?x=1"
        assert (b"authorization", b"Bearer secret") in list(pod.seen[0].headers)
        assert wakes.keys == []
        # So that the client's next request goes to the pod itself, which is in the Service by then.
        assert answer.headers["Connection"] == "close"


def test_a_thousand_requests_wait_and_all_are_answered(wakes: Wakes) -> None:
    many = 1000
    with activating(wakes, limits=Limits(wake=60)) as activator, Pod() as pod:
        port = activator.listen(KEY)

        async def ask(number: int) -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = b"request %d" % number
            writer.write(b"POST /chat HTTP/1.1\r\nHost: phi\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
            return answer

        async def everybody() -> list[bytes]:
            return await asyncio.gather(*(ask(n) for n in range(many)))

        asking = Asking(lambda: asyncio.run(everybody()))
        until(lambda: activator.waiting(KEY) == many)
        assert httpx.get(url(activator, "/health"), trust_env=False).status_code == 200
        assert wakes.keys == [KEY]
        activator.ready(KEY, pod.address)
        answers = asking.result()
        assert [a.rpartition(b"\r\n\r\n")[2] for a in answers] == [b"request %d" % n for n in range(many)]
        assert {status(a) for a in answers} == {200}
        assert len(pod.seen) == many


def test_more_than_may_wait_are_told_to_come_again() -> None:
    with activating(waiting=2) as activator, Pod() as pod:
        where = url(activator)
        first = [Asking(lambda: post(where)) for _ in range(2)]
        until(lambda: activator.waiting(KEY) == 2)
        answer = post(where)
        assert answer.status_code == 429
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.json()["error"]["type"] == "rate_limit_error"
        activator.ready(KEY, pod.address)
        assert [a.result().status_code for a in first] == [200, 200]


def test_endpoints_do_not_get_in_each_others_way(activator: Activator, wakes: Wakes) -> None:
    other = ("team", "mistral")
    with Pod() as pod:
        asking = Asking(lambda: post(f"http://127.0.0.1:{activator.listen(other)}/chat", b"other"))
        until(lambda: activator.waiting(other) == 1)
        activator.ready(KEY, pod.address)
        assert post(url(activator), b"mine").content == b"mine"
        assert activator.waiting(other) == 1
        assert set(wakes.keys) == {other}
        activator.ready(other, pod.address)
        assert asking.result().content == b"other"


# Waking


def test_a_burst_wakes_once_and_again_after_a_while_as_long_as_somebody_waits(
    activator: Activator, wakes: Wakes
) -> None:
    with Pod() as pod:
        where = url(activator)
        burst = [Asking(lambda: post(where)) for _ in range(20)]
        until(lambda: activator.waiting(KEY) == 20)
        until(lambda: len(wakes.keys) >= 3)
        activator.ready(KEY, pod.address)
        assert all(a.result().status_code == 200 for a in burst)
        woken = len(wakes.keys)
        time.sleep(3 * IMPATIENT.wake)
        assert len(wakes.keys) == woken


def test_an_endpoint_that_fell_asleep_again_is_woken_at_once(wakes: Wakes) -> None:
    with activating(wakes, limits=Limits(wake=3600)) as activator, Pod() as pod:
        for _ in range(2):
            wakes.keys.clear()
            asking = Asking(lambda: post(url(activator)))
            until(lambda: wakes.keys == [KEY])
            activator.ready(KEY, pod.address)
            assert asking.result().status_code == 200
            activator.asleep(KEY)


def test_who_is_woken_may_fail_or_take_long_and_nobody_is_held_up() -> None:
    slow, calls = threading.Event(), []

    def wake(key: tuple[str, str]) -> None:
        calls.append(key)
        slow.wait(10)
        raise RuntimeError("the API server is away")

    with activating(wake) as activator, Pod() as pod:
        asking = Asking(lambda: post(url(activator)))
        until(lambda: calls)
        assert httpx.get(url(activator, "/health"), trust_env=False).status_code == 200
        slow.set()
        until(lambda: len(calls) > 1)
        activator.ready(KEY, pod.address)
        assert asking.result().status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("path", "expected"),
    [("/", 200), ("/health", 200), ("/healthz?full=1", 200), ("/metrics", 200), ("/v1/models", 503)],
)
def test_probes_are_answered_at_once_and_wake_nobody(
    activator: Activator, wakes: Wakes, method: str, path: str, expected: int
) -> None:
    activator.asleep(KEY, "asleep since noon")
    answer = httpx.request(method, url(activator, path), timeout=20, trust_env=False)
    assert answer.status_code == expected
    if method == "HEAD":
        assert answer.content == b""
    elif path == "/metrics":
        assert "kaito_endpoint_waiting_requests 0" in answer.text
    elif path == "/v1/models":
        assert answer.json()["error"]["code"] == "endpoint_asleep"
        assert int(answer.headers["Retry-After"]) > 0
    else:
        assert answer.json() == {"status": "asleep", "message": "asleep since noon"}
    time.sleep(0.05)
    assert wakes.keys == []


def test_a_connection_without_a_request_wakes_nobody_and_is_ended(wakes: Wakes) -> None:
    with activating(wakes, limits=Limits(head=0.3)) as activator:
        with Wire(activator.listen(KEY)) as wire:
            assert wire.rest() == b""
        Wire(activator.listen(KEY)).close()
        Wire(activator.listen(KEY)).reset()
    assert wakes.keys == []


def test_probes_of_an_endpoint_that_is_ready_are_the_endpoints_own(activator: Activator) -> None:
    with Pod() as pod:
        activator.ready(KEY, pod.address)
        assert httpx.get(url(activator, "/health"), trust_env=False).content == b""
        assert [r.target for r in pod.seen] == [b"/health"]
    answer = httpx.get(url(activator, "/health"), trust_env=False)
    assert answer.status_code == 503
    assert answer.json()["status"] == "failed"
    assert activator.waiting(KEY) == 0


# When it does not come


def test_patience_ends_with_what_was_waited_for() -> None:
    with activating(patience=0.3) as activator:
        activator.asleep(KEY, "waiting for a machine:\r\n1 in the queue")
        answer = post(url(activator))
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.json()["error"] == {
            "message": "the endpoint team/phi was not there within 0.3 s: waiting for a machine: 1 in the queue",
            "type": "server_error", "param": None, "code": "endpoint_asleep",
        }  # fmt: skip
        assert activator.waiting(KEY) == 0


def test_what_will_not_come_is_refused_and_asked_for_again_only_after_a_while(wakes: Wakes) -> None:
    with activating(wakes, limits=Limits(wake=1.5)) as activator:
        where = url(activator)
        asking = Asking(lambda: post(where))
        until(lambda: activator.waiting(KEY) == 1)
        activator.refuse(KEY, "the Secret hub is missing")
        answer = asking.result()
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "the endpoint team/phi does not come up: the Secret hub is missing"
        assert httpx.get(url(activator, "/health"), trust_env=False).status_code == 503
        woken = len(wakes.keys)
        quick = post(where)
        assert (quick.status_code, "Secret hub" in quick.text) == (503, True)
        time.sleep(1.5)
        later = Asking(lambda: post(where))
        until(lambda: len(wakes.keys) > woken and activator.waiting(KEY) == 1)
        activator.refuse(KEY, "still missing")
        assert "still missing" in later.result().text


def test_a_refusal_is_over_when_the_controller_says_so(wakes: Wakes) -> None:
    with activating(wakes, limits=Limits(wake=3600)) as activator, Pod() as pod:
        asking = Asking(lambda: post(url(activator)))
        until(lambda: activator.waiting(KEY) == 1)
        activator.refuse(KEY, "no quota")
        activator.asleep(KEY)
        assert asking.result().status_code == 503  # it heard of the refusal, though that was over at once
        asking = Asking(lambda: post(url(activator)))
        until(lambda: len(wakes.keys) == 2)
        activator.ready(KEY, pod.address)
        assert asking.result().status_code == 200


def test_stop_sends_those_that_wait_away_and_lets_the_others_end() -> None:
    go = threading.Event()

    async def slow(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        await asyncio.to_thread(go.wait, 20)
        await talk.answer(200, b"slow")

    with activating() as activator, Pod(slow) as pod:
        port, other = activator.listen(("team", "other")), activator.listen(KEY)
        activator.ready(KEY, pod.address)
        answered = Asking(lambda: post(f"http://127.0.0.1:{other}/chat"))
        until(lambda: len(pod.seen) == 1)
        waits = Asking(lambda: post(f"http://127.0.0.1:{port}/chat"))
        until(lambda: activator.waiting(("team", "other")) == 1)
        stopping = Asking(lambda: activator.stop(20))
        assert waits.result().status_code == 503
        assert int(waits.result().headers["Retry-After"]) > 0
        go.set()
        assert answered.result().content == b"slow"
        stopping.result()
        with pytest.raises(Failure):
            activator.listen(KEY)
        activator.ready(KEY, pod.address)
        activator.forget(KEY)
        activator.stop(1)
        with pytest.raises(ConnectionRefusedError):
            Wire(port)


def test_stop_does_not_wait_longer_than_it_was_told_to() -> None:
    async def never(talk: Talk, request: h11.Request) -> None:
        await asyncio.sleep(3600)

    activator = Activator("127.0.0.1", Wakes())
    activator.start()
    with Pod(never) as pod:
        activator.ready(KEY, pod.address)
        with Wire(activator.listen(KEY)) as wire, Wire(activator.listen(KEY)) as idle:
            wire.send(b"GET /x HTTP/1.1\r\nHost: phi\r\n\r\n")
            until(lambda: len(pod.seen) == 1)
            activator.stop(0.1)
            wire.ended()
            assert idle.rest() == b""


# Listening


def test_listening_is_idempotent_and_ends(activator: Activator) -> None:
    port = activator.listen(KEY)
    assert activator.listen(KEY) == port
    assert activator.listen(("team", "other")) != port
    with Wire(port) as idle:
        until(lambda: tasks(activator) > 1)
        activator.forget(KEY)
        assert idle.rest() == b""
    with pytest.raises(ConnectionRefusedError):
        Wire(port)
    activator.forget(KEY)
    assert activator.waiting(KEY) == 0


def test_many_threads_may_listen_for_one_endpoint(activator: Activator) -> None:
    asking = [Asking(lambda: activator.listen(KEY)) for _ in range(16)]
    assert len({a.result() for a in asking}) == 1
    activator.forget(KEY)


def test_connections_that_come_as_it_is_forgotten_are_closed(activator: Activator) -> None:
    for _ in range(50):
        with Wire(activator.listen(KEY)) as wire:
            activator.forget(KEY)
            wire.ended()


def test_forgetting_ends_what_is_answered_and_sends_away_what_waits_for_nothing(activator: Activator) -> None:
    go = threading.Event()

    async def slow(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        await asyncio.to_thread(go.wait, 20)
        await talk.answer(200, b"slow")

    with Pod(slow) as pod:
        activator.ready(KEY, pod.address)
        asking = Asking(lambda: post(url(activator)))
        until(lambda: len(pod.seen) == 1)
        activator.forget(KEY)
        again = Asking(lambda: post(url(activator)))  # listened for anew, and asleep
        until(lambda: activator.waiting(KEY) == 1)
        go.set()
        assert asking.result().content == b"slow"
        activator.forget(KEY)
        assert again.result().status_code == 503


def test_a_port_is_not_used_again_while_others_are_left() -> None:
    """A Service may still send an endpoint's requests to its old port for a while: nobody else may get them."""
    ports = free_ports(3)
    taken = socket.create_server(("127.0.0.1", ports[1]))
    with taken, activating(ports=ports) as activator:
        assert activator.listen(("a", "a")) == ports[0]
        activator.forget(("a", "a"))
        assert activator.listen(("b", "b")) == ports[2]
        assert activator.listen(("c", "c")) == ports[0]
        with pytest.raises(Failure) as e:
            activator.listen(("d", "d"))
        assert "no port for the endpoint d/d" in str(e.value)
        assert f"{ports[0]} to {ports[2]}" in str(e.value)
        activator.forget(("c", "c"))
        assert activator.listen(("d", "d")) == ports[0]


def test_an_address_that_cannot_be_listened_on_is_named() -> None:
    activator = Activator("203.0.113.7", Wakes())
    activator.start()
    with pytest.raises(Failure, match=r"203\.0\.113\.7"):
        activator.listen(KEY)
    activator.stop(1)


def test_before_it_runs_it_says_so() -> None:
    activator = Activator("127.0.0.1", Wakes())
    with pytest.raises(Failure, match="does not run"):
        activator.listen(KEY)
    activator.stop(1)


@pytest.mark.parametrize("address", ["10.0.0.5:5000", "https://10.0.0.5:5000", "http://10.0.0.5", "http://x:1/y", ""])
def test_an_address_is_a_host_and_a_port(activator: Activator, address: str) -> None:
    with pytest.raises(ValueError, match="not an address"):
        activator.ready(KEY, address)


def test_an_address_that_leads_back_does_not_go_round_forever(activator: Activator) -> None:
    activator.ready(KEY, f"http://127.0.0.1:{activator.listen(KEY)}")
    answer = post(url(activator))
    assert answer.status_code == 508
    assert "leads back here" in json.loads(answer.text)["error"]["message"]
