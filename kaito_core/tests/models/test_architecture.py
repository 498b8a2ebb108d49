"""A model's numbers: from config.json and from the weights' headers, which must agree, and from transformers' own models."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.models.architecture import DENSE, Described, Refused, class_of, describe
from kaito_core.models.safetensors_header import BadHeader, Header, Tensor

from .conftest import CONFIG, llama

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 128, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def header(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> Header:
    return Header({n: Tensor(dtype, s) for n, s in shapes.items()})


def described(shapes: dict[str, tuple[int, ...]] | None = None, **config: Any) -> Described:
    return describe({**CONFIG, **config}, (header(llama() if shapes is None else shapes),))


def test_a_llama() -> None:
    found = described()
    a = found.architecture
    assert (a.name, a.layers, a.hidden, a.intermediate, a.heads, a.kv_heads, a.head_dim) == (
        "LlamaForCausalLM", 2, 64, 96, 4, 2, 32,
    )  # fmt: skip
    assert a.linears["q_proj"] == (64, 128)
    assert a.linears["down_proj"] == (96, 64)
    assert a.parameters == sum(Tensor("BF16", s).numbers for s in llama().values())
    assert found.weights == 2 * a.parameters
    assert (found.dtype, found.quantization, found.not_tunable) == ("bfloat16", "", "")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"head_dim": 32, "sliding_window": 100}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
        ("gemma2", {"head_dim": 32}),
        ("gemma3_text", {"head_dim": 32}),
        ("phi3", {"sliding_window": 100}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
def test_the_headers_and_the_numbers_of_every_family_agree_with_its_own_code(
    kind: str, changes: dict[str, Any]
) -> None:
    """transformers makes the model, without memory for its weights; what would be saved is what we read."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SMALL, **changes}))
    config = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]}
    saved = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del saved["lm_head.weight"]
    with_headers, without = describe(config, (header(saved),)), describe(config)
    assert with_headers == without
    assert with_headers.architecture.parameters == sum(p.numel() for p in model.parameters())
    assert type(model).__name__ in DENSE
    linears = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    tunable = kind not in ("gemma2", "granite")  # their logits are capped, and scaled
    assert set(with_headers.architecture.linears) == (linears if tunable else set())
    assert bool(with_headers.not_tunable) is not tunable
    assert with_headers.architecture.sliding_window == changes.get("sliding_window")


def test_the_precision_is_that_of_the_weights_and_not_of_the_config() -> None:
    found = describe(CONFIG, (header(llama(), "F32"),))
    assert found.dtype == "float32"
    assert found.weights == 4 * found.architecture.parameters


def test_latent_attention_keeps_one_vector() -> None:
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "vocab_size": 129_280,
        "max_position_embeddings": 163_840, "quantization_config": {"quant_method": "fp8"}, "moe_intermediate_size": 2048,
    }  # fmt: skip
    found = describe(config, (header({"a.weight": (10, 10)}, "F8_E4M3"), header({"a.weight_scale_inv": (1, 1)}, "F32")))
    assert found.architecture.cache_width == 576
    assert found.architecture.cache_numbers * 2 == 70_272
    assert found.quantization == "fp8"
    assert found.architecture.parameters == 100
    assert found.weights == 104
    assert "serves and does not tune" in found.not_tunable


@pytest.mark.parametrize(
    ("extra", "share"),
    [
        ({"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}, 1 / 4),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention", "unheard_of"]}, 1),
        ({"hybrid_override_pattern": "M-M*"}, 1 / 4),
    ],
)
def test_layers_that_do_not_attend_keep_nothing(extra: dict[str, Any], share: float) -> None:
    config = {**CONFIG, "num_hidden_layers": 4, "architectures": ["NemotronHForCausalLM"], **extra}
    assert describe(config, total_bytes=1000).architecture.cache_numbers == 4 * 2 * 2 * 32 * share


def test_the_language_model_of_one_with_more_senses() -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": CONFIG, "vision_config": {}}
    found = describe(config, total_bytes=2000)
    assert (found.architecture.layers, found.architecture.parameters, found.weights) == (2, 1000, 2000)


