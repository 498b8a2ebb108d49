"""An adapter folder, looked at before the engine is: what vLLM would stumble over, said in words; and what was pinned at training.

The folder comes from an image or a volume and is not trusted: files are read up to a size, and weights only as safetensors."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kaito_core.plugins.types import Preset
from kaito_core.problems import Problem, UserError
from kaito_runtime_vllm.arguments import Loaded

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
LARGEST_FILE: Final = 1 << 20
"""Bytes of a JSON file or a template; real ones have some thousand."""

LARGEST_TOKENIZER: Final = 200 << 20


@dataclass(frozen=True)
class Pinned:
    """An adapter, and what it was trained with."""

    adapter: Loaded
    template: str = ""
    """Empty: the adapter says nothing."""
    stop_tokens: tuple[str, ...] = ()


def look(name: str, folder: Path, preset: Preset, allowed: int) -> Pinned:
    """What the folder holds. UserError with everything that keeps it from being served on this model, with rank ``allowed`` at most."""
    if not folder.is_dir():
        raise UserError(
            f"the adapter {name!r} is not there",
            "its image or volume must hold a folder as peft saves it",
            field="adapters",
        )
    config = read_object(folder / CONFIG)
    if not config:
        what = f"has no {CONFIG}" if not (folder / CONFIG).is_file() else f"has a {CONFIG} that is no JSON object"
        raise UserError(f"the adapter {name!r} {what}", "it must be a folder as peft saves it", field="adapters")
    problems = [
        Problem(f"the adapter {name!r} {what}", remedy, "adapters")
        for what, remedy in _wrong(folder, config, preset, allowed)
    ]
    if problems:
        raise UserError(problems)
    stops = read_object(folder / "kaito.json").get("stop_tokens")
    return Pinned(
        Loaded(name, str(folder), rank_of(config)),
        read_text(folder / "chat_template.jinja"),
        tuple(s for s in stops if isinstance(s, str)) if isinstance(stops, list) else (),
    )


def rank_of(config: Mapping[str, Any]) -> int:
    """The highest rank of its modules; 0 when it does not say."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max((r for r in ranks if isinstance(r, int) and not isinstance(r, bool)), default=0)


def _wrong(folder: Path, config: Mapping[str, Any], preset: Preset, allowed: int) -> Iterator[tuple[str, str]]:
    kind = str(config.get("peft_type", "LORA"))[:40]
    if kind.upper() != "LORA":
        yield f"is of the kind {kind}", "vLLM serves LoRA adapters only"
        return
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        yield (
            f"has no {WEIGHTS}" + (", only a pickled file, which is never loaded" if pickled else ""),
            "save it with peft's save_pretrained(safe_serialization=True)",
        )
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and not is_of(base, preset):
        yield (f"was trained for {base[:100]}, and the model here is {preset.source.hub or preset.name}",
               "serve it on the model that it was trained for")  # fmt: skip
    rank = rank_of(config)
    if rank < 1:
        yield "does not say its rank (`r`)", f"its {CONFIG} must be as peft writes it"
    elif rank > allowed:
        yield (f"has rank {rank}, and there is room for rank {allowed}",
               f"set `max-lora-rank: {rank}` below `vllm:` in inference_config.yaml and plan again")  # fmt: skip
    for field, what in (("modules_to_save", "whole modules"), ("use_dora", "DoRA"), ("lora_bias", "biases"),
                        ("layer_replication", "repeated layers"), ("use_qalora", "QALoRA"),
                        ("alora_invocation_tokens", "activated LoRA")):  # fmt: skip
        if config.get(field):
            yield (
                f"has {what} (`{field}`), which vLLM cannot serve",
                "train it without, or use the runtime transformers",
            )
    if config.get("bias", "none") != "none":
        yield (
            "has trained biases (`bias`), which vLLM cannot serve",
            "train it without, or use the runtime transformers",
        )


def is_of(base: str, preset: Preset) -> bool:
    """Whether an adapter that names this base belongs to the preset. A path of the machine that trained it says nothing, and is
    let through: whether the shapes agree is seen when it is loaded."""
    if base.startswith((".", "/", "~")) or "\\" in base or not base:
        return True
    names = {preset.source.hub.lower(), preset.name, *preset.aliases} - {""}
    return base.lower() in names or posixpath.basename(base.lower()) in {posixpath.basename(n) for n in names}


