"""The API key of an endpoint: one line in a file, such as the one that a Kubernetes Secret is mounted as."""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from kaito_core.problems import UserError

REFUSAL: Final = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
CODE: Final = "invalid_api_key"
"""What a request without the key is told, with status 401."""

LOOK_EVERY: Final = 1.0
"""Seconds between two looks whether the file has changed: a Secret that is replaced is used without a new start."""


class ApiKey:
    """Compares what a request brings with the key in a file; reads the file again when it has changed."""

    def __init__(self, path: Path) -> None:
        """Raises `UserError` when the file cannot be read or is empty: an endpoint that was meant to be closed is never open."""
        self._path = path
        self._looked = time.monotonic()
        try:
            self._stamp = _stamp(path)
            self._key = path.read_bytes().strip()
        except OSError as e:
            raise UserError(f"the API key cannot be read: {path}: {e.strerror}", _REMEDY) from e
        if not self._key:
            raise UserError(f"the file of the API key is empty: {path}", _REMEDY)

    def opens(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether these headers hold ``Authorization: Bearer KEY``."""
        # Compared also where there is none: the time taken must tell nothing.
        return hmac.compare_digest(bearer(headers), self._current())

    def _current(self) -> bytes:
        now = time.monotonic()
        if now - self._looked >= LOOK_EVERY:
            self._looked = now
            try:
                stamp = _stamp(self._path)
                if stamp != self._stamp and (key := self._path.read_bytes().strip()):
                    self._stamp, self._key = stamp, key
            except OSError:
                pass  # being replaced, or gone: the last key stays the key
        return self._key


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The key that these headers bring; empty when they bring none."""
    given = next((value for name, value in headers if name.lower() == b"authorization"), b"")
    scheme, _, token = given.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


_REMEDY = "create the Secret with the key in it, or take away what asks for one"


def _stamp(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)  # noqa: PTH116 – follows the links of a mounted Secret
    return found.st_mtime_ns, found.st_ino, found.st_size
