"""A model's numbers from its ``config.json`` and the headers of its weights: no weights are read and none of its code is run.

Where both say something, they must agree: a config.json that does not belong to the weights is found here and not on a GPU.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kaito_core.models.safetensors_header import Header, Tensor, all_tensors
from kaito_core.plugins.types import Architecture


class Refused(Exception):
    """The model cannot be used; why, and what would help."""

    def __init__(self, message: str, remedy: str = "choose another model, or another revision of it") -> None:
        super().__init__(message)
        self.message, self.remedy = message, remedy


@dataclass(frozen=True)
class Dense:
    """What is the same in all models of a class whose layers are one attention and one feed-forward block each."""

    fused: bool = False
    """One matrix for query, key and value, and one for gate and up."""
    norms: int = 2
    """Vectors of the hidden size in a layer."""
    head_norms: bool = False
    """Two vectors of the size of a head in a layer: norms of queries and keys."""
    qkv_bias: bool = False
    tied: bool = False
    """Whether embeddings and output head are one matrix where config.json does not say."""
    sliding: bool = False
    """Whether ``sliding_window`` is that of every layer."""


DENSE: Mapping[str, Dense] = {
    "LlamaForCausalLM": Dense(),
    "MistralForCausalLM": Dense(sliding=True),
    "Qwen2ForCausalLM": Dense(qkv_bias=True),
    "Qwen3ForCausalLM": Dense(head_norms=True),
    "Gemma2ForCausalLM": Dense(norms=4, tied=True),
    "Gemma3ForCausalLM": Dense(norms=4, head_norms=True, tied=True),
    "Phi3ForCausalLM": Dense(fused=True, sliding=True),
    "GraniteForCausalLM": Dense(),
}
"""Classes whose layers are known exactly, from their modelling files in transformers 5; a test builds each of them."""

SERVED: tuple[str, ...] = (
    "DeepseekV2ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV4ForCausalLM",
    "Gemma3ForConditionalGeneration", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForConditionalGeneration", "Glm4MoeForCausalLM", "GlmMoeDsaForCausalLM", "GptOssForCausalLM",
    "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM", "KimiK25ForConditionalGeneration", "MiniMaxM2ForCausalLM",
    "Ministral3ForCausalLM", "Mistral3ForConditionalGeneration", "MistralLarge3ForCausalLM", "MixtralForCausalLM",
    "NemotronHForCausalLM", "NemotronH_Nano_VL_V2", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration", "SmolLM3ForCausalLM",
)  # fmt: skip
"""Classes that are served and not tuned: experts, latent attention, layers without attention, other senses than text. All are in
vLLM's own list (vllm/model_executor/models/registry.py, version 0.32)."""

NESTED = ("text_config", "llm_config", "language_config")
"""Where models with more senses than one keep the numbers of their language model."""

LARGEST_NUMBER = 1 << 31

ATTENDING = ("full_attention", "sliding_attention", "chunked_attention", "attention")
NOT_ATTENDING = ("linear_attention", "mamba", "mamba2", "conv", "mlp", "moe", "recurrent")
"""Entries of ``layer_types``: layers that keep keys and values of every token, and layers that do not."""

PRECISIONS: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_LAYER = re.compile(r"model\.layers\.(\d{1,4})\.(?:self_attn|mlp)\.(\w{1,64})\.weight\Z")
_NOT_WEIGHTS = re.compile(
    r"(scale|scales|scale_inv|input_scale|weight_scale|weight_scale_2|k_scale|v_scale|qzeros|g_idx|weight_shape|weight_zero_point"
    r"|weight_g_idx|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+|SCB)\Z"
)


@dataclass(frozen=True)
class Described:
    """What the files say of a model."""

    architecture: Architecture
    dtype: str
    quantization: str
    """How the weights are quantised, as vLLM calls it; empty when they are not."""
    weights: int
    """Bytes of all tensors."""
    not_tunable: str
    """Why it can be served and not tuned; empty when it can be tuned."""