def template_of(pinned: tuple[Pinned, ...], preset: Preset) -> str:
    """The one chat template of the endpoint: what the adapters were trained with, else the preset's; empty: the tokenizer's.

    UserError when two adapters were trained with different ones, since vLLM has one for all."""
    said: dict[str, Pinned] = {}
    for one in pinned:
        if one.template.strip():
            said.setdefault(one.template.strip(), one)
    if len(said) > 1:
        first, second = list(said.values())[:2]
        raise UserError(
            f"the adapters {first.adapter.name!r} and {second.adapter.name!r} were trained with different chat templates, "
            "and an endpoint has one",
            "serve them in two workspaces, or set `chat-template` below `vllm:` in inference_config.yaml",
            field="adapters",
        )
    return next((p.template for p in said.values()), preset.chat.template)


def generation_config(
    weights: Path, pinned: tuple[Pinned, ...], preset: Preset, *, neutral: bool = False
) -> dict[str, Any]:
    """``generation_config.json`` for the endpoint: the model's own, with the tokens that end an answer in this chat.

    vLLM takes ``eos_token_id`` from there. Many models name only the end of a text in it, and an answer would then go on after
    its turn. ``neutral``: none of the model's own sampling settings."""
    own = {} if neutral else read_object(weights / "generation_config.json")
    said = read_object(weights / "generation_config.json").get(
        "eos_token_id", read_object(weights / "config.json").get("eos_token_id")
    )
    ends = [e for e in (said if isinstance(said, list) else [said]) if isinstance(e, int) and not isinstance(e, bool)]
    wanted = dict.fromkeys((*preset.chat.stop_tokens, *(s for p in pinned for s in p.stop_tokens)))
    ids = _special_tokens(weights)
    ends += [ids[w] for w in wanted if w in ids]
    return {**own, "eos_token_id": list(dict.fromkeys(ends))}


def _special_tokens(weights: Path) -> dict[str, int]:
    """The tokens that were added to the vocabulary by hand, which is where the ends of turns are."""
    listed = read_object(weights / "tokenizer.json", LARGEST_TOKENIZER).get("added_tokens")
    found = {}
    if isinstance(listed, list):
        found = {
            t["content"]: t["id"]
            for t in listed
            if isinstance(t, dict) and isinstance(t.get("id"), int) and isinstance(t.get("content"), str)
        }
    decoder = read_object(weights / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for number, token in decoder.items():
            if number.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
                found.setdefault(token["content"], int(number))
    return found


def weaker(pinned: Pinned, strength: float, into: Path) -> Pinned:
    """The same adapter mixed in by a share from 0 to 1: a folder of its own with the scale changed, and the weights linked.

    A LoRA adapter adds ``alpha / r × B A`` (or ``alpha / √r``), so a share of alpha is the share of the adapter."""
    source = Path(pinned.adapter.folder)
    config = read_object(source / CONFIG)
    config["lora_alpha"] = config["lora_alpha"] * strength
    config["alpha_pattern"] = {k: v * strength for k, v in (config.get("alpha_pattern") or {}).items()}
    into.mkdir(parents=True)
    (into / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    (into / WEIGHTS).symlink_to((source / WEIGHTS).resolve())
    return Pinned(Loaded(pinned.adapter.name, str(into), pinned.adapter.rank), pinned.template, pinned.stop_tokens)


def read_text(path: Path, largest: int = LARGEST_FILE) -> str:
    """The file; empty when there is none. UserError when it is too large to be what it says."""
    if not path.is_file():
        return ""
    if path.stat().st_size > largest:
        raise UserError(
            f"{path.name} in {path.parent} has {path.stat().st_size:,} bytes, more than any real one",
            "look at what it is",
        )
    return path.read_text(encoding="utf-8", errors="replace")


def read_object(path: Path, largest: int = LARGEST_FILE) -> dict[str, Any]:
    """A JSON object; empty when the file is missing or holds something else."""
    try:
        loaded = json.loads(read_text(path, largest) or "null")
    except (ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
