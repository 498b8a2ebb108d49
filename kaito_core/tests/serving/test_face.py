"""The face over real HTTP: what it adds, what it refuses, and what it leaves alone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kaito_core.problems import UserError
from kaito_core.serving import api_key, chat, face, sampling
from kaito_core.serving.face import Face
from kaito_core.serving.settings import Settings

from .conftest import Engine, Served

Serve = Callable[..., Served]
QUESTION = "What is the answer?"


def eventually(true: Callable[[], Any]) -> None:
    """Waits until something is true; a test that hangs here has failed."""
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def metric(served: Served, name: str) -> float:
    return next(
        float(line.split()[-1]) for line in served.http.get("/metrics").text.splitlines() if line.startswith(name)
    )


# --- what KAITO has


def test_the_quick_starts_curl_line(serve: Serve) -> None:
    """``curl -X POST http://$CLUSTERIP/chat -H … -d '{"prompt": …}'``, with everything as KAITO's defaults are."""
    served = serve()
    said = subprocess.run(
        ["curl", "--silent", "--noproxy", "*", "-X", "POST", f"{served.url}/chat", "-H", "accept: application/json",
         "-H", "Content-Type: application/json", "-d", '{"prompt":"YOUR QUESTION HERE"}'],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    assert said.stdout == '{"Result": "YOUR QUESTION HERE\\nforty-two"}'
    path, asked = served.engine.asked[-1]
    assert path == "/v1/chat/completions"
    assert asked == {
        "model": "demo", "messages": [{"role": "user", "content": "YOUR QUESTION HERE"}], "max_tokens": 200, "temperature": 1.0,
        "top_k": 10, "top_p": 1.0,
    }  # fmt: skip


def test_root_and_health_as_in_kaito(serve: Serve) -> None:
    served = serve()
    assert served.http.get("/").json() == {"message": "Server is running"}
    assert served.http.get("/healthz").json() == {"status": "Healthy"}
    assert served.http.get("/health").status_code == 200
    served.engine.ready = False
    assert served.http.get("/health").status_code == 503
    answer = served.http.get("/healthz")
    assert (answer.status_code, answer.json()) == (500, {"detail": "Model not initialized"})


def test_errors_of_chat_have_kaitos_words_and_openais_form(serve: Serve) -> None:
    answer = serve().chat()
    assert answer.status_code == 400
    assert answer.json() == {
        "detail": "Text generation parameter prompt required",
        "error": {"message": "Text generation parameter prompt required", "type": "invalid_request_error", "param": "prompt",
                  "code": None},
    }  # fmt: skip


def test_a_max_length_counts_the_prompt_as_in_kaito(serve: Serve) -> None:
    served = serve()
    served.chat(prompt="one two three", generate_kwargs={"max_length": 10})
    assert [path for path, _ in served.engine.asked] == ["/tokenize", "/v1/chat/completions"]
    assert served.engine.asked[-1][1]["max_tokens"] == 7
    answer = served.chat(prompt="one two three", generate_kwargs={"max_length": 3})
    assert answer.status_code == 400
    assert "the prompt has 3 tokens and max_length is 3" in answer.json()["detail"]


def test_an_engine_that_cannot_count_tokens_is_asked_once(serve: Serve) -> None:
    served = serve()
    served.engine.tokenizes = False
    for _ in range(2):
        served.chat(prompt="one two three", generate_kwargs={"max_length": 10})
    assert [path for path, _ in served.engine.asked].count("/tokenize") == 1
    assert served.engine.asked[-1][1]["max_tokens"] == 10


def test_without_a_name_chat_answers_as_the_engines_first_model(serve: Serve) -> None:
    served = serve(chat_model="")
    served.chat(prompt=QUESTION)
    assert served.engine.asked[-1][1]["model"] == "first"


def test_the_engines_own_error_is_handed_on(serve: Serve) -> None:
    answer = serve(chat_model="unknown").chat(prompt=QUESTION)
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "no such model",
        "type": "not_found_error",
        "param": "model",
        "code": None,
    }


def test_an_engine_that_breaks_is_a_500_in_words(serve: Serve) -> None:
    answer = serve(chat_model="broken").chat(prompt=QUESTION)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "Traceback" not in answer.text
    assert "memory" not in answer.text


