"""The launcher: what it says when something is wrong, and a real vLLM on the CPU, where there is one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from vllm_models import A10, PHI_3_MINI, job_for, machine

from kaito_core.plugins import Preset, ServedAdapter
from kaito_core.problems import UserError
from kaito_core.workloads.serving import ServingJob
from kaito_runtime_vllm import serve


def place(tmp_path: Path, job: ServingJob, **environ: str) -> dict[str, str]:
    """The environment of a workload on this machine, with a model folder and a free port."""
    weights = tmp_path / "weights"
    weights.mkdir(exist_ok=True)
    (weights / "config.json").write_text('{"eos_token_id": 32000}')
    (tmp_path / "job.json").write_text(job.to_json())
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    return {"KAITO_JOB": str(tmp_path / "job.json"), "KAITO_WEIGHTS": str(weights), "KAITO_ADAPTERS": str(tmp_path / "adapters"),
            "KAITO_HOST": "127.0.0.1", "KAITO_PORT": str(port), "KAITO_RESULTS": str(tmp_path / "results"), **environ}  # fmt: skip


JOB = job_for(PHI_3_MINI, None, machine(A10))


def test_what_lies_here_becomes_small_files_and_flags(tmp_path: Path) -> None:
    here = serve.look(JOB, place(tmp_path, JOB))
    assert Path(here.chat_template).read_text() == PHI_3_MINI.chat.template
    assert json.loads((Path(here.generation_config) / "generation_config.json").read_text()) == {
        "eos_token_id": [32000]
    }
    assert Path(here.generation_config).parent == tmp_path / "results"


def test_the_users_template_wins(tmp_path: Path) -> None:
    job = job_for(PHI_3_MINI, {"vllm": {"chat-template": "{{ mine }}"}}, machine(A10))
    assert Path(serve.look(job, place(tmp_path, job)).chat_template).read_text() == "{{ mine }}"


def test_every_adapter_that_is_wrong_is_named(tmp_path: Path) -> None:
    job = job_for(PHI_3_MINI, None, machine(A10), adapters=(ServedAdapter("one"), ServedAdapter("two")))
    with pytest.raises(UserError) as e:
        serve.look(job, place(tmp_path, job))
    assert [p.message for p in e.value.problems] == ["the adapter 'one' is not there", "the adapter 'two' is not there"]


def test_the_environment_is_checked(tmp_path: Path) -> None:
    def complaint(job: ServingJob = JOB, **environ: str) -> str:
        with pytest.raises(UserError) as e:
            serve.look(job, place(tmp_path, job, **environ))
        return str(e.value)

    assert "KAITO_WEIGHTS is not set" in complaint(KAITO_WEIGHTS="")
    assert "config.json is missing" in complaint(KAITO_WEIGHTS=str(tmp_path))
    assert "KAITO_PORT is 'http', which is no number" in complaint(KAITO_PORT="http")
    assert "the plan is for 1 machines, and KAITO_NODES says 2" in complaint(KAITO_NODES="2")
    two = replace(JOB, machines=2)
    assert "KAITO_LEADER does not say" in complaint(two)
    assert "counted from 0" in complaint(two, KAITO_NODE_RANK="2", KAITO_LEADER="x")
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = str(s.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}" in complaint(KAITO_PORT=port)


def test_a_wrong_start_ends_with_words_and_exit_code_2(tmp_path: Path) -> None:
    environ = place(tmp_path, JOB, KAITO_WEIGHTS=str(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-m", "kaito_runtime_vllm.serve"], capture_output=True, text=True, timeout=60,
        env={**os.environ, **environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert ended.returncode == 2
    assert "config.json is missing" in ended.stderr
    assert "Traceback" not in ended.stderr
    (event,) = [json.loads(line) for line in (tmp_path / "results/progress.jsonl").read_text().splitlines()]
    assert (event["event"], event["exit_code"]) == ("failed", 2)


def test_a_missing_interpreter_is_said(tmp_path: Path) -> None:
    environ = place(tmp_path, JOB, KAITO_VLLM_PYTHON="/nowhere/python")
    ended = subprocess.run(
        [sys.executable, "-m", "kaito_runtime_vllm.serve"], capture_output=True, text=True, timeout=60,
        env={**os.environ, **environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert ended.returncode == 1
    assert "vLLM could not be started" in ended.stderr


# --- a real vLLM ------------------------------------------------------------------------------------------------------


@dataclass
class Endpoint:
    """A vLLM that serves the demonstration model with three adapters."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith("{") else text

    def chat(self, model: str, question: str = "What is the capital of France?") -> dict[str, Any]:
        body = {"model": model, "temperature": 0, "max_tokens": 24, "messages": [{"role": "user", "content": question}]}
        choice: dict[str, Any] = self.call("/v1/chat/completions", body)["choices"][0]
        return choice


@pytest.fixture(scope="module")
def demo() -> Preset:
    module = pytest.importorskip("kaito_preset_demo.plugin")
    (preset,) = module.kaito_presets()
    return preset


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, vllm_python: str, demo: Preset) -> Iterator[Endpoint]:
    from kaito_preset_demo import MODEL_DIR

    folder = tmp_path_factory.mktemp("serving")
    adapter(folder / "adapters/wild", MODEL_DIR)
    for name in ("half", "none"):
        (folder / "adapters" / name).symlink_to("wild")
    job = job_for(
        demo, {"vllm": {"enforce-eager": True, "kv-cache-memory-bytes": "64M"}}, machine(None, memory=16 << 30),
        adapters=(ServedAdapter("wild"), ServedAdapter("half", strength=0.5), ServedAdapter("none", strength=0.0)),
    )  # fmt: skip
    environ = {**place(folder, job), "KAITO_WEIGHTS": str(MODEL_DIR), "KAITO_VLLM_PYTHON": vllm_python, "OMP_NUM_THREADS": "1",
               "KAITO_CHAT_MODEL": job.chat_model}  # fmt: skip
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "kaito_runtime_vllm.serve"], stdout=out, stderr=out, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p.endswith("src")), **environ},
        )  # fmt: skip
    found = Endpoint(f"http://127.0.0.1:{environ['KAITO_PORT']}", process, log)
    try:
        until = time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            try:
                found.call("/health")
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield found
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def adapter(at: Path, model: Path) -> None:
    """A LoRA adapter with large random weights."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.peft_config["default"].base_model_name_or_path = "demo-phi-3"
    adapted.save_pretrained(at)


@pytest.mark.slow
def test_openais_client(endpoint: Endpoint, demo: Preset) -> None:
    openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx")
    with (
        httpx.Client(trust_env=False) as http,
        openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="-", http_client=http) as client,
    ):
        assert [m.id for m in client.models.list()] == [demo.name, "wild", "half", "none"]
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        asked: dict[str, Any] = {"model": "wild", "messages": messages, "temperature": 0, "max_tokens": 24}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == endpoint.chat("wild")["message"]["content"]
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        stream = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        said = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
        assert said == whole.choices[0].message.content
        assert stream[-1].usage.total_tokens == whole.usage.total_tokens
        with pytest.raises(openai.NotFoundError, match="gpt-4"):
            client.chat.completions.create(model="gpt-4", messages=messages)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=demo.name, messages=messages, max_tokens=50_000)


@pytest.mark.slow
def test_curl(endpoint: Endpoint, demo: Preset) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")

    def curl(path: str, body: dict[str, Any]) -> str:
        words = ["curl", "-sS", "--noproxy", "*", endpoint.url + path, "-H", "Content-Type: application/json"]
        return subprocess.run(
            [*words, "-d", json.dumps(body)], capture_output=True, text=True, timeout=60, check=True
        ).stdout

    assert "Result" in json.loads(curl("/chat", {"prompt": "What is your favourite ice cream?"}))
    asked = {"model": demo.name, "prompt": "The", "max_tokens": 4, "stream": True}
    assert curl("/v1/completions", asked).rstrip().endswith("data: [DONE]")


@pytest.mark.slow
def test_a_real_vllm_answers_with_and_without_adapters_and_ends_what_it_has_begun(
    endpoint: Endpoint, demo: Preset
) -> None:
    # One test: the start is what takes its time.
    models = endpoint.call("/v1/models")["data"]
    assert [(m["id"], m["parent"]) for m in models] == [
        (demo.name, None), ("wild", demo.name), ("half", demo.name), ("none", demo.name)
    ]  # fmt: skip
    assert models[0]["max_model_len"] == demo.architecture.context

    base = endpoint.chat(demo.name)
    assert base["finish_reason"] == "stop"  # at <|end|>, which the model's own generation settings do not name
    answers = {name: endpoint.chat(name)["message"]["content"] for name in ("wild", "half", "none")}
    assert answers["none"] == base["message"]["content"]
    assert answers["wild"] != base["message"]["content"]
    assert answers["half"] != answers["wild"]

    completed = endpoint.call(
        "/v1/completions", {"model": demo.name, "prompt": "The capital of", "max_tokens": 5, "temperature": 0}
    )
    assert completed["usage"]["completion_tokens"] == 5
    assert "Result" in endpoint.call("/chat", {"prompt": "What is your favourite ice cream?"})
    with pytest.raises(urllib.error.HTTPError) as e:
        endpoint.chat("unknown")
    assert e.value.code == 404

    body = {"model": demo.name, "prompt": "a", "max_tokens": 600, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        endpoint.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as stream:
        assert stream.readline().startswith(b"data: {")
        # Of what vLLM itself logs once it is to end, 0.32 has a traceback of an engine that has gone: after the last answer.
        assert "Traceback" not in endpoint.log.read_text()
        endpoint.process.send_signal(signal.SIGTERM)
        assert stream.read().rstrip().endswith(b"data: [DONE]")
    assert endpoint.process.wait(60) in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
