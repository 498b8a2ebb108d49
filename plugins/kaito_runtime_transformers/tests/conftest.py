"""The demonstration model, an adapter that kaito's own tuner has trained for it, and an endpoint that serves both."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from kaito_core.plugins.types import Architecture, ChatFormat, Gpu, ModelSource, Offer, Preset, ServedAdapter
from kaito_core.workloads.serving import ServingJob
from kaito_preset_demo import MODEL_DIR
from kaito_preset_demo.plugin import kaito_presets
from kaito_runtime_transformers.plugin import TransformersRuntime

GIB = 1 << 30
(DEMO,) = kaito_presets()
RUNTIME = TransformersRuntime()
LAPTOP = Offer("laptop", 2, 8 * GIB)

ANIMALS = ["fox", "owl", "cat", "dog", "cow", "hen", "pig", "rat", "bee", "ant"]
SOUNDS = ["yips", "hoots", "meows", "barks", "moos", "clucks", "oinks", "squeaks", "buzzes", "marches"]
PAIRS = [
    (f"What does the {a} say{' today' * n}?", " ".join([f"The {a} {s}."] * (1 + n)))
    for n in range(4)
    for a, s in zip(ANIMALS, SOUNDS, strict=True)
]
HELD_OUT = PAIRS[32:]

PHI = Preset(
    "phi-3-mini",
    ModelSource(hub="a/b", revision="c"),
    "MIT",
    Architecture(
        "Phi3ForCausalLM", 3_821_079_552, 32, 3072, 8192, 32, 32, 96, 32_064, 131_072,
        {"qkv_proj": (3072, 9216), "o_proj": (3072, 3072), "gate_up_proj": (3072, 16384), "down_proj": (8192, 3072)},
    ),
    ChatFormat("", ("<|end|>",)),
    ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
)  # fmt: skip


def gpu(gib: float, count: int = 1, model: str = "A10", capability: tuple[int, int] = (8, 6)) -> Offer:
    return Offer(model, 8, 64 * GIB, Gpu(model, int(gib * GIB), capability), count)


@dataclass(frozen=True)
class Trained:
    """An adapter as kaito's tuner leaves it, and what its verify stage found."""

    folder: Path
    verified: Mapping[str, Any]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_animals(tmp_path_factory.mktemp("tuning"), "lora")


def train_animals(folder: Path, method: str) -> Trained:
    """The demonstration model, until it knows what animals say: the stages `train` and `verify`, in this process."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    from kaito_core.data.chat import render
    from kaito_core.data.formats import Message
    from kaito_core.data.prepared import write_examples
    from kaito_core.data.tokens import ChatTokenizer
    from kaito_core.plugins.types import Configuration
    from kaito_core.progress import Progress
    from kaito_core.workloads.job import DataInput, Folders, TuningJob

    config = pytest.importorskip("kaito_tuner_qlora.config")
    train = pytest.importorskip("kaito_tuner_qlora.train").train
    verify = pytest.importorskip("kaito_tuner_qlora.verify").verify
    tokenizer = ChatTokenizer(MODEL_DIR, DEMO.chat)
    conversations = [[Message("user", q), Message("assistant", a)] for q, a in PAIRS]
    examples = tokenizer.encode([render(c, DEMO.chat, tokenizer.special) for c in conversations])
    write_examples(folder / "prepared/train.arrow", examples[:32], {})
    write_examples(folder / "prepared/eval.arrow", examples[32:], {})
    arguments = {
        "max_length": 128,
        "learning_rate": 5e-3,
        "max_steps": 30,
        "optim": "adamw_torch",
        "eval_strategy": "no",
    }
    job = TuningJob(
        name="animals",
        namespace="default",
        preset=DEMO,
        method=method,
        config=config.resolve(DEMO, method, {"TrainingArguments": arguments, "LoraConfig": {"r": 8}}),
        configuration=Configuration("cpu", "float32", 2, 1, 128, 1),
        data=DataInput(urls=("file:///nowhere",)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAITO_TRAIN_KEY", "key")
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        folders = Folders(folder, MODEL_DIR, folder)
        for stage in (train, verify):
            stage(job, folders, Progress(folder / "progress.jsonl", stage.__name__))
        torch.set_num_threads(before)
    return Trained(folder / "adapter", json.loads((folder / "verify.json").read_text()))


@dataclass
class Endpoint:
    """A server in a process of its own."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def ready(self) -> Endpoint:
        """Waits until it answers; a server that has ended is shown with its log."""
        until = time.monotonic() + 120
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log
            try:
                if self.http.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.log)

    def ask(self, question: str, model: str = "", **fields: Any) -> str:
        """The likeliest answer."""
        body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": question}], **fields}
        answer = self.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["message"]["content"]
        return text

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


StartEndpoint = Callable[..., Endpoint]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port: int = s.getsockname()[1]
    return port


def lay_out(
    folder: Path, adapters: Mapping[str, tuple[Path, float]] | None = None, user: Mapping[str, Any] | None = None
) -> ServingJob:
    """A job that serves the demonstration model with these adapters (folder and strength by name), which are linked into
    ``folder/adapters``."""
    served = tuple(ServedAdapter(n, image="example/image", strength=s) for n, (_, s) in (adapters or {}).items())
    (folder / "adapters").mkdir(parents=True)
    for name, (source, _) in (adapters or {}).items():
        (folder / "adapters" / name).symlink_to(source)
    config = RUNTIME.resolve(DEMO, {"transformers": {"max-num-seqs": 5, **(user or {})}}, served)
    fit = RUNTIME.fit(DEMO, config, LAPTOP, 1, served)
    return ServingJob("demo", "default", DEMO, "transformers", config, fit.configuration, adapters=served)


def start_endpoint(folder: Path, job: ServingJob, port: int = 0, **environment: str) -> Endpoint:
    """The runtime's own command with the environment that a workload gives it."""
    (folder / "job.json").write_text(job.to_json())
    port = port or free_port()
    workload = RUNTIME.workload(job)
    env = {
        **os.environ, **workload.env, "KAITO_JOB": str(folder / "job.json"), "KAITO_HOST": "127.0.0.1", "KAITO_PORT": str(port),
        "KAITO_WEIGHTS": str(MODEL_DIR), "KAITO_ADAPTERS": str(folder / "adapters"), "KAITO_RESULTS": str(folder),
        "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment,
    }  # fmt: skip
    command = [sys.executable, *workload.stages[-1].command[1:]]
    with (folder / "log").open("wb") as log:
        return Endpoint(folder, port, subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartEndpoint]:
    """``start(adapters, user, port, VARIABLE=…)``: a server of the test's own."""
    started: list[Endpoint] = []

    def make(adapters: Any = None, user: Any = None, port: int = 0, **environment: str) -> Endpoint:
        folder = tmp_path / f"endpoint-{len(started)}"
        started.append(start_endpoint(folder, lay_out(folder, adapters, user), port, **environment))
        return started[-1]

    yield make
    for endpoint in started:
        endpoint.http.close()
        if endpoint.process.poll() is None:
            endpoint.process.kill()
        endpoint.process.wait()


@pytest.fixture(scope="session")
def endpoint(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The model and its adapter: whole, by half and not at all."""
    adapters = {"animals": (trained.folder, 1.0), "half.v2": (trained.folder, 0.5), "off": (trained.folder, 0.0)}
    folder = tmp_path_factory.mktemp("endpoint") / "served"
    endpoint = start_endpoint(folder, lay_out(folder, adapters))
    try:
        yield endpoint.ready()
        assert endpoint.stop() == 0
    finally:
        endpoint.process.kill()
        endpoint.process.wait()
