"""Presets and machines of the tests."""

from __future__ import annotations

from typing import Any

from kaito_core.plugins import Architecture, ChatFormat, Gpu, ModelSource, Offer, Preset, ServedAdapter
from kaito_core.workloads.serving import ServingJob
from kaito_runtime_vllm import estimate
from kaito_runtime_vllm.config import resolve

GIB = 1 << 30


def phi(
    name: str, parameters: int, layers: int, h: int, i: int, heads: int, kv: int, dim: int, vocab: int, context: int
) -> Preset:
    linears = {
        "qkv_proj": (h, (heads + 2 * kv) * dim),
        "o_proj": (heads * dim, h),
        "gate_up_proj": (h, 2 * i),
        "down_proj": (i, h),
    }
    shape = Architecture("Phi3ForCausalLM", parameters, layers, h, i, heads, kv, dim, vocab, context, linears)
    return Preset(
        name,
        ModelSource(hub=f"microsoft/{name}", revision="c"),
        "MIT",
        shape,
        ChatFormat("{{ messages }}", ("<|end|>",)),
        tuple(linears),
    )


PHI_3_MINI = phi("phi-3-mini-128k-instruct", 3_821_079_552, 32, 3072, 8192, 32, 32, 96, 32_064, 131_072)
PHI_4_MINI = phi("phi-4-mini-instruct", 3_836_021_760, 32, 3072, 8192, 24, 8, 128, 200_064, 131_072)
PHI_4 = phi("phi-4", 14_659_507_200, 40, 5120, 17_920, 40, 10, 128, 100_352, 16_384)
LLAMA_70B = Preset(
    "llama-3.3-70b-instruct",
    ModelSource(hub="meta-llama/Llama-3.3-70B-Instruct", revision="c"),
    "llama3.3",
    Architecture("LlamaForCausalLM", 70_553_706_496, 80, 8192, 28_672, 64, 8, 128, 128_256, 131_072,
                 {"q_proj": (8192, 8192), "k_proj": (8192, 1024), "v_proj": (8192, 1024), "o_proj": (8192, 8192),
                  "gate_proj": (8192, 28_672), "up_proj": (8192, 28_672), "down_proj": (28_672, 8192)}),
    ChatFormat("", ("<|eot_id|>",)),
    ("q_proj", "v_proj"),
    inference={"vllm": {"tool-call-parser": "llama3_json"}},
)  # fmt: skip
LATENT = Preset(
    "deepseek-v2-lite",
    ModelSource(hub="deepseek-ai/DeepSeek-V2-Lite-Chat", revision="c"),
    "deepseek",
    Architecture("DeepseekV2ForCausalLM", 15_706_484_224, 27, 2048, 10_944, 16, 16, 128, 102_400, 163_840, {"o_proj": (2048, 2048)},
                 cache_width=576),
    ChatFormat("", ("<｜end▁of▁sentence｜>",)),
    ("o_proj",),
)  # fmt: skip
PRESETS = (PHI_3_MINI, PHI_4_MINI, PHI_4, LLAMA_70B, LATENT)

T4 = Gpu("T4", 15_109 << 20, (7, 5))
A10 = Gpu("A10", 22 * GIB, (8, 6))
A100 = Gpu("A100-80GB", 79 * GIB, (8, 0))
H100 = Gpu("H100-80GB", 79 * GIB, (9, 0))
V100 = Gpu("V100", 16 * GIB, (7, 0))


def machine(gpu: Gpu | None, gpus: int = 1, memory: int = 200 * GIB) -> Offer:
    return Offer("a-machine", 24, memory, gpu, gpus if gpu else 0)


def job_for(
    preset: Preset,
    user: dict[str, Any] | None,
    offer: Offer,
    machines: int = 1,
    adapters: tuple[ServedAdapter, ...] = (),
) -> ServingJob:
    """A job as the plan makes it."""
    config = resolve(preset, user, adapters)
    found = estimate.fit(preset, config, offer, machines, adapters)
    return ServingJob("mine", "default", preset, "vllm", config, found.configuration, machines, adapters)
