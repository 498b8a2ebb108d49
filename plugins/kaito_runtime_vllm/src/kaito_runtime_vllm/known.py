"""What vLLM knows: its flags, model classes, quantisations and parsers, as data made by scripts/known_vllm.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One flag of ``vllm serve``."""

    name: str
    """Without dashes in front: ``max-model-len``."""
    type: str
    """``bool`` (with ``--no-…``), ``switch``, ``int``, ``float``, ``amount`` (an int that may be written ``32k``), ``text``,
    ``json`` or ``json or text``."""
    many: bool = False
    """Whether it takes a list."""
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Known:
    """One version of vLLM."""

    version: str
    flags: Mapping[str, Flag]
    """By every name that they have, short ones included."""
    architectures: frozenset[str]
    without_lora: frozenset[str]
    without_pipeline: frozenset[str]
    quantizations: Mapping[str, int]
    """The least compute capability of each: 75 is 7.5."""
    tool_parsers: tuple[str, ...]
    reasoning_parsers: tuple[str, ...]


@cache
def known() -> Known:
    """The version of vLLM that this package was made for."""
    data = json.loads(files(__package__).joinpath("data/vllm.json").read_text(encoding="utf-8"))
    flags = {}
    for name, facts in data["flags"].items():
        flag = Flag(name, facts["type"], facts.get("many", False), tuple(facts.get("choices", ())))
        flags.update(dict.fromkeys((name, *facts.get("also", ())), flag))
    return Known(
        data["version"],
        flags,
        frozenset(data["architectures"]),
        frozenset(data["without_lora"]),
        frozenset(data["without_pipeline"]),
        data["quantizations"],
        tuple(data["tool_parsers"]),
        tuple(data["reasoning_parsers"]),
    )
