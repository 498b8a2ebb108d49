"""Tells whoever follows the log whether the endpoint is busy: a GPU that idles is given back.

One event, ``serving``, with the fields

============ =====================================================================
requests     requests to the model since the start
in_flight    those that are being answered or wait
last_request when the last one began or ended, in seconds since the epoch
============ =====================================================================

It is written when the endpoint becomes busy and when it becomes idle, at most once every `EVERY` seconds: what happens in
between is summed up at the end of that time, so that the last line always says how it is."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from kaito_core import progress
from kaito_core.serving.metrics import Metrics

STAGE: Final = "serve"
EVENT: Final = "serving"
EVERY: Final = 10.0
"""Seconds between two lines, at least."""


class Activity:
    """Follows `Metrics.in_flight` of one process."""

    def __init__(self, metrics: Metrics, results: str = "", every: float = EVERY) -> None:
        self._metrics = metrics
        self._path = Path(results) / progress.FILE_NAME if results else None
        self._every = every
        self._said_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def began(self) -> None:
        """A request to the model has come."""
        m = self._metrics
        m.work += 1
        m.in_flight += 1
        m.last_request = time.time()
        if m.in_flight == 1:
            self._changed()

    def ended(self) -> None:
        """It was answered, or its client is gone."""
        m = self._metrics
        m.in_flight -= 1
        m.last_request = time.time()
        if m.in_flight == 0:
            self._changed()

    def _changed(self) -> None:
        if self._timer is not None:
            return
        wait = self._said_at + self._every - time.monotonic()
        if wait <= 0:
            self._say()
        else:
            self._timer = asyncio.get_running_loop().call_later(wait, self._say)

    def _say(self) -> None:
        self._timer = None
        self._said_at = time.monotonic()
        m = self._metrics
        assert m.last_request is not None
        fields = {"requests": m.work, "in_flight": m.in_flight, "last_request": round(m.last_request, 3)}
        # A full disk or a closed pipe must not fail the request that happened to be the first.
        with suppress(OSError):
            self._write(fields)

    def _write(self, fields: dict[str, Any]) -> None:
        if self._path is not None:
            progress.Progress(self._path, STAGE).emit(EVENT, **fields)
            if os.environ.get(progress.RELAYED):
                return
        event = {"event": EVENT, "stage": STAGE, "time": round(time.time(), 3), **fields}
        print(progress.log_line(event), flush=True)
