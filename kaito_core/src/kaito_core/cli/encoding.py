"""Output to a terminal, a pipe or a file of any encoding.

Python raises `UnicodeEncodeError` where a text has a character that the stream's encoding lacks (Latin-1, Windows' code
pages), and for file names that are not UTF-8. Here such a character is written as JSON escapes it, ``\\u2026``: that loses
nothing, and what ``--json`` prints stays JSON.
"""

from __future__ import annotations

import codecs
import io
import sys

ESCAPE = "kaito.escape"
"""The name of the error handler, as `codecs.register_error` knows it."""


def escape_what_is_missing() -> None:
    """Let standard output and standard error escape the characters that their encodings lack."""
    codecs.register_error(ESCAPE, _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPE)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)), error.end
