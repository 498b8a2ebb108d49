"""How strong an adapter is: numbers mean what they mean in KAITO and peft, and a training keeps the strength it began with."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.workloads.job import TuningJob
from kaito_core.workloads.tuning import train_key
from kaito_tuner_qlora import config as configs
from kaito_tuner_qlora.plugin import QloraTuner
from kaito_tuner_qlora.sections import LoraConfig

RANKS = st.integers(1, 1024)


def resolved(preset: Any, lora: dict[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = configs.resolve(preset, "qlora", lora and {"LoraConfig": lora})["LoraConfig"]
    return found


def scale(lora: dict[str, Any]) -> float:
    return LoraConfig(**lora).scale


def test_the_default_is_as_strong_as_it_was_with_plain_scaling(make_job: Any) -> None:
    lora = resolved(make_job().preset, None)
    assert (lora["r"], lora["lora_alpha"], lora["use_rslora"]) == (16, 64, False)
    assert scale(lora) == 4
    properties = configs.schema()["$defs"]["LoraConfig"]["properties"]
    assert (properties["lora_alpha"]["default"], properties["use_rslora"]["default"]) == (64, False)
    assert configs.defaults("qlora")["LoraConfig"]["lora_alpha"] == 64


@given(r=RANKS, alpha=st.integers(1, 4096))
def test_numbers_mean_what_they_mean_in_kaito(make_job: Any, r: int, alpha: int) -> None:
    lora = resolved(make_job().preset, {"r": r, "lora_alpha": alpha})
    assert scale(lora) == pytest.approx(alpha / r)


@given(r=RANKS)
def test_a_rank_alone_keeps_the_strength_that_it_had(make_job: Any, r: int) -> None:
    lora = resolved(make_job().preset, {"r": r})
    assert scale(lora) == pytest.approx(16 / math.sqrt(r), rel=0.02)


@given(r=RANKS)
def test_rank_stabilised_scaling_that_is_asked_for_is_as_it_was(make_job: Any, r: int) -> None:
    lora = resolved(make_job().preset, {"r": r, "use_rslora": True})
    assert (lora["lora_alpha"], lora["use_rslora"]) == (16, True)


@pytest.mark.parametrize("absent", [{}, {"use_rslora": None}, {"lora_alpha": None, "r": None}])
def test_null_is_as_absent(make_job: Any, absent: dict[str, Any]) -> None:
    assert resolved(make_job().preset, absent) == resolved(make_job().preset, None)


def test_what_a_preset_wishes_counts(make_job: Any) -> None:
    preset = replace(make_job().preset, tuning={"qlora": {"LoraConfig": {"r": 64}}})
    assert resolved(preset, None)["lora_alpha"] == 128
    preset = replace(preset, tuning={"qlora": {"LoraConfig": {"r": 64, "lora_alpha": 16}}})
    assert scale(resolved(preset, None)) == 0.25


@pytest.mark.parametrize("lora", [{"r": 256, "lora_alpha": 512}, {"r": 64, "lora_alpha": 64}, {"r": 32}])
def test_a_smaller_rank_in_the_plan_is_as_strong(make_job: Any, lora: dict[str, Any]) -> None:
    preset, tuner = make_job().preset, QloraTuner()
    config = tuner.resolve(preset, "qlora", {"LoraConfig": lora})
    ranks = [c for c in tuner.smaller(preset, "qlora", config) if c.config["LoraConfig"]["r"] != lora["r"]]
    assert ranks
    for change in ranks:
        assert scale(dict(change.config["LoraConfig"])) == pytest.approx(scale(config["LoraConfig"]), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"r": 8}, {"r": 8, "lora_alpha": 8}, {"use_rslora": True, "lora_alpha": 16}])
def test_it_is_the_scale_that_peft_computes(make_job: Any, weights: Path, lora: dict[str, Any]) -> None:
    import torch
    from peft.tuners.lora import LoraLayer

    from kaito_tuner_qlora import model as models

    config = configs.read(configs.resolve(make_job().preset, "lora", {"LoraConfig": lora}))
    base = models.load_base(weights, config, torch.device("cpu"), "float32")
    model = models.add_adapter(base, config.lora, "base", 1)
    scales = {s for m in model.modules() if isinstance(m, LoraLayer) for s in m.scaling.values()}
    assert list(scales) == [pytest.approx(config.lora.scale)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "key", "would_give"), [({"lora_alpha": 16}, "the same", "0.25"), ({}, "that of its configuration", "2")]
)
def test_a_resumed_training_keeps_its_own_scale(
    make_job: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any], key: str, would_give: str
) -> None:
    """One that an earlier version began, rank-stabilised by default, goes on under this one and stays what it is."""
    import torch

    from kaito_core.progress import Progress
    from kaito_core.stages.process import Interrupted
    from kaito_tuner_qlora import train, trainer
    from kaito_tuner_qlora.verify import verify

    torch.set_num_threads(1)
    job = make_job(LoraConfig={"r": 64, **lora}, TrainingArguments={"max_steps": 8, "eval_strategy": "no"})
    former = {"r": 64, "lora_alpha": 16, "use_rslora": True}
    before = replace(job, config={**job.config, "LoraConfig": {**job.config["LoraConfig"], **former}})
    run = make_run(before)
    progress = Progress(run.folders.results / "progress.jsonl", "train")
    begin = trainer.Follow.on_step_begin

    def stop_in_the_fourth_step(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        begin(self, args, state, control, **more)
        if state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Follow, "on_step_begin", stop_in_the_fourth_step)
        patched.setenv("KAITO_TRAIN_KEY", key if lora else train_key(before))
        with pytest.raises(Interrupted):
            train.train(before, run.folders, progress)
    job = TuningJob.from_json(job.to_json())  # as the stage reads it
    monkeypatch.setenv("KAITO_TRAIN_KEY", key if lora else train_key(job))
    train.train(job, run.folders, progress)

    said = [e["text"] for e in run.events("message")]
    assert "going on from checkpoint-4" in said
    assert (
        "the adapter in checkpoint-4 is scaled by 2 (r 64, lora_alpha 16, use_rslora true) and keeps that, where the "
        f"configuration would give {would_give}"
    ) in said
    adapter = run.folders.results / "adapter"
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert former.items() <= written.items()
    assert former.items() <= json.loads((adapter / "kaito.json").read_text())["config"]["LoraConfig"].items()
    verify(job, run.folders, Progress(run.folders.results / "progress.jsonl", "verify"))
    assert "| `alpha` | `16` |" in (adapter / "README.md").read_text()
