"""The server for real: the demonstration model and a tuned adapter on the CPU, over HTTP, with curl, httpx and OpenAI's client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kaito_core.problems import UserError
from kaito_core.progress import FILE_NAME, read
from kaito_preset_demo import MODEL_DIR
from kaito_runtime_transformers import protocol

from .conftest import HELD_OUT, Endpoint, StartEndpoint, Trained, free_port, lay_out, train_animals

pytestmark = pytest.mark.slow
pytest.importorskip("torch")
pytest.importorskip("uvicorn")

QUESTION = "What does the owl say?"
LONG = {"ignore_eos": True, "max_tokens": 900}


def eventually(true: Callable[[], Any]) -> None:
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


# --- answers


def test_the_answers_are_those_of_the_verify_stage(endpoint: Endpoint, trained: Trained) -> None:
    """To the letter, with the adapter and without, and both are asked in one crowd, so that they meet in the engine."""
    samples = trained.verified["samples"]
    assert len(samples) == 5
    assert any(s["before"] != s["after"] for s in samples)
    expected = [(q, s) for (q, _), s in zip(HELD_OUT, samples, strict=False)]

    async def crowd() -> list[tuple[str, str]]:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=120, trust_env=False) as client:

            async def ask(question: str, model: str) -> str:
                body = {"model": model, "temperature": 0, "max_tokens": 160,
                        "messages": [{"role": "user", "content": question}]}  # fmt: skip
                answer = await client.post("/v1/chat/completions", json=body)
                return str(answer.json()["choices"][0]["message"]["content"]).strip()

            both = [asyncio.gather(ask(q, "animals"), ask(q, "demo-phi-3")) for q, _ in expected]
            return [(a, b) for a, b in await asyncio.gather(*both)]

    said = asyncio.run(crowd())
    assert said == [(s["after"], s["before"]) for _, s in expected]


def test_an_adapter_of_a_quantised_model_answers_as_it_was_verified_on_one(
    tmp_path: Path, start: StartEndpoint
) -> None:
    """`qlora`: the adapter corrects the 4-bit model that it was trained on."""
    verified = train_animals(tmp_path, "qlora")
    served = start({"animals": (verified.folder, 1.0)}, {"load_in_4bit": True}).ready()
    for (question, _), sample in zip(HELD_OUT, verified.verified["samples"], strict=False):
        assert served.ask(question, "animals", max_tokens=160).strip() == sample["after"]
        assert served.ask(question, "demo-phi-3", max_tokens=160).strip() == sample["before"]


def test_strength(endpoint: Endpoint) -> None:
    """Nothing of an adapter is the model itself; the half of it is neither the one nor the other."""

    def answers_of(model: str) -> list[str]:
        return [endpoint.ask(q, model, max_tokens=20) for q, _ in HELD_OUT[:3]]

    whole, half, off, base = (answers_of(m) for m in ("animals", "half.v2", "off", "demo-phi-3"))
    assert off == base
    assert whole != base
    assert half not in (whole, base)


def test_the_quick_starts_curl_line_answers_with_the_adapter(endpoint: Endpoint) -> None:
    body = json.dumps({"prompt": QUESTION, "generate_kwargs": {"do_sample": False}})
    said = subprocess.run(
        ["curl", "--silent", "--noproxy", "*", "-X", "POST", f"{endpoint.url}/chat", "-H", "accept: application/json",
         "-H", "Content-Type: application/json", "-d", body],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(said.stdout) == {"Result": f"{QUESTION}\n{endpoint.ask(QUESTION, 'animals')}"}
    plain = endpoint.http.post("/chat", json={"prompt": QUESTION})  # as in the quick start: sampled
    assert plain.json()["Result"].startswith(f"{QUESTION}\n")


def test_a_prompt_in_the_models_own_form_is_completed(endpoint: Endpoint) -> None:
    prompt = f"<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n"
    settings = {"do_sample": False, "max_new_tokens": 50}
    answer = endpoint.http.post(
        "/chat", json={"prompt": prompt, "return_full_text": False, "generate_kwargs": settings}
    )
    assert answer.json() == {"Result": endpoint.ask(QUESTION, "animals", max_tokens=50)}


def test_max_length_counts_the_prompts_tokens(endpoint: Endpoint) -> None:
    count = endpoint.http.post("/tokenize", json={"messages": [{"role": "user", "content": QUESTION}]}).json()["count"]
    answer = endpoint.http.post("/chat", json={"prompt": QUESTION, "generate_kwargs": {"max_length": count}})
    assert answer.status_code == 400
    assert f"the prompt has {count} tokens" in answer.json()["detail"]


def test_openais_client(endpoint: Endpoint) -> None:
    openai = pytest.importorskip("openai")
    with (
        httpx.Client(trust_env=False) as http,
        openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="-", http_client=http) as client,
    ):
        assert [m.id for m in client.models.list()] == ["demo-phi-3", "animals", "half.v2", "off"]
        messages = [{"role": "user", "content": QUESTION}]
        whole = client.chat.completions.create(model="animals", messages=messages, temperature=0)
        text = whole.choices[0].message.content
        assert text == endpoint.ask(QUESTION, "animals")
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        stream = list(client.chat.completions.create(
            model="animals", messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
        ))  # fmt: skip
        assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == text
        assert len([c for c in stream if c.choices and c.choices[0].delta.content]) > 3
        assert stream[-1].usage == whole.usage
        completed = client.completions.create(
            model="demo-phi-3",
            prompt=["What", "Who"],
            n=2,
            max_tokens=4,
            temperature=1.0,
            extra_body={"ignore_eos": True},
        )
        assert [c.finish_reason for c in completed.choices] == ["length"] * 4
        assert completed.usage.completion_tokens == 16
        pieces = client.completions.create(model="demo-phi-3", prompt="What", max_tokens=4, temperature=0, stream=True)
        once = client.completions.create(model="demo-phi-3", prompt="What", max_tokens=4, temperature=0)
        assert "".join(c.choices[0].text for c in pieces) == once.choices[0].text
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here"):
            client.chat.completions.create(model="gpt-4", messages=messages)
        with pytest.raises(openai.BadRequestError, match="1024 tokens"):
            client.chat.completions.create(model="animals", messages=messages, max_tokens=5000)


def test_how_tokens_are_chosen(endpoint: Endpoint) -> None:
    def texts(**fields: Any) -> list[str]:
        body = {"model": "demo-phi-3", "prompt": "What", "max_tokens": 8, "ignore_eos": True, **fields}
        answer = endpoint.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return [c["text"] for c in answer.json()["choices"]]

    (greedy,) = texts(temperature=0)
    assert texts(temperature=2, top_k=1) == [greedy]
    assert texts(temperature=0.001, top_p=0.001) == [greedy]
    assert texts(temperature=0, repetition_penalty=1.0, seed=3) == [greedy]
    assert texts(temperature=0, min_tokens=8) == [greedy]  # the same by the way of one alone
    assert len(set(texts(temperature=5, n=8))) > 1
    assert texts(temperature=5, seed=7) == texts(temperature=5, seed=7)
    assert texts(temperature=5, seed=7) != texts(temperature=5, seed=8)
    banned = endpoint.http.post("/tokenize", json={"prompt": greedy, "add_special_tokens": False}).json()["tokens"][0]
    assert texts(temperature=0, logit_bias={str(banned): -100}) != [greedy]
    (long,) = texts(temperature=0, max_tokens=60)
    assert texts(temperature=0, max_tokens=60, repetition_penalty=50) != [long]
    assert texts(temperature=0, max_tokens=60, frequency_penalty=2, presence_penalty=2) != [long]
    word = greedy.split()[1]
    assert texts(temperature=0, stop=[word]) == [greedy[: greedy.index(word)]]


def test_many_at_once(endpoint: Endpoint) -> None:
    """More than are worked on at once (5), to three voices and by both ways."""

    async def crowd() -> list[int]:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=120, trust_env=False) as client:
            bodies = [
                {"model": ("animals", "off", "demo-phi-3")[i % 3], "prompt": "What", "max_tokens": 5,
                 **({"seed": i} if i % 4 == 3 else {})}
                for i in range(8)
            ]  # fmt: skip
            answers = await asyncio.gather(*(client.post("/v1/completions", json=b) for b in bodies))
        return [a.status_code for a in answers]

    assert asyncio.run(crowd()) == [200] * 8


# --- bad input


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "the body is not JSON"),
        (b'{"messages": "hello"}', 400, "messages must be a list"),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"}',
            400,
            "max_tokens must be a whole number",
        ),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "half of a character"),
        (
            json.dumps({"messages": [{"role": "user", "content": "word " * 3000}]}).encode(),
            400,
            "the context of the endpoint",
        ),
        (
            json.dumps({"messages": [{"role": "user", "content": "x"}], "model": "x" * 10_000}).encode(),
            404,
            "there is no model",
        ),
    ],
)
def test_malformed_requests(endpoint: Endpoint, body: bytes, status: int, words: str) -> None:
    answer = endpoint.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert len(answer.text) < 1000
    assert endpoint.http.post("/v1/completions", json={"prompt": [999_999]}).status_code == 400
    assert endpoint.http.get("/health").status_code == 200


HOSTILE = (
    "true", '"7"', '"\\ud800"', "[]", "{}", "[[]]", "NaN", "Infinity", "1e400", "-1e400", "1.5e300", "0", "-1", "-1e-320", "1e-320", "0.5", "2147483647",
    "2147483648", "-2147483648", "-2147483649", "4294967296", "9223372036854775807", "9223372036854775808", "9" * 30, "9" * 5000,
    "[2147483648]", "[1e400]", "[-1]", "[null]", '["\\ud800"]', '{"x": 1}', '{"5": 1e400}', '{"5": NaN}', '{"2147483648": 1}', '{"-1": 1}',
    '{"messages": 1, "tools": 1e400, "x": "\\ud800"}',
)  # fmt: skip


def test_no_field_ends_the_engine(endpoint: Endpoint) -> None:
    """Every field that reaches the engine or a tensor, with everything that is hostile to a number, against the real engine: each request is
    answered or refused, and so are those beside it. Nothing else is left for the engine to die of."""

    async def ask() -> list[tuple[str, str, str, int, str]]:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=60, trust_env=False) as client:
            narrow = asyncio.Semaphore(8)  # fewer than the endpoint has places

            async def one(path: str, prompt: str, field: str, value: str) -> tuple[str, str, str, int, str]:
                fields = {**json.loads(prompt), "max_tokens": 2, "model": "demo-phi-3"}
                text = json.dumps({k: v for k, v in fields.items() if k != field})[:-1] + f', "{field}": {value}}}'
                async with narrow:
                    answer = await client.post(path, content=text.encode(), headers={"connection": "close"})
                return path, field, value, answer.status_code, answer.text

            ways = {
                "/v1/completions": '{"prompt": "What"}',
                "/v1/chat/completions": '{"messages": [{"role": "user", "content": "What"}]}',
            }
            fields = [f for f in protocol._KNOWN if f != "model"]
            return await asyncio.gather(*(one(p, w, f, v) for p, w in ways.items() for f in fields for v in HOSTILE))

    for path, field, value, status, text in asyncio.run(ask()):
        assert status in (200, 400), (path, field, value[:40], text)
        if status == 400:
            assert json.loads(text)["error"].keys() == {"message", "type", "param", "code"}
    for more in ({}, {"seed": 1}, {"stream": True}):
        body = {"model": "demo-phi-3", "prompt": "What", "max_tokens": 2, **more}
        assert endpoint.http.post("/v1/completions", json=body).status_code == 200
    assert endpoint.http.get("/health").status_code == 200


@pytest.mark.parametrize("count", [16, 64])
def test_half_sent_bodies_take_no_place(endpoint: Endpoint, count: int) -> None:
    """More than the ten places of this endpoint; and as many clients that do not even end their headers."""
    with contextlib.ExitStack() as stack:
        for number in range(2 * count):
            s = stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=20))
            body = b"Content-Length: 1000\r\n\r\n{" if number % 2 else b""
            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + body)
        assert endpoint.ask(QUESTION, "demo-phi-3", max_tokens=2)
        assert endpoint.metric("kaito_requests_in_flight") == 0


def test_a_client_that_goes_away_frees_the_model(endpoint: Endpoint) -> None:
    """In mid-stream, while it waits for the whole, and by both ways of answering."""
    for more in ({}, {"repetition_penalty": 1.1}):
        body = {"model": "animals", "prompt": "What", **LONG, **more}
        with endpoint.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            pieces = answer.iter_raw()
            next(pieces)
        with pytest.raises(httpx.ReadTimeout):
            endpoint.http.post("/v1/completions", json=body, timeout=0.3)
        eventually(lambda: endpoint.metric("kaito_requests_in_flight") == 0)
    assert endpoint.ask(QUESTION, "demo-phi-3")  # the turn was given up too
    assert endpoint.metric('kaito_requests_total{path="/v1/completions",code="499"}') == 4


def test_overload(endpoint: Endpoint) -> None:
    """5 are worked on, 5 wait, the rest hears so."""

    async def crowd() -> list[int]:
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=120, trust_env=False) as client:
            body = {"model": "off", "prompt": "What", "ignore_eos": True, "max_tokens": 60}
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(30)))
        assert all(a.headers["retry-after"].isdecimal() for a in answers if a.status_code == 429)
        return [a.status_code for a in answers]

    codes = asyncio.run(crowd())
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 10


# --- start and end


def test_health_while_it_loads_key_and_a_clean_end(start: StartEndpoint, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    endpoint = start(KAITO_API_KEY_FILE=str(tmp_path / "key"))
    eventually(lambda: _connects(endpoint.port))
    early = endpoint.http.get("/healthz")
    if early.status_code == 500:  # unless this machine is very fast
        assert early.json() == {"detail": "Model not initialized"}
    endpoint.ready()
    assert endpoint.http.get("/healthz").json() == {"status": "Healthy"}
    assert endpoint.http.get("/v1/models").status_code == 401
    key = {"Authorization": "Bearer secret"}
    body = {"prompt": "What", "stream": True, "ignore_eos": True, "max_tokens": 300}
    with endpoint.http.stream("POST", "/v1/completions", json=body, headers=key) as answer:
        pieces = answer.iter_raw()
        got = next(pieces)
        endpoint.process.terminate()
        got += b"".join(pieces)
    assert got.endswith(b"data: [DONE]\n\n")  # the stream in progress was finished
    assert b'"finish_reason": "length"' in got
    assert endpoint.process.wait(60) == 0
    assert "secret" not in endpoint.log
    assert "Traceback" not in endpoint.log


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def test_one_at_a_time_where_batches_are_not_wanted(endpoint: Endpoint, tmp_path: Path) -> None:
    from kaito_runtime_transformers.engine import Engine, Layout
    from kaito_runtime_transformers.model import load
    from kaito_runtime_transformers.protocol import Sampling

    job = lay_out(tmp_path / "job", user={"continuous-batching": False})
    engine = Engine(load(job, MODEL_DIR, tmp_path), Layout.of(job.configuration, job.config, 0))
    engine.start()
    assert not engine.batches

    async def ask(sampling: Sampling) -> list[int]:
        ids = endpoint.http.post("/tokenize", json={"model": "demo-phi-3", "prompt": "What"}).json()["tokens"]
        voice = engine.loaded.voices["demo-phi-3"]
        return [t async for tokens in engine.generate(voice, ids, sampling, 20) for t in tokens]

    said = asyncio.run(ask(Sampling(temperature=0)))
    text = engine.loaded.tokenizer.decode(said, skip_special_tokens=True)
    body = {"model": "demo-phi-3", "prompt": "What", "temperature": 0, "max_tokens": 20}
    assert text == endpoint.http.post("/v1/completions", json=body).json()["choices"][0]["text"]


def test_a_model_that_cannot_be_batched_is_served_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kaito_runtime_transformers.engine import Engine, Layout
    from kaito_runtime_transformers.model import load

    job = lay_out(tmp_path / "job")
    loaded = load(job, MODEL_DIR, tmp_path)

    def refuse(**_: Any) -> None:
        raise ValueError("this attention has no pages")

    monkeypatch.setattr(loaded.model, "init_continuous_batching", refuse)
    said: list[str] = []
    engine = Engine(loaded, Layout.of(job.configuration, job.config, 1024), said.append)
    engine.start()
    assert said == ["this model cannot be batched (this attention has no pages): requests are answered one at a time"]
    assert engine.alive


def test_a_port_in_use(start: StartEndpoint) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        endpoint = start(port=port)
        assert endpoint.process.wait(60) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: " in endpoint.log
    ((_, failed),) = read(endpoint.folder / FILE_NAME)
    assert (failed["event"], failed["stage"], failed["exit_code"]) == ("failed", "serve", 2)
    assert "Traceback" not in endpoint.log


def test_adapters_that_do_not_belong_here(start: StartEndpoint, trained: Trained, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from kaito_runtime_transformers.model import load

    def changed(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
        folder = tmp_path / name
        shutil.copytree(trained.folder, folder)
        save_file(change(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
        return folder

    other = changed("other", lambda t: {k: torch.cat([v, v], dim=1) if "lora_A" in k else v for k, v in t.items()})
    alien = changed("alien", lambda t: {k.replace("qkv_proj", "q_proj"): v for k, v in t.items()})
    cases = {
        "does not load on this model": (other, 64),
        "tensors are not the model's": (alien, 64),
        "has rank 8, and the server takes adapters up to rank 4": (trained.folder, 4),
    }
    for number, (words, (folder, rank)) in enumerate(cases.items()):
        place = tmp_path / f"job-{number}"
        with pytest.raises(UserError, match=words) as e:
            load(lay_out(place, {"mine": (folder, 1.0)}, {"max-lora-rank": rank}), MODEL_DIR, place / "adapters")
        assert "the adapter 'mine'" in str(e.value)
    refused = start({"mine": (other, 1.0)})
    assert refused.process.wait(60) == 2
    assert "the adapter 'mine' does not load on this model" in refused.log
    assert "Traceback" not in refused.log
