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
failed      message, remedy, exit_code; of several processes the first one that says it has the cause
=========== ==========================================================================================================
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "progress.jsonl"

RELAYED = "KAITO_RELAYED"
"""Set in the environment of a stage whose events somebody relays to the log: it need not print its messages as well."""


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
        if not os.environ.get(RELAYED):
            print(text, flush=True)
        self.emit("message", text=text)


class Silent(Progress):
    """For every process but the first of a stage that has several: one of them speaks for all, and each for its own failure."""

    def emit(self, event: str, **fields: Any) -> None:
        if event == "failed":
            super().emit(event, **fields)

    def message(self, text: str) -> None:
        pass


def ending(last: Mapping[str, Any], event: Mapping[str, Any]) -> Mapping[str, Any]:
    """The event that says how a stage has ended, after one more of its events; ``last`` is what it was before.

    Of several processes the first that fails has the cause; the others fail because of it."""
    return event if event["event"] in ("finished", "failed") and last.get("event") != "failed" else last


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
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and "event" in event:
                yield offset, event


# --- events in a container's log, where whoever is not in the container can read them

_PREFIX = "[kaito "
_LINE_ENDS = "\x85\u2028\u2029"
"""What JSON leaves as it is and some readers take for the end of a line."""


def strict_json(value: Any) -> str:
    """JSON as everybody reads it, not only Python: a loss that is no number (NaN) is null there."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), ensure_ascii=False)


def log_line(event: Mapping[str, Any]) -> str:
    """An event as a line for a container's log: a message as people read it, everything else as JSON, behind
    ``[kaito STAGE]``. A message of several lines stays several, each with that prefix."""
    prefix = f"{_PREFIX}{event['stage']}] "
    if event["event"] == "message":
        lines = str(event.get("text", "")).splitlines() or [""]
        if not any(line.startswith("{") for line in lines):
            return "\n".join(prefix + line for line in lines)
    return prefix + "".join(f"\\u{ord(c):04x}" if c in _LINE_ENDS else c for c in strict_json(event))


def parse_log_line(line: str) -> dict[str, Any] | None:
    """The event that a line of a container's log stands for; None when it is something that a program printed."""
    head, separator, rest = line.partition("] ")
    if not head.startswith(_PREFIX) or not separator:
        return None
    stage = head[len(_PREFIX) :]
    if rest.startswith("{"):
        try:
            event = json.loads(rest)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            return {**event, "stage": stage}
    return {"event": "message", "stage": stage, "text": rest}
