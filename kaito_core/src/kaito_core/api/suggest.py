"""Did you mean …?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant; empty when none is near. Case, ``-`` and ``_`` do not count."""
    plain = {_plain(k): k for k in known}
    near = difflib.get_close_matches(_plain(word[:100]), plain, n=1, cutoff=0.75)
    return plain[near[0]] if near else ""


def _plain(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")
