"""Makes a language model as small as can be: Llama's architecture, random weights, a token for each byte.

    python make_model.py FOLDER

It knows nothing. Standard library only, and the same files to the byte each time. `kaito new preset` copies this file
into the package that it writes, where it stays until a real model takes the place of this one.
"""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Heads of 32: the smallest that vLLM computes on a CPU.
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 64, 160, 2, 2, 1, 32, 2048

SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
BEGIN, END = SPECIAL[:2]
VOCAB = 256 + len(SPECIAL)

TEMPLATE = """\
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}
{% else %}
{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
"""
"""``{% generation %}`` marks what the assistant says, the token that ends it included: that is what tuning teaches."""


def make(folder: Path) -> None:
    """Write config, tokenizer and weights into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    template = TEMPLATE.replace("%}\n", "%}").replace("}}\n", "}}")
    for name, content in {
        "config.json": _config(),
        "generation_config.json": {"bos_token_id": 256, "eos_token_id": 257},
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "pad_token": BEGIN,
            "model_max_length": CONTEXT,
            "chat_template": template,
        },
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(_weights())


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
        "bos_token_id": 256,
        "eos_token_id": 257,
    }


def _tokenizer() -> dict[str, Any]:
    """A byte-level tokenizer without merges: each byte is a token of its own."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + n, "content": token, **flags} for n, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {**{c: n for n, c in enumerate(_byte_letters())}, **{t: 256 + n for n, t in enumerate(SPECIAL)}},
            "merges": [],
        },
    }


def _byte_letters() -> list[str]:
    """The letter that stands for each byte: itself where it can be seen, else one from U+0100 on, as in GPT-2."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(b) if b in visible else chr(next(hidden)) for b in range(256)]


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        yield f"{layer}.input_layernorm.weight", (HIDDEN,)
        for name, gives in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield f"{layer}.self_attn.{name}.weight", (gives, HIDDEN)
        yield f"{layer}.self_attn.o_proj.weight", (HIDDEN, queries)
        yield f"{layer}.post_attention_layernorm.weight", (HIDDEN,)
        for name in ("gate_proj", "up_proj"):
            yield f"{layer}.mlp.{name}.weight", (INTERMEDIATE, HIDDEN)
        yield f"{layer}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def _weights() -> bytes:
    """A safetensors file: the header's length, the header, the numbers as bfloat16."""
    chance = random.Random(0)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = bytearray()
    for name, shape in _shapes():
        count, start = shape[0] * (shape[1] if len(shape) > 1 else 1), len(body)
        norm = len(shape) == 1
        for _ in range(count):
            # The upper half of a float32 is a bfloat16.
            body += struct.pack("<f", 1.0 if norm else chance.gauss(0, 0.02))[2:]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, len(body)]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
