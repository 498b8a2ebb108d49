"""Reads ``presets.toml``, fills in what follows from the shape, and hands the presets over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kaito_core.plugins import Architecture, ChatFormat, ModelSource, Preset, hookimpl

KAITO_API_VERSION = "1.0"


@hookimpl
def kaito_presets() -> Iterator[Preset]:
    """One preset per table of ``presets.toml``."""
    import tomllib  # nobody needs it to list commands

    folder = Path(__file__).parent
    data = tomllib.loads(folder.joinpath("presets.toml").read_text(encoding="utf-8"))
    chats = {
        name: ChatFormat(
            folder.joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n"),
            tuple(chat["stop_tokens"]),
        )
        for name, chat in data["chats"].items()
    }
    for name, preset in data["presets"].items():
        architecture = _architecture(data["shapes"][preset["shape"]], preset)
        yield Preset(
            name=name,
            source=ModelSource(hub=preset["hub"], revision=preset["revision"]),
            licence=data["licence"],
            architecture=architecture,
            chat=chats[preset["chat"]],
            lora_targets=tuple(architecture.linears),
            dtype=data["dtype"],
            description=preset["description"],
            inference=preset.get("inference", {}),
        )


def _architecture(shape: Mapping[str, Any], preset: Mapping[str, Any]) -> Architecture:
    hidden, intermediate, heads = shape["hidden"], shape["intermediate"], shape["heads"] * shape["head_dim"]
    keys_and_values = 2 * shape["kv_heads"] * shape["head_dim"]
    return Architecture(
        name="Phi3ForCausalLM",
        context=preset["context"],
        sliding_window=preset.get("sliding_window"),
        # All of these models fuse query, key and value, and gate and up, into one matrix each.
        linears={
            "qkv_proj": (hidden, heads + keys_and_values),
            "o_proj": (heads, hidden),
            "gate_up_proj": (hidden, 2 * intermediate),
            "down_proj": (intermediate, hidden),
        },
        **shape,
    )
