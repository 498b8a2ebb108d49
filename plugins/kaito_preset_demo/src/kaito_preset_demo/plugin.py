"""The preset record. The numbers are written out here and held against the shipped files by a test."""

from __future__ import annotations

from collections.abc import Iterator

from kaito_core.plugins import Architecture, ChatFormat, ModelSource, Preset, hookimpl
from kaito_preset_demo import MODEL_DIR

HIDDEN = 256
INTERMEDIATE = 768

ARCHITECTURE = Architecture(
    name="Phi3ForCausalLM",
    parameters=4_458_752,
    layers=4,
    hidden=HIDDEN,
    intermediate=INTERMEDIATE,
    heads=4,
    kv_heads=4,
    head_dim=64,
    vocab=2048,
    context=1024,
    linears={
        "qkv_proj": (HIDDEN, 3 * HIDDEN),
        "o_proj": (HIDDEN, HIDDEN),
        "gate_up_proj": (HIDDEN, 2 * INTERMEDIATE),
        "down_proj": (INTERMEDIATE, HIDDEN),
    },
    tied_embeddings=False,
)

#: Short rows, because packing would put this much text into a handful of optimizer steps; and a larger step than the 2e-4
#: that suits billions of parameters. The README has the figures.
SMALL_MODEL_TUNING = {
    "TrainingArguments": {
        "learning_rate": 1e-3,
        "num_train_epochs": 4,
        "max_length": 256,
        "per_device_train_batch_size": 1,
    },
}


@hookimpl
def kaito_presets() -> Iterator[Preset]:
    """The one model of this package."""
    import json

    settings = json.loads((MODEL_DIR / "tokenizer_config.json").read_text(encoding="utf-8"))
    yield Preset(
        name="demo-phi-3",
        source=ModelSource(package="kaito_preset_demo", path="model"),
        licence="MIT",
        architecture=ARCHITECTURE,
        chat=ChatFormat(template=settings["chat_template"], stop_tokens=("<|end|>", "<|endoftext|>")),
        lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        dtype="bfloat16",
        description="A toy of 4.5 million parameters, made from templates, to try kaito on any machine",
        tuning={"qlora": SMALL_MODEL_TUNING, "lora": SMALL_MODEL_TUNING},
    )
