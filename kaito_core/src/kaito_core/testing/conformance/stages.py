"""A workload's stages as processes of this machine, so that a test can watch, measure, interrupt and kill them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kaito_core.local.paths import local_folder
from kaito_core.progress import FILE_NAME, read
from kaito_core.stages.child import argv
from kaito_core.workloads.workload import Stage, Workload

PATIENCE: Final = 300.0
"""Seconds that a stage may take. Only what hangs takes so long."""


@dataclass(frozen=True)
class Ended:
    """How a stage has ended."""

    code: int
    """Negative: by this signal."""
    peak: int
    """Bytes of memory that it, or a child of it, had at most."""
    log: str

    @property
    def tail(self) -> str:
        """The last lines that it printed."""
        return "\n".join(self.log.strip().splitlines()[-15:])


class Running:
    """A stage at work."""

    def __init__(self, stage: Stage, environment: Mapping[str, str], folder: Path, log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                argv(stage.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=dict(environment),
                start_new_session=True,
            )
        self._ended: tuple[int, int] | None = None
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        peak = 0
        while not (ended := os.wait4(self._process.pid, os.WNOHANG))[0]:
            peak = max(peak, _peak(self._process.pid))
            time.sleep(0.02)
        _, status, usage = ended
        # ru_maxrss only where there is no /proc: Linux counts in it what the parent had when it started the child.
        kib = 1 if sys.platform == "darwin" else 1024
        self._ended = (os.waitstatus_to_exitcode(status), peak or usage.ru_maxrss * kib)

    @property
    def alive(self) -> bool:
        return self._ended is None

    def send(self, number: int) -> None:
        """A signal to the stage alone, as a pod gets it; nothing happens when it has ended."""
        if self.alive:
            os.kill(self._process.pid, number)

    def until(self, seen: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Whether ``seen`` was true before the stage ended, or at all."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if seen():
                return True
            if not self.alive:
                return seen()
            time.sleep(0.01)
        return False

    def ended(self, seconds: float = PATIENCE) -> Ended:
        """Waits for its end; whatever does not end is killed, with all that it has started."""
        until = time.monotonic() + seconds
        while self._ended is None and time.monotonic() < until:
            time.sleep(0.01)
        hung = self._ended is None
        self.kill()
        while self._ended is None:
            time.sleep(0.01)
        code, peak = self._ended
        text = self.log.read_text("utf-8", "replace")
        return Ended(code, peak, f"{text}\nit hung: killed after {seconds:.0f} seconds" if hung else text)

    def kill(self) -> None:
        """It, and whatever it has started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


def _peak(pid: int) -> int:
    """Bytes of memory that a process, or one that it has started, has had at most; 0 where Linux does not say it."""
    found = 0
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text("utf-8", "replace")
        found = next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")), 0)
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split():
            found = max(found, _peak(int(child)))
    return found


def _added_to_the_path() -> list[str]:
    """Where modules are found besides the interpreter's own folders. Those would be wrong for an engine that has an interpreter of its
    own."""
    own = (sys.prefix, sys.base_prefix, sys.exec_prefix)
    return [p for p in sys.path if p and not p.startswith(own)]


class Stages:
    """The folders of a workload, and its stages."""

    def __init__(self, folder: Path, workload: Workload, **environment: str) -> None:
        self.folder, self.workload = folder, workload
        self.mounts = {m.name: local_folder(m.name, m.source, folder / m.name) for m in workload.mounts}
        for path in (*self.mounts.values(), folder / "logs"):
            path.mkdir(parents=True, exist_ok=True)
        files: dict[str, str] = {}
        for name, content in workload.files.items():
            path = folder / "files" / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            files[name] = str(path)
        self.environment = {
            **os.environ,
            **{m.env: str(self.mounts[m.name]) for m in workload.mounts},
            **{n: files.get(v, v) for n, v in workload.env.items()},
            "KAITO_CACHE": str(folder / "cache"),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(_added_to_the_path()),
            "OMP_NUM_THREADS": "1",
            **environment,
        }

    @property
    def results(self) -> Path:
        """Where the stages leave what they made."""
        return self.mounts["results"]

    def start(self, name: str) -> Running:
        """One stage."""
        stage = next(s for s in self.workload.stages if s.name == name)
        return Running(stage, self.environment, self.folder, self.folder / "logs" / f"{name}.log")

    def run(self, name: str) -> Ended:
        """One stage to its end. Fails when it does not end well."""
        ended = self.start(name).ended()
        assert ended.code == 0, f"the stage {name} ended with {ended.code}:\n{ended.tail}"
        return ended

    def events(self, stage: str, kinds: Iterable[str] = ()) -> list[dict[str, Any]]:
        """What a stage has said of itself."""
        wanted = set(kinds)
        return [
            e
            for _, e in read(self.results / FILE_NAME)
            if e.get("stage") == stage and (not wanted or e["event"] in wanted)
        ]
