"""The `train` and `verify` stages, for real: a tiny Phi-3, nf4, on the CPU."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kaito_core.problems import Failure, UserError
from kaito_core.progress import Progress
from kaito_tuner_qlora import checkpoints
from kaito_tuner_qlora import model as models
from kaito_tuner_qlora import train as stage
from kaito_tuner_qlora.verify import load_adapter, verify

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAITO_TRAIN_KEY", "key")
    torch.set_num_threads(1)


def train(run: Any) -> dict[str, Any]:
    """The stage in this process; gives metrics.json."""
    stage.train(run.job, run.folders, Progress(run.folders.results / "progress.jsonl", "train"))
    metrics: dict[str, Any] = json.loads((run.folders.results / "metrics.json").read_text())
    return metrics


def adapter(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.folders.results / "adapter/adapter_model.safetensors")


def assert_same_adapter(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_an_adapter_is_trained_and_verified(make_job: Any, make_run: Any) -> None:
    run = make_run(make_job(TrainingArguments={"max_steps": 30, "learning_rate": 1e-2}))
    metrics = train(run)
    results = run.folders.results
    losses = [e["loss"] for e in metrics["history"] if "loss" in e]
    assert losses[-1] < losses[0] / 2
    assert metrics["data"]["examples"] == 32
    assert metrics["tokens"] > metrics["data"]["tokens"]

    config = json.loads((results / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "example/tiny-phi"  # not a path of this machine
    assert (results / "adapter/chat_template.jinja").read_text() == run.job.preset.chat.template
    facts = json.loads((results / "adapter/kaito.json").read_text())
    assert facts["revision"] == "0123456789abcdef"
    assert facts["data_digest"] == "sha256:1234"

    verify(run.job, run.folders, Progress(results / "progress.jsonl", "verify"))
    verified = json.loads((results / "verify.json").read_text())
    assert verified["eval_loss_after"] < verified["eval_loss_before"]
    assert verified["eval_loss_after"] == pytest.approx(
        metrics["summary"]["eval_loss"], rel=1e-3
    )  # what was saved is what was measured
    assert verified["stops"]["after"] == verified["stops"]["of"] == 5
    card = (results / "adapter/README.md").read_text()
    assert "base_model: example/tiny-phi" in card
    report = (results / "report.html").read_text()
    assert "<polyline" in report
    assert "What does the" in report
    assert not re.search(r"<script|src=|href=", report)

    kinds = {e["event"] for e in run.events()}
    assert {"step", "eval", "message"} <= kinds
    step = run.events("step")[-1]
    assert {"step", "steps", "loss", "tokens_per_second", "seconds_left", "learning_rate", "memory"} <= step.keys()
    assert step["step"] == step["steps"] == 30


def test_lora_on_the_uncompressed_model(make_job: Any, make_run: Any) -> None:
    metrics = train(make_run(make_job("lora", TrainingArguments={"max_steps": 3})))
    assert metrics["summary"]["steps"] == 3


def test_how_a_step_is_divided_changes_nothing(make_job: Any, make_run: Any) -> None:
    whole = make_run(make_job(micro_batch=4, accumulation=1), "whole")
    parts = make_run(make_job(micro_batch=1, accumulation=4), "parts")
    assert train(whole)["summary"]["eval_loss"] == pytest.approx(train(parts)["summary"]["eval_loss"], rel=1e-4)
    assert_same_adapter(adapter(whole), adapter(parts))


def test_out_of_memory_backs_off_and_goes_on(make_job: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is done again in smaller pieces, with the same result as if there had been memory enough."""
    calm, tight = make_run(make_job(micro_batch=2), "calm"), make_run(make_job(micro_batch=2), "tight")
    train(calm)
    real = models.batch_loss

    def little_memory(model: torch.nn.Module, b: Any) -> torch.Tensor:
        if b.tokens > 130:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried …"
            )
        return real(model, b)

    monkeypatch.setattr(models, "batch_loss", little_memory)
    assert train(tight)["budget"] == 128
    assert any("out of memory: going on with 128 tokens" in e["text"] for e in tight.events("message"))
    assert_same_adapter(adapter(calm), adapter(tight))


