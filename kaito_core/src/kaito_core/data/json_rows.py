"""JSON values from a stream, one after the other, without holding the whole file.

The standard parser wants a whole document; training data is often one array of a gigabyte. This reads the top level itself
and leaves each element to the standard parser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import IO, Any

from kaito_core.data.bounds import MOST_CONTAINERS

CHUNK = 1 << 18
WRAPPERS = ("data", "rows", "train", "examples", "instances")
"""Keys under which files keep their rows: ``{"data": [{…}, …]}``."""
ABOUT_THE_FILE = frozenset({"version", "name", "description", "license", "licence", "citation", "homepage"})
"""Keys beside those that say nothing of the rows."""


def json_rows(text: IO[str], longest: int) -> Iterator[Any]:
    """The rows of a JSON document: the elements of an array, the values of concatenated JSON, the list below a wrapper key
    (`WRAPPERS`), or columns of texts (``{"prompt": ["…"], "completion": ["…"]}``). ValueError when it is none."""
    values = json_values(text, longest)
    first = next(values, None)
    if first is None:
        return
    if values.is_array or not isinstance(first, dict):
        yield from chain([first], values)
        return
    second = next(values, None)
    if second is not None:
        yield from chain([first, second], values)
        return
    wrapped = [k for k in WRAPPERS if isinstance(first.get(k), list)]
    if len(wrapped) == 1 and all(isinstance(row, dict) for row in first[wrapped[0]]):
        # What stands beside the rows belongs to each of them.
        beside = {k: v for k, v in first.items() if k != wrapped[0] and k not in ABOUT_THE_FILE}
        yield from ({**beside, **row} for row in first[wrapped[0]])
    elif first and all(isinstance(c, list) and all(isinstance(x, str) for x in c) for c in first.values()):
        if len({len(c) for c in first.values()}) != 1:
            raise ValueError("an object of columns whose columns are not equally long")
        yield from (dict(zip(first, cells, strict=True)) for cells in zip(*first.values(), strict=True))
    else:
        yield first


def json_values(text: IO[str], longest: int) -> JsonValues:
    """Top-level values one by one; when the document is one array, its elements. ``longest`` bounds one value, in characters.

    ValueError, with the place, for what is not JSON (``NaN`` and ``Infinity`` are not)."""
    return JsonValues(_Reader(text, longest))


class JsonValues(Iterator[Any]):
    """The values, and whether they stand in one array."""

    def __init__(self, reader: _Reader) -> None:
        self.is_array = reader.peek() == "["
        self._values = reader.array() if self.is_array else reader.concatenated()

    def __next__(self) -> Any:
        return next(self._values)


class _Reader:
    def __init__(self, text: IO[str], longest: int) -> None:
        self._text, self._longest = text, longest
        self._buffer, self._at, self._ended = "", 0, False
        self._decoder = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=unique_names)

    def _more(self) -> bool:
        """Read on, each time as much as is already there, so that one long value costs linear time."""
        if self._ended:
            return False
        chunk = self._text.read(max(CHUNK, len(self._buffer) - self._at))
        if not chunk:
            self._ended = True
            return False
        self._buffer, self._at = self._buffer[self._at :] + chunk, 0
        return True

    def peek(self) -> str:
        """The next character that is not space; empty at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        self._at += 1

    def concatenated(self) -> Iterator[Any]:
        while self.peek():
            yield self.value()

    def array(self) -> Iterator[Any]:
        self.skip()
        mark = self.peek()
        while mark != "]":
            yield self.value()
            mark = self.peek()
            if mark == ",":
                self.skip()
            elif mark != "]":
                raise ValueError(
                    f"expected ',' and found {mark!r}" if mark else "the file ends in the middle of the array"
                )
        self.skip()
        if self.peek():
            raise ValueError("text behind the end of the array")

    def value(self) -> Any:
        self.peek()
        while True:
            if len(self._buffer) - self._at > MOST_CONTAINERS and (
                self._buffer.count("{", self._at) + self._buffer.count("[", self._at) > MOST_CONTAINERS
            ):
                raise ValueError(f"more than {MOST_CONTAINERS:,} lists and objects in one value")
            try:
                found, end = self._decoder.raw_decode(self._buffer, self._at)
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as e:
                if len(self._buffer) - self._at > self._longest:
                    raise ValueError(f"no JSON value ends within {self._longest} characters ({e.msg})") from None
                if not self._more():
                    raise ValueError(e.msg) from None
                continue
            # A number at the end of what was read may go on in what was not.
            if isinstance(found, int | float) and not self._buffer[end:].lstrip("0123456789.eE+-") and self._more():
                continue
            self._at = end
            return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of ``pairs``. ValueError when a name stands in it twice: one of the two would be dropped."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:80]!r} stands twice in one object")
    return found
