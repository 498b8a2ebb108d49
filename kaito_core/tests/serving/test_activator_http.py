"""HTTP through the activator: what a client and an endpoint say to each other arrives as it was said."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaito_core.serving.activator import Activator
from kaito_core.serving.activator_http import Limits, end_to_end, host_and_port, path_of

from .activator_world import KEY, Asking, Pod, Talk, Wakes, Wire, activating, status, tasks, until


@pytest.fixture
def activator() -> Iterator[Activator]:
    with activating() as activator:
        yield activator


GET = b"GET /x HTTP/1.1\r\nHost: phi\r\n\r\n"

# What arrives


@pytest.fixture(scope="module")
def through() -> Iterator[tuple[Activator, Pod]]:
    with activating(limits=Limits()) as activator, Pod() as pod:
        yield activator, pod


TOKEN = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
OURS = {"host", "content-length", "transfer-encoding", "connection", "expect", "via", *(
    ["keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer", "upgrade"]
)}  # fmt: skip
NAMES = st.text(TOKEN, min_size=1, max_size=20).filter(lambda n: n.lower() not in OURS)
VALUES = st.binary(max_size=40).map(lambda v: bytes(c for c in v if c == 9 or 32 <= c < 127 or c >= 128).strip(b" \t"))
HEADERS = st.lists(st.tuples(NAMES.map(str.encode), VALUES), max_size=8)
CHUNKS = st.lists(st.binary(min_size=1, max_size=5000), max_size=8)
PATHS = st.text("".join(chr(c) for c in range(33, 127)), max_size=30).map(lambda p: b"/p" + p.encode())


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"]), PATHS, HEADERS, CHUNKS, st.booleans(),
    st.integers(200, 599).filter(lambda s: s not in (204, 304, 429)), HEADERS, CHUNKS, st.booleans(), st.booleans(),
)  # fmt: skip
def test_requests_and_answers_arrive_unchanged(
    through: tuple[Activator, Pod],
    method: str, path: bytes, headers: list[Any], body: list[bytes], chunked: bool,
    code: int, answer_headers: list[Any], answer_body: list[bytes], answer_chunked: bool, held: bool,
) -> None:  # fmt: skip
    activator, pod = through
    arrived: list[bytes] = []

    async def behaves(talk: Talk, request: h11.Request) -> None:
        arrived.append(await talk.read())
        framing = [] if answer_chunked else [("Content-Length", str(len(b"".join(answer_body))))]
        await talk.send(h11.Response(status_code=code, headers=[*answer_headers, *framing]))
        for piece in answer_body:
            await talk.send(h11.Data(data=piece))
        await talk.send(h11.EndOfMessage())

    pod.behaviour = behaves
    pod.seen.clear()
    activator.asleep(KEY) if held else activator.ready(KEY, pod.address)
    framing = (b"Transfer-Encoding", b"chunked") if chunked else (b"Content-Length", str(len(b"".join(body))).encode())
    client = h11.Connection(h11.CLIENT)
    with Wire(activator.listen(KEY)) as wire:
        request = h11.Request(method=method, target=path, headers=[("Host", "phi:80"), *headers, framing])
        wire.send(client.send(request) or b"")
        for piece in body:
            wire.send(client.send(h11.Data(data=piece)) or b"")
        wire.send(client.send(h11.EndOfMessage()) or b"")
        if held:
            until(lambda: activator.waiting(KEY) == 1)
            activator.ready(KEY, pod.address)
        came = bytearray()
        while True:
            event = client.next_event()
            if event is h11.NEED_DATA:
                client.receive_data(wire.socket.recv(65536))
            elif isinstance(event, h11.Response):
                answer = event
            elif isinstance(event, h11.Data):
                came += event.data
            else:
                assert isinstance(event, h11.EndOfMessage)
                break
    (seen,) = pod.seen
    assert (seen.method, seen.target) == (method.encode(), path)
    assert arrived == [b"".join(body)]
    assert [h for h in seen.headers.raw_items() if h[0].lower().decode() not in OURS] == headers
    assert dict(seen.headers)[b"host"] == b"phi:80"
    assert (answer.status_code, bytes(came)) == (code, b"".join(answer_body))
    assert [h for h in answer.headers.raw_items() if h[0].lower().decode() not in OURS] == answer_headers


def test_headers_about_one_connection_stay_there(activator: Activator) -> None:
    async def talks(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        await talk.answer(
            200, b"", [("Keep-Alive", "timeout=5"), ("Connection", "X-Hop"), ("X-Hop", "1"), ("X-End", "2")]
        )

    with Pod(talks) as pod, Wire(activator.listen(KEY)) as wire:
        activator.ready(KEY, pod.address)
        wire.send(
            b"GET /x HTTP/1.1\r\nHost: phi\r\nConnection: keep-alive, X-Mine\r\nX-Mine: 1\r\nTE: trailers\r\n"
            b"Upgrade: websocket\r\nProxy-Authorization: Basic eDp5\r\nX-Yours: 2\r\n\r\n"
        )
        answer = wire.rest()
        assert set(dict(pod.seen[0].headers)) == {b"host", b"x-yours", b"via", b"connection"}
        assert dict(pod.seen[0].headers)[b"connection"] == b"close"
        assert b"X-End: 2" in answer
        assert b"X-Hop" not in answer
        assert b"timeout=5" not in answer


def test_head_and_empty_answers_have_no_body(activator: Activator) -> None:
    async def talks(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        if request.method == b"HEAD":
            await talk.send(h11.Response(status_code=200, headers=[("Content-Length", "1234")]))
            await talk.send(h11.EndOfMessage())
        else:
            await talk.send(h11.Response(status_code=204, headers=[]))
            await talk.send(h11.EndOfMessage())

    with Pod(talks) as pod:
        activator.ready(KEY, pod.address)
        with Wire(activator.listen(KEY)) as wire:
            answer = wire.send(b"HEAD /x HTTP/1.1\r\nHost: phi\r\n\r\n").rest()
            assert b"1234" in answer
            assert answer.endswith(b"\r\n\r\n")
        with Wire(activator.listen(KEY)) as wire:
            answer = wire.send(b"DELETE /x HTTP/1.1\r\nHost: phi\r\n\r\n").rest()
            assert status(answer) == 204
            assert answer.endswith(b"\r\n\r\n")


def test_an_old_client_gets_the_end_of_an_answer_by_the_end_of_the_connection(activator: Activator) -> None:
    async def talks(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        await talk.send(h11.Response(status_code=200, headers=[]))
        await talk.send(h11.Data(data=b"hello"))
        await talk.send(h11.EndOfMessage())

    with Pod(talks) as pod, Wire(activator.listen(KEY)) as wire:
        activator.ready(KEY, pod.address)
        answer = wire.send(b"GET /x HTTP/1.0\r\n\r\n").rest()
        assert answer.endswith(b"\r\n\r\nhello")
        assert b"chunked" not in answer
        # HTTP/1.1 needs a host; it had none.
        assert dict(pod.seen[0].headers)[b"host"] == pod.address.removeprefix("http://").encode()


def test_an_answer_that_ends_with_the_connection_ends_properly(activator: Activator) -> None:
    async def old(talk: Talk, request: h11.Request) -> None:
        await talk.read()
        talk.writer.write(b"HTTP/1.0 200 OK\r\n\r\nhello")
        await talk.writer.drain()
        talk.writer.close()

    with Pod(old) as pod, Wire(activator.listen(KEY)) as wire:
        activator.ready(KEY, pod.address)
        assert wire.send(GET).rest().endswith(b"5\r\nhello\r\n0\r\n\r\n")


def test_a_target_that_was_written_for_a_proxy_is_a_path(activator: Activator) -> None:
    with Pod() as pod, Wire(activator.listen(KEY)) as wire:
        activator.ready(KEY, pod.address)
        wire.send(b"GET http://phi/x?y=1 HTTP/1.1\r\nHost: phi\r\n\r\n").rest()
        assert pod.seen[0].target == b"/x?y=1"


# One connection, several requests


def test_requests_follow_each_other_on_a_connection(activator: Activator) -> None:
    with Wire(activator.listen(KEY)) as wire:
        for _ in range(3):
            wire.send(b"GET /health HTTP/1.1\r\nHost: phi\r\n\r\n")
            assert status(wire.until(b"\r\n\r\n")) == 200
            wire.until(b"}")
        wire.send(b"GET /health HTTP/1.1\r\nHost: phi\r\nConnection: close\r\n\r\n")
        assert b"onnection: close" in wire.rest()


def test_a_connection_that_is_not_used_again_is_ended() -> None:
    with activating(limits=Limits(idle=0.3)) as activator, Wire(activator.listen(KEY)) as wire:
        wire.send(b"GET /health HTTP/1.1\r\nHost: phi\r\n\r\n")
        assert wire.rest().endswith(b"}")


def test_pipelined_requests_are_answered_one_after_the_other(activator: Activator) -> None:
    with Wire(activator.listen(KEY)) as wire:
        answer = wire.send(b"GET /v1/models HTTP/1.1\r\nHost: phi\r\n\r\nHEAD /health HTTP/1.1\r\nHost: phi\r\n\r\n"
                           b"GET /health HTTP/1.1\r\nHost: phi\r\nConnection: close\r\n\r\n").rest()  # fmt: skip
        assert [int(a[:3]) for a in answer.split(b"HTTP/1.1 ")[1:]] == [503, 200, 200]


def test_what_is_pipelined_behind_a_request_that_waits_is_not_mistaken_for_its_body(activator: Activator) -> None:
    with Pod() as pod, Wire(activator.listen(KEY)) as wire:
        wire.send(b"POST /x HTTP/1.1\r\nHost: phi\r\nContent-Length: 2\r\n\r\nhiPOST /y HTTP/1.1\r\nHost: phi\r\n\r\n")
        until(lambda: activator.waiting(KEY) == 1)
        wire.send(b"z" * 500_000)
        activator.ready(KEY, pod.address)
        assert wire.until(b"\r\n\r\nhi")
        wire.ended()
        assert [r.target for r in pod.seen] == [b"/x"]


# The body


def test_a_client_that_expects_to_be_told_to_go_on_is_told_at_once(activator: Activator) -> None:
    with Pod() as pod, Wire(activator.listen(KEY)) as wire:
        wire.send(b"POST /x HTTP/1.1\r\nHost: phi\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert status(wire.until(b"\r\n\r\n")) == 100
        wire.send(b"hello")
        until(lambda: activator.waiting(KEY) == 1)
        activator.ready(KEY, pod.address)
        assert wire.rest().endswith(b"\r\n\r\nhello")
        assert b"expect" not in dict(pod.seen[0].headers)


def test_a_client_whose_body_is_not_wanted_is_not_told_to_go_on() -> None:
    with activating(waiting=0) as activator, Wire(activator.listen(KEY)) as wire:
        answer = wire.send(b"POST /x HTTP/1.1\r\nHost: phi\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n").rest()
        assert status(answer) == 429
        assert b"Connection: close" in answer


def test_a_body_that_is_not_wanted_is_read_so_that_the_connection_can_be_used_again() -> None:
    with activating(waiting=0) as activator, Wire(activator.listen(KEY)) as wire:
        for _ in range(2):
            wire.send(b"POST /x HTTP/1.1\r\nHost: phi\r\nContent-Length: 5\r\n\r\n")
            assert status(wire.until(b"\r\n\r\n")) == 429
            wire.until(b"}}")
            wire.send(b"hello")


def test_of_a_large_body_only_so_much_is_held_and_all_of_it_arrives(activator: Activator) -> None:
    size = 20 << 20
    body = bytes(range(256)) * (size // 256)
    sent = threading.Event()

    def ask(wire: Wire) -> None:
        wire.send(b"POST /x HTTP/1.1\r\nHost: phi\r\nContent-Length: %d\r\n\r\n" % size)
        wire.send(body)
        sent.set()

    with Pod() as pod, Wire(activator.listen(KEY)) as wire:
        asking = Asking(lambda: ask(wire))
        until(lambda: activator._held.bytes > 1 << 20)
        assert not sent.wait(0.3)
        assert activator._held.bytes < 2 << 20
        activator.ready(KEY, pod.address)
        answer = wire.rest()
        asking.result()
        assert answer.partition(b"\r\n\r\n")[2] == body


@pytest.mark.parametrize("size", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1])
@pytest.mark.parametrize("chunked", [True, False])
def test_at_the_bound_of_what_is_held(activator: Activator, size: int, chunked: bool) -> None:
    body = b"x" * size
    framing, sent = b"Content-Length: %d" % size, body
    if chunked:
        framing, sent = b"Transfer-Encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (size, body)
    with Pod() as pod, Wire(activator.listen(KEY)) as wire:
        wire.send(b"POST /x HTTP/1.1\r\nHost: phi\r\n%b\r\n\r\n" % framing)
        asking = Asking(lambda: wire.send(sent))
        until(lambda: activator.waiting(KEY) == 1 and activator._held.bytes >= min(size, 1 << 20))
        activator.ready(KEY, pod.address)
        assert wire.rest().partition(b"\r\n\r\n")[2] == body
        asking.result()


def test_all_bodies_together_are_bounded_too() -> None:
    limits = Limits(body=200_000, held=300_000)
    size, many = 5 << 20, 4
    with activating(limits=limits) as activator, Pod() as pod:

        def ask() -> int:
            with Wire(activator.listen(KEY)) as wire:
                wire.send(b"POST /x HTTP/1.1\r\nHost: phi\r\nContent-Length: %d\r\n\r\n" % size)
                sending = Asking(lambda: wire.send(b"x" * size))
                answer = wire.rest()
                sending.result()
                return len(answer.partition(b"\r\n\r\n")[2])

        asking = [Asking(ask) for _ in range(many)]
        until(lambda: activator.waiting(KEY) == many and activator._held.bytes > 300_000)
        time.sleep(0.2)
        assert activator._held.bytes < 900_000
        activator.ready(KEY, pod.address)
        assert [a.result() for a in asking] == [size] * many


def test_a_slow_reader_slows_the_endpoint_down_and_nothing_piles_up(activator: Activator) -> None:
    sent = 0

    async def pours(talk: Talk, request: h11.Request) -> None:
        nonlocal sent
        await talk.read()
        await talk.send(h11.Response(status_code=200, headers=[("Content-Length", str(64 << 20))]))
        for _ in range(64):
            await talk.send(h11.Data(data=b"x" * (1 << 20)))
            sent += 1
        await talk.send(h11.EndOfMessage())

    with Pod(pours) as pod, Wire(activator.listen(KEY)) as wire:
        activator.ready(KEY, pod.address)
        wire.send(GET)
        until(lambda: sent > 0)
        time.sleep(0.3)
        assert sent < 40  # the kernel's buffers, and not the activator's
        assert len(wire.rest()) > 64 << 20


# What is not HTTP


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET /x HTTP/1.1\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\n bad\x00: b\r\n\r\n", 400),
        (b"GET x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT phi:80 HTTP/1.1\r\nHost: phi\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /x HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /" + b"x" * 300_000, 431),
        (b"GET /x HTTP/1.1\r\nHost: a\r\n" + b"X-Many: 1\r\n" * 30_000, 431),
    ],
)
def test_nonsense_is_answered_as_such(activator: Activator, said: bytes, expected: int) -> None:
    with Wire(activator.listen(KEY)) as wire:
        answer = wire.send(said).rest()
        assert status(answer) == expected
        assert b"onnection: close" in answer
        assert b'"error"' in answer
    assert activator.waiting(KEY) == 0


def test_a_head_that_comes_too_slowly_is_not_waited_for() -> None:
    with activating(limits=Limits(head=0.5)) as activator, Wire(activator.listen(KEY)) as wire:
        wire.send(b"GET /x HTTP/1.1\r\n")
        asking = Asking(wire.rest)
        while asking.is_alive():
            try:
                wire.send(b"X-Slow: 1\r\n")
            except OSError:
                break
            time.sleep(0.05)
        assert status(asking.result()) == 408


def test_a_body_that_does_not_get_on_is_not_waited_for() -> None:
    with activating(limits=Limits(silence=0.2)) as activator, Wire(activator.listen(KEY)) as wire:
        answer = wire.send(b"POST /x HTTP/1.1\r\nHost: phi\r\nContent-Length: 5\r\n\r\nhe").rest()
        assert status(answer) == 408
        assert activator.waiting(KEY) == 0


HALF_SENT = (
    b"Content-Length: 100\r\n\r\n",
    b"Content-Length: 100\r\n\r\n{",
    b"Content-Length: 2000000\r\n\r\n" + b" " * 500_000,
    b"Transfer-Encoding: chunked\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n10\r\n{",
    b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n",
)


@pytest.mark.parametrize("count", [16, 64])
def test_half_sent_bodies_take_no_place_and_wake_nothing(count: int) -> None:
    wakes = Wakes()
    with activating(wakes, waiting=2) as activator, ExitStack() as stack, Pod() as pod:
        port = activator.listen(KEY)
        for number in range(count):
            wire = stack.enter_context(Wire(port))
            wire.send(b"POST /v1/completions HTTP/1.1\r\nHost: phi\r\n" + HALF_SENT[number % len(HALF_SENT)])
        until(lambda: tasks(activator) > count)
        assert (activator.waiting(KEY), wakes.keys) == (0, [])
        with Wire(port) as wire:
            wire.send(b"POST /x HTTP/1.1\r\nHost: phi\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello")
            until(lambda: wakes.keys)
            assert activator.waiting(KEY) == 1
            activator.ready(KEY, pod.address)
            assert wire.rest().endswith(b"hello")


@pytest.mark.parametrize("half", HALF_SENT)
def test_a_body_that_does_not_come_is_given_up(half: bytes) -> None:
    wakes = Wakes()
    with activating(wakes, limits=Limits(body_seconds=0.2)) as activator, Wire(activator.listen(KEY)) as wire:
        answer = wire.send(b"POST /x HTTP/1.1\r\nHost: phi\r\n" + half).rest()
        assert status(answer.removeprefix(b"HTTP/1.1 100 \r\n\r\n")) == 408
        assert b"did not come within 0.2 s" in answer
        assert wakes.keys == []


def test_many_tiny_chunks_hold_nobody_up(activator: Activator) -> None:
    with Pod() as pod, Wire(activator.listen(KEY)) as wire:
        wire.send(b"POST /x HTTP/1.1\r\nHost: phi\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 30_000)
        with Wire(activator.listen(KEY)) as other:
            other.send(b"GET /health HTTP/1.1\r\nHost: phi\r\nConnection: close\r\n\r\n")
            assert status(other.rest()) == 200
        wire.send(b"0\r\n\r\n")
        activator.ready(KEY, pod.address)
        assert wire.rest().endswith(b"x" * 30_000)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(
    st.binary(max_size=200),
    st.tuples(st.binary(max_size=60), st.sampled_from([b"\r\n\r\n", b"\n\n"])).map(
        lambda t: b"POST /x HTTP/1.1\r\nHost: phi\r\nContent-Length: 3\r\n" + t[0] + t[1] + b"abc"
    ),
    st.binary(max_size=100).map(lambda b: b"POST /x HTTP/1.1\r\nHost: phi\r\nTransfer-Encoding: chunked\r\n\r\n" + b),
))  # fmt: skip
def test_whatever_is_sent_the_activator_goes_on(through: tuple[Activator, Pod], said: bytes) -> None:
    activator, _ = through
    activator.asleep(KEY)
    with Wire(activator.listen(KEY)) as wire:
        wire.send(said)
        wire.socket.shutdown(socket.SHUT_WR)
        wire.ended()
    with Wire(activator.listen(KEY)) as wire:
        assert status(wire.send(b"GET /health HTTP/1.0\r\n\r\n").rest()) == 200


# The small functions


@pytest.mark.parametrize(
    ("target", "path"),
    [(b"/x?y", b"/x?y"), (b"*", b"*"), (b"http://a", b"/"), (b"HTTPS://a:1/x", b"/x"), (b"http://a?q=/", b"/?q=/"),
     (b"a:80", None), (b"x", None)],
)  # fmt: skip
def test_targets(target: bytes, path: bytes | None) -> None:
    assert path_of(target) == path


def test_addresses() -> None:
    assert host_and_port("http://10.0.0.5:5000") == ("10.0.0.5", 5000)
    assert host_and_port("http://[fd00::5]:80/") == ("fd00::5", 80)


def test_a_client_may_not_call_the_length_its_own() -> None:
    headers = [(b"Content-Length", b"3"), (b"Connection", b"Content-Length, X-A"), (b"x-a", b"1"), (b"X-B", b"2")]
    assert end_to_end(headers, [b"x-b"]) == [(b"Content-Length", b"3")]
