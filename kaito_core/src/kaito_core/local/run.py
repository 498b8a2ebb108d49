"""Runs a workload's stages as processes on this machine, one after the other, each resumable.

* A stage that is done for its key is not run again; a killed or failed one is, and finds its own work where it left it.
* Ctrl-C (and SIGTERM) reach the stage as SIGTERM: training writes a checkpoint, then everything ends.
* When this process itself is killed, the kernel sends the stage SIGTERM; the lock stays held until the stage has ended.
* The last stage of an endpoint serves until it is asked to end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kaito_core import progress
from kaito_core.local.home import cache_folder
from kaito_core.local.paths import local_folder
from kaito_core.local.secrets import environment
from kaito_core.local.server import Server
from kaito_core.local.state import RunFolder, RunState, StageState
from kaito_core.problems import Failure, KaitoError, UserError
from kaito_core.stages.child import argv, failure_of, result_of
from kaito_core.workloads.job import TuningJob
from kaito_core.workloads.serving import ServingJob
from kaito_core.workloads.workload import Stage, Workload

OnEvent = Callable[[dict[str, Any]], None]

POLL = 0.1
"""Seconds between looks at the progress file: quick enough for a live bar, cheap enough to forget."""

GRACE = 120.0
"""Seconds that a stage has for its checkpoint after SIGTERM."""

LOG_TAIL = 15


class Stopped(Exception):
    """The user (or the system) asked the run to stop; what was done is kept."""


def run(
    folder: RunFolder,
    workload: Workload,
    job: TuningJob | ServingJob,
    secrets: Mapping[str, Any],
    on_event: OnEvent,
    port: int | None = None,
) -> RunState:
    """Run every stage that is not done yet; the state in the end. Raises the failed stage's `KaitoError`, or `Stopped`, which is how
    an endpoint ends. It listens on ``port`` (None: the workload's own; 0: any that is free); once it answers, there is an event
    ``answers`` with the fields of `kaito_core.local.state.Served`."""
    with folder.lock() as lock:
        server = None
        if workload.endpoint is not None and isinstance(job, ServingJob):
            server = Server.of(job, workload.endpoint, port)  # before anything is fetched: the port may be in use
        before = folder.read()
        done = before.stages if before else {}
        state = RunState(
            name=job.name,
            namespace=job.namespace,
            preset=job.preset.name,
            method=job.method if isinstance(job, TuningJob) else job.runtime,
            order=[s.name for s in workload.stages],
            stages={s.name: done[s.name] for s in workload.stages if s.name in done and done[s.name].key == s.key},
            task="tuning" if isinstance(job, TuningJob) else "inference",
        )
        env = _lay_out(folder, workload) | (server.env if server else {})
        with environment(workload, secrets, folder.path / "secrets") as secret_env, _Stop() as stop:
            for stage in workload.stages:
                serving = server if stage is workload.stages[-1] else None
                known = state.stages.get(stage.name)
                if known and known.status == "done" and serving is None and not _from_folders(job):
                    on_event({"event": "skipped", "stage": stage.name, **known.result})
                    continue
                _run_stage(folder, state, stage, {**env, **secret_env}, lock, stop, on_event, serving)
        return state


def _from_folders(job: TuningJob | ServingJob) -> bool:
    """Whether an endpoint gets something from a folder, where it may have changed since the last start: tuned anew, say."""
    return isinstance(job, ServingJob) and bool(job.model_folder or any(a.volume for a in job.adapters))


def is_done(folder: RunFolder, workload: Workload) -> bool:
    """Whether every stage has ended well for exactly this workload."""
    state = folder.read()
    if state is None:
        return False
    return all(
        (known := state.stages.get(s.name)) is not None and known.key == s.key and known.status == "done"
        for s in workload.stages
    )


def _lay_out(folder: RunFolder, workload: Workload) -> dict[str, str]:
    """Make the folders and files that the workload asks for; the environment that tells the stages where they are."""
    env = dict(os.environ)
    for mount in workload.mounts:
        path = local_folder(mount.name, mount.source, folder.path / mount.name)
        if mount.read_only and not path.is_dir():
            raise UserError(f"the {mount.name} folder {path} is not there", "make it, or correct hostPath.path")
        _mkdir(path)
        env[mount.env] = str(path)
    for container_path, content in workload.files.items():
        path = folder.path / "files" / container_path.lstrip("/")
        _mkdir(path.parent)
        path.write_text(content, encoding="utf-8")
    _mkdir(folder.path / "logs")
    for name, value in workload.env.items():
        env[name] = str(folder.path / "files" / value.lstrip("/")) if value in workload.files else value
    env["KAITO_CACHE"] = str(cache_folder())
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONIOENCODING"] = "utf-8"  # what a stage prints goes into its log, whatever this terminal's encoding is
    # People use their machines for other things too. Threads that spin while they wait for each other are a little faster
    # on an idle machine, and ten times slower as soon as one more process wants a core.
    env.setdefault("OMP_WAIT_POLICY", "passive")
    return env


def _mkdir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Failure(
            f"the folder {path} cannot be made: {e.strerror}", "free some space, or choose another place"
        ) from e


def _run_stage(
    folder: RunFolder,
    state: RunState,
    stage: Stage,
    env: Mapping[str, str],
    lock: int,
    stop: _Stop,
    on_event: OnEvent,
    server: Server | None = None,
) -> None:
    events = folder.results / progress.FILE_NAME
    offset = events.stat().st_size if events.exists() else 0
    current = StageState(stage.key, "running", time.time())
    state.stages[stage.name] = current
    folder.write(state)
    last: Mapping[str, Any] = {}

    def follow(read_to: int) -> int:
        nonlocal last
        for behind, event in progress.read(events, read_to):
            read_to = behind
            if event["stage"] == stage.name:
                last = progress.ending(last, event)
                on_event(event)
        return read_to

    with folder.log(stage.name).open("ab") as log:
        log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {stage.name} {stage.key}\n".encode())
        log.flush()
        child = subprocess.Popen(
            argv(stage.command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder.path,
            env=dict(env),
            start_new_session=True,
            pass_fds=(lock,),
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        asked: float | None = None
        late: Failure | None = None
        if server:
            server.started()
        while child.poll() is None:
            offset = follow(offset)
            if (stop.asked or late) and asked is None:
                child.terminate()
                asked = time.monotonic()
                if server:
                    on_event({"event": "stopping", "stage": stage.name})
            if asked is not None and (stop.asked > 1 or time.monotonic() - asked > GRACE):
                _kill(child)
            try:
                if server and asked is None and server.has_become_ready():
                    state.served = server.served
                    folder.write(state)
                    on_event({"event": "answers", "stage": stage.name, **asdict(server.served)})
            except Failure as e:
                late = e
            with suppress(subprocess.TimeoutExpired):
                child.wait(POLL)
        follow(offset)
    if server:
        _kill(child)  # an engine's own processes would keep the GPU
    current.ended = time.time()
    current.result = result_of(last)
    if server is None and child.returncode == 0 and not (stop.asked and last.get("event") != "finished"):
        current.status = "done"
        folder.write(state)
        return
    current.status = "stopped" if stop.asked else "failed"
    error = late or _failure(folder, stage, child.returncode, last)
    current.message = "" if server and stop.asked else error.problems[0].message
    folder.write(state)
    if stop.asked:
        raise Stopped
    raise error


def _failure(folder: RunFolder, stage: Stage, code: int, last: Mapping[str, Any]) -> KaitoError:
    try:
        tail = folder.log(stage.name).read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
    except OSError:
        tail = []
    remedy = f"run the same command again to go on; the whole log is {folder.log(stage.name)}"
    return failure_of(stage.name, code, last, tail, remedy)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The stage, and whatever it has started and left behind."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _die_with_parent() -> None:
    """In the child: SIGTERM when the parent dies (Linux, prctl(2) PR_SET_PDEATHSIG), so no stage outlives its run for long."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class _Stop:
    """Counts requests to stop while the stages run, in place of the interruption that Python would raise anywhere."""

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not the main thread: nobody sends us signals then
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        self.asked += 1

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def summary(state: RunState) -> dict[str, Any]:
    """The state as plain data, for ``--json``."""
    return {**asdict(state), "phase": state.phase}