# --- what it leaves alone


def test_the_engines_stream_comes_through_piece_by_piece(serve: Serve) -> None:
    served = serve()
    served.hold()
    with served.http.stream("POST", "/v1/chat/completions", json={"stream": True}) as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == b"data: one\n\n"  # while the engine has not yet made the second
        served.release()
        assert next(pieces) == b"data: [DONE]\n\n"


def test_the_engine_gets_the_scope_of_the_server_and_the_bytes_of_the_client() -> None:
    """No copy of ``scope``, a body in one piece however it came, and then what the server has to say: that the client has gone."""
    got: list[Any] = []

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        got.extend([scope, await receive(), await receive()])

    messages = [
        {"type": "http.request", "body": b'{"a":', "more_body": True},
        {"type": "http.request", "body": b" 1 }", "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None: ...

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [(b"content-length", b"9")]}
    asyncio.run(Face(engine, Settings())(scope, receive, send))
    assert got[0] is scope
    assert got[1:] == [
        {"type": "http.request", "body": b'{"a": 1 }', "more_body": False},
        {"type": "http.disconnect"},
    ]


def test_a_client_that_goes_away_in_mid_stream(serve: Serve) -> None:
    served = serve()
    served.hold()
    with served.http.stream("POST", "/v1/chat/completions", json={"stream": True}) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        assert metric(served, "kaito_requests_in_flight") == 1
    eventually(lambda: served.engine.gone == 1)
    eventually(lambda: metric(served, "kaito_requests_in_flight") == 0)
    assert metric(served, 'kaito_requests_total{path="/v1/chat/completions",code="499"}') == 1


def test_a_client_of_chat_that_goes_away_ends_the_engines_work(serve: Serve) -> None:
    served = serve()
    served.hold()
    with pytest.raises(httpx.ReadTimeout):
        served.http.post("/chat", json={"prompt": QUESTION}, timeout=0.5)
    eventually(lambda: served.engine.gone == 1)
    eventually(lambda: metric(served, "kaito_requests_in_flight") == 0)


# --- metrics


def test_metrics_are_the_engines_and_then_ours(serve: Serve) -> None:
    served = serve()
    served.chat(prompt=QUESTION)
    served.http.get("/no/such/path")
    answer = served.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.text.startswith("engine_up 1\n")
    for line in (
        'kaito_requests_total{path="/chat",code="200"} 1',
        'kaito_requests_total{path="other",code="404"} 1',
        "kaito_requests_in_flight 0",
        "kaito_ratelimit_rejected_total 0",
        'kaito_request_seconds_bucket{path="/chat",le="+Inf"} 1',
        'kaito_request_seconds_count{path="/chat"} 1',
    ):
        assert f"\n{line}\n" in answer.text


def test_prometheus_own_parser_reads_them(serve: Serve) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    served = serve()
    served.chat(prompt=QUESTION)
    families = {f.name: f.type for f in text_string_to_metric_families(served.http.get("/metrics").text)}
    assert families["kaito_requests"] == "counter"
    assert families["kaito_request_seconds"] == "histogram"


# --- the key


def test_the_api_key(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_key, "LOOK_EVERY", 0.0)
    key = tmp_path / "key"
    key.write_text("first\n")
    served = serve(api_key_file=str(key))

    def status(token: str | None, path: str = "/v1/models") -> int:
        return served.http.get(path, headers={"Authorization": token} if token is not None else {}).status_code

    assert status("Bearer first") == status("bearer first") == 200
    for wrong in (None, "", "Bearer", "Bearer firs", "Bearer firstt", "Basic first", "first"):
        assert status(wrong) == 401, wrong
    assert [status(None, p) for p in ("/", "/health", "/healthz", "/metrics")] == [200] * 4
    assert [status(None, p) for p in ("/health/", "/metrics/x", "/HEALTH")] == [401] * 3
    refused = served.chat(prompt=QUESTION)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert "first" not in refused.text

    key.write_text("second")
    assert (status("Bearer first"), status("Bearer second")) == (401, 200)
    key.write_text("")  # half written
    assert (status("Bearer"), status("Bearer second")) == (401, 200)
    key.unlink()
    assert (status(None), status("Bearer second")) == (401, 200)


def test_a_key_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the API key cannot be read"):
        Face(Engine.__call__, Settings(api_key_file=str(tmp_path / "none")))  # type: ignore[arg-type]
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        Face(Engine.__call__, Settings(api_key_file=str(tmp_path / "empty")))  # type: ignore[arg-type]


# --- limits


def test_too_large_by_its_own_word(serve: Serve) -> None:
    served = serve(max_body=1000)
    for path in ("/chat", "/v1/completions"):
        answer = served.http.post(path, content=b"x" * 1001)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "a request may have 1,000 bytes and not more"
    assert served.engine.asked == []
    assert served.chat(prompt=QUESTION).status_code == 200  # on the same connection


def test_too_large_without_a_word(serve: Serve) -> None:
    served = serve(max_body=1000)
    for path in ("/chat", "/v1/completions"):
        assert served.http.post(path, content=(b"x" * 100 for _ in range(11))).status_code == 413
    assert served.engine.asked == []
    body = [b'{"prompt": "', b"x" * 900, b'"}']
    assert served.http.post("/chat", content=iter(body)).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"],
)
def test_what_is_not_json(serve: Serve, body: bytes) -> None:
    answer = serve().http.post("/chat", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("invalid_json", None)
    assert len(answer.text) < 1000


def test_a_thousand_at_once_are_all_answered(serve: Serve) -> None:
    served = serve(max_requests=500)
    codes = asyncio.run(many(served, 1000))
    assert codes == [200] * 1000
    assert metric(served, "kaito_requests_in_flight") == 0


def test_overload_is_refused_at_once_and_says_when_to_come_again(serve: Serve) -> None:
    """100 are worked on, 100 wait, and 800 are told so while not one of the 200 has been answered."""
    served = serve(max_requests=100)
    served.hold()

    async def crowd() -> list[int]:
        calls = asyncio.create_task(many(served, 1000))
        while served.face.metrics.rejected < 800:
            await asyncio.sleep(0.01)
        assert served.engine.answering == 200
        served.release()
        return await calls

    codes = asyncio.run(crowd())
    assert (codes.count(200), codes.count(429)) == (200, 800)
    assert metric(served, "kaito_ratelimit_rejected_total") == 800
    assert served.chat(prompt=QUESTION).status_code == 200


def test_what_a_refused_client_reads(serve: Serve) -> None:
    served = serve(max_requests=1)
    served.hold()
    with (
        served.http.stream("POST", "/v1/completions", json={"stream": True}),
        served.http.stream("POST", "/v1/completions", json={"stream": True}),
    ):
        answer = served.http.post("/v1/completions", json={})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"] == {
            "message": "2 requests are being answered or wait, which is as many as there may be: try again in 1 s",
            "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded",
        }  # fmt: skip
        assert served.http.get("/v1/models").status_code == served.http.get("/health").status_code == 200


