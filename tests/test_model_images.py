"""The demonstration model as an image in a real registry, and what a server finds of it and of an adapter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kaito_core.artifacts.credentials import Credentials
from kaito_core.artifacts.push import push
from kaito_core.models.safetensors_header import header_length
from kaito_core.oci_reference import Reference
from kaito_core.plugins import Configuration, Preset, ServedAdapter, ServingConfiguration
from kaito_core.plugins.manager import load_plugins
from kaito_core.stages.push import build
from kaito_core.testing.registry import Registry, running_registry, why_no_registry
from kaito_core.workloads.job import DataInput, TuningJob
from kaito_core.workloads.serving import ServingJob, serving_workload
from kaito_preset_demo import MODEL_DIR
from tests.conftest import Kaito

pytestmark = pytest.mark.skipif(bool(why_no_registry()), reason=why_no_registry())


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry"), "server", "s3cret") as running:
        yield running


@pytest.fixture
def logged_in(registry: Registry, environment: dict[str, str]) -> Registry:
    registry.write_docker_config(Path(environment["DOCKER_CONFIG"]))
    return registry


@pytest.fixture
def preset() -> Preset:
    return load_plugins().preset("demo-phi-3")


def test_a_model_is_pushed_shown_and_pushed_again_for_nothing(kaito: Kaito, logged_in: Registry) -> None:
    image = f"{logged_in.host}/models/demo:1"
    first = kaito("model", "push", MODEL_DIR, image)
    assert first.returncode == 0, first.stderr
    assert f"pushed {image}@sha256:" in first.stdout
    assert "5 files, 9.1 MB, of which 9.1 MB had to be sent" in first.stdout
    again = kaito("model", "push", MODEL_DIR, image)
    assert "of which 0 B had to be sent" in again.stdout
    assert first.stdout.splitlines()[0] == again.stdout.splitlines()[0]
    shown = kaito("model", "show", image)
    assert shown.returncode == 0, shown.stderr
    assert "architectures: Phi3ForCausalLM" in shown.stdout
    assert "8.9 MB  model.safetensors" in shown.stdout
    assert "sh.kaito.version: " in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["model", "push", "nowhere", "r.io/m:1"], "there is no folder 'nowhere'"),
        (["model", "push", str(MODEL_DIR.parent), "r.io/m:1"], "there is no config.json"),
        (["model", "push", str(MODEL_DIR), "r.io/M:1"], "'r.io/M:1' is not an image reference"),
        (["model", "push", str(MODEL_DIR), "r.io/m@sha256:" + "0" * 64], "a push needs a tag"),
        (["model", "show", "not an image"], "is not an image reference"),
    ],
)
def test_what_cannot_be_pushed_is_said(kaito: Kaito, arguments: list[str], cause: str) -> None:
    answer = kaito(*arguments)
    assert answer.returncode == 2, answer.stderr
    assert cause in answer.stderr
    assert "Traceback" not in answer.stderr


def test_pickles_beside_the_weights_are_refused(kaito: Kaito, tmp_path: Path) -> None:
    shutil.copytree(MODEL_DIR, tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"x")
    answer = kaito("model", "push", "./m", "127.0.0.1:1/m:1")
    assert answer.returncode == 2
    assert "pytorch_model.bin is pickled weights" in answer.stderr


def adapter(folder: Path, preset: Preset, *, base: str, rank: int = 8) -> Path:
    """As training leaves it, with matrices of zeros."""
    folder.mkdir(parents=True)
    header, at = {}, 0
    for layer in range(preset.architecture.layers):
        for name, (i, o) in preset.architecture.linears.items():
            block = "mlp" if name in ("gate_up_proj", "down_proj") else "self_attn"
            module = f"base_model.model.model.layers.{layer}.{block}.{name}"
            for matrix, shape in (("A", (rank, i)), ("B", (o, rank))):
                size = 4 * shape[0] * shape[1]
                offsets = [at, at + size]
                header[f"{module}.lora_{matrix}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
                at += size
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    config = {"peft_type": "LORA", "r": rank, "base_model_name_or_path": base, "revision": None,
              "target_modules": list(preset.lora_targets)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(preset.chat.template)
    return folder


def stages(job: ServingJob, folder: Path, environment: dict[str, str]) -> list[subprocess.CompletedProcess[str]]:
    """Runs the stages before the server as the workload calls them."""
    workload = serving_workload(job, serve=("true",))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(job.to_json())
    env = {**environment, "KAITO_JOB": str(folder / "job.json"), "KAITO_CACHE": str(folder.parent / "cache")}
    env |= {f"KAITO_{n.upper()}": str(folder / n) for n in ("weights", "adapters", "results")}
    done = []
    for stage in workload.stages[:-1]:
        command = [sys.executable, "-P", *stage.command[1:]]
        done.append(subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False))
    return done


def test_a_server_finds_its_model_and_the_adapter_that_push_has_made(
    kaito: Kaito, logged_in: Registry, environment: dict[str, str], preset: Preset, tmp_path: Path
) -> None:
    image = f"{logged_in.host}/models/served:1"
    assert kaito("model", "push", MODEL_DIR, image).returncode == 0
    results = tmp_path / "tuned"
    adapter(results / "adapter", preset, base="demo-phi-3")
    output = f"{logged_in.host}/adapters/mine:1"
    tuned = TuningJob("mine", "default", preset, "qlora", {}, Configuration("cpu", "float32", 1, 1, 64), DataInput(),
                      output_image=output)  # fmt: skip
    layout, _, _ = build(tuned, results)
    push(layout, Reference.parse(output), Credentials("server", "s3cret"))

    serving = ServingConfiguration("cpu", "float32", 64, 4)
    job = ServingJob("chat", "default", preset, "vllm", {"max-lora-rank": 8}, serving, model_image=image,
                     adapters=(ServedAdapter("mine", image=output),))  # fmt: skip
    for done in stages(job, tmp_path / "first", environment):
        assert done.returncode == 0, done.stdout + done.stderr
        assert "s3cret" not in done.stdout + done.stderr
    weights = tmp_path / "first" / "weights"
    for file in MODEL_DIR.iterdir():
        assert (weights / file.name).read_bytes() == file.read_bytes()
    with (weights / "model.safetensors").open("rb") as f:
        assert header_length(f.read(8)) > 2
    assert (tmp_path / "first" / "adapters" / "mine" / "adapter_model.safetensors").is_file()

    fetched, checked = stages(job, tmp_path / "second", environment)
    assert fetched.stdout.count("is in the cache") == 2
    assert checked.returncode == 0

    fetched, checked = stages(replace(job, config={"max-lora-rank": 4}), tmp_path / "third", environment)
    assert checked.returncode == 2
    assert "the adapter 'mine' has rank 8, and the server takes adapters up to rank 4" in checked.stderr


def test_the_models_own_package_needs_no_registry(environment: dict[str, str], preset: Preset, tmp_path: Path) -> None:
    job = ServingJob("chat", "default", preset, "vllm", {}, ServingConfiguration("cpu", "float32", 64, 4))
    for done in stages(job, tmp_path / "run", environment):
        assert done.returncode == 0, done.stdout + done.stderr