def describe(config: Mapping[str, Any], headers: Sequence[Header] = (), total_bytes: int = 0) -> Described:
    """The numbers of a model.

    ``config`` is its config.json; ``headers`` are those of its safetensors files, all of them or none; ``total_bytes`` is
    ``metadata.total_size`` of model.safetensors.index.json, for where there are no headers. Raises `Refused`, and `BadHeader`
    when two files have one tensor."""
    name = class_of(config)
    numbers = _text(config)
    tensors = all_tensors(tuple(headers))
    quantization, bits = _quantization(config)
    layers, hidden, heads = (_number(numbers, k) for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    kv_heads = _number(numbers, "num_key_value_heads", heads)
    if numbers.get("head_dim") is None and hidden % heads:
        raise Refused(f"config.json says hidden_size {hidden} and {heads} attention heads, which do not divide it")
    head_dim = _number(numbers, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise Refused(
            f"config.json says {heads} attention heads and {kv_heads} key-value heads, which do not divide them"
        )
    vocab, context = _number(numbers, "vocab_size"), _number(numbers, "max_position_embeddings")
    dense = DENSE.get(name)
    fallback = None if dense else numbers.get("moe_intermediate_size") or 0
    intermediate = _number(numbers, "intermediate_size", fallback)
    tied = _tied(config, dense, tensors, plain=dense is not None and not quantization)
    linears: Mapping[str, tuple[int, int]] = {}
    extra = 0
    if dense:
        linears = linears_of(dense, hidden, intermediate, heads * head_dim, kv_heads * head_dim)
        extra = _small(dense, numbers, hidden, intermediate, heads * head_dim, kv_heads * head_dim, head_dim)
    if tensors and dense and not quantization:
        _same(linears, tensors, layers, (vocab, hidden))
    dtype = _dtype(config, numbers, {} if quantization else tensors)
    weights = sum(t.bytes for t in tensors.values()) or total_bytes
    if tensors:
        parameters = sum(_parameters(n, t, bits) for n, t in tensors.items())
    elif dense:
        parameters = vocab * hidden * (1 if tied else 2) + hidden
        parameters += layers * (sum(i * o for i, o in linears.values()) + extra)
    elif total_bytes and not quantization:
        parameters = total_bytes // (4 if dtype == "float32" else 2)
    else:
        raise Refused(
            f"how large a {name} is cannot be said from config.json alone",
            "it needs the headers of its safetensors files, or model.safetensors.index.json",
        )
    not_tunable = _not_tunable(name, numbers, quantization, dense)
    architecture = Architecture(
        name=name,
        parameters=parameters,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        context=context,
        linears={} if not_tunable else linears,
        tied_embeddings=tied,
        sliding_window=_sliding_window(numbers, dense),
        cache_width=_cache_width(numbers, layers, 2 * kv_heads * head_dim),
    )
    return Described(
        architecture, dtype, quantization, weights or parameters * (4 if dtype == "float32" else 2), not_tunable
    )


def class_of(config: Mapping[str, Any]) -> str:
    """The model's class, if it is one that kaito knows. Raises `Refused` with the reason."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not all(isinstance(n, str) for n in named):
        raise Refused(
            "config.json does not say which architecture it is", "it needs `architectures`, as transformers writes it"
        )
    for name in named:
        if name in DENSE or name in SERVED:
            return str(name)
    first = _shown(named[0])
    if config.get("auto_map"):
        raise Refused(
            f"the architecture {first} needs code from the model's own repository (auto_map), and kaito never runs such code",
            "choose a version of the model that transformers and vLLM know by themselves",
        )
    if config.get("is_encoder_decoder"):
        raise Refused(f"{first} is an encoder and a decoder; kaito knows language models that go on with a text")
    close = difflib.get_close_matches(str(named[0]), [*DENSE, *SERVED], n=1, cutoff=0.8)
    known = ", ".join(n.removesuffix("ForCausalLM") for n in DENSE)
    raise Refused(
        f"kaito does not know the architecture {first}" + (f" (it knows {close[0]})" if close else ""),
        f"it tunes {known}, and serves more: docs/models.md",
    )


def linears_of(dense: Dense, hidden: int, intermediate: int, queries: int, keys: int) -> dict[str, tuple[int, int]]:
    """The linear modules of one layer as (in, out) features; ``queries`` and ``keys`` are the heads' features together."""
    if dense.fused:
        return {
            "qkv_proj": (hidden, queries + 2 * keys),
            "o_proj": (queries, hidden),
            "gate_up_proj": (hidden, 2 * intermediate),
            "down_proj": (intermediate, hidden),
        }
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }


def _small(
    dense: Dense, numbers: Mapping[str, Any], hidden: int, intermediate: int, queries: int, keys: int, head_dim: int
) -> int:
    """Parameters of one layer beside its matrices: norms and biases."""
    found = dense.norms * hidden + (2 * head_dim if dense.head_norms else 0)
    if dense.qkv_bias:
        found += queries + 2 * keys
    elif numbers.get("attention_bias") is True and not dense.fused:
        found += queries + 2 * keys + hidden
    if numbers.get("mlp_bias") is True:
        found += 2 * intermediate + hidden
    return found


def _same(
    linears: Mapping[str, tuple[int, int]], tensors: Mapping[str, Tensor], layers: int, embeddings: tuple[int, int]
) -> None:
    """The weights have the layers and shapes that config.json promises. Raises `Refused` with the first difference."""
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        if match := _LAYER.match(name):
            found.setdefault(int(match[1]), {})[match[2]] = tensor.shape
    remedy = "config.json and the weights do not belong together: fetch both from one revision"
    if set(found) != set(range(layers)):
        raise Refused(f"config.json says {layers} layers, and the weights have {len(found)}", remedy)
    for number, modules in sorted(found.items()):
        for name, (takes, gives) in linears.items():
            if name not in modules:
                raise Refused(f"layer {number} of the weights has no {name}", remedy)
            if modules[name] != (gives, takes):
                raise Refused(
                    f"{name} of layer {number} is {list(modules[name])} in the weights, and {[gives, takes]} by config.json",
                    remedy,
                )
    words = tensors.get("model.embed_tokens.weight")
    if words is None or words.shape != embeddings:
        shape = "not there" if words is None else f"{list(words.shape)} in the weights"
        raise Refused(f"model.embed_tokens.weight is {shape}, and {list(embeddings)} by config.json", remedy)


def _tied(config: Mapping[str, Any], dense: Dense | None, tensors: Mapping[str, Tensor], *, plain: bool) -> bool:
    said = config.get("tie_word_embeddings", _text(config).get("tie_word_embeddings"))
    if plain and tensors and "lm_head.weight" not in tensors:
        if said is False:
            raise Refused(
                "config.json says that the output head is a matrix of its own, and the weights have none (lm_head.weight)",
                "config.json and the weights do not belong together: fetch both from one revision",
            )
        return True
    return said if isinstance(said, bool) else dense is not None and dense.tied


def _not_tunable(name: str, numbers: Mapping[str, Any], quantization: str, dense: Dense | None) -> str:
    if dense is None:
        return f"{name} is an architecture that kaito serves and does not tune"
    if quantization:
        return f"its weights are quantised already ({quantization}); qlora quantises the original ones itself"
    if numbers.get("final_logit_softcapping"):
        return "it caps its logits (final_logit_softcapping), which the loss that is computed in chunks does not do"
    scale = numbers.get("logits_scaling", 1.0)
    if scale not in (None, 1, 1.0):
        return f"it scales its logits (logits_scaling {scale!r:.20}), which the loss that is computed in chunks does not do"
    return ""


def _cache_width(numbers: Mapping[str, Any], layers: int, usual: int) -> int | None:
    """Numbers that a layer's cache keeps for a token, on the average of all layers; None for the usual keys and values.

    Latent attention keeps one vector and the rotated part of the keys (DeepSeek-V2, arXiv 2405.04434, section 2.1). Of a model
    that attends in some layers only, the others keep nothing that grows with the text."""
    latent = numbers.get("kv_lora_rank")
    if latent:
        return _number(numbers, "kv_lora_rank") + _number(numbers, "qk_rope_head_dim", 0)
    attending = layers
    kinds, pattern = numbers.get("layer_types"), numbers.get("hybrid_override_pattern")
    if isinstance(kinds, list) and len(kinds) == layers:
        attending -= sum(kind in NOT_ATTENDING for kind in kinds)
    elif isinstance(pattern, str) and len(pattern) == layers:  # Nemotron-H: M, -, E and * for attention
        attending = pattern.count("*")
    return None if attending == layers else math.ceil(usual * attending / layers)


def _sliding_window(numbers: Mapping[str, Any], dense: Dense | None) -> int | None:
    """The window of every layer; None where only some have one, and the whole text is kept for the others."""
    if dense is None or not dense.sliding or numbers.get("sliding_window") is None:
        return None
    return _number(numbers, "sliding_window")


def _quantization(config: Mapping[str, Any]) -> tuple[str, int]:
    """How the weights are quantised, and bits of a number in packed tensors."""
    about = config.get("quantization_config") or _text(config).get("quantization_config")
    if not about:
        return "", 0
    if not isinstance(about, Mapping):
        raise Refused("quantization_config in config.json is not a mapping")
    method = about.get("quant_method")
    method = method.lower() if isinstance(method, str) and re.fullmatch(r"[\w.-]{1,40}", method) else "unknown"
    bits = about.get("bits")
    if method == "compressed-tensors":
        groups = about.get("config_groups")
        first: Any = next(iter(groups.values())) if isinstance(groups, Mapping) and groups else None
        weights = first.get("weights") if isinstance(first, Mapping) else None
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
    elif method in ("mxfp4", "bitsandbytes"):
        bits = 8 if about.get("load_in_8bit") else 4
    return method, bits if type(bits) is int and bits in (2, 3, 4, 8) else 8 if method == "fp8" else 4


def _parameters(name: str, tensor: Tensor, bits: int) -> int:
    """Parameters in a tensor: packed numbers are counted one by one, the scales of quantised ones are not counted."""
    if not bits:
        return tensor.numbers
    last = name.rpartition(".")[2]
    if _NOT_WEIGHTS.search(name) or last.endswith(("_scales", "_scale", "_scale_inv")):
        return 0
    packed = (
        last in ("qweight", "weight_packed") or last.endswith("_blocks") or (last == "weight" and tensor.dtype == "U8")
    )
    return tensor.bytes * 8 // bits if packed else tensor.numbers


def _dtype(config: Mapping[str, Any], numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The precision of most of the weights; of quantised ones that of the rest, as config.json has it."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.numbers
    if sizes:
        most = sizes.most_common(1)[0][0]
        if most in PRECISIONS:
            return PRECISIONS[most]
        raise Refused(
            f"most of its weights are of the type {most}, and config.json does not say how they are quantised",
            "choose a version of the model in bfloat16, or one with quantization_config",
        )
    for where in (config, numbers):
        for key in ("dtype", "torch_dtype"):
            said = str(where.get(key)).removeprefix("torch.")
            if said in PRECISIONS.values():
                return said
    return "bfloat16"


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The numbers of the language model."""
    for key in NESTED:
        inner = config.get(key)
        if isinstance(inner, Mapping) and "num_hidden_layers" in inner:
            return inner
    return config


def _number(numbers: Mapping[str, Any], key: str, otherwise: int | None = None) -> int:
    value = numbers.get(key)
    if value is None and otherwise is not None:
        value = otherwise
    if type(value) is not int or not 0 <= value <= LARGEST_NUMBER or (value == 0 and otherwise != 0):
        raise Refused(
            f"config.json says no {key}" if value is None else f"config.json says {key} {_shown(value)}",
            "it needs to be a whole number above 0",
        )
    return value


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
