"""The usual GPUs, and the presets that tuners and runtimes are asked about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kaito_core.plugins.types import Architecture, ChatFormat, Gpu, ModelSource, Offer, Preset, Price

GIB: Final = 1 << 30
MIB: Final = 1 << 20

PROVISIONER: Final = "conformance"


def _offer(name: str, cpus: int, gib: int, gpu: Gpu, gpus: int = 1) -> Offer:
    return Offer(
        name, cpus, gib * GIB, gpu, gpus, PROVISIONER, "aws", price=Price(1.0, "the conformance kit", "2026-01-01")
    )


USUAL: Final[Mapping[str, Offer]] = {
    "T4": _offer("g4dn.xlarge", 4, 14, Gpu("T4", 15_109 * MIB, (7, 5))),
    "A10G": _offer("g5.xlarge", 4, 14, Gpu("A10G", 22_888 * MIB, (8, 6))),
    "A100": _offer("Standard_NC24ads_A100_v4", 24, 200, Gpu("A100-80GB", 81_079 * MIB, (8, 0))),
    "H100": _offer("Standard_NC40ads_H100_v5", 40, 290, Gpu("H100-80GB", 81_079 * MIB, (9, 0))),
}
"""One GPU of each kind that people have; usable bytes as in the catalogue (kaito_core/planning/data/gpus.csv)."""

LAPTOP: Final = Offer("this machine", 8, 16 * GIB, provisioner="local")

MARKED: Final = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

PHI: Final = Preset(
    name="conformance-phi",
    source=ModelSource(hub="example/phi", revision="0" * 40),
    licence="MIT",
    architecture=Architecture(
        "Phi3ForCausalLM", 3_821_079_552, 32, 3072, 8192, 32, 32, 96, 32_064, 4096,
        {"qkv_proj": (3072, 9216), "o_proj": (3072, 3072), "gate_up_proj": (3072, 16_384), "down_proj": (8192, 3072)},
    ),
    chat=ChatFormat(MARKED, ("<|end|>", "<|endoftext|>")),
    lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
)  # fmt: skip
"""The numbers of Phi-3-mini: one matrix for query, key and value."""

LLAMA: Final = Preset(
    name="conformance-llama",
    source=ModelSource(hub="example/llama", revision="0" * 40),
    licence="llama3.1",
    architecture=Architecture(
        "LlamaForCausalLM", 8_030_261_248, 32, 4096, 14_336, 32, 8, 128, 128_256, 131_072,
        {"q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024), "o_proj": (4096, 4096),
         "gate_proj": (4096, 14_336), "up_proj": (4096, 14_336), "down_proj": (14_336, 4096)},
    ),
    chat=ChatFormat(MARKED, ("<|end|>",)),
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)  # fmt: skip
"""The numbers of Llama-3.1-8B: a matrix for each, and fewer heads for keys and values."""

SAMPLES: Final = (PHI, LLAMA)