async def many(served: Served, count: int) -> list[int]:
    """So many clients, each with a connection of its own; the status of each answer."""
    body = b'{"prompt": "What is the answer?"}'
    head = f"POST /chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(head + body)
        answer = await reader.read()
        writer.close()
        return int(answer.split(b" ", 2)[1])

    return await asyncio.gather(*(one() for _ in range(count)))


def test_a_request_cut_off_in_the_middle_of_its_body(serve: Serve) -> None:
    """It never was one: the endpoint does not count as busy with it."""
    served = serve()
    with half_sent(served, b"{"):
        eventually(lambda: served.face._intake.held == 1)
        assert metric(served, "kaito_requests_in_flight") == 0
    eventually(lambda: metric(served, 'kaito_requests_total{path="/chat",code="499"}') == 1)
    assert served.face._intake.held == 0


# --- bodies that do not come

LENGTH = b"Content-Length: 100\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
HALF_SENT = {
    "nothing of it": (LENGTH, b""),
    "half of it": (LENGTH, b'{"prompt": "What'),
    "all but a byte": (LENGTH, b" " * 99),
    "a length that no server can hold": (b"Content-Length: 16777216\r\n", b"{"),
    "no chunk": (CHUNKED, b""),
    "half of a chunk": (CHUNKED, b"10\r\n{"),
    "no last chunk": (CHUNKED, b"1\r\n{\r\n"),
    "a client that wants to be told to go on": (LENGTH + b"Expect: 100-continue\r\n", b""),
}


