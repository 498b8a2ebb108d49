"""How a model's own files say that a conversation becomes text, and where an answer ends: pure, so that a folder and a hub
give the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from kaito_core.plugins.types import ChatFormat


def chat_format(
    tokenizer_config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    config: Mapping[str, Any],
    template: str = "",
    added_tokens: Mapping[int, str] | None = None,
) -> ChatFormat:
    """The model's template and stop tokens; both may be empty.

    ``template`` is chat_template.jinja, which counts before the one in tokenizer_config.json. ``added_tokens`` are those of
    tokenizer.json by number, for files that do not name them in tokenizer_config.json. Of several tokens that end an answer the
    one that the template itself writes comes first: it is the one that a conversation teaches."""
    template = template or default_template(tokenizer_config.get("chat_template"))
    texts = {**(added_tokens or {}), **_added(tokenizer_config)}
    eos = _token(tokenizer_config.get("eos_token"))
    ends = [texts[i] for i in stop_ids(generation_config, config) if i in texts]
    stops = list(dict.fromkeys(t for t in (*ends, eos) if t))
    by_variable = bool(re.search(r"\beos_token\b", template))

    def rank(token: str) -> int:
        return 0 if token in template else 1 if token == eos and by_variable else 2 if token == eos else 3

    return ChatFormat(template, tuple(sorted(stops, key=rank)))


def stop_ids(generation_config: Mapping[str, Any], config: Mapping[str, Any]) -> list[int]:
    """The numbers of the tokens that end an answer: of generation_config.json, or else of config.json."""
    for said in (generation_config.get("eos_token_id"), config.get("eos_token_id")):
        ids = said if isinstance(said, list) else [said]
        found = [i for i in ids if type(i) is int and i >= 0]
        if found:
            return found
    return []


def unnamed(tokenizer_config: Mapping[str, Any], ids: Iterable[int]) -> bool:
    """Whether tokenizer_config.json leaves one of these tokens without its text, so that tokenizer.json has to be asked."""
    return not set(ids) <= _added(tokenizer_config).keys()


def added_tokens(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    """Text by number of the tokens that tokenizer.json adds to its vocabulary."""
    found: dict[int, str] = {}
    listed = tokenizer.get("added_tokens")
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, Mapping) and type(entry.get("id")) is int and isinstance(entry.get("content"), str):
            found[entry["id"]] = entry["content"]
    return found


def _added(tokenizer_config: Mapping[str, Any]) -> dict[int, str]:
    listed = tokenizer_config.get("added_tokens_decoder")
    found: dict[int, str] = {}
    for number, entry in listed.items() if isinstance(listed, Mapping) else ():
        text = _token(entry)
        if text and str(number).isdecimal() and len(str(number)) < 10:
            found[int(number)] = text
    return found


def _token(value: Any) -> str:
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else ""


def default_template(value: Any) -> str:
    """What ``chat_template`` of tokenizer_config.json says: one template, or of a list of them the one called ``default``, which is
    the only one that transformers takes without being told. Empty when there is none."""
    if isinstance(value, str):
        return value
    named: dict[str, str] = {
        e["name"]: e["template"]
        for e in (value if isinstance(value, list) else ())
        if isinstance(e, Mapping) and isinstance(e.get("name"), str) and isinstance(e.get("template"), str)
    }
    return named.get("default", "")
