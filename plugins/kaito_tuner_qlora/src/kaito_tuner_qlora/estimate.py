"""How much memory and time a tuning takes, before anything is bought: arithmetic on the model's shape, and nothing else.

The memory items follow what `train` does: the base model frozen in 4, 8, 16 or 32 bit; embeddings, output head and norms in
the compute precision and never cast up; the adapter and its gradients in fp32; layer inputs kept and the rest computed again;
the loss in chunks that never hold all logits. Every figure is an estimate, on the high side by intent.

Sources: QLoRA, arXiv 2305.14314 (bits per weight); Korthikanti et al., arXiv 2205.05198 (activations); Dettmers et al., arXiv
2110.02861 (8-bit Adam); Kaplan et al., arXiv 2001.08361 (2 FLOPs per parameter and token, forward).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kaito_core.plugins import Configuration, DataFacts, Gpu, MemoryEstimate, MemoryItem, Offer, Preset, TuningFit

MIB, GIB = 1 << 20, 1 << 30

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

MICRO_BATCHES = (16, 8, 4, 2, 1)

GPU_SHARE = 0.95
"""Of a GPU's usable memory: what fragmentation takes is not to be had."""

CPU_SHARE = 0.8
"""Of a machine's memory: the system and the page cache need the rest."""

CUDA_CONTEXT = 600 * MIB
"""The CUDA context and the workspaces of cuBLAS, as the driver counts them: 0.5 to 0.8 GiB."""

CPU_PROCESS = 455 * MIB
"""A Python process that has imported torch, transformers and peft, with its threads: 410 MiB resident with torch 2.13; the rest is
what the C allocator keeps of buffers that come and go. Set, like the next one, with ``benchmarks/memory.py``."""

CPU_QUANTISED = 149 * MIB
"""More of it where weights are quantised on a CPU: bitsandbytes, and what is kept of tensors as they were before."""

SLACK = 0.05
"""The allocator's rounding and fragmentation, of everything that changes while training."""

KEPT = 256 * MIB
"""A forward pass keeps its activations when they take no more than this, and computes them again in the backward pass when
they would take more. Recomputing costs a third more time; for a small model it would save next to nothing."""

LOSS_CHUNK = {"cpu": 16 * MIB, "cuda": 64 * MIB}
"""fp32 logits that the loss holds at once (`kaito_tuner_qlora.loss.CHUNK_BYTES`, which imports torch)."""

MFU = 0.35
"""Share of a GPU's peak that is reached with packed rows: torchtune's published QLoRA runs reach 0.35 to 0.5."""

MFU_UNPACKED = 0.12
"""The same with short examples in rows of their own, which keep a GPU idle most of the time."""

CPU_FLOPS = 25e9
"""FLOP/s that one core reaches in fp32 matrix products. A guess between machines of different age."""

PEAKS: tuple[tuple[frozenset[str], float], ...] = tuple(
    (frozenset(words.split()), flops * 1e12)
    for words, flops in [
        # Dense 16-bit tensor peaks in TFLOP/s, from NVIDIA's data sheets. The most special name comes first.
        ("H100 NVL", 835),
        ("H100", 989),
        ("H200", 989),
        ("A100", 312),
        ("B200", 2250),
        ("L40S", 362),
        ("L4", 121),
        ("A10G", 70),
        ("A10", 125),
        ("T4", 65),  # fp16
        ("V100", 112),  # fp16
        # From 4000 TOPS of sparse fp4, as published: half of it dense, a quarter of that in 16 bit.
        ("RTX PRO 6000", 500),
    ]
)


def dtype_of(offer: Offer) -> str:
    """The precision to compute in on this machine."""
    if not _on_gpu(offer) or offer.gpu is None:
        return "float32"
    return "bfloat16" if offer.gpu.has_bfloat16 else "float16"


def peak_flops(gpu: Gpu) -> float | None:
    """Dense 16-bit FLOP/s of one GPU by its name (``A100-80GB``, ``Tesla T4``); None when it is not known."""
    words = set(re.split(r"[^A-Z0-9]+", gpu.model.upper()))
    return next((flops for name, flops in PEAKS if name <= words), None)


