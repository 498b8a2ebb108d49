"""How far a job is: one JSON object a line, appended to one file.

A stage of a workload may run in this process tree, in a container or on another machine; what they share with the one who
follows them is this file (``$KAITO_RESULTS/progress.jsonl``). Every line has ``event``, ``stage`` and ``time`` (seconds
since the epoch); the rest depends on the event:

=========== ==========================================================================================================
event       fields
=========== ==========================================================================================================
started     –
message     text: one plain line for people
step        step, steps, loss, tokens_per_second, seconds_left (an estimate), and whatever else the tuner measures
eval        step, loss
checkpoint  step, path
finished    whatever the stage found out (adapter, metrics, digest …)
failed      message, remedy, exit_code
=========== ==========================================================================================================
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_NAME = "progress.jsonl"


class Progress:
    """Appends events of one stage. Safe against a kill at any byte: a torn last line is skipped by `read`."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage
        path.parent.mkdir(parents=True, exist_ok=True)
        # A line torn by a kill must not swallow the next event.
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            with path.open("ab") as f:
                f.write(b"\n")

    def emit(self, event: str, **fields: Any) -> None:
        record = {"event": event, "stage": self.stage, "time": round(time.time(), 3), **fields}
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
            f.flush()
            if event in ("finished", "failed", "checkpoint"):
                os.fsync(f.fileno())

    def message(self, text: str) -> None:
        """One plain line, to the log as well as to the file."""
        print(text, flush=True)
        self.emit("message", text=text)


class Silent(Progress):
    """For every process but the first of a stage that has several: one of them speaks for all."""

    def emit(self, event: str, **fields: Any) -> None:
        pass

    def message(self, text: str) -> None:
        pass


def read(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whole events from byte ``offset`` on, each with the offset behind it (to go on from there later)."""
    if not path.exists():
        return
    with path.open("rb") as f:
        f.seek(offset)
        for line in f:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield offset, event
