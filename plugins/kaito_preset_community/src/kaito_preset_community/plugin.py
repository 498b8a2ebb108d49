"""Reads ``presets.json`` and hands the presets over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kaito_core.plugins import Architecture, ChatFormat, ModelSource, Preset, hookimpl

KAITO_API_VERSION = "1.0"


@hookimpl
def kaito_presets() -> Iterator[Preset]:
    """One preset per entry of ``presets.json``."""
    import json  # nobody needs it to list commands

    data = json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))
    for name, preset in data.items():
        architecture = _architecture(preset["architecture"])
        yield Preset(
            name=name,
            aliases=tuple(preset["aliases"]),
            source=ModelSource(hub=preset["hub"], revision=preset["revision"]),
            licence=preset["licence"],
            gated=preset["gated"],
            architecture=architecture,
            # The models' own templates: they know the tools that these models were taught to call.
            chat=ChatFormat(template="", stop_tokens=tuple(preset["stop_tokens"])),
            lora_targets=tuple(architecture.linears),
            description=preset["description"],
            inference={"vllm": preset["vllm"]} if preset["vllm"] else {},
            quantization=preset["quantization"],
            weights=preset["weights"],
        )


def _architecture(shape: Mapping[str, Any]) -> Architecture:
    linears = {name: (takes, gives) for name, (takes, gives) in shape["linears"].items()}
    return Architecture(**{**shape, "linears": linears})
