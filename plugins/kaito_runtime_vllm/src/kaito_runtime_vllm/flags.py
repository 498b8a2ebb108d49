"""One flag of ``vllm serve``: a value out of YAML checked against its type, and as words of a command line."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from kaito_runtime_vllm.known import Flag

LONGEST = 100_000
"""Characters of one value: Linux takes 128 KiB for a word of a command line (MAX_ARG_STRLEN)."""

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)\Z", re.ASCII)
_POWERS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "T": 1 << 40,
}


def read(flag: Flag, value: Any) -> Any:
    """The value in the flag's own type, plain JSON-able data. ValueError with the reason in words."""
    if flag.many:
        values = value if isinstance(value, list | tuple) else [value]
        if not values:
            raise ValueError("an empty list says nothing: remove the flag")
        return [_listed(flag, v) for v in values]
    return _one(flag, value)


def argv(flag: Flag, value: Any) -> tuple[str, ...]:
    """The words on the command line for a value that `read` has made. One word wherever that is possible, so that a value with
    a dash in front is not taken for a flag."""
    if flag.type in ("bool", "switch"):
        if flag.type == "switch":
            return (f"--{flag.name}",) if value else ()
        return (f"--{flag.name}" if value else f"--no-{flag.name}",)
    if flag.many:
        return (f"--{flag.name}", *(str(v) for v in value))
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    if flag.type == "json" and isinstance(value, str):
        text = json.dumps(value)
    return (f"--{flag.name}={text}",)


def amount(value: Any) -> int:
    """``32768``, ``32k`` (thousands) or ``32K`` (of 1024 each), as vLLM reads them; -1 for ``auto``. ValueError for others."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < -1:
            raise ValueError(f"{value} is negative")
        return value
    text = str(value).strip()
    if text == "-1" or text.lower() == "auto":
        return -1
    found = _AMOUNT.match(text[:40])
    if not found or (found[2].isupper() and "." in found[1]):
        raise ValueError(f"{str(value)[:40]!r} is not a number such as 32768, 32k (32,000) or 32K (32,768)")
    return int(float(found[1]) * _POWERS[found[2]]) if "." in found[1] else int(found[1]) * _POWERS[found[2]]


def _listed(flag: Flag, value: Any) -> Any:
    one = _one(flag, value)
    if isinstance(one, str) and (not one or one.startswith("-")):
        raise ValueError(f"{one!r} cannot be in a list: it would be taken for another flag")
    return one


def _one(flag: Flag, value: Any) -> Any:
    kinds = {
        "bool": _bool,
        "switch": _bool,
        "int": _int,
        "float": _float,
        "amount": amount,
        "text": _text,
        "json": _json,
    }
    found = kinds.get(flag.type, _json_or_text)(value)
    if flag.choices and found not in flag.choices:
        raise ValueError(f"{found!r} is none of {', '.join(map(str, flag.choices))}")
    return found


def _bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"{str(value)[:40]!r} is neither true nor false")
    return value


def _int(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{str(value)[:40]!r} is not a whole number")
    return value


def _float(value: Any) -> float:
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{str(value)[:40]!r} is not a number")
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{str(value)[:40]!r} is not text")
    text = str(value)
    if "\0" in text:
        raise ValueError("the value has a zero byte in it")
    if len(text) > LONGEST:
        raise ValueError(f"the value has {len(text):,} characters, which no command line takes")
    return text


def _json(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(_text(value))
        except (ValueError, RecursionError):
            raise ValueError(f"{value[:40]!r} is neither a mapping nor JSON") from None
    return _plain(value)


def _json_or_text(value: Any) -> Any:
    return _text(value) if isinstance(value, str) else _json(value)


def _plain(value: Any) -> Any:
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("the value cannot be written as JSON") from None
    _text(text)
    return json.loads(text)
