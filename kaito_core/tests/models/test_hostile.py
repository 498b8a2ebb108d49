"""Models whose files were made to take the reader's memory and time: each is read or refused by name, within bounds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from kaito_core import limited
from kaito_core.controller import planner as planning
from kaito_core.controller.planner import Planner
from kaito_core.kube.client import Client
from kaito_core.kube.kinds import Object
from kaito_core.models import description
from kaito_core.models.folder import read_folder
from kaito_core.plugins.manager import PluginManager
from kaito_core.problems import UserError

from .conftest import COMMIT, REPO, Hub, llama, model_files, weights, write

COMPUTED_SECONDS = 6.0
"""Of computing, for one model, in this process and its children; on an idle machine each takes less than two."""
MIB = 1 << 20
HERE_MIB = 60
"""What this process may take more than before, whatever it reads."""
CHILD_MIB = limited.MODEL_FILES.memory_bytes // MIB + 60
"""With the libraries that are mapped and shared."""

UNNAMED = {"eos_token": "</s>", "chat_template": "{{ messages }}"}
"""A tokenizer_config.json that leaves the stop token without its number, so that tokenizer.json is asked."""


def filled(unit: str, mib: float) -> str:
    return unit * (int(mib * MIB) // len(unit))


def lists(mib: float) -> str:
    return "[" + filled("[],", mib) + "0]"


def headers(files: int, tensors: int) -> dict[str, bytes]:
    """Weight files with nothing but many empty tensors: their headers are all there is."""
    about = "{" + ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(tensors)) + "}"
    body = len(about).to_bytes(8, "little") + about.encode()
    return {f"model-{number:05}.safetensors": body for number in range(files)}


def tokenizer_config(**more: str) -> bytes:
    return ("{" + ",".join([*(f'"{k}":{v}' for k, v in more.items()), json.dumps(UNNAMED)[1:-1]]) + "}").encode()


LLAMA_WEIGHTS = weights(llama())

HOSTILE: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "a tokenizer of empty lists": (
        lambda: {"tokenizer.json": lists(14).encode(), "tokenizer_config.json": tokenizer_config()},
        "",  # they are none of the tokens that it adds, and nothing else of it is read
    ),
    "a tokenizer that adds empty lists": (
        lambda: {"tokenizer.json": f'{{"added_tokens": {lists(14)}}}'.encode(), "tokenizer_config.json": tokenizer_config()},
        r"tokenizer.json cannot be read: its added_tokens do not end within 4 MiB",
    ),
    "a tokenizer of deep lists": (
        lambda: {"tokenizer.json": f'{{"added_tokens": {"[" * 14 * MIB}'.encode(), "tokenizer_config.json": tokenizer_config()},
        r"tokenizer.json cannot be read: its added_tokens are nested more than 64 deep",
    ),
    "a tokenizer_config of empty lists": (
        lambda: {"tokenizer_config.json": tokenizer_config(x=lists(14))},
        r"reading tokenizer_config.json takes more than 224 MiB of memory",
    ),
    "a tokenizer_config of deep lists": (
        lambda: {"tokenizer_config.json": tokenizer_config(x="[" * 10_000 + "]" * 10_000)},
        r"tokenizer_config.json is not JSON: it is nested more than 64 deep",
    ),
    "a tokenizer_config with one key many times": (
        lambda: {"tokenizer_config.json": tokenizer_config(x="{" + filled('"a":{"a":[]},', 14) + '"b":0}')},
        r"reading tokenizer_config.json takes more than 224 MiB of memory|^$",
    ),
    "a tokenizer_config of one text": (
        lambda: {"tokenizer_config.json": tokenizer_config(x=f'"{filled("😀", 6)}"')},
        r"reading tokenizer_config.json takes more than 224 MiB of memory|^$",
    ),
    "a tokenizer_config with a long number": (
        lambda: {"tokenizer_config.json": tokenizer_config(x="9" * 5000)},
        r"tokenizer_config.json is not JSON: it has a number with too many digits",
    ),
    "a template of 300 kB": (
        lambda: {"chat_template.jinja": b"{{ x }}" * 50_000},
        r"its chat template is longer than 262144 characters",
    ),
    "a configuration of objects": (
        lambda: {"config.json": json.dumps({"architectures": ["LlamaForCausalLM"]}).encode()[:-1] + f',"x":{lists(3.9)}}}'.encode()},
        r"config.json says no num_hidden_layers",
    ),
    "an index of 34 MB": (
        lambda: {"model.safetensors.index.json": f'{{"weight_map": {{"a": "model.safetensors"}}, "x": {lists(34)}}}'.encode()},
        r"reading model.safetensors.index.json takes more than 224 MiB of memory",
    ),
    "a header that claims to be long": (
        lambda: {"model.safetensors": (1 << 62).to_bytes(8, "little") + LLAMA_WEIGHTS[8:]},
        r"model.safetensors: the header would be 4611686018427387904 bytes long",
    ),
    "headers of 60 MB": (
        lambda: {"model.safetensors": b"", **headers(4, 230_000)},
        r"reading (the headers of the weights|model-\d+.safetensors) takes more than 224 MiB of memory",
    ),
    "headers of 80 MB": (
        lambda: {"model.safetensors": b"", **headers(5, 250_000)},
        r"the headers of its weights are longer than 64 MiB together",
    ),
}  # fmt: skip

HONEST: dict[str, Callable[[], dict[str, bytes]]] = {
    "a tokenizer of 33 MB, as Gemma's": lambda: {
        "tokenizer_config.json": tokenizer_config(),
        "tokenizer.json": json.dumps({
            "version": "1.0", "added_tokens": [{"id": i, "content": f"<unused{i}>" if i != 2 else "</s>"} for i in range(6_000)],
            "model": {"vocab": {f"▁t{i}": i for i in range(260_000)}, "merges": [[f"a{i}", f"b{i}"] for i in range(510_000)]},
        }, ensure_ascii=False).encode(),
    },
    "a tokenizer_config of 2 MB": lambda: {
        "tokenizer_config.json": json.dumps({
            **UNNAMED, "added_tokens_decoder": {str(i): {"content": f"<unused{i}>" if i != 2 else "</s>", "lstrip": False,
                "normalized": False, "rstrip": False, "single_word": False, "special": True} for i in range(16_000)},
        }, indent=2).encode(),
    },
    "140,000 tensors in 61 files, as Kimi-K2's": lambda: {
        "config.json": json.dumps({
            "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
            "num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 128, "vocab_size": 163840, "max_position_embeddings": 131072,
            "eos_token_id": 2, "quantization_config": {"quant_method": "fp8"}}).encode(),
        "model.safetensors": b"",
        **{f"model-{n:05}-of-00061.safetensors": _experts(n) for n in range(61)},
        "model.safetensors.index.json": json.dumps({"weight_map": {
            _expert(n, i): f"model-{n:05}-of-00061.safetensors" for n in range(61) for i in range(2300)}}).encode(),
    },
}  # fmt: skip


def _expert(layer: int, number: int) -> str:
    return f"model.layers.{layer}.mlp.experts.{number // 6}.{('gate_proj', 'up_proj', 'down_proj')[number % 3]}.weight{'_scale_inv' * (number % 6 > 2)}"


def _experts(layer: int) -> bytes:
    about = {_expert(layer, i): {"dtype": "BF16", "shape": [0, 7168], "data_offsets": [0, 0]} for i in range(2300)}
    text = json.dumps(about).encode()
    return len(text).to_bytes(8, "little") + text


READ = """
import json, resource, sys
from pathlib import Path
from kaito_core.models.hub import read_hub
from kaito_core.problems import KaitoError

