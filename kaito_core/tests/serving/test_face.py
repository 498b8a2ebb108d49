"""The face over real HTTP: what it adds, what it refuses, and what it leaves alone."""

from __future__ import annotations

import asyncio
import re
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
from kaito_core.serving import api_key
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


def test_the_engine_gets_the_very_objects_of_the_server() -> None:
    """No wrapping of ``receive`` and no copy of ``scope`` for what the face has nothing to do with."""
    got: list[Any] = []

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        got.extend([scope, receive])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    async def send(message: Any) -> None: ...

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [(b"content-length", b"5")]}
    asyncio.run(Face(engine, Settings())(scope, receive, send))
    assert got[0] is scope
    assert got[1] is receive


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
    served = serve()
    with socket.create_connection(("127.0.0.1", served.port)) as s:
        s.sendall(b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        eventually(lambda: metric(served, "kaito_requests_in_flight") == 1)
    eventually(lambda: metric(served, "kaito_requests_in_flight") == 0)
    assert metric(served, 'kaito_requests_total{path="/chat",code="499"}') == 1


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
