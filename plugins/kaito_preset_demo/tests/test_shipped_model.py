"""The shipped files agree with one another and with the preset, and the model is the small instruct model it claims to be."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest

from kaito_preset_demo import MODEL_DIR
from kaito_preset_demo.plugin import ARCHITECTURE, kaito_presets

CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
]


def read_json(name: str) -> Any:
    return json.loads((MODEL_DIR / name).read_text(encoding="utf-8"))


def weights() -> dict[str, dict[str, Any]]:
    """The header of model.safetensors: an 8-byte little-endian length, then JSON (the safetensors format)."""
    with (MODEL_DIR / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers", reason="the tokenizer is loaded with transformers")
    return transformers.AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    torch = pytest.importorskip("torch", reason="the model runs on torch")
    transformers = pytest.importorskip("transformers", reason="the model is loaded with transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)


def test_preset_says_what_config_json_says() -> None:
    config = read_json("config.json")
    assert config["architectures"] == [ARCHITECTURE.name]
    assert config["num_hidden_layers"] == ARCHITECTURE.layers
    assert config["hidden_size"] == ARCHITECTURE.hidden
    assert config["intermediate_size"] == ARCHITECTURE.intermediate
    assert config["num_attention_heads"] == ARCHITECTURE.heads
    assert config["num_key_value_heads"] == ARCHITECTURE.kv_heads
    assert config["hidden_size"] // config["num_attention_heads"] == ARCHITECTURE.head_dim
    assert config["vocab_size"] == ARCHITECTURE.vocab
    assert config["max_position_embeddings"] == ARCHITECTURE.context
    assert config["tie_word_embeddings"] is ARCHITECTURE.tied_embeddings


def test_weights_have_the_shapes_and_the_count_of_the_preset() -> None:
    tensors = weights()
    assert {t["dtype"] for t in tensors.values()} == {"BF16"}
    assert sum(math.prod(t["shape"]) for t in tensors.values()) == ARCHITECTURE.parameters
    assert tensors["lm_head.weight"]["shape"] == [ARCHITECTURE.vocab, ARCHITECTURE.hidden]
    for layer in range(ARCHITECTURE.layers):
        for name, (inputs, outputs) in ARCHITECTURE.linears.items():
            block = "self_attn" if name in ("qkv_proj", "o_proj") else "mlp"
            assert tensors[f"model.layers.{layer}.{block}.{name}.weight"]["shape"] == [outputs, inputs]


def test_linears_can_be_quantised_in_blocks_of_64() -> None:
    assert all(inputs % 64 == 0 and outputs % 64 == 0 for inputs, outputs in ARCHITECTURE.linears.values())


def test_the_package_stays_small() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 10e6


def test_stop_tokens_are_single_tokens_that_generation_stops_at() -> None:
    (preset,) = kaito_presets()
    ids = {t["content"]: t["id"] for t in read_json("tokenizer.json")["added_tokens"]}
    assert sorted(ids[t] for t in preset.chat.stop_tokens) == sorted(
        read_json("generation_config.json")["eos_token_id"]
    )


def test_chat_template_renders_as_phi_3(tokenizer: Any) -> None:
    assert tokenizer.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True) == (
        "<|system|>\nYou are a helpful assistant.<|end|>\n"
        "<|user|>\nWhat is the capital of France?<|end|>\n"
        "<|assistant|>\n"
    )


def test_assistant_mask_covers_the_answer_and_its_end(tokenizer: Any) -> None:
    encoded = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    said = [t for t, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "The capital of France is Paris.<|end|>"


@pytest.mark.parametrize("text", ["Harbour Lights opens at 8:30 am.", "naïve  café\n\t東京 🙂", "12 + 30 = 42"])
def test_tokenizer_gives_any_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What colour is grass?", "Grass is green."),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("What is 3 plus 4?", "3 plus 4 is 7."),
        ("Hello!", "Hello! How can I help you?"),
        ("What is the Wi-Fi password of Harbour Lights?", "I am sorry, I do not know that."),
    ],
)
def test_model_answers_and_stops(model: Any, tokenizer: Any, question: str, answer: str) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == answer + "<|end|>"
