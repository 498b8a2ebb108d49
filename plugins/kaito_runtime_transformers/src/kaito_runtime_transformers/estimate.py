"""How a model would be served with transformers on a machine: arithmetic on its shape, and nothing else.

On each device: the weights, a cache that all requests share (continuous batching keeps it in pages, so that no request holds more than
it needs), a second one for the one request that is answered alone because it asks for what batches cannot do, the adapters,
and what a step computes with.

Formulas: the cache takes ``2 × layers × kv_heads × head_dim × bytes`` per token (Kwon et al., arXiv 2309.06180, section 1; with
latent attention its compressed width, DeepSeek-V2, arXiv 2405.04434, section 2.1); activations of a forward pass without
gradients about ``T × (2 I + 6 h) × bytes`` for T tokens (one layer's at a time: the two halves of the gated feed-forward, and
input, queries, keys, values, output and residual of width h); sampling sorts fp32 logits. All estimates, on the high side by intent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kaito_core.plugins.types import (
    MemoryEstimate,
    MemoryItem,
    Offer,
    Preset,
    ServedAdapter,
    ServingConfiguration,
    ServingFit,
)

MIB: Final = 1 << 20
BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}

GPU_SHARE: Final = 0.9
CPU_SHARE: Final = 0.8
"""Of a machine's memory: the system and the page cache need the rest."""

CUDA_CONTEXT: Final = 600 * MIB
"""The CUDA context and the workspaces of cuBLAS, as the driver counts them: 0.5 to 0.8 GiB."""

CPU_PROCESS: Final = 900 * MIB
"""A Python process that has imported torch, transformers and peft, with its threads. Measured: 0.6 GiB with a tiny model."""

LOADED: Final = 1.02
"""Weights take a little more than their bytes: rounding of the allocator, buffers."""

REQUESTS: Final = {"cuda": 32, "cpu": 8}
"""Requests that are worked on at once. A CPU computes what it is given one after the other; more requests at once only share it."""

BATCH_TOKENS: Final = {"cuda": 1024, "cpu": 256}
"""Tokens of one forward pass of all requests together; longer prompts are read in pieces of it."""

SHORTEST: Final = 2048
"""Tokens: a shorter context than this is not chosen, however little memory there is. Somebody may still ask for it."""

STEP: Final = 256
"""A shortened context is a multiple of this."""

ALONE: Final = 4096
"""Tokens of the longest request that is answered alone, beside the shared cache."""

SORTED_COPIES: Final = 6
"""fp32 copies of the logits of a step while it samples: themselves, scaled, sorted, their indices (8 B), cumulated."""


@dataclass(frozen=True)
class Parts:
    """What a layout needs on one device, and what a token of cache takes there."""

    items: tuple[MemoryItem, ...]
    token: int
    shared: bool
    """Whether requests share a cache: continuous batching."""

    @property
    def fixed(self) -> int:
        return sum(i.bytes for i in self.items)


def dtype_of(offer: Offer, asked: str) -> str:
    """The precision to compute in on this machine: float32 on CPUs, where 16 bit is emulated or slower on most, bfloat16 on GPUs
    that have it, else float16."""
    if asked != "auto":
        return asked
    if not (offer.gpu and offer.gpus):
        return "float32"
    return "bfloat16" if offer.gpu.has_bfloat16 else "float16"


def fit(
    preset: Preset, config: Mapping[str, Any], offer: Offer, machines: int, adapters: tuple[ServedAdapter, ...]
) -> ServingFit:
    """The best layout: on as few GPUs of one machine as hold the model with its whole context, else on all of them with the longest
    context that fits; when none fits, the smallest one."""
    gpus = offer.gpus if offer.gpu else 0
    best: ServingFit | None = None
    for count in range(1, max(1, gpus) + 1):
        best = _on(preset, config, offer, count, adapters)
        wanted = config["max-model-len"] or preset.architecture.context
        if best.fits and best.configuration.context >= wanted:
            break
    assert best is not None
    notes = list(best.notes)
    if machines > 1:
        notes.append(f"this runtime serves on one machine: {machines - 1} of {machines} would have nothing to do")
    return ServingFit(best.configuration, best.memory, best.capacity, best.cache_tokens, tuple(notes))


