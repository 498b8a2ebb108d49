"""What kaito itself looks up in a model's tokenizer.json: the few tokens that it adds to its vocabulary.

The rest, tens of megabytes of vocabulary, is left to the tokenizers library; as Python objects it would take hundreds of megabytes."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Final

from kaito_core import foreign_json
from kaito_core.data.chat_format import added_tokens

LARGEST_LIST: Final = 4 << 20
"""Bytes of the list that are read at most; the largest published ones (six thousand tokens) have one MiB."""

_KEY = re.compile(rb'(?<!\\)"added_tokens"\s*:\s*(?=\[)')
"""A vocabulary has numbers behind its keys and quotes inside of them escaped, so that nothing else in the file reads so."""
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def added_tokens_of(path: Path) -> dict[int, str]:
    """Text by number of the tokens that a tokenizer.json adds; empty when it names none.

    ValueError when the list is no JSON, is not UTF-8 or is longer than `LARGEST_LIST`. Raises `OSError`."""
    with path.open("rb") as f:
        if not f.seek(0, 2):
            return {}
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = _KEY.search(content)
            part = content[found.end() : found.end() + LARGEST_LIST] if found else b"[]"
    text = part.decode("utf-8", "ignore" if len(part) == LARGEST_LIST else "strict")
    depth = 0
    for token in _TOKENS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if not depth:
            return added_tokens({"added_tokens": foreign_json.loads(text[: token.end()])})
        if depth > foreign_json.MAX_DEPTH:
            raise ValueError(f"its added_tokens are nested more than {foreign_json.MAX_DEPTH} deep")
    raise ValueError(f"its added_tokens do not end within {LARGEST_LIST >> 20} MiB")
