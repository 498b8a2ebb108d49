"""``python -m kaito_core.stages.pod STAGE…``: runs stages in a container, as its first process.

A laptop's stages are looked after by ``kaito run``, which sees their folder. Those of a pod are seen by nobody but through
what Kubernetes shows of a container: its log, its exit code and its last words. So this supervisor

* runs each stage as a process of its own, the same command as on a laptop, and hands on the wish to stop (SIGTERM);
* puts the stages' events into the log, where the controller reads them (`kaito_core.progress.log_line`);
* leaves the end in the termination message: the failed stage's own words, or what was made;
* skips what is done for its key, when the results outlived the pod before.

Exit codes: 0 done, 1 failed, 2 the input is wrong (never worth a second try), 137 killed, 143 interrupted.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from kaito_core import progress
from kaito_core.problems import Failure, KaitoError, UserError
from kaito_core.stages.child import argv, failure_of, result_of
from kaito_core.stages.process import of_the_system
from kaito_core.stages.registry_secrets import KEY, auths, write_docker_config
from kaito_core.workloads.pod import HUB_SECRET, INIT_STAGES, REGISTRY_SECRETS, SECRETS, STAGES_FILE, USER, read_stages
from kaito_core.workloads.workload import Stage

DONE = ".stages"
"""Below the results: one file for each stage that is done, with the key that it is done for."""

TERMINATION_BYTES = 4096
"""Kubernetes cuts a termination message there."""

POLL = 0.2
"""Seconds between looks at the progress file."""

TAIL = 15
"""Lines of a stage's output that speak for it when it dies without words."""

LONGEST_LINE = 16 << 10
"""Bytes: what has no end of line by then (a progress bar) is printed as it is."""

PRECIOUS = ("image", "digest", "eval_loss_before", "eval_loss_after")
"""What of the results the controller writes into the Workspace: left out of a termination message last of all."""


def main(names: Sequence[str]) -> int:
    """Run these stages, in this order; the exit code of the container."""
    with Stop() as stop:
        code, last_words = _run_all(names, stop)
        path = Path(os.environ.get("KAITO_TERMINATION", "/dev/termination-log"))
        with suppress(OSError):  # the exit code and the log still say it
            path.write_bytes(termination_message(last_words))
    return code


class Stop:
    """Takes SIGTERM and SIGINT while it lasts: the first process of a container has no default for them."""

    def __init__(self) -> None:
        self.asked = False
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stop:
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reaches(self, child: subprocess.Popen[bytes] | None) -> None:
        """From now on a signal is handed on to this process; at once when it came before."""
        self._child = child
        if self.asked:
            self._tell()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._tell()

    def _tell(self) -> None:
        # Once: a second SIGTERM tells a training to end without its checkpoint. Whoever cannot wait kills the container.
        if self._child is not None:
            self._child.terminate()
            self._child = None


class StageFailed(Exception):
    """A stage ended badly, with this exit code."""

    def __init__(self, error: KaitoError, code: int) -> None:
        super().__init__(str(error))
        self.error, self.code = error, code


def _run_all(names: Sequence[str], stop: Stop) -> tuple[int, dict[str, Any]]:
    """The exit code, and what to say at the end."""
    name = names[0] if names else ""
    error: KaitoError
    try:
        stages = _stages(names)
        results = _results_folder()
        env = _environment()
        found: dict[str, Any] = {}
        for number, stage in enumerate(stages):
            name = stage.name
            known = None if name in INIT_STAGES else _done(results, stage)
            if known is not None:
                _out(progress.log_line({"event": "skipped", "stage": name, "time": round(time.time(), 3), **known}))
            elif not stop.asked:
                # What follows was made from what is now made anew.
                for stale in stages[number:]:
                    _marker(results, stale).unlink(missing_ok=True)
                known = _run(stage, results, env, stop)
            if known is None:
                return 128 + signal.SIGTERM, {"event": "interrupted", "stage": name}
            found[name] = known
        return 0, {"event": "finished", "stage": name, "results": found}
    except StageFailed as e:
        error, code = e.error, e.code
    except KaitoError as e:
        error, code = e, e.exit_code
        _out(str(e))
    except OSError as e:
        error = of_the_system(e)
        code = error.exit_code
        _out(str(error))
    except Exception as e:
        text = f"{type(e).__name__}: {e}".splitlines()[0]
        error = Failure(f"the supervisor of the stages broke: {text}", "this is a bug; its log has the traceback")
        code = error.exit_code
        _out(traceback.format_exc())
    return code, _failed(name, error, code)


# --- what the pod hands over


