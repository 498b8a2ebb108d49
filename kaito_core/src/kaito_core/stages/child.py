"""A stage as a child process, for whoever runs it: how it is started, what it found out, what to say when it ends badly."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kaito_core.problems import Failure, KaitoError, Problem, UserError


def argv(command: Sequence[str]) -> list[str]:
    """The command as it is run: ``python`` is the interpreter that has the plugins, which is this one."""
    program, *arguments = command
    # -P: the folder that we are in may hold a file named like one of our imports.
    return [sys.executable, "-P", *arguments] if program == "python" else [program, *arguments]


def result_of(last: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage found out, from its last ``finished`` or ``failed`` event."""
    return {k: v for k, v in last.items() if k not in ("event", "stage", "time")}


def failure_of(stage: str, code: int, last: Mapping[str, Any], tail: Iterable[str], remedy: str) -> KaitoError:
    """Why a stage failed: in its own words; without them, how its process ended and the last lines that it printed.

    ``code`` is as `subprocess` has it (negative: a signal), ``last`` the stage's last ``finished`` or ``failed`` event,
    ``tail`` the end of its output, ``remedy`` what to do when it left no words of its own."""
    if last.get("event") == "failed":
        return (UserError if last.get("exit_code") == 2 else Failure)(_problems(last))
    how = f"was killed by {_signal(-code)}" if code < 0 else f"ended with exit code {code}"
    if code == -signal.SIGKILL:
        how += " (often the system running out of memory)"
    return Failure(Problem("\n".join([f"the stage {stage!r} {how}", *("    | " + line for line in tail)]), remedy))


def _problems(last: Mapping[str, Any]) -> list[Problem]:
    try:
        found = [Problem(**p) for p in last.get("problems", ())]
    except TypeError:  # a tuner of another version, or of another language
        found = []
    return found or [Problem(str(last.get("message") or "it did not say why"), str(last.get("remedy", "")))]


def _signal(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:  # a real-time signal has no name
        return f"signal {number}"
