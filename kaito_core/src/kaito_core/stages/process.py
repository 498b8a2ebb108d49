"""How a stage begins and ends, the same for all: job in, progress out, one clear failure, an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from kaito_core import progress
from kaito_core.problems import Failure, KaitoError, Problem, UserError
from kaito_core.progress import Progress, Silent
from kaito_core.workloads.job import Folders, TuningJob
from kaito_core.workloads.serving import ServingJob


class Interrupted(Exception):
    """A signal ended the stage. Its work is kept, and nothing has failed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@dataclass(frozen=True, slots=True)
class ServingFolders:
    """Where a stage of an endpoint finds its mounts."""

    weights: Path
    adapters: Path
    results: Path

    @staticmethod
    def from_env() -> ServingFolders:
        names = ("KAITO_WEIGHTS", "KAITO_ADAPTERS", "KAITO_RESULTS")
        missing = [n for n in names if not os.environ.get(n)]
        if missing:
            raise UserError(
                f"the environment does not say where the endpoint's folders are: {', '.join(missing)} unset",
                "servers are started by `kaito run` or by the controller",
            )
        return ServingFolders(*(Path(os.environ[n]) for n in names))


class _HasResults(Protocol):
    @property
    def results(self) -> Path: ...


Job = TypeVar("Job")
Places = TypeVar("Places", bound=_HasResults)


@dataclass(frozen=True, slots=True)
class Kind(Generic[Job, Places]):
    """What a stage belongs to: how its job is read, and where its folders are."""

    load: Callable[[], Job]
    folders: Callable[[], Places]


TUNING = Kind(TuningJob.load, Folders.from_env)
SERVING = Kind(ServingJob.load, ServingFolders.from_env)


def run_stage(
    name: str,
    body: Callable[[Job, Places, Progress], Mapping[str, Any] | None],
    kind: Kind[Job, Places] = TUNING,  # type: ignore[assignment]  # a default for a type variable
) -> int:
    """Run ``body`` as the stage ``name`` of a job of this kind; the process's exit code.

    What ``body`` returns becomes the ``finished`` event. A `KaitoError` becomes the ``failed`` event and its exit code;
    anything else is a bug or a broken machine: its traceback goes to the log, one line of it to the user.
    """
    try:
        folders = kind.folders()
        # torchrun numbers the processes of a stage that has several.
        voice = Progress if os.environ.get("RANK", "0") == "0" else Silent
        events = voice(folders.results / progress.FILE_NAME, name)
    except KaitoError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    except OSError as e:
        print(of_the_system(e), file=sys.stderr)
        return 1
    try:
        events.emit("started")
        result = body(kind.load(), folders, events)
        events.emit("finished", **(result or {}))
        return 0
    except KaitoError as e:
        return _failed(events, e)
    except Interrupted as e:
        return e.exit_code
    except KeyboardInterrupt:
        return Interrupted(signal.SIGINT).exit_code
    except OSError as e:
        traceback.print_exc()
        return _failed(events, of_the_system(e))
    except Exception as e:
        traceback.print_exc()
        text = f"{type(e).__name__}: {e}".splitlines()[0]
        return _failed(events, Failure(f"the stage {name!r} broke: {text}", "this is a bug; its log has the traceback"))


def _failed(events: Progress, error: KaitoError) -> int:
    print(error, file=sys.stderr, flush=True)
    first = error.problems[0]
    fields = {"message": first.message, "remedy": first.remedy, "exit_code": error.exit_code}
    with suppress(OSError):  # the disk is full: the log and the exit code still say it
        events.emit("failed", **fields, problems=[p.to_json() for p in error.problems])
    return error.exit_code


def of_the_system(error: OSError) -> Failure:
    """What the operating system refused, as a failure: a full disk, a folder that may not be written."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure(Problem(f"no space left on the disk{where}", "free some space and run it again: it goes on"))
    return Failure(f"the system says: {error.strerror or error}{where}", "mend that and run it again: it goes on")


def cache() -> Path:
    """Where downloads are kept by content; ``$KAITO_CACHE``, else below the folder that the data, or the weights, go to."""
    beside = os.environ.get("KAITO_DATA") or os.environ["KAITO_WEIGHTS"]
    return Path(os.environ.get("KAITO_CACHE") or Path(beside) / ".cache")