def _stages(names: Sequence[str]) -> list[Stage]:
    job = os.environ.get("KAITO_JOB", "")
    if not job:
        raise UserError("the environment variable KAITO_JOB does not say where the job is", _MADE)
    path = Path(job).with_name(STAGES_FILE)
    try:
        known = read_stages(path.read_bytes())
    except OSError as e:
        raise UserError(f"the stages of the job cannot be read: {path}: {e.strerror}", _MADE) from e
    except ValueError as e:
        raise UserError(f"{path} is not the list of stages that this version of kaito writes", _MADE) from e
    unknown = [n for n in names if n not in known]
    if unknown or not names:
        raise UserError(f"no such stage: {', '.join(unknown) or 'none given'}", f"stages: {', '.join(known)}")
    return [known[n] for n in names]


_MADE = "the controller makes it: delete the Workspace's job, and it is made anew"


def _results_folder() -> Path:
    path = os.environ.get("KAITO_RESULTS", "")
    if not path:
        raise UserError("the environment variable KAITO_RESULTS does not say where the results go", _MADE)
    results = Path(path)
    try:
        results.mkdir(parents=True, exist_ok=True)
        written = os.access(results, os.W_OK)
    except PermissionError:
        written = False
    if not written:
        raise UserError(
            f"the volume of the results cannot be written: {results}",
            f"let the user {USER} write to it",
            field="tuning.checkpoints",
        )
    return results


