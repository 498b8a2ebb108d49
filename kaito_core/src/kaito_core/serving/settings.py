"""What the face is told by the environment of a workload that serves (`kaito_core.workloads.serving`), read once.

Standard library only: an engine's own environment need not have anything else of kaito's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kaito_core.problems import UserError

WAITING_FACTOR: Final = 1
"""So many times the requests that are worked on at once may wait; KAITO refuses when more than ``max_num_seqs`` are waiting."""

MAX_BODY: Final = 16 << 20
"""Bytes of a request: a million tokens of text, or several pictures, in JSON."""

BODY_SECONDS: Final = 30.0
"""In which a request's body must have come: `MAX_BODY` at 4.5 Mbit/s."""


@dataclass(frozen=True)
class Settings:
    """All that the face knows of the endpoint."""

    chat_model: str = ""
    """The name that ``/chat`` answers as; empty: the first of ``/v1/models``."""
    max_requests: int = 0
    """Requests that the engine works on at once; 0: no limit is known, and none is set."""
    api_key_file: str = ""
    """Empty: the endpoint is open."""
    results: str = ""
    """Where the progress file is; empty: events go into the log only."""
    has_template: bool = True
    """Whether the model has a chat template."""
    marks: frozenset[str] = frozenset()
    """Special tokens of the model, as text: a prompt that holds one is already written in the model's own form."""
    vocabulary: int = 0
    """Tokens that the model has; 0: not known."""
    max_body: int = MAX_BODY
    body_seconds: float = BODY_SECONDS

    @property
    def most_in_flight(self) -> int:
        """Requests that may be worked on and wait together; 0: as many as come."""
        return self.max_requests * (1 + WAITING_FACTOR)

    @staticmethod
    def from_env(environ: Mapping[str, str] = os.environ) -> Settings:
        """Raises `UserError` when the environment is not what `serving_workload` writes."""
        text = environ.get("KAITO_MAX_REQUESTS", "") or "0"
        if not text.isascii() or not text.isdecimal():
            raise UserError(f"KAITO_MAX_REQUESTS is {text!r}, which is not a number of requests", "0 means no limit")
        preset = _object(_object(_read(environ.get("KAITO_JOB", ""))).get("preset"))
        vocabulary = _object(preset.get("architecture")).get("vocab")
        template, marks = _of_the_model(environ, _object(preset.get("chat")))
        return Settings(
            chat_model=environ.get("KAITO_CHAT_MODEL", ""),
            max_requests=int(text),
            api_key_file=environ.get("KAITO_API_KEY_FILE", ""),
            results=environ.get("KAITO_RESULTS", ""),
            has_template=template,
            marks=marks,
            vocabulary=vocabulary if isinstance(vocabulary, int) and vocabulary > 0 else 0,
        )


def _of_the_model(environ: Mapping[str, str], chat: Mapping[str, Any]) -> tuple[bool, frozenset[str]]:
    """Whether there is a chat template, and the special tokens, from the job and the model's own small files."""
    weights, adapters = environ.get("KAITO_WEIGHTS", ""), environ.get("KAITO_ADAPTERS", "")
    if not weights:
        return True, frozenset()
    folder = Path(weights)
    tokenizer = _object(_read(folder / "tokenizer_config.json"))
    template = bool(
        chat.get("template")
        or tokenizer.get("chat_template")
        or (folder / "chat_template.jinja").is_file()
        or (folder / "chat_template.json").is_file()
        or (adapters and (Path(adapters) / environ.get("KAITO_CHAT_MODEL", "") / "chat_template.jinja").is_file())
    )
    stops = chat.get("stop_tokens")
    more = tokenizer.get("additional_special_tokens")
    added = [_object(t) for t in _object(tokenizer.get("added_tokens_decoder")).values()]
    named = [
        *(stops if isinstance(stops, list) else ()),
        *(_text(t) for t in (more if isinstance(more, list) else ())),
        *(_text(t) for t in added if t.get("special")),
        *(_text(tokenizer.get(name)) for name in ("bos_token", "eos_token")),
    ]
    return template, frozenset(t for t in named if isinstance(t, str) and t.strip())


def _text(token: Any) -> Any:
    """Tokenizer files name a token by its text, or by an object with its text."""
    return token.get("content") if isinstance(token, dict) else token


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read(path: Path | str) -> Any:
    try:
        return json.loads(Path(path).read_bytes()) if path else None
    except (OSError, ValueError, RecursionError):
        return None
