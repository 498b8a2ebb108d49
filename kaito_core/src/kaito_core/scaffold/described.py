"""A preset as Python that people read and change, and a list of what its model's files do not say."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Final

from kaito_core.models.files import UNKNOWN_LICENCE, Model
from kaito_core.plugins.types import Architecture, ModelSource, Preset
from kaito_core.problems import UserError

WIDTH: Final = 100
"""Characters of a comment's line."""


@dataclass(frozen=True)
class Described:
    """What a model's files say, and what they do not."""

    source: str
    """Python: the constants ``SOURCE`` and ``ARCHITECTURE``."""
    preset: str
    """Python: the arguments of ``Preset`` after its name, one to a line."""
    template: str
    """The chat template; empty when there is none."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Field by field what a person has to say, in words."""


def described(model: Model, source: ModelSource) -> Described:
    """``source`` is where the new package's model comes from. Raises `UserError` for a chat template that is no text."""
    preset = model.preset
    unknown = dict(_unknown(model, source))
    try:
        preset.chat.template.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the model's chat template is no text that could be written to a file", "mend it") from None
    return Described(
        f"{_record(source, unknown)}\n\n{_architecture(preset.architecture)}",
        "\n".join(f"        {line}" for line in _preset(preset, unknown)),
        preset.chat.template,
        unknown,
    )


def literal(value: object) -> str:
    """A value as Python source, texts in double quotes where that is as plain. Foreign text stays a text."""
    if isinstance(value, bool | None):
        return repr(value)
    if isinstance(value, int):
        return f"{value:_}" if value >= 10_000 else str(value)
    if isinstance(value, tuple):
        inside = ", ".join(map(literal, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, str):
        plain = value.isprintable() and '"' not in value and "\\" not in value
        return f'"{value}"' if plain else repr(value)
    raise TypeError(f"{value!r} has no place in a preset")


def _unknown(model: Model, source: ModelSource) -> Iterator[tuple[str, str]]:
    preset = model.preset
    if source.folder:
        yield (
            "source",
            (
                "where others get the weights: a folder of this machine means nothing elsewhere; publish them, and write "
                "hub= and revision="
            ),
        )
    if preset.licence == UNKNOWN_LICENCE:
        yield "licence", "which licence the model has: its card does not say"
    if not preset.chat.template:
        yield (
            "chat",
            "how a conversation becomes text: its files have no chat template; without one only plain text is learnt",
        )
    if not preset.chat.stop_tokens:
        yield "stop_tokens", "which token ends an answer: its files do not name one (eos_token), and a tuning needs it"
    if model.not_tunable:
        yield "lora_targets", f"what LoRA could target: {model.not_tunable}"
    if source.folder:
        yield "gated", "whether the hub asks for a token before it gives the model out"
    if not preset.description:
        yield "description", "what the model is good for, in one line"
    yield "tuning", "settings that suit it better than the tuner's own, by method"
    yield "inference", 'settings that its runtimes need, such as {"vllm": {"tool-call-parser": "…"}}'


def _record(source: ModelSource, unknown: Mapping[str, str]) -> str:
    given = [(f.name, getattr(source, f.name)) for f in fields(source) if getattr(source, f.name)]
    if source.folder:  # what is in a folder changes
        given = [(k, v) for k, v in given if k != "revision"]
    lines = [f"    {k}={literal(v)}," for k, v in given]
    return "\n".join([*_comment("source", unknown), "SOURCE = ModelSource(", *lines, ")"])


def _architecture(a: Architecture) -> str:
    lines = []
    for f in fields(a):
        value = getattr(a, f.name)
        if f.name == "linears":
            lines += ["    linears={", *(f"        {literal(n)}: ({i}, {o})," for n, (i, o) in value.items()), "    },"]
        elif value != f.default:
            lines.append(f"    {f.name}={literal(value)},")
    return "\n".join(["ARCHITECTURE = Architecture(", *lines, ")"])


def _preset(preset: Preset, unknown: Mapping[str, str]) -> Iterator[str]:
    """The arguments in the order in which people ask for them, each below what is not known of it."""
    arguments = {
        "source": "SOURCE",
        "licence": literal(preset.licence),
        "architecture": "ARCHITECTURE",
        "chat": f"ChatFormat(_template(), stop_tokens={literal(preset.chat.stop_tokens)})",
        "lora_targets": literal(preset.lora_targets),
        "dtype": literal(preset.dtype),
        "quantization": literal(preset.quantization),
        "weights": literal(preset.weights),
        "gated": literal(preset.gated),
        "description": literal(preset.description),
        "tuning": "{}",
        "inference": "{}",
    }
    usual = {"quantization": '""', "weights": "0", "gated": "False", "tuning": "{}", "inference": "{}"}
    for name, value in arguments.items():
        if name != "source":  # it is said at the constant
            yield from _comment(name, unknown)
        if name == "chat":
            yield from _comment("stop_tokens", unknown)
        if name in unknown or value != usual.get(name):
            yield f"{name}={value},"


def _comment(name: str, unknown: Mapping[str, str]) -> list[str]:
    if name not in unknown:
        return []
    words = "".join(c if c.isprintable() else " " for c in unknown[name])
    return textwrap.wrap(f"unknown: {words}", WIDTH, initial_indent="# ", subsequent_indent="# ")