def _environment() -> dict[str, str]:
    """The stages' environment: ours, the secrets put where programs look for them, and that somebody relays."""
    env = {**os.environ, progress.RELAYED: "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    secrets = Path(env.get("KAITO_SECRETS", SECRETS))
    merged: dict[str, Any] = {}
    for name in filter(None, env.get(REGISTRY_SECRETS, "").split(",")):
        folder = secrets / "registry" / name
        # Mounted as optional: the folder of a Secret that is not there is empty.
        if not folder.is_dir() or not any(folder.iterdir()):
            raise _missing(f"the Secret {name!r} is not there")
        path = folder / KEY
        merged.update(auths(name, path.read_bytes() if path.is_file() else None))
    if merged:
        write_docker_config(Path(env.get("DOCKER_CONFIG") or Path.home() / ".docker"), merged)
    if hub := env.get(HUB_SECRET, ""):
        path = secrets / "hub" / "HF_TOKEN"
        token = path.read_bytes().decode(errors="replace").strip() if path.is_file() else ""
        if not token:
            raise _missing(f"the Secret {hub!r} is not there, or has no key HF_TOKEN")
        env["HF_TOKEN"] = token
    return env


def _missing(message: str) -> UserError:
    return UserError(
        message,
        "create it in the Workspace's namespace, then run the Workspace again: change it, or delete its job",
        field="tuning",
    )


# --- one stage


def _run(stage: Stage, results: Path, env: Mapping[str, str], stop: Stop) -> dict[str, Any] | None:
    """What the stage found out; None when it was interrupted. Raises `StageFailed`."""
    events = results / progress.FILE_NAME
    offset = events.stat().st_size if events.exists() else 0
    try:
        child = subprocess.Popen(
            argv(stage.command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            start_new_session=True,
        )
    except OSError as e:
        failure = Failure(f"the stage {stage.name!r} cannot be started: {e.filename or stage.command[0]}: {e.strerror}")
        raise StageFailed(failure, failure.exit_code) from e
    stop.reaches(child)
    try:
        last, tail = _follow(child, stage.name, events, offset)
    finally:
        stop.reaches(None)
        if child.poll() is None:
            child.kill()
    code, said = child.returncode, last.get("event")
    if code == 0 and (said == "finished" or not stop.asked):
        result = result_of(last)
        _mark(results, stage, result)
        return result
    if stop.asked and said != "failed" and code != -signal.SIGKILL:
        return None
    remedy = "its log has more; the next try goes on from the last checkpoint"
    error = failure_of(stage.name, code, last, tail, remedy)
    # torchrun ends with 1 whatever its processes end with; the words hold the stage's own code.
    raise StageFailed(error, error.exit_code if said == "failed" else 128 - code if code < 0 else code)


def _follow(
    child: subprocess.Popen[bytes], name: str, events: Path, offset: int
) -> tuple[Mapping[str, Any], Sequence[str]]:
    """Relay what the stage prints and says until it has ended: its last ``finished`` or ``failed`` event, its last lines."""
    assert child.stdout is not None
    last: Mapping[str, Any] = {}
    with child.stdout as stdout:
        output = _Output(stdout)
        while True:
            ended = child.poll() is not None
            if ended:
                # What it has left behind must not hold the GPU while the next stage runs.
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            output.relay(0 if ended else POLL)
            for behind, event in progress.read(events, offset):
                offset = behind
                if event.get("stage") != name:
                    continue
                last = progress.ending(last, event)
                if event["event"] == "message":
                    output.tail.append(str(event.get("text", "")))
                _out(progress.log_line(event))
            _bury_others(child)
            if ended:
                output.flush()
                return last, output.tail
            if output.closed:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(POLL)


class _Output:
    """What a stage prints: to the log as it comes, in whole lines, so that no event ends up within one."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.closed = False
        self.tail: deque[str] = deque(maxlen=TAIL)
        self._stream = stream.fileno()
        self._begun = b""

    def relay(self, seconds: float) -> None:
        """Pass on what comes within so many seconds; with 0, all that is there already."""
        until = time.monotonic() + seconds
        while not self.closed and select.select([self._stream], [], [], max(0.0, until - time.monotonic()))[0]:
            data = os.read(self._stream, 1 << 16)
            self.closed = not data
            *lines, self._begun = (self._begun + data).split(b"\n")
            for line in lines:
                self._print(line)
            if len(self._begun) > LONGEST_LINE:
                self.flush()
            if seconds and time.monotonic() > until:
                return

    def flush(self) -> None:
        if self._begun:
            self._print(self._begun)
        self._begun = b""

    def _print(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        self.tail.append(text)
        _out(text)


def _out(text: str) -> None:
    """A line to the container's log, whatever the locale; a log that cannot be written ends no training."""
    with suppress(OSError):
        sys.stdout.buffer.write(text.encode(errors="replace") + b"\n")
        sys.stdout.buffer.flush()


def _bury_others(child: subprocess.Popen[bytes]) -> None:
    """Take the exit codes of processes whose parents are gone: in a container the first process has to."""
    with suppress(ChildProcessError):
        # Looked at first: the child's own exit code is for `Popen`.
        while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if dead.si_pid == child.pid and child.returncode is None:
                return
            os.waitpid(dead.si_pid, 0)


# --- what is done


def _marker(results: Path, stage: Stage) -> Path:
    return results / DONE / f"{stage.name}.json"


def _done(results: Path, stage: Stage) -> dict[str, Any] | None:
    """What the stage found out when it was done for this key; None when it was not, whatever else the folder holds."""
    try:
        marker = json.loads(_marker(results, stage).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(marker, dict) or marker.get("key") != stage.key:
        return None
    result = marker.get("result")
    return result if isinstance(result, dict) else {}


def _mark(results: Path, stage: Stage, result: Mapping[str, Any]) -> None:
    path = _marker(results, stage)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="utf-8") as f:
        json.dump({"key": stage.key, "result": result}, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


# --- last words


def _failed(stage: str, error: KaitoError, code: int) -> dict[str, Any]:
    first = error.problems[0]
    return {
        "event": "failed",
        "stage": stage,
        "message": first.message,
        "remedy": first.remedy,
        "exit_code": code,
        "problems": [p.to_json() for p in error.problems],
    }


def termination_message(said: Mapping[str, Any]) -> bytes:
    """``said`` as JSON of at most `TERMINATION_BYTES`. What does not fit is left out: the end of a long text, problems from
    the last one on, results from the longest one on."""
    kept = {k: v for k, v in said.items() if k not in ("problems", "results")}
    while (over := len(_json({**kept, "problems": []})) - TERMINATION_BYTES) > 0:
        longest = max((k for k in kept if isinstance(kept[k], str)), key=lambda k: len(kept[k]))
        words = kept[longest].removesuffix("…")
        kept[longest] = words[: max(0, len(words) - over // 6 - 4)] + "…"  # a character may be six bytes
    if "results" in said:
        kept["results"] = _fitting_results(kept, said["results"])
    if "problems" in said:
        kept["problems"] = []
        for problem in said["problems"]:
            if len(_json({**kept, "problems": [*kept["problems"], problem]})) > TERMINATION_BYTES:
                break
            kept["problems"].append(problem)
    return _json(kept)


def _fitting_results(kept: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """As many values as fit: the precious ones first, then the short ones."""
    values = [(stage, key, value) for stage, found in results.items() for key, value in found.items()]
    values.sort(key=lambda v: (v[1] not in PRECIOUS, len(_json(v[2]))))
    fitting: dict[str, dict[str, Any]] = {}
    for stage, key, value in values:
        more = {**fitting, stage: {**fitting.get(stage, {}), key: value}}
        if len(_json({**kept, "results": more})) <= TERMINATION_BYTES:
            fitting = more
    return fitting


def _json(value: Any) -> bytes:
    return progress.strict_json(value).encode(errors="replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
