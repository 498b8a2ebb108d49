"""Talking to an endpoint: what is streamed, remembered, compared and ended, and every way in which an endpoint can fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.cli import chat as chat_module
from kaito_core.cli.chat import Chat, Voice, command
from kaito_core.cli.completions import Asking, Piece, pieces
from kaito_core.cli.endpoint import base_url
from kaito_core.problems import Failure, KaitoError, UserError

Answer = Callable[[dict[str, Any], BaseHTTPRequestHandler], None]


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


END = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
MODELS = {"data": [{"id": "tiny"}, {"id": "mine", "parent": "tiny"}, {"id": "other", "parent": "tiny"}]}


def stream(*parts: bytes, content_type: str = "text/event-stream") -> Answer:
    def act(body: dict[str, Any], handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", content_type)
        handler.end_headers()
        for part in parts:
            handler.wfile.write(part)
            handler.wfile.flush()

    return act


def refuse(status: int, body: bytes, **headers: str) -> Answer:
    def act(_: dict[str, Any], handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return act


def repeat(body: dict[str, Any], handler: BaseHTTPRequestHandler) -> None:
    told = " ".join(m["content"] for m in body["messages"])
    stream(event(f"{body['model']} hears "), event(told), END)(body, handler)


@contextmanager
def endpoint(answer: Answer = repeat, models: Any = MODELS) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers so; its URL, and what it was asked with the headers."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if callable(models):
                models({}, self)
            else:
                refuse(200, json.dumps(models).encode())({}, self)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append({**body, "headers": dict(self.headers)})
            answer(body, self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("KAITO_API_KEY", raising=False)
    monkeypatch.setenv("KAITO_HOME", str(tmp_path))


def ask(url: str, *arguments: str, text: str = "") -> Result:
    return CliRunner().invoke(command, [url, *arguments], input=text, standalone_mode=False)


def problem(result: Result) -> KaitoError:
    assert isinstance(result.exception, KaitoError), result.exception
    return result.exception


# --- one question


def test_a_question_behind_the_name_has_one_answer() -> None:
    with endpoint() as (url, asked):
        result = ask(url, "how", "are you?", "--system", "be brief", "--max-tokens", "7", "--temperature", "0")
    assert result.output == "mine hears be brief how are you?\n"
    (body,) = asked
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "how are you?"}]
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("mine", 7, 0, True)


def test_text_on_standard_input_is_one_question() -> None:
    with endpoint() as (url, asked):
        assert ask(url, text="first line\nsecond line\n").output == "mine hears first line\nsecond line\n"
        assert "max_tokens" not in asked[0]
        assert "no question" in str(problem(ask(url, text="  \n")))


@pytest.mark.parametrize(
    ("options", "model"), [((), "mine"), (("--adapter", "other"), "other"), (("--adapter", "none"), "tiny")]
)
def test_the_adapter_is_chosen_by_name(options: tuple[str, ...], model: str) -> None:
    with endpoint() as (url, _):
        assert ask(url, "hi", *options).output == f"{model} hears hi\n"


def test_an_adapter_that_is_not_there_is_said_with_those_that_are() -> None:
    with endpoint() as (url, _):
        found = problem(ask(url, "hi", "--adapter", "nobody"))
    assert "there is no adapter 'nobody'; there is mine, other" in str(found)


def test_both_answers_are_shown_one_after_the_other() -> None:
    with endpoint() as (url, _):
        assert ask(url, "hi", "--compare").output == "[tiny]\ntiny hears hi\n[mine]\nmine hears hi\n"
        assert "[other]" in ask(url, "hi", "--compare", "--adapter", "other").output
        assert isinstance(problem(ask(url, "hi", "--compare", "--adapter", "none")), UserError)
    with endpoint(models={"data": [{"id": "tiny"}]}) as (url, _):
        assert "no adapter to compare with" in str(problem(ask(url, "hi", "--compare")))


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAITO_API_KEY", "sesame\n")
    with endpoint() as (url, asked):
        ask(url, "hi")
        assert asked[0]["headers"]["Authorization"] == "Bearer sesame"
    with endpoint(refuse(401, b'{"error": {"message": "no"}}')) as (url, _):
        found = problem(ask(url, "hi"))
        assert "does not accept the API key: no" in str(found)
        assert "sesame" not in str(found)
    monkeypatch.setenv("KAITO_API_KEY", "ses\name")
    assert "characters that no API key has" in str(problem(ask("http://127.0.0.1:1", "hi")))


def test_an_endpoint_that_sleeps_is_woken_by_a_question_to_a_named_model() -> None:
    asleep = refuse(503, b'{"error": {"message": "asleep", "code": "endpoint_asleep"}}')
    with endpoint(models=asleep) as (url, _):
        assert "is not ready: asleep" in str(problem(ask(url, "hi")))
        assert ask(url, "hi", "--adapter", "mine").output == "mine hears hi\n"


# --- a conversation


def talk(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *lines: Any, **more: Any
) -> str:
    """What a person sees who types these lines; an exception is what their keyboard does."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    chat_module._talk(Chat(Asking(url), [Voice("mine")], **more), "one")
    seen = capsys.readouterr()
    return seen.out + seen.err