def half_sent(served: Served, body: bytes, header: bytes = LENGTH, path: str = "/chat") -> socket.socket:
    s = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    s.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode() + header + b"\r\n" + body)
    return s


def answer_of(s: socket.socket) -> bytes:
    """Everything until the server ends the connection."""
    data = b""
    while piece := s.recv(65536):
        data += piece
    return data


@pytest.mark.parametrize("count", [16, 64])
def test_half_sent_bodies_take_no_place(serve: Serve, count: int) -> None:
    """Of an endpoint that answers one request at once and lets one wait."""
    served = serve(max_requests=1)
    with contextlib.ExitStack() as stack:
        ways = list(
            itertools.product(("/chat", "/v1/chat/completions", "/v1/completions", "/tokenize"), HALF_SENT.values())
        )
        for path, (header, body) in itertools.islice(itertools.cycle(ways), count):
            stack.enter_context(half_sent(served, body, header, path))
        started = time.monotonic()
        assert served.chat(prompt=QUESTION).status_code == 200
        assert time.monotonic() - started < 5
        assert metric(served, "kaito_requests_in_flight") == 0


@pytest.mark.parametrize(("header", "body"), HALF_SENT.values(), ids=HALF_SENT)
def test_a_body_that_does_not_come_is_given_up(serve: Serve, header: bytes, body: bytes) -> None:
    served = serve(body_seconds=0.2)
    with half_sent(served, body, header) as s:
        said = answer_of(s)
    head, _, content = said.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(content)["error"] == {
        "message": "the body of the request did not come within 0.2 s", "type": "invalid_request_error", "param": None,
        "code": "request_timeout",
    }  # fmt: skip
    assert served.engine.asked == []


def test_a_body_that_dribbles_has_no_more_time_than_another(serve: Serve) -> None:
    served = serve(body_seconds=0.5)
    with half_sent(served, b"") as s:
        s.settimeout(0.05)
        until, said = time.monotonic() + 10, b""
        while not said and time.monotonic() < until:
            s.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                said = s.recv(65536)
    assert said.startswith(b"HTTP/1.1 408 ")


def test_a_refused_client_that_goes_on_sending_reads_why_and_is_let_go(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too large by its own word, too large as it comes, and without the key: the connection ends."""
    monkeypatch.setattr(face, "LINGER", 0.2)
    (tmp_path / "key").write_text("secret")
    served, locked = serve(max_body=1000), serve(api_key_file=str(tmp_path / "key"))
    for at, header, body, status in (
        (served, b"Content-Length: 100000000\r\n", b"x" * 1001, b"413"),
        (served, b"Content-Length: 00000000000000001001\r\n", b"x", b"413"),
        (served, CHUNKED, b"3e9\r\n" + b"x" * 1001, b"413"),
        (locked, LENGTH, b"{", b"401"),
    ):
        with half_sent(at, body, header) as s:
            head, _, content = answer_of(s).partition(b"\r\n\r\n")
            assert head.split(b" ", 2)[1] == status
            assert json.loads(content)["error"]["message"]


def test_large_bodies_that_do_not_end_leave_room_for_small_ones(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all clients together may make the endpoint hold is bounded."""
    monkeypatch.setattr(face, "LINGER", 0.2)
    served = serve(max_body=100_000)
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(half_sent(served, b" " * 99_000, b"Content-Length: 100000\r\n")) for _ in range(20)]
        refused, _, _ = select.select(said, [], [], 10)
        assert answer_of(refused[0]).startswith(b"HTTP/1.1 429 ")
        assert served.face._intake.held <= 17 * 100_000
        assert served.chat(prompt=QUESTION).status_code == 200


# --- numbers that no tensor holds

HOSTILE = (
    "true",
    '"7"',
    "[]",
    "{}",
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-1e400",
    "2147483648",
    "-2147483649",
    "9" * 30,
    "1.5e300",
)


def refused_by_name(answer: httpx.Response, field: str) -> bool:
    error = answer.json()["error"]
    return (
        answer.status_code == 400
        and error["param"] == field
        and field in error["message"]
        and "must be" in error["message"]
    )


