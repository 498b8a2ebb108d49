"""What went wrong, where, and what to do about it.

Everything that can be wrong with what a person gave us is a `Problem`; problems are collected, so that a person sees all
of them at once. What stops the program is a `KaitoError`:

    KaitoError
    ├── UserError      the person can mend it: bad YAML, unknown preset, unreadable data      exit code 2
    └── Failure        something else failed: a dead registry, a full disk, a crashed stage   exit code 1

A `KaitoError` never reaches the user as a traceback; the CLI prints its problems and exits with its code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, in words that name the object, the field, the cause and the remedy.

    ``field`` is a path as people write it (``tuning.input.urls[0]``). ``line`` and ``column`` count from 1. ``kind`` tells
    programs apart what they treat specially: ``placeholder`` is a value that the person still has to fill in.
    """

    message: str
    remedy: str = ""
    field: str = ""
    file: str = ""
    line: int | None = None
    column: int | None = None
    severity: Severity = "error"
    kind: str = ""

    def at(self, file: str, line: int | None = None, column: int | None = None) -> Problem:
        """The same problem, with the place in the file where it was found."""
        return replace(self, file=file, line=line, column=column)

    @property
    def place(self) -> str:
        """``workspace.yaml:7:3``, as editors and terminals make clickable; empty when unknown."""
        parts = [self.file, self.line, self.column]
        return ":".join(str(p) for p in parts if p not in ("", None))

    def __str__(self) -> str:
        head = ": ".join(p for p in (self.place, self.severity, self.field, self.message) if p)
        return f"{head}\n    {self.remedy}" if self.remedy else head

    def to_json(self) -> dict[str, Any]:
        """A plain dict for ``--json``; keys without a value are left out."""
        return {k: v for k, v in asdict(self).items() if v not in ("", None)}


def errors(problems: Iterable[Problem]) -> list[Problem]:
    """Those that stop the work; warnings left out."""
    return [p for p in problems if p.severity == "error"]


class KaitoError(Exception):
    """Stops the program with an exit code and at least one problem."""

    exit_code: int = 1

    def __init__(self, problem: Problem | str | Sequence[Problem], remedy: str = "", *, field: str = "") -> None:
        if isinstance(problem, str):
            problem = Problem(problem, remedy, field)
        self.problems: tuple[Problem, ...] = (problem,) if isinstance(problem, Problem) else tuple(problem)
        super().__init__("\n".join(str(p) for p in self.problems))


class UserError(KaitoError):
    """What the person gave is wrong and the person can mend it."""

    exit_code = 2


class Failure(KaitoError):
    """Something failed that the person's input did not cause; nothing already done is lost."""

    exit_code = 1