def here():
    if sys.platform != "linux":
        return 0
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

def seconds():
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)

for name in sys.stdin:
    memory, began, words = here(), seconds(), ""
    try:
        read_hub(name.strip(), cache=Path(sys.argv[1]), field="inference.preset.name")
    except KaitoError as e:
        words = "; ".join(p.message for p in e.problems)
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds() - began, "here": here() - memory, "child": child, "words": words}), flush=True)
"""


class Reading:
    """A process that reads models of the hub, one after the other, within all bounds."""

    def __init__(self, hub: Hub, cache: Path) -> None:
        command = [sys.executable, "-c", READ, str(cache)]
        self.hub = hub
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self, files: dict[str, bytes]) -> str:
        """What it says of a model with these files; empty when it was read."""
        self.hub.models = {REPO: {n: b for n, b in {**model_files(), **files}.items() if b or n != "model.safetensors"}}
        return self.again()

    def again(self) -> str:
        self.hub.requests.clear()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{REPO}\n")
        self.process.stdin.flush()
        said = json.loads(self.process.stdout.readline())
        assert said["seconds"] < COMPUTED_SECONDS
        if sys.platform == "linux":
            assert said["here"] < HERE_MIB
            assert said["child"] < CHILD_MIB
        return str(said["words"])


@pytest.fixture
def reading(hub: Hub, tmp_path: Path) -> Iterator[Reading]:
    found = Reading(hub, tmp_path)
    yield found
    found.process.kill()
    found.process.communicate()


def test_hostile_models_are_refused_by_name_within_bounds(reading: Reading, tmp_path: Path) -> None:
    for name, (files, says) in HOSTILE.items():
        for kept in tmp_path.glob("*.json"):  # all of them have one commit
            kept.unlink()
        words = reading.read(files())
        assert re.search(says, words), (name, words)
        assert not words or words.startswith(f"{REPO}@{COMMIT[:12]}: "), name
        if "takes more than" in words or "MiB together" in words:
            assert reading.again() == words
            asked = [path for path, _ in reading.hub.requests]
            assert asked == [f"/api/models/{REPO}/revision/main"], "it is said again without being read again"


def test_the_largest_published_models_are_read(reading: Reading, tmp_path: Path) -> None:
    for name, files in HONEST.items():
        for kept in tmp_path.glob("*.json"):
            kept.unlink()
        assert reading.read(files()) == "", name


# --- the controller's planner


WORKSPACES = 8
"""As many as hold every worker of a controller with the chart's values, twice."""
SECONDS = 60.0
"""For all of them on a busy machine, one after the other; idle it is a second for each."""