def answers_to(path: str, bodies: list[str], engine: Engine) -> list[httpx.Response]:
    """Without sockets: these are many."""

    async def ask() -> list[httpx.Response]:
        engine.gate = asyncio.Event()
        engine.gate.set()
        transport = httpx.ASGITransport(Face(engine, Settings(chat_model="demo", vocabulary=100)))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return [await client.post(path, content=body.encode()) for body in bodies]

    return asyncio.run(ask())


def hostile_fields() -> list[tuple[str, str]]:
    """Every field that is bounded, with what it may not be."""
    cases = [(name, v) for name in sampling.NUMBERS for v in HOSTILE if name != "seed" or len(v) != 10 + v.count("-")]
    cases += [("logprobs", v) for v in HOSTILE if v != "true"]
    for name in sampling.LISTS_OF_TOKENS:
        cases += [(name, f"[1, {v}]") for v in (*HOSTILE, "-1", "1.5", "100", "null")]
        cases += [(name, v) for v in HOSTILE if v != "[]"] + [(name, str([1] * 1025))]
    cases += [("logit_bias", f'{{"5": {v}}}') for v in (*HOSTILE, "101", "null")]
    cases += [("logit_bias", f'{{"{k}": 1}}') for k in ("x", "-1", "1.5", "100", "2147483648", "9" * 30, "²", "")]
    return cases + [("logit_bias", v) for v in HOSTILE if v != "{}"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
def test_every_number_of_a_request_is_bounded_before_the_engine_sees_it(path: str) -> None:
    cases, engine = hostile_fields(), Engine()
    answers = answers_to(path, [f'{{"{name}": {value}}}' for name, value in cases], engine)
    for (name, value), answer in zip(cases, answers, strict=True):
        assert refused_by_name(answer, name), (name, value, answer.text)
    (inner,) = answers_to(path, ['{"sampling_params": {"top_k": 2147483648}}'], engine)
    assert refused_by_name(inner, "top_k")
    assert engine.asked == []


def test_what_is_within_its_bounds_reaches_the_engine_as_it_was_sent() -> None:
    engine = Engine()
    fine = {
        "top_k": -1, "n": None, "seed": 2**63 - 1, "max_tokens": 5.0, "logit_bias": {"99": -100}, "stop_token_ids": [0, 99],
        "logprobs": True, "temperature": 0, "metadata": {"top_k": 1e300},
    }  # fmt: skip
    (answer,) = answers_to("/v1/completions", [json.dumps(fine)], engine)
    assert answer.status_code == 200
    assert engine.asked == [("/v1/completions", fine)]


def test_every_number_of_chat_is_bounded() -> None:
    engine = Engine()
    numbers = [name for name, what in chat.KWARGS.items() if isinstance(what, sampling.Bound)]
    values = [v for v in HOSTILE if v not in ("NaN", "Infinity", "-Infinity")]  # no JSON on /chat
    cases = [(n, v) for n, v in itertools.product(numbers, values) if (n, v) != ("seed", "2147483648")]
    cases += [("eos_token_id", v) for v in ("[1e400]", "2147483648", "-1", "true")]
    bodies = [f'{{"prompt": "x", "generate_kwargs": {{"{name}": {value}}}}}' for name, value in cases]
    for (name, value), answer in zip(cases, answers_to("/chat", bodies, engine), strict=True):
        assert refused_by_name(answer, f"generate_kwargs.{name}"), (name, value, answer.text)
    (beyond,) = answers_to("/chat", ['{"prompt": "x", "generate_kwargs": {"eos_token_id": 100}}'], engine)
    assert beyond.status_code == 400
    assert engine.asked == []


def test_what_is_no_object_is_for_the_engine_to_judge(serve: Serve) -> None:
    served = serve()
    for body in (b"[1]", b'"text"', b"7"):
        served.http.post("/tokenize", content=body)
    assert (
        served.http.post("/v1/completions", content=b"[" * 100_000).status_code == 500
    )  # of the engine of these tests


def test_it_needs_nothing_but_the_standard_library() -> None:
    """``-S -I``: no site-packages; the package itself is given by its folder."""
    import kaito_core

    source = Path(kaito_core.__file__).parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(source)!r}); import kaito_core.serving.face; print(*sorted(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"kaito_core\.\w+(?= )", loaded) == [
        "kaito_core.problems",
        "kaito_core.progress",
        "kaito_core.serving",
    ]