def test_what_was_said_is_remembered_until_it_is_reset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint() as (url, asked):
        shown = talk(
            url, monkeypatch, capsys, "one", "", "two", "/reset", "three", "/what", "/exit", "never", system="s"
        )
    assert [len(a["messages"]) for a in asked] == [2, 4, 2]
    assert asked[1]["messages"][1:3] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "mine hears s one"},
    ]
    assert "there is no /what" in shown
    assert "never" not in shown


def test_ctrl_c_ends_the_answer_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(self: Asking, model: str, messages: Any, **_: Any) -> Iterator[Piece]:
        yield Piece("answer", "half an ans")
        if len(messages) == 1:
            raise KeyboardInterrupt
        yield Piece("answer", f"wer to {len(messages)}")

    monkeypatch.setattr(Asking, "answer", cut)
    shown = talk("http://127.0.0.1:1", monkeypatch, capsys, "one", KeyboardInterrupt(), "two", EOFError())
    assert "half an ans\n" in shown
    assert "(ended)" in shown
    assert "half an answer to 3" in shown, "what was said before Ctrl-C is remembered"


def test_a_question_that_fails_is_forgotten_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def second_fails(body: dict[str, Any], handler: BaseHTTPRequestHandler) -> None:
        busy = body["messages"][-1]["content"] == "two"
        (refuse(429, b'{"error": {"message": "full"}}', retry_after="3") if busy else repeat)(body, handler)

    with endpoint(second_fails) as (url, asked):
        shown = talk(url, monkeypatch, capsys, "one", "two", "three")
    assert "is busy: full" in shown
    assert "ask again in 3 s" in shown
    assert [m["content"] for m in asked[2]["messages"]] == ["one", "mine hears one", "three"]


# --- what endpoints do wrong


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refuse(400, b'{"error": {"message": "too long"}}'), "refuses the request: too long"),
        (refuse(404, b'{"object": "error", "message": "no such model"}'), "does not have that: no such model"),
        (refuse(422, b'{"detail": [{"msg": "bad"}]}'), 'refuses the request: [{"msg": "bad"}]'),
        (refuse(429, b"", retry_after="soon"), "ask again in a moment"),
        (refuse(500, b"<html>\x1b[31mboom</html>"), "failed with 500: <html>[31mboom</html>"),
        (refuse(302, b"", location="http://elsewhere"), "sends us elsewhere"),
        (refuse(401, b""), "wants an API key"),
        (stream(b"not json", content_type="application/json"), "none that kaito can read"),
        (stream(event("half")), "broke off in the middle"),
        (stream(b'data: {"error": {"message": "out of memory"}}\n\n'), "the endpoint gave up: out of memory"),
        (stream(b"data: " + b"x" * (1 << 21)), "more than any answer is long"),
        (lambda body, handler: handler.connection.close(), "the connection to"),
    ],
)
def test_an_error_is_told_in_words(answer: Answer, words: str) -> None:
    with endpoint(answer) as (url, _):
        assert words in str(problem(ask(url, "hi")))