class Nothing:
    """A cluster without any object."""

    def get(self, *_: Any) -> None:
        return None


def workspace(name: str, model: str) -> Object:
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": name, "namespace": "team", "uid": name, "generation": 1},
        "resource": {"count": 1},
        "inference": {"preset": {"name": model}},
    }


@pytest.fixture
def planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    monkeypatch.setattr(planning, "HUB_CACHE", tmp_path / "models")
    monkeypatch.setattr(description, "MODEL_FILES", limited.Limits(memory_bytes=64 << 20))  # reached sooner
    return Planner(cast(Client, Nothing()), PluginManager(()), {})


def test_poisonous_models_hold_the_workers_for_seconds_and_are_not_read_again(hub: Hub, planner: Planner) -> None:
    lists = json.dumps({"eos_token": "</s>"})[:-1] + ', "x": [' + "[]," * (1 << 20) + "0]}"
    poison = {**model_files(), "tokenizer_config.json": lists.encode()}
    hub.models = {f"evil/model-{i}": poison for i in range(WORKSPACES)}
    said: dict[str, str] = {}

    def plan(number: int) -> None:
        planned = planner(workspace(f"w{number}", f"evil/model-{number}"))
        said[f"evil/model-{number}"] = f"{planned.refusal}: {planned.problems[0].message}"

    began = time.monotonic()
    workers = [threading.Thread(target=plan, args=(i,)) for i in range(WORKSPACES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert time.monotonic() - began < SECONDS
    assert len(said) == WORKSPACES
    for name, words in said.items():
        assert re.match(
            rf"PlanRefused: {name}@\w{{12}}: reading tokenizer_config.json takes more than \d+ MiB of memory$", words
        )
    hub.requests.clear()
    again = planner(workspace("w0", "evil/model-0"))
    assert not hub.requests, "the same object is planned from memory"
    assert again.refusal == "PlanRefused"
    other = planner(workspace("another", "evil/model-0"))
    assert [path for path, _ in hub.requests] == ["/api/models/evil/model-0/revision/main"]
    assert other.problems == again.problems


def test_a_folder_is_read_within_the_same_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(description, "MODEL_FILES", limited.Limits(memory_bytes=64 << 20))
    folder = write(tmp_path / "m", {**model_files(), "tokenizer_config.json": tokenizer_config(x=lists(4))})
    with pytest.raises(UserError, match=r"m: reading tokenizer_config.json takes more than 64 MiB of memory"):
        read_folder(folder)
