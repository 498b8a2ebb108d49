"""A small copy of a model's architecture: the class that transformers has for it, two layers, random weights.

What a preset says of a model of billions of parameters is tried on it in seconds: that this architecture is trained, with these
LoRA targets, this template and these stop tokens; that it is served; and that the estimate of memory is about right."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from kaito_core.models.architecture import DENSE
from kaito_core.models.files import CONFIG
from kaito_core.models.folder import read_folder
from kaito_core.plugins.types import ChatFormat, Preset

HIDDEN, INTERMEDIATE, LAYERS, HEADS, HEAD_DIM, CONTEXT = 128, 256, 2, 2, 64, 512
"""Heads as wide as kernels ask for: those of vLLM for CPUs know 32 and more."""

_MARKUP: Final = re.compile(r"<\|?/?[A-Za-z_][\w ]{0,30}\|?>|\[/?[A-Z_]{2,20}\]")
"""What looks like a special token in a template."""

_KEPT: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def shrink(preset: Preset, chat: ChatFormat, files: Path | None, into: Path) -> Preset:
    """The small copy in the folder ``into``, and the preset of it. ``files`` are the model's own, where they are at hand: its
    config.json, and its tokenizer. Skips where there is no such class, or nothing to build it with."""
    a = preset.architecture
    if a.name not in DENSE:
        pytest.skip(f"a small copy of {a.name} cannot be made: kaito does not know its layers")
    for module in ("torch", "transformers", "tokenizers"):
        pytest.importorskip(module, reason=f"{module} is not installed: it makes the small copy")
    # By name: the core imports neither, and a type checker has not got to have them.
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    into.mkdir(parents=True)
    vocab, ends = _tokenizer(preset, chat, files, into)
    kind, config = _config(preset, files, transformers)
    config |= {"vocab_size": vocab, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ends)}
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(kind, **config)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    if type(model).__name__ != a.name:
        pytest.skip(f"transformers makes a {type(model).__name__} of the model type {kind}, not a {a.name}")
    model.save_pretrained(into)
    read = read_folder(into).preset
    unknown = [t for t in preset.lora_targets if t not in read.architecture.linears]
    assert not unknown, (
        f"a {a.name} of transformers has no {', '.join(unknown)}; it has {', '.join(read.architecture.linears)}"
    )
    return replace(
        read,
        name=preset.name,
        source=preset.source,
        licence=preset.licence,
        chat=chat,
        lora_targets=preset.lora_targets,
        tuning=preset.tuning,
    )


def _config(preset: Preset, files: Path | None, transformers: Any) -> tuple[str, dict[str, Any]]:
    """The model type, and the numbers of the small copy; what is not a size stays as the model has it."""
    a = preset.architecture
    said: dict[str, Any] = {}
    if files is not None:
        said = json.loads((files / CONFIG).read_text("utf-8"))
    kind = str(said.get("model_type") or _type_of(a.name))
    own_width = a.head_dim * a.heads != a.hidden
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS if a.kv_heads == a.heads else 1 if a.kv_heads == 1 else HEADS // 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": a.tied_embeddings,
    }
    if own_width or "head_dim" in said:
        sizes["head_dim"] = 2 * HEAD_DIM if own_width else HEAD_DIM
    if a.sliding_window is not None:
        sizes["sliding_window"] = min(a.sliding_window, CONTEXT // 4)
    if "original_max_position_embeddings" in said:
        sizes["original_max_position_embeddings"] = CONTEXT
    if isinstance(said.get("layer_types"), list):
        sizes["layer_types"] = said["layer_types"][:LAYERS]
    # Scaled positions are lists as long as a head of the large model; who runs its code is nobody.
    left_out = ("model_type", "architectures", "auto_map", "rope_scaling", "rope_parameters", "dtype", "torch_dtype",
                "transformers_version", "quantization_config", "_name_or_path")  # fmt: skip
    return kind, {**{k: v for k, v in said.items() if k not in left_out}, **sizes}


def _type_of(name: str) -> str:
    """What transformers calls the models of a class; skips where it has none."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    found = next((kind for kind, cls in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if cls == name), "")
    if not found:
        pytest.skip(f"transformers has no class {name}")
    return str(found)


def _tokenizer(preset: Preset, chat: ChatFormat, files: Path | None, into: Path) -> tuple[int, int]:
    """The model's own where it is at hand, else a token for each byte and one for each mark of the template.

    Gives how many numbers the embeddings need, and the number of the token that ends an answer."""
    tokenizers = importlib.import_module("tokenizers")
    if files is not None and (files / "tokenizer.json").is_file():
        for name in _KEPT:
            if (files / name).is_file():
                shutil.copy(files / name, into / name)
        own = tokenizers.Tokenizer.from_file(str(into / "tokenizer.json"))
        size, end = own.get_vocab_size(with_added_tokens=True), own.token_to_id(chat.stop_tokens[0])
        assert end is not None, f"the tokenizer does not know the stop token {chat.stop_tokens[0]!r}"
        return max(size, preset.architecture.vocab), int(end)
    bytes_alone = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(sorted(bytes_alone))}, merges=[])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    marks = dict.fromkeys([*chat.stop_tokens, *_MARKUP.findall(chat.template)])
    made.add_special_tokens([*marks, "<|unused|>"])
    made.save(str(into / "tokenizer.json"))
    about: Mapping[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": chat.stop_tokens[0],
        "pad_token": chat.stop_tokens[0],
        "model_max_length": CONTEXT,
    }
    (into / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    size = made.get_vocab_size(with_added_tokens=True)
    return -(-size // 64) * 64, int(made.token_to_id(chat.stop_tokens[0]))
