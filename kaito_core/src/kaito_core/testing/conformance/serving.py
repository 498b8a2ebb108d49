"""A real server on the CPU, asked everything that docs/serving-http.md promises of an endpoint."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from kaito_core.plugins.types import InferenceRuntime, Preset
from kaito_core.testing.conformance.machines import LAPTOP
from kaito_core.testing.conformance.stages import Ended, Running, Stages
from kaito_core.workloads.serving import ServingJob

ENDS_WELL: Final = (0, 128 + signal.SIGTERM, -signal.SIGTERM)

QUESTION: Final = [{"role": "user", "content": "What does the fox say?"}]

SHORT: Final = 8
"""Tokens of an answer: what the model says means nothing."""


def serves(runtime: InferenceRuntime, preset: Preset, model: Path, user: Mapping[str, Any], folder: Path) -> None:
    """Start a server for the model in the folder ``model``, ask it, and end it. Fails with everything that is wrong at once."""
    missing = runtime.missing()
    if missing:
        pytest.skip(f"the runtime {runtime.name} cannot run here: {missing}")
    refused = runtime.serves(preset)
    if refused is not None:
        pytest.skip(f"the runtime {runtime.name} does not serve {preset.architecture.name}: {refused.message}")
    config = runtime.resolve(preset, user or None, ())
    fit = runtime.fit(preset, config, LAPTOP, 1, ())
    job = ServingJob("conformance", "default", preset, runtime.name, config, fit.configuration, model_folder=str(model))
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    workload = runtime.workload(job)
    stages = Stages(folder / "run", workload, KAITO_HOST="127.0.0.1", KAITO_PORT=str(port))
    *before, last = [s.name for s in workload.stages]
    for stage in before:
        stages.run(stage)
    running = stages.start(last)
    try:
        _ask_all(
            running, f"http://127.0.0.1:{port}", preset, workload.endpoint.health if workload.endpoint else "/health"
        )
    finally:
        running.kill()


def _ask_all(running: Running, url: str, preset: Preset, health: str) -> None:
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
        ready = running.until(lambda: _healthy(http, health))
        if not ready:
            ended = running.ended(0)
            pytest.fail(f"it never answered {health} with 200:\n{ended.tail}", pytrace=False)
        wrong = []
        for check in CHECKS:
            try:
                check(http, preset)
            except (AssertionError, httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as e:
                words = str(e).partition("\nassert ")[0] or type(e).__name__
                wrong.append(
                    f"{check.__name__.strip('_').replace('_', ' ')}: {words if isinstance(e, AssertionError) else repr(e)}"
                )
        # Before it is ended: what an engine says while it goes down is its own affair.
        said = running.log.read_text("utf-8", "replace")
        if "Traceback" in said:
            wrong.append(f"its log has a traceback:\n{said[said.index('Traceback') :][:1500]}")
        wrong += _end(running, http, preset)
    assert not wrong, "\n".join(wrong)


def _healthy(http: httpx.Client, health: str) -> bool:
    try:
        return http.get(health, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


# --- what is asked


def _alive(http: httpx.Client, preset: Preset) -> None:
    for path in ("/", "/health", "/healthz"):
        assert http.get(path).status_code == 200, f"GET {path} is {http.get(path).status_code}"


def _models(http: httpx.Client, preset: Preset) -> None:
    answer = http.get("/v1/models")
    assert answer.status_code == 200, answer.text
    names = [m["id"] for m in answer.json()["data"]]
    assert names == [preset.name], f"it serves {names}, and the model is {preset.name}"


def _chat(http: httpx.Client, preset: Preset) -> None:
    body = {"model": preset.name, "messages": QUESTION, "max_tokens": SHORT, "temperature": 0}
    first, again = (http.post("/v1/chat/completions", json=body) for _ in range(2))
    assert first.status_code == 200, f"{first.status_code}: {first.text:.300}"
    (choice,) = first.json()["choices"]
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert choice["finish_reason"] in ("stop", "length"), choice["finish_reason"]
    used = first.json()["usage"]
    assert 0 < used["completion_tokens"] <= SHORT, f"{SHORT} tokens were asked for, and usage says {used}"
    assert used["prompt_tokens"] > 0
    assert again.json()["choices"][0]["message"] == choice["message"], (
        "at temperature 0 the same question has two answers"
    )


def _stream(http: httpx.Client, preset: Preset) -> None:
    body = {"model": preset.name, "messages": QUESTION, "max_tokens": SHORT, "temperature": 0}
    whole = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.headers["content-type"]
        events = list(_events(answer.iter_lines()))
    assert events[-1] == "[DONE]", f"the stream ends with {events[-1]!r:.100}"
    choices = [json.loads(e)["choices"] for e in events[:-1]]
    said = "".join(c[0]["delta"].get("content") or "" for c in choices if c)
    assert said == whole, f"as a stream it says {said!r}, and as a whole {whole!r}"
    reasons = [c[0].get("finish_reason") for c in choices if c]
    assert reasons[-1] in ("stop", "length"), f"the last event says {reasons[-1]}"


def _completions(http: httpx.Client, preset: Preset) -> None:
    body = {"model": preset.name, "prompt": "The fox", "max_tokens": SHORT, "temperature": 0}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, f"{answer.status_code}: {answer.text:.300}"
    assert isinstance(answer.json()["choices"][0]["text"], str)


def _kaitos_chat(http: httpx.Client, preset: Preset) -> None:
    body = {"prompt": "What does the fox say?", "return_full_text": False, "generate_kwargs": {"max_new_tokens": SHORT}}
    answer = http.post("/chat", json=body)
    assert answer.status_code == 200, f"{answer.status_code}: {answer.text:.300}"
    assert isinstance(answer.json()["Result"], str)


def _errors(http: httpx.Client, preset: Preset) -> None:
    chat = "/v1/chat/completions"
    asked: list[tuple[str, int, Callable[[], httpx.Response]]] = [
        ("a model that is not there", 404, lambda: http.post(chat, json={"model": "nobody", "messages": QUESTION})),
        ("no JSON", 400, lambda: http.post(chat, content=b"{", headers={"content-type": "application/json"})),
        ("messages that are a text", 400, lambda: http.post(chat, json={"model": preset.name, "messages": "hello"})),
        ("no messages", 400, lambda: http.post(chat, json={"model": preset.name, "messages": []})),
        ("a negative max_tokens", 400,
         lambda: http.post(chat, json={"model": preset.name, "messages": QUESTION, "max_tokens": -1})),
        ("no prompt", 400, lambda: http.post("/v1/completions", json={"model": preset.name})),
        ("a path that is not there", 404, lambda: http.get("/nowhere")),
    ]  # fmt: skip
    wrong = []
    for what, status, ask in asked:
        answer = ask()
        if answer.status_code != status:
            wrong.append(f"{what} is {answer.status_code}, not {status} ({answer.text:.100})")
            continue
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = "" if status != 404 or what != "a path that is not there" else "as its server says it"
        if not message:
            wrong.append(f"{what} has no words in error.message: {answer.text:.100}")
        if "Traceback" in answer.text:
            wrong.append(f"{what} shows a traceback")
    assert not wrong, "; ".join(wrong)


def _metrics(http: httpx.Client, preset: Preset) -> None:
    answer = http.get("/metrics")
    assert answer.status_code == 200
    missing = [m for m in ("kaito_requests_total", "kaito_requests_in_flight") if m not in answer.text]
    assert not missing, f"/metrics has no {', '.join(missing)}: kaito's face is not around the server"


CHECKS: Final[tuple[Callable[[httpx.Client, Preset], None], ...]] = (
    _alive, _models, _chat, _stream, _completions, _kaitos_chat, _errors, _metrics,
)  # fmt: skip


def _events(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


# --- how it ends


def _end(running: Running, http: httpx.Client, preset: Preset) -> list[str]:
    """SIGTERM while it answers: the answer comes to its end, and the server as well."""
    wrong = []
    if not running.alive:
        return [f"it has ended while it was asked:\n{running.ended(0).tail}"]
    body = {"model": preset.name, "messages": QUESTION, "max_tokens": 64, "temperature": 0, "stream": True}
    try:
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            events = _events(answer.iter_lines())
            first = next(events, "")
            running.send(signal.SIGTERM)
            last = first
            for last in events:  # noqa: B007 – the last one is wanted
                pass
        if last != "[DONE]":
            wrong.append(f"SIGTERM cuts an answer off: its last event is {last!r:.100}")
    except httpx.HTTPError as e:
        wrong.append(f"SIGTERM cuts an answer off: {e!r}")
    ended: Ended = running.ended(120)
    if ended.code not in ENDS_WELL:
        wrong.append(f"after SIGTERM it ended with {ended.code}:\n{ended.tail}")
    return wrong
