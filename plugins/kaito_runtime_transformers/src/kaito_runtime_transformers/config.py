"""``inference_config.yaml`` for this runtime: KAITO's file, read unchanged, with the section ``transformers`` added.

    kv_cache_cpu_memory_utilization: 0.5     # KAITO's, for vLLM: no effect here
    max_probe_steps: 6
    vllm: {…}                                # for the other runtime: not looked at
    transformers:
      max-model-len: 4096
      load_in_4bit: true

Names are written with ``-`` or ``_``. What is set wins over the plan's choice and is checked against the machine."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kaito_core.planning.config_files import is_template
from kaito_core.plugins.types import Preset, ServedAdapter
from kaito_core.problems import Problem, UserError

SECTION: Final = "transformers"

DTYPES: Final = ("auto", "bfloat16", "float16", "float32")
QUANTIZATIONS: Final = ("", "bnb-4bit", "bnb-8bit")
"""As ``transformers serve --quantization`` calls them."""

ATTENTION: Final = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3")

MAX_RANK: Final = 64
"""Of adapters, unless somebody says otherwise: enough for what people train, and little memory."""


@dataclass(frozen=True)
class Field:
    """One setting: what is asked of its value, in words, and its default."""

    words: str
    good: Callable[[Any], bool]
    default: Any


def _whole(least: int, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and least <= v <= most


def _template(value: Any) -> bool:
    """Planning has put the text of a file of the ConfigMap in the place of its name: no other file is read."""
    return isinstance(value, str) and (not value or is_template(value))


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and v in values


FIELDS: Final[Mapping[str, Field]] = {
    "max-model-len": Field("a whole number of tokens, at least 16, or nothing", lambda v: v is None or _whole(16)(v), None),
    "max-num-seqs": Field("a whole number from 1 to 1024, or nothing", lambda v: v is None or _whole(1, 1024)(v), None),
    "dtype": Field(f"one of {', '.join(DTYPES)}", _one_of(*DTYPES), "auto"),
    "quantization": Field("empty, bnb-4bit or bnb-8bit", _one_of(*QUANTIZATIONS), ""),
    "attn-implementation": Field(f"one of {', '.join(ATTENTION)}", _one_of(*ATTENTION), "auto"),
    "continuous-batching": Field("true or false", lambda v: isinstance(v, bool), True),
    "cb-block-size": Field("a whole number of tokens from 16 to 4096", _whole(16, 4096), 64),
    "cb-max-batch-tokens": Field("a whole number of tokens, at least 16, or nothing", lambda v: v is None or _whole(16)(v), None),
    "max-lora-rank": Field("a whole number from 1 to 1024", _whole(1, 1024), MAX_RANK),
    "chat-template": Field("a Jinja template, or the name of a file of the ConfigMap with one", _template, ""),
    "memory-share": Field(
        "a number above 0 and at most 1, or nothing",
        lambda v: v is None or (isinstance(v, int | float) and not isinstance(v, bool) and 0 < v <= 1),
        None,
    ),
}  # fmt: skip

ALIASES: Final = {
    "torch-dtype": "dtype", "gpu-memory-utilization": "memory-share", "cb-max-memory-percent": "memory-share",
    "max-context": "max-model-len", "context": "max-model-len",
}  # fmt: skip
"""Other names of the same thing: KAITO's, vLLM's and those of ``transformers serve``."""

_PRESET: Final = "the preset says which model is loaded, and its files are fetched beforehand"
_DECIDED: Final = "the plan decides it from the machine"

IGNORED: Final = {
    "pipeline": "prompts and conversations are both answered",
    "device-map": _DECIDED,
    "device": _DECIDED,
    "allow-remote-files": _PRESET,
    "pretrained-model-name-or-path": _PRESET,
    "model-timeout": "the model stays loaded",
    "log-level": "",
}
"""Accepted, and without effect, with the reason."""

REFUSED: Final = {
    "trust-remote-code": "code from a model repository is never run",
    "host": "the workload decides where it listens",
    "port": "the workload decides where it listens",
    "force-model": _PRESET,
    "compile": "compiled models are not supported by this runtime",
    "enable-cors": "put a proxy in front of the endpoint for browsers of other sites",
}

TOP_LEVEL: Final = ("vllm", "kv_cache_cpu_memory_utilization", "max_probe_steps")
"""KAITO's own keys beside the sections. They are vLLM's concern."""


def resolve(preset: Preset, user: Mapping[str, Any] | None, adapters: Iterable[ServedAdapter]) -> dict[str, Any]:
    """The complete configuration, plain JSON-able data: one key for each of `FIELDS`.

    Raises `UserError` with every problem of the user's file and of the adapters."""
    problems: list[Problem] = []
    config = {name: field.default for name, field in FIELDS.items()}
    config |= _section(preset.inference.get(SECTION) or {}, f"preset {preset.name}", [])
    config |= _section(_of_the_file(user, problems), SECTION, problems)
    longest = preset.architecture.context
    if config["max-model-len"] is not None and config["max-model-len"] > longest:
        problems.append(
            Problem(
                f"max-model-len is {config['max-model-len']:,} tokens, and {preset.name} reads {longest:,} at most",
                f"set it to {longest} or less, or leave it out",
                f"{SECTION}.max-model-len",
            )
        )
    problems += _adapters(preset, adapters)
    if problems:
        raise UserError(problems)
    return config