def test_out_of_memory_with_one_example_says_what_to_do(
    make_job: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(model: torch.nn.Module, b: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(models, "check_packing", lambda *a: None)
    monkeypatch.setattr(models, "batch_loss", no_memory)
    with pytest.raises(Failure, match="single example") as error:
        train(make_run(make_job()))
    assert "max_length" in error.value.problems[0].remedy


def test_a_diverged_training_stops(make_job: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = models.batch_loss
    monkeypatch.setattr(models, "batch_loss", lambda m, b: real(m, b) * (float("nan") if m.training else 1))
    with pytest.raises(Failure, match="diverged"):
        train(make_run(make_job()))


def test_killed_at_any_instant_it_goes_on_where_it_was(make_job: Any, make_run: Any) -> None:
    """KAITO defect 9: there a retry starts from zero, and a spot eviction loses everything."""
    job = make_job(
        TrainingArguments={"max_steps": 24, "save_steps": 4, "eval_strategy": "no"}, LoraConfig={"lora_dropout": 0.1}
    )
    calm, killed = make_run(job, "calm"), make_run(job, "killed")
    train(calm)
    process = killed.start()
    folder = killed.folders.results / "checkpoints/key"
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-8").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (killed.folders.results / "adapter").exists()
    reached = int(checkpoints.newest(folder).name.rpartition("-")[2])
    assert 8 <= reached < 24
    torn = folder / "checkpoint-23"  # and what a torn one would look like is not gone on from
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{}")

    metrics = train(killed)
    assert any(e["text"] == f"going on from checkpoint-{reached}" for e in killed.events("message"))
    assert [e["step"] for e in metrics["history"] if "loss" in e] == list(range(1, 25))  # the curve has no gap
    calm_metrics = json.loads((calm.folders.results / "metrics.json").read_text())
    assert metrics["summary"]["eval_loss"] == pytest.approx(calm_metrics["summary"]["eval_loss"], rel=1e-4)
    assert_same_adapter(adapter(calm), adapter(killed))
    assert len(checkpoints.all_of(folder)) <= 2
    assert not list(folder.rglob("training_args.bin"))  # no pickled objects


def test_a_signal_writes_a_checkpoint_first(make_job: Any, make_run: Any) -> None:
    """SIGTERM is what an eviction, a drained node and `kaito`'s own Ctrl-C look like from here."""
    run = make_run(make_job(TrainingArguments={"max_steps": 5000, "eval_strategy": "no"}))
    process = run.start()
    deadline = time.monotonic() + 120
    while not run.events("step") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert checkpoints.newest(run.folders.results / "checkpoints/key") is not None
    assert "SIGTERM" in run.events("message")[-1]["text"]
    assert not run.events("finished", "failed")


def test_no_checkpoint_is_kept_when_none_is_asked_for(make_job: Any, make_run: Any) -> None:
    """`save_strategy: "no"` is KAITO's template; and a full disk in the middle does not end the training."""
    run = make_run(make_job(TrainingArguments={"max_steps": 3, "save_strategy": "no", "save_steps": 1}))
    train(run)
    assert not (run.folders.results / "checkpoints/key").exists()
    assert [e["step"] for e in run.events("checkpoint")] == [1, 2, 3]


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(
    make_job: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "publish", full)
    run = make_run(make_job(TrainingArguments={"max_steps": 3, "save_steps": 2, "eval_strategy": "no"}))
    assert train(run)["summary"]["steps"] == 3
    assert any("No space left" in e["text"] for e in run.events("message"))


def test_the_best_adapter_is_the_result_and_patience_ends(
    make_job: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kaito_tuner_qlora import trainer

    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    monkeypatch.setattr(trainer, "held_out_loss", lambda *a: next(losses))
    run = make_run(make_job(TrainingArguments={"max_steps": 12, "eval_steps": 2, "early_stopping_patience": 2}))
    metrics = train(run)
    assert metrics["summary"]["adapter_of_step"] == 4
    assert metrics["summary"]["eval_loss"] == 2.0
    assert metrics["summary"]["steps"] == 8
    best = load_file(run.folders.results / "checkpoints/key/best/adapter_model.safetensors")
    assert_same_adapter(adapter(run), best)


def test_kaitos_own_config_map_is_trained_as_it_is(make_job: Any, make_run: Any) -> None:
    """KAITO defect 14: `mlm: true` is flipped without a word there. Here it is said."""
    sections = {
        "ModelConfig": {"torch_dtype": "bfloat16", "local_files_only": True, "device_map": "auto"},
        "QuantizationConfig": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16",
                               "bnb_4bit_use_double_quant": True},
        "LoraConfig": {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0},
        "TrainingArguments": {"output_dir": "/mnt/results", "ddp_find_unused_parameters": False, "save_strategy": "no",
                              "per_device_train_batch_size": 1, "max_steps": 2},
        "DataCollator": {"mlm": True},
        "DatasetConfig": {"shuffle_dataset": True, "train_test_split": 1},
    }  # fmt: skip
    run = make_run(make_job(**sections))
    assert train(run)["summary"]["steps"] == 2
    assert any(e["text"].startswith("DataCollator.mlm") for e in run.events("message"))


def test_fields_of_transformers_are_passed_on_and_its_refusals_are_ours(make_job: Any, make_run: Any) -> None:
    run = make_run(make_job(TrainingArguments={"max_steps": 1, "adam_beta2": 0.95}))
    assert train(run)["summary"]["steps"] == 1
    with pytest.raises(UserError, match="transformers refuses"):
        train(make_run(make_job(TrainingArguments={"logging_strategy": "sometimes"}), "other"))


def test_an_adapter_that_is_not_one_is_refused(make_job: Any, make_run: Any, weights: Path, tmp_path: Path) -> None:
    run = make_run(make_job(TrainingArguments={"max_steps": 2}))
    train(run)
    from safetensors.torch import save_file

    from kaito_tuner_qlora import config

    def fresh_base() -> Any:
        return models.load_base(weights, config.read(run.job.config), torch.device("cpu"), "float32")

    folder, tensors = run.folders.results / "adapter", adapter(run)
    load_adapter(fresh_base(), folder)
    save_file({k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(Failure, match="learned nothing"):
        load_adapter(fresh_base(), folder)
    save_file({k: v for k, v in tensors.items() if "layers.0" in k}, folder / "adapter_model.safetensors")
    with pytest.raises(Failure, match="another model"):
        load_adapter(fresh_base(), folder)
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(Failure, match="does not load"):
        load_adapter(fresh_base(), folder)


def test_what_can_be_foreseen_ends_without_a_traceback(make_job: Any, make_run: Any, tmp_path: Path) -> None:
    run = make_run(make_job())
    (run.folders.results / "prepared/train.arrow").unlink()
    process = run.start()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in out
    failed = run.events("failed")[0]
    assert "no prepared data" in failed["message"]
    assert "check" in failed["remedy"]