def test_nobody_there_is_told_in_words() -> None:
    with endpoint() as (url, _):
        pass
    assert f"nothing answers at {url}" in str(problem(ask(url, "hi")))


@pytest.mark.parametrize("models", [{}, {"data": []}, {"data": [3]}, {"data": [{"id": 3}]}, [], refuse(200, b"\xff{")])
def test_a_server_that_is_no_endpoint_is_told_in_words(models: Any) -> None:
    with endpoint(models=models) as (url, _):
        assert "does not say which models" in str(problem(ask(url, "hi")))


def test_no_answer_moves_the_terminal() -> None:
    with endpoint(stream(event("a\x1b]0;title\x07b\x9bc\r\nd"), END)) as (url, _):
        assert ask(url, "hi").output == "a]0;titlebc\nd\n"


def test_an_answer_that_is_not_streamed_is_read_too() -> None:
    whole = {"choices": [{"message": {"content": "all of it"}, "finish_reason": "length"}]}
    with endpoint(stream(json.dumps(whole).encode(), content_type="application/json")) as (url, _):
        result = ask(url, "hi")
    assert result.output.startswith("all of it\n")
    assert "--max-tokens" in result.output


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:5000", "http://h:5000"),
        ("HTTP://h:5000/v1/", "http://h:5000"),
        ("https://h/a/v1/chat/completions", "https://h/a"),
        ("http://[::1]:80/", "http://[::1]:80"),
    ],
)
def test_a_url_may_be_that_of_the_server_or_of_its_api(url: str, base: str) -> None:
    assert base_url(url) == base


@pytest.mark.parametrize(
    "url", ["http://", "http://h:port", "http://[::1", "http://me:secret@h/", "http://h/?a=b", "http://h:99999"]
)
def test_what_is_no_url_is_refused_and_never_repeats_a_password(url: str) -> None:
    with pytest.raises(UserError) as e:
        base_url(url)
    assert "secret" not in str(e.value)


@pytest.mark.parametrize("name", ["nobody", "../x", "", "a/b"])
def test_a_name_that_nothing_has_is_refused(name: str) -> None:
    assert "there is no run named" in str(problem(ask(name, "hi")))


# --- the parser


@given(st.lists(st.text(max_size=20), max_size=6), st.integers(1, 40), st.booleans())
def test_a_stream_may_be_cut_anywhere(texts: list[str], size: int, crlf: bool) -> None:
    whole = b": thinking of it\n\n" + b"".join(event(t) for t in texts) + END
    whole = whole.replace(b"\n", b"\r\n") if crlf else whole
    chunks = [whole[i : i + size] for i in range(0, len(whole), size)]
    found = list(pieces(chunks))
    assert found[0] == Piece("status", "thinking of it")
    assert found == list(pieces([whole]))
    assert found[-1] == Piece("end", "stop")


@given(st.lists(st.binary(max_size=60), max_size=5))
def test_no_bytes_break_the_parser(chunks: list[bytes]) -> None:
    try:
        found = list(pieces([*chunks, b"\n"]))
    except Failure:
        return
    assert all(c >= " " or c in "\n\t" for p in found for c in p.text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda s: st.lists(s, max_size=3) | st.dictionaries(st.sampled_from(["choices", "delta", "content", "error", "message", "finish_reason", "reasoning"]), s, max_size=4)))  # fmt: skip
def test_no_json_breaks_the_parser(value: Any) -> None:
    with suppress(Failure):
        list(pieces([b"data: " + json.dumps(value).encode() + b"\n\n", END]))