def _of_the_file(user: Any, problems: list[Problem]) -> Mapping[str, Any]:
    if user is None:
        return {}
    if not isinstance(user, Mapping):
        problems.append(Problem("the inference configuration is not a mapping", f"write a section `{SECTION}:`"))
        return {}
    for name in user:
        if name == SECTION or name in TOP_LEVEL:
            continue
        key = _key(name)
        if key in FIELDS or key in ALIASES or key in ("load-in-4bit", "load-in-8bit"):
            problems.append(Problem(f"`{name}` stands outside of a section", f"write it below `{SECTION}:`", str(name)))
        else:
            problems.append(
                Problem(f"there is no setting `{name}`", _near(str(name), (SECTION, *TOP_LEVEL)), str(name))
            )
    section = user.get(SECTION)
    if section is not None and not isinstance(section, Mapping):
        problems.append(
            Problem(f"`{SECTION}` is not a mapping of settings", "write `name: value` lines below it", SECTION)
        )
        return {}
    return section or {}


def _section(section: Mapping[str, Any], where: str, problems: list[Problem]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in section.items():
        key = ALIASES.get(_key(name), _key(name))
        field = f"{where}.{name}"
        if key in ("load-in-4bit", "load-in-8bit"):
            if not isinstance(value, bool):
                problems.append(Problem(f"{name} must be true or false, not {value!r}", "", field))
            elif value:
                found["quantization"] = f"bnb-{key[8]}bit"
        elif key in REFUSED:
            if value:  # `trust_remote_code: false` is what happens anyway
                problems.append(Problem(f"{name} cannot be set: {REFUSED[key]}", "leave it out", field))
        elif key in FIELDS:
            if not FIELDS[key].good(value):
                problems.append(Problem(f"{name} must be {FIELDS[key].words}, not {_shown(value)}", "", field))
            else:
                found[key] = value
        elif key not in IGNORED:
            names = (*FIELDS, *ALIASES, "load-in-4bit", "load-in-8bit")
            problems.append(Problem(f"there is no setting `{name}` for {SECTION}", _near(str(name), names), field))
    return found


def _adapters(preset: Preset, adapters: Iterable[ServedAdapter]) -> list[Problem]:
    problems: list[Problem] = []
    seen: set[str] = set()
    for number, adapter in enumerate(adapters):
        field = f"inference.adapters[{number}]"
        if adapter.name in (preset.name, *preset.aliases):
            problems.append(
                Problem(f"the adapter is called {adapter.name!r}, like the model itself",
                        "give it a name of its own: requests name either", f"{field}.source.name")
            )  # fmt: skip
        if adapter.name in seen:
            problems.append(
                Problem(f"two adapters are called {adapter.name!r}", "name each once", f"{field}.source.name")
            )
        seen.add(adapter.name)
        if not 0 <= adapter.strength <= 1:
            problems.append(Problem(f"the strength {adapter.strength} is not from 0 to 1", "", f"{field}.strength"))
    return problems


def _key(name: object) -> str:
    return str(name).lstrip("-").replace("_", "-").lower()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _near(name: str, names: Iterable[str]) -> str:
    plain = {_key(n): n for n in names}
    near = difflib.get_close_matches(_key(name[:100]), plain, n=1, cutoff=0.7)
    return f"did you mean `{plain[near[0]]}`?" if near else f"known: {', '.join(dict.fromkeys(names))}"
