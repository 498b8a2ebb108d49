"""What the core sees of the tuner."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from kaito_core.plugins import Architecture, ChatFormat, Configuration, Gpu, ModelSource, Offer, Preset
from kaito_core.problems import UserError
from kaito_core.workloads.job import DataInput, TuningJob
from kaito_tuner_qlora import estimate, plugin
from kaito_tuner_qlora.plugin import QloraTuner

GIB = 1 << 30
LINEARS = {"qkv_proj": (3072, 9216), "o_proj": (3072, 3072), "gate_up_proj": (3072, 16384), "down_proj": (8192, 3072)}
PRESET = Preset(
    "phi-3-mini",
    ModelSource(hub="a/b", revision="c"),
    "MIT",
    Architecture("Phi3ForCausalLM", 3_821_079_552, 32, 3072, 8192, 32, 32, 96, 32_064, 4096, LINEARS),
    ChatFormat("", ("<|end|>",)),
    tuple(LINEARS),
)
TUNER = QloraTuner()


def test_the_hook_gives_one_tuner_of_both_methods() -> None:
    (tuner,) = plugin.kaito_tuners()
    assert tuner.methods == ("qlora", "lora")


def descriptions(method: str, user: dict[str, Any]) -> list[str]:
    return [c.description for c in TUNER.smaller(PRESET, method, TUNER.resolve(PRESET, method, user))]


def test_smaller_begins_with_one_change_and_the_least_painful() -> None:
    said = descriptions("lora", {"TrainingArguments": {"optim": "adamw_torch", "gradient_checkpointing": False}})
    assert said[:7] == [
        "gradient_checkpointing true",
        "method qlora instead of lora",
        "examples cut at max_length 1024 instead of 2048",
        "examples cut at max_length 512 instead of 2048",
        "r 8 instead of 16 with lora_alpha 32",
        "optim paged_adamw_8bit instead of adamw_torch",
        "gradient_checkpointing true and method qlora instead of lora",
    ]
    assert len(said) == len(set(said))


def test_the_smallest_configuration_has_nothing_smaller() -> None:
    assert descriptions("qlora", {"LoraConfig": {"r": 8}, "TrainingArguments": {"max_length": 512}}) == []


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_every_change_really_shrinks_and_is_itself_a_good_configuration(method: str) -> None:
    user = {"LoraConfig": {"r": 64}, "TrainingArguments": {"optim": "adamw_torch", "gradient_checkpointing": False}}
    config = TUNER.resolve(PRESET, method, user)

    def needs(config: Any) -> int:
        length = config["TrainingArguments"]["max_length"]
        return estimate.memory(PRESET, config, Configuration("cuda", "bfloat16", 1, 4, length)).total

    before = needs(config)
    for change in TUNER.smaller(PRESET, method, config):
        assert needs(change.config) < before, change.description
        assert TUNER.resolve(PRESET, change.method, change.config) == change.config


def test_what_fits_no_t4_fits_with_the_change_that_is_named() -> None:
    t4 = Offer("t4", 4, 28 * GIB, Gpu("T4", 6 * GIB, (7, 5)), 1)
    config = TUNER.resolve(PRESET, "lora", None)
    assert not TUNER.fit(PRESET, "lora", config, t4, None).fits
    first = next(
        c for c in TUNER.smaller(PRESET, "lora", config) if TUNER.fit(PRESET, c.method, c.config, t4, None).fits
    )
    assert first.description == "method qlora instead of lora"


def test_the_workload_trains_and_verifies_with_this_package() -> None:
    job = TuningJob(
        "mine",
        "default",
        PRESET,
        "qlora",
        TUNER.resolve(PRESET, "qlora", None),
        Configuration("cuda", "bfloat16", 4, 1, 2048),
        DataInput(urls=("https://example.com/a.jsonl",)),
    )
    stages = {s.name: s for s in TUNER.workload(job).stages}
    assert list(stages) == ["fetch", "check", "train", "verify", "push"]
    assert stages["train"].command == ("python", "-m", "kaito_tuner_qlora", "train")
    assert stages["verify"].command == ("python", "-m", "kaito_tuner_qlora", "verify")
    assert stages["train"].gpu


def test_missing_libraries_are_named_by_the_command_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda m: None if m == "peft" else found("json"))
    assert TUNER.missing() == "pip install 'kaito-tuner-qlora[train]'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda m: found("json"))
    assert TUNER.missing() == ""


def test_the_planners_half_is_light() -> None:
    code = (
        "import sys, kaito_tuner_qlora.plugin as p; list(p.kaito_tuners());"
        "heavy = {'torch', 'transformers', 'peft', 'pydantic', 'yaml', 'httpx', 'rich', 'click'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_columns_that_exclude_each_other_are_refused_before_a_node_is_bought() -> None:
    user = {"DatasetConfig": {"messages_column": "chat", "prompt_column": "ask"}}
    with pytest.raises(UserError, match="messages_column and prompt_column exclude each other") as e:
        TUNER.resolve(PRESET, "lora", user)
    assert e.value.problems[0].field.endswith("DatasetConfig.prompt_column")