def memory(preset: Preset, config: Mapping[str, Any], layout: Configuration) -> MemoryEstimate:
    """The peak on one device, item by item, for this layout.

    ``config`` is a resolved configuration. T below is ``micro_batch × sequence`` tokens, d the bytes of the compute precision,
    h the hidden size."""
    a, d = preset.architecture, BYTES[layout.dtype]
    lora, training, quantization = config["LoraConfig"], config["TrainingArguments"], config["QuantizationConfig"]
    tokens = layout.micro_batch * layout.sequence
    per_weight, precision = _bytes_per_weight(quantization, d)
    adapter = a.lora_parameters(lora["r"], lora["target_modules"])
    if lora.get("use_dora"):
        adapter += a.layers * sum(a.linears[t][1] for t in lora["target_modules"])
    optim, state = _optimizer(training["optim"], layout.device)
    largest = max(i * o for i, o in a.linears.values())
    head_rows = min(tokens, max(16, LOSS_CHUNK[layout.device] // (4 * a.vocab)))
    copies = 1 if layout.device == "cuda" else 2  # a CPU's matrix product packs its own
    items = [
        MemoryItem("base", round(a.linear_parameters * per_weight), f"{a.linear_parameters:,} weights × {precision}"),
        MemoryItem("embeddings", a.other_parameters * d, f"{a.other_parameters:,} weights × {d} B, not quantised"),
        MemoryItem("lora", adapter * 8, f"{adapter:,} parameters × (4 B + 4 B gradient)"),
        MemoryItem("optimizer", adapter * state, f"{adapter:,} parameters × {state} B ({optim})"),
        _activations(preset, training, tokens, d),
        MemoryItem(
            "logits",
            head_rows * a.vocab * 8 + 2 * tokens * a.hidden * d,
            f"a chunk of {head_rows} × {a.vocab:,} logits × 8 B + 2 T × h × {d} B",
        ),
        MemoryItem(
            "workspace",
            copies * largest * d if per_weight < d else 0,
            f"the largest matrix dequantised: {copies} × {largest:,} × {d} B"
            if per_weight < d
            else "nothing is quantised",
        ),
    ]
    on_cpu = CPU_PROCESS + (CPU_QUANTISED if per_weight < d else 0)
    fixed = CUDA_CONTEXT if layout.device == "cuda" else on_cpu
    slack = round(SLACK * sum(i.bytes for i in items))
    what = "CUDA context" if layout.device == "cuda" else "Python process"
    items.append(
        MemoryItem("context", fixed + slack, f"{what} {fixed // MIB} MiB + {SLACK:.0%} of the rest for the allocator")
    )
    return MemoryEstimate(tuple(items))


def _bytes_per_weight(quantization: Mapping[str, Any], d: int) -> tuple[float, str]:
    if quantization["load_in_4bit"]:
        # One fp32 scale per 64 weights; doubly quantised: one byte per 64, and one fp32 per 64 × 256 (section 3 of the paper).
        double = quantization["bnb_4bit_use_double_quant"]
        scales = 1 / 64 + 4 / (64 * 256) if double else 4 / 64
        return (
            0.5 + scales,
            f"{0.5 + scales:.3f} B ({quantization['bnb_4bit_quant_type']}{', double' if double else ''})",
        )
    if quantization["load_in_8bit"]:
        return 1.0, "1 B (LLM.int8)"
    return float(d), f"{d} B"


def _optimizer(optim: str, device: str) -> tuple[str, int]:
    """The optimizer that is really used, and its bytes of state per trained parameter."""
    if device == "cpu" and ("8bit" in optim or "paged" in optim):
        optim = "adamw_torch"  # as the trainer does: bitsandbytes' optimizers want a GPU
    moments = 1 if any(name in optim for name in ("sgd", "lion", "rmsprop", "adagrad")) else 2
    return optim, moments * (1 if "8bit" in optim or "4bit" in optim else 4)


def _layer_bytes(preset: Preset, d: int) -> int:
    """What one layer keeps of one token for its backward pass with a fused attention kernel, at ``d`` bytes a value.

    In 16 bit: about 20 h + 4 qkv + 12 I bytes."""
    a = preset.architecture
    return round((20 * a.hidden + 4 * (a.heads + 2 * a.kv_heads) * a.head_dim + 12 * a.intermediate) * d / 2)


def kept_tokens(preset: Preset, dtype: str) -> int:
    """How many tokens a forward pass may have for its activations to be kept (at most `KEPT` bytes) and not recomputed."""
    return KEPT // (preset.architecture.layers * _layer_bytes(preset, BYTES[dtype]))


def _activations(preset: Preset, training: Mapping[str, Any], tokens: int, d: int) -> MemoryItem:
    a = preset.architecture
    layer = tokens * _layer_bytes(preset, d)
    if not training["gradient_checkpointing"]:
        return MemoryItem("activations", a.layers * layer, f"{a.layers} layers × T × (20 h + 4 qkv + 12 I) × {d} / 2 B")
    recomputed = a.layers * tokens * a.hidden * d + layer
    kept = min(KEPT, a.layers * layer)
    if recomputed >= kept:
        return MemoryItem("activations", recomputed, f"{a.layers} layer inputs × T × h × {d} B + one layer live")
    return MemoryItem("activations", kept, f"kept up to {KEPT // MIB} MiB, recomputed beyond")


def fit(preset: Preset, config: Mapping[str, Any], offer: Offer, data: DataFacts | None) -> TuningFit:
    """The job on this machine, with the largest micro-batch that fits; with the smallest one when none does."""
    training = config["TrainingArguments"]
    on_gpu = _on_gpu(offer)
    capacity = int(offer.device_memory * (GPU_SHARE if on_gpu else CPU_SHARE))
    rows = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    layout = Configuration(
        device="cuda" if on_gpu else "cpu",
        dtype=dtype_of(offer),
        micro_batch=1,
        accumulation=rows,
        sequence=_sequence(preset, training, data),
        processes=offer.gpus if on_gpu else 1,
    )
    # Micro-batches that divide the step, so that a step is exactly what the person asked for.
    for micro in (m for m in MICRO_BATCHES if rows % m == 0):
        layout = replace(layout, micro_batch=micro, accumulation=rows // micro)
        needed = memory(preset, config, layout)
        if needed.total <= capacity:
            break
    steps, tokens = _work(training, layout, data)
    seconds, notes = _time(preset, training, offer, layout, tokens)
    return TuningFit(layout, needed, capacity, steps, tokens, seconds, notes)


def _on_gpu(offer: Offer) -> bool:
    return offer.gpu is not None and offer.gpus > 0


def _sequence(preset: Preset, training: Mapping[str, Any], data: DataFacts | None) -> int:
    """Tokens of a row. Without packing a row is one example, so the longest one (in steps of 64) is enough."""
    wanted = min(int(training["max_length"]), preset.architecture.context)
    if data is None or training["packing"]:
        return wanted
    return min(wanted, max(64, math.ceil(data.longest / 64) * 64))


def _work(training: Mapping[str, Any], layout: Configuration, data: DataFacts | None) -> tuple[int | None, int | None]:
    """Optimizer steps and tokens of the whole job; None while the data is unknown."""
    max_steps = int(training["max_steps"])
    if data is None or not data.sequences:
        return (max_steps if max_steps > 0 else None), None
    rows = layout.micro_batch * layout.accumulation * layout.processes
    steps_per_epoch = math.ceil(data.sequences / rows)
    epochs = max_steps / steps_per_epoch if max_steps > 0 else float(training["num_train_epochs"])
    return math.ceil(steps_per_epoch * epochs), round(data.tokens * epochs)


def _time(
    preset: Preset, training: Mapping[str, Any], offer: Offer, layout: Configuration, tokens: int | None
) -> tuple[float | None, tuple[str, ...]]:
    notes = []
    if layout.dtype == "float16":
        notes.append("this GPU has no bfloat16: float16 is used, and loss scaling with it")
    if tokens is None:
        return None, tuple(notes)
    if offer.gpu is not None and layout.device == "cuda":
        peak = peak_flops(offer.gpu)
        if peak is None:
            return None, (*notes, f"how fast a {offer.gpu.model} is, is not known: no time is estimated")
        speed = peak * layout.processes * (MFU if training["packing"] else MFU_UNPACKED)
    else:
        speed = offer.cpus * CPU_FLOPS
        notes.append("the time is a rough estimate: CPUs differ several times over")
    # Forward and the gradients of the activations, 2 each; the frozen weights have none; once more forward to recompute.
    per_parameter = 6 if training["gradient_checkpointing"] else 4
    return per_parameter * preset.architecture.parameters * tokens / speed, tuple(notes)
