"""Tokens as text while they come, up to where a stop string ends it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class Text:
    """The text of an answer, given out in pieces. ``tokenizer`` is a `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), skip_special_tokens: bool = True) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream([], skip_special_tokens=skip_special_tokens)
        self._stops = [s for s in stops if s]
        self._ids: list[int] = []
        self._text = ""
        self._given = 0
        self.stopped = False
        """A stop string has come: nothing that follows is text of the answer."""

    def feed(self, ids: Iterable[int]) -> str:
        """What these tokens add that can be given out now: whole characters that do not begin a stop string."""
        for token in ids:
            if self.stopped:
                break
            self._ids.append(token)
            self._text += self._stream.step(self._tokenizer, token) or ""
            self._look_for_a_stop()
        return self._give(len(self._text) if self.stopped else len(self._text) - self._held())

    def end(self) -> str:
        """What is left: no more tokens come."""
        if not self.stopped:
            # A character that was cut off is left out by the stream, and is a replacement character in the whole.
            whole = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
            if whole.startswith(self._text):
                self._text = whole
                self._look_for_a_stop()
        return self._give(len(self._text))

    def _look_for_a_stop(self) -> None:
        # The one that is complete first, as if characters came one by one; of several, the longest.
        places = ((self._text.find(s, self._given), len(s)) for s in self._stops)
        ends = [(at + length, at) for at, length in places if at >= 0]
        if ends:
            self._text = self._text[: min(ends)[1]]
            self.stopped = True

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(s) for s in self._stops), default=1) - 1
        for length in range(min(longest, len(self._text) - self._given), 0, -1):
            if any(s.startswith(self._text[-length:]) for s in self._stops):
                return length
        return 0

    def _give(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece
