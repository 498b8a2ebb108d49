"""What is known of a local run: a small file, written whole or not at all, that outlives every kill.

A stage is *done* when it ended well for its key. Whether a run is *running* is never read from the file, which a
``kill -9`` leaves lying: it is the lock that the run and its processes hold.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kaito_core.local.home import runs_folder
from kaito_core.problems import Failure, UserError


@dataclass(slots=True)
class StageState:
    """One stage's last attempt."""

    key: str
    status: str
    """``running``, ``done``, ``failed`` or ``stopped``."""
    started: float
    ended: float | None = None
    message: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    """The fields of the stage's ``finished`` event."""


@dataclass(slots=True)
class Served:
    """An endpoint on this machine, once it answers."""

    url: str
    """``http://127.0.0.1:5000``."""
    base: str
    """The model without any adapter, as requests name it."""
    model: str
    """What answers when nothing else is asked for."""
    adapters: list[str] = field(default_factory=list)


@dataclass(slots=True)
class RunState:
    """A run: which workspace, which stages, how far."""

    name: str
    namespace: str
    preset: str
    method: str
    """How it is tuned, or with which runtime it is served."""
    order: list[str] = field(default_factory=list)
    stages: dict[str, StageState] = field(default_factory=dict)
    task: str = "tuning"
    """``tuning`` or ``inference``."""
    served: Served | None = None
    """Where it answers; only true while it runs."""

    @property
    def phase(self) -> str:
        """``Succeeded``, ``Failed``, ``Stopped`` or ``Pending``; who asks for a live run looks at the lock as well."""
        states = [self.stages[n].status if n in self.stages else "" for n in self.order]
        if states and all(s == "done" for s in states):
            return "Succeeded"
        if "failed" in states:
            return "Failed"
        return "Stopped" if "stopped" in states or "running" in states else "Pending"


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path, name: str = "") -> None:
        self.path = path
        self.name = name or path.name
        """What commands call it."""

    @classmethod
    def of(cls, name: str, namespace: str = "default") -> RunFolder:
        """The folder of the workspace of this name; the name is a DNS label, so it is a safe file name."""
        return cls(runs_folder() / (name if namespace == "default" else f"{namespace}.{name}"))

    @classmethod
    def existing(cls, name: str) -> RunFolder:
        """The folder of a run that was started before. UserError when there is none."""
        folder = cls(runs_folder() / name) if "/" not in name and name not in ("", ".", "..") else None
        if folder is None or folder.read() is None:
            known = ", ".join(sorted(f.name for f in all_runs())) or "none yet"
            raise UserError(f"there is no run named {name!r} on this machine", f"runs: {known}")
        return folder

    @property
    def serving(self) -> RunFolder:
        """The folder in which the model is served that is tuned in this one."""
        return RunFolder(self.path / "serving", self.name)

    @property
    def both(self) -> list[RunFolder]:
        """The runs of one Workspace: itself, and what serves its result."""
        return [self, *(f for f in (self.serving,) if f.read() is not None)]

    @property
    def results(self) -> Path:
        return self.path / "results"

    @property
    def job(self) -> Path:
        return self.path / "files" / "mnt" / "config" / "job.json"

    def log(self, stage: str) -> Path:
        return self.path / "logs" / f"{stage}.log"

    def read(self) -> RunState | None:
        """The state, or None when the folder holds no run."""
        try:
            data = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
            stages = {n: StageState(**s) for n, s in data.pop("stages").items()}
            served = data.pop("served", None)
            return RunState(**data, stages=stages, served=Served(**served) if served else None)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise Failure(
                f"{self.path / 'state.json'} is damaged: {e}", "remove the file; finished work is found again"
            ) from e

    def write(self, state: RunState) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / ".state.json"
        temporary.write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
        temporary.replace(self.path / "state.json")

    @contextmanager
    def lock(self) -> Iterator[int]:
        """Holds the run: one at a time. Yields the descriptor that children inherit, so that a stage that outlives its
        parent still holds it. UserError when somebody else does."""
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _try_lock(descriptor):
                # The stage of a run that has just been killed may still be writing its checkpoint.
                deadline = time.monotonic() + 3
                while not _try_lock(descriptor):
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"{self.name} is running already",
                            f"follow it with `kaito logs -f {self.name}`, or stop that process first",
                        )
                    time.sleep(0.2)
            yield descriptor
        finally:
            os.close(descriptor)

    def is_running(self) -> bool:
        """Whether a process holds the lock now."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not _try_lock(descriptor)
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def all_runs() -> list[RunFolder]:
    """Every run on this machine, by name."""
    root = runs_folder()
    return [RunFolder(p) for p in sorted(root.iterdir()) if (p / "state.json").is_file()] if root.is_dir() else []
