"""The preset ``pocket-llama``: numbers that plans are made from, and where the model is. Nothing here runs the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kaito_core.plugins import Architecture, ChatFormat, ModelSource, Preset, hookimpl

KAITO_API_VERSION = "1.0"

SOURCE = ModelSource(
    package="kaito_preset_pocket_llama",
    path="model",
)

ARCHITECTURE = Architecture(
    name="LlamaForCausalLM",
    parameters=119_744,
    layers=2,
    hidden=64,
    intermediate=160,
    heads=2,
    kv_heads=1,
    head_dim=32,
    vocab=261,
    context=2048,
    linears={
        "q_proj": (64, 64),
        "k_proj": (64, 32),
        "v_proj": (64, 32),
        "o_proj": (64, 64),
        "gate_proj": (64, 160),
        "up_proj": (64, 160),
        "down_proj": (160, 64),
    },
)

SMALL = {"TrainingArguments": {"learning_rate": 5e-3, "max_length": 256, "per_device_train_batch_size": 1}}
"""Longer steps and shorter rows than the tuner's own settings, which suit billions of parameters."""


@hookimpl
def kaito_presets() -> Iterator[Preset]:
    """The one model of this package. To offer several, yield one after the other."""
    yield Preset(
        name="pocket-llama",
        source=SOURCE,
        licence="Apache-2.0",
        architecture=ARCHITECTURE,
        chat=ChatFormat(_template(), stop_tokens=("<|end|>",)),
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        dtype="bfloat16",
        description="A toy of 120 thousand random numbers in the form of Llama: it tunes in seconds and knows nothing",
        tuning={"qlora": SMALL, "lora": SMALL},
    )


def _template() -> str:
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