def _on(
    preset: Preset, config: Mapping[str, Any], offer: Offer, gpus: int, adapters: tuple[ServedAdapter, ...]
) -> ServingFit:
    a = preset.architecture
    device = "cuda" if offer.gpu and offer.gpus else "cpu"
    dtype = dtype_of(offer, config["dtype"])
    share = config["memory-share"] or (GPU_SHARE if device == "cuda" else CPU_SHARE)
    capacity = int(offer.device_memory * share)
    requests = config["max-num-seqs"] or REQUESTS[device]
    parts = _parts(preset, config, device, dtype, gpus, requests, adapters)
    wanted = config["max-model-len"] or a.context
    room = max(0, capacity - parts.fixed) // parts.token
    context = wanted
    notes: list[str] = []
    if _tokens_for(wanted, parts.shared) > room and config["max-model-len"] is None:
        context = max(min(SHORTEST, wanted), _longest(room, parts.shared))
        if context < wanted:
            notes.append(f"the context is {context:,} tokens instead of {wanted:,}: more does not fit into the memory")
    alone = min(context, ALONE) if parts.shared else context
    cache = _shared_cache(parts, room, context, requests, config["cb-block-size"])
    if gpus > 1:
        notes.append(f"the layers are on {gpus} GPUs, one after the other, and requests are answered one at a time")
    if not parts.shared and gpus == 1:
        notes.append("without continuous batching, requests are answered one at a time")
    items = [
        *parts.items,
        MemoryItem("single request", alone * parts.token, f"{alone:,} tokens × {parts.token:,} B"),
    ]
    if parts.shared:
        items.insert(1, MemoryItem("cache", cache * parts.token, f"{cache:,} tokens × {parts.token:,} B"))
    return ServingFit(
        ServingConfiguration(
            device="cuda" if device == "cuda" else "cpu",
            dtype=dtype,
            context=context,
            requests=requests if parts.shared else 1,
            memory_share=share,
            pipeline=gpus if device == "cuda" else 1,
        ),
        MemoryEstimate(tuple(items)),
        capacity,
        cache if parts.shared else context,
        tuple(notes),
    )


def cache_tokens(
    preset: Preset,
    config: Mapping[str, Any],
    layout: ServingConfiguration,
    adapters: tuple[ServedAdapter, ...],
    memory: int,
) -> int:
    """Tokens of the shared cache on a device with so many bytes, for the layout that was planned; 0 without one."""
    parts = _parts(preset, config, layout.device, layout.dtype, layout.pipeline, layout.requests, adapters)
    room = max(0, int(memory * layout.memory_share) - parts.fixed) // parts.token
    return _shared_cache(parts, room, layout.context, layout.requests, config["cb-block-size"])


def _shared_cache(parts: Parts, room: int, context: int, requests: int, page: int) -> int:
    """One whole request at least, all requests whole at most, and in between what there is room for beside one that is answered
    alone; in whole pages."""
    if not parts.shared:
        return 0
    tokens = min(max(context, room - min(context, ALONE)), requests * context)
    return max(math.ceil(context / page), tokens // page) * page


def _tokens_for(context: int, shared: bool) -> int:
    """Tokens of cache that one request of ``context`` tokens needs, the request alone beside it included."""
    return context + min(context, ALONE) if shared else context


def _longest(room: int, shared: bool) -> int:
    longest = max(room // 2, room - ALONE) if shared else room
    return longest // STEP * STEP


def _parts(
    preset: Preset,
    config: Mapping[str, Any],
    device: str,
    dtype: str,
    gpus: int,
    requests: int,
    adapters: tuple[ServedAdapter, ...],
) -> Parts:
    a, d = preset.architecture, BYTES[dtype]
    layers = math.ceil(a.layers / gpus)
    per_weight, precision = _bytes_per_weight(config["quantization"], d)
    linear = a.linear_parameters * layers // a.layers
    other = a.other_parameters if gpus == 1 or a.tied_embeddings else a.other_parameters // 2
    shared = bool(config["continuous-batching"]) and gpus == 1
    tokens = (config["cb-max-batch-tokens"] or BATCH_TOKENS[device]) if shared else BATCH_TOKENS[device]
    rank = config["max-lora-rank"]
    lora = a.lora_parameters(rank, preset.lora_targets or a.linears) * layers // a.layers
    context = CUDA_CONTEXT if device == "cuda" else CPU_PROCESS
    what = "CUDA context" if device == "cuda" else "Python process"
    items = [
        MemoryItem("weights", round((linear * per_weight + other * d) * LOADED),
                   f"({linear:,} × {precision} + {other:,} × {d} B) × {LOADED}"),
        MemoryItem("activations", tokens * (2 * a.intermediate + 6 * a.hidden) * d,
                   f"{tokens:,} tokens × (2 I + 6 h) × {d} B"),
        MemoryItem("sampling", requests * a.vocab * 4 * SORTED_COPIES,
                   f"{requests} requests × {a.vocab:,} logits × 4 B × {SORTED_COPIES}"),
        MemoryItem("context", context, what),
    ]  # fmt: skip
    if adapters:
        # peft keeps adapters in fp32 unless they were saved in less.
        items.insert(
            1,
            MemoryItem("adapters", len(adapters) * lora * 4,
                       f"{len(adapters)} × {lora:,} parameters of rank {rank} × 4 B"),
        )  # fmt: skip
    token = max(1, a.cache_numbers * layers // a.layers * d)
    return Parts(tuple(items), token, shared)


def _bytes_per_weight(quantization: str, d: int) -> tuple[float, str]:
    if quantization == "bnb-4bit":
        # nf4, doubly quantised scales: one byte per 64 weights and one fp32 per 64 × 256 (QLoRA, arXiv 2305.14314, section 3).
        per = 0.5 + 1 / 64 + 4 / (64 * 256)
        return per, f"{per:.3f} B (nf4)"
    if quantization == "bnb-8bit":
        return 1.0, "1 B (LLM.int8)"
    return float(d), f"{d} B"