@pytest.mark.parametrize(
    ("about", "name", "dtype", "shape", "parameters"),
    [
        ({"quant_method": "awq", "bits": 4}, "qweight", "I32", (64, 8), 64 * 64),
        ({"quant_method": "gptq", "bits": 8}, "qweight", "I32", (64, 8), 64 * 32),
        ({"quant_method": "mxfp4"}, "gate_up_proj_blocks", "U8", (2, 8), 32),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}}, "weight_packed", "I32",
         (64, 8), 64 * 64),
    ],
)  # fmt: skip
def test_packed_weights_are_counted_one_by_one(
    about: dict[str, Any], name: str, dtype: str, shape: tuple[int, ...], parameters: int
) -> None:
    packed = header({f"model.layers.0.mlp.up_proj.{name}": shape}, dtype)
    scales = header(
        {"model.layers.0.mlp.up_proj.scales": (1, 64), "model.layers.0.mlp.gate_up_proj_scales": (1,)}, "F16"
    )
    found = describe({**CONFIG, "quantization_config": about}, (packed, scales))
    assert found.architecture.parameters == parameters
    assert found.quantization == about["quant_method"]
    assert "quantised already" in found.not_tunable
    assert not found.architecture.linears


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"architectures": None}, "does not say which architecture"),
    "not a list": ({"architectures": "LlamaForCausalLM"}, "does not say which architecture"),
    "unknown": (
        {"architectures": ["LLamaForCausalLM"]},
        r"does not know the architecture LLamaForCausalLM \(it knows Llama",
    ),
    "remote code": (
        {"architectures": ["Phi3SmallForCausalLM"], "auto_map": {"AutoModel": "m.M"}},
        "never runs such code",
    ),
    "translator": (
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        "encoder and a decoder",
    ),
    "no number": ({"hidden_size": None}, "says no hidden_size"),
    "text": ({"num_hidden_layers": "2"}, "says num_hidden_layers 2"),
    "true": ({"num_hidden_layers": True}, "says num_hidden_layers True"),
    "zero": ({"vocab_size": 0}, "says vocab_size 0"),
    "negative": ({"max_position_embeddings": -1}, "says max_position_embeddings -1"),
    "huge": ({"hidden_size": 10**30}, "says hidden_size 10"),
    "heads": ({"head_dim": None, "num_attention_heads": 5}, "which do not divide it"),
    "kv heads": ({"num_key_value_heads": 3}, "which do not divide them"),
    "quantization": ({"quantization_config": "fp8"}, "not a mapping"),
    "other layers": ({"num_hidden_layers": 3}, "says 3 layers, and the weights have 2"),
    "other shape": ({"intermediate_size": 100}, r"gate_proj of layer 0 is \[96, 64\] in the weights, and \[100, 64\]"),
    "other words": ({"vocab_size": 130}, "embed_tokens.weight is"),
}


@pytest.mark.parametrize(("config", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_refused_with_the_reason(config: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused, match=says):
        described(**config)


def test_known_code_in_the_repository_is_not_needed_and_not_run() -> None:
    assert (
        class_of({"architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling.X"}})
        == "Phi3ForCausalLM"
    )


@pytest.mark.parametrize(
    ("without", "says"),
    [
        ("lm_head.weight", "the weights have none"),
        ("model.layers.1.self_attn.q_proj.weight", "layer 1 of the weights has no q_proj"),
        ("model.embed_tokens.weight", "not there"),
    ],
)
def test_weights_that_lack_something_are_refused(without: str, says: str) -> None:
    with pytest.raises(Refused, match=says):
        described({n: s for n, s in llama().items() if n != without})


def test_how_large_it_is_has_to_be_said_somewhere() -> None:
    with pytest.raises(Refused, match="cannot be said from config.json alone"):
        describe({**CONFIG, "architectures": ["MixtralForCausalLM"]})


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=3)
)


@given(
    st.dictionaries(
        st.sampled_from([*CONFIG, "quantization_config", "layer_types", "kv_lora_rank", "sliding_window"]), VALUES
    )
)
def test_any_config_is_described_or_refused(changes: dict[str, Any]) -> None:
    for headers in ((), (header(llama()),)):
        try:
            found = describe({**CONFIG, **changes}, headers)
        except (Refused, BadHeader):
            continue
        assert found.architecture.parameters > 0
