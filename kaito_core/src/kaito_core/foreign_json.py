"""JSON that strangers wrote: whatever is wrong with it is a `ValueError` in words.

``json.loads`` alone raises `RecursionError` for deep nesting, gives objects on which later recursive code breaks, and advises to call
a function of Python's for a number with thousands of digits. It takes some thirty times the text's size in memory, so that what
may be large is read in a limited process (`kaito_core.limited`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final

MAX_DEPTH: Final = 64
"""Lists and objects inside each other; published configurations have fewer than ten, and no resource of Kubernetes has more than 20."""

CUT_DEPTH: Final = 2 * MAX_DEPTH
"""Where `loads_cut` cuts: an object in a list of the API server is still nested too deeply then."""

TOO_DEEP: Final = "(nested too deeply)"
"""What `loads_cut` puts in the place of what it leaves out."""

_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def loads(text: str | bytes) -> Any:
    """The value that a JSON text holds. ValueError when it is none, is nested too deeply or has a number of thousands of digits."""
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
        too_deep = True
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # sys.int_info.default_max_str_digits
        raise ValueError("it has a number with too many digits") from None
    else:
        too_deep = deeper(value, MAX_DEPTH)
    if too_deep:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return value


def loads_cut(text: str | bytes) -> Any:
    """The value that a JSON text holds, where one deep part must not take all the others with it: where the
    text is deeper than Python can read, what is below `CUT_DEPTH` is `TOO_DEEP`. ValueError when it is no JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        return json.loads(_cut(text if isinstance(text, str) else text.decode()))


def deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are inside each other more than so many times."""
    level = _containers([value])
    for _ in range(limit):
        if not level:
            return False
        level = [
            inner for outer in level for inner in _containers(outer if isinstance(outer, list) else outer.values())
        ]
    return bool(level)


def _containers(values: Iterable[Any]) -> list[Any]:
    return [v for v in values if isinstance(v, list | dict)]


def _cut(text: str) -> str:
    kept, depth, end = [], 0, 0
    for token in _TOKENS.finditer(text):
        if token[0] in ("[", "{"):
            depth += 1
            if depth == CUT_DEPTH:
                kept.append(text[end : token.start()])
        elif token[0] in ("]", "}"):
            if depth == CUT_DEPTH:
                kept.append(json.dumps(TOO_DEEP))
                end = token.end()
            depth -= 1
    return "".join([*kept, text[end:]])
