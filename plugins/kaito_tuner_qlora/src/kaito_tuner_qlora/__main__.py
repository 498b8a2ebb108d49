"""``python -m kaito_tuner_qlora train|verify``: one stage of a tuning workload, in a process of its own.

What can be foreseen ends with one line about the cause, one about the remedy, a `failed` event and exit code 2 (the user can
mend it) or 1; a traceback in the log is a bug of ours, or a broken machine.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from kaito_core.problems import Failure, KaitoError, Problem, UserError
from kaito_core.progress import FILE_NAME, Progress
from kaito_core.workloads.job import Folders, TuningJob

STAGES = ("train", "verify")


class Silent(Progress):
    """What every process but the first one says (KAITO defect 12: there all of them write)."""

    def emit(self, event: str, **fields: Any) -> None:
        pass

    def message(self, text: str) -> None:
        pass


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in STAGES:
        print(f"usage: python -m kaito_tuner_qlora {'|'.join(STAGES)}", file=sys.stderr)
        return 2
    stage = arguments[0]
    progress: Progress | None = None
    try:
        folders = Folders.from_env()
        kind = Progress if os.environ.get("RANK", "0") == "0" else Silent
        progress = kind(folders.results / FILE_NAME, stage)
        job = TuningJob.load()
        if stage == "train" and job.configuration.processes > 1 and "RANK" not in os.environ:
            _several_processes(stage, job.configuration.processes)
        progress.emit("started")
        return _run(stage, job, folders, progress)
    except KaitoError as e:
        for problem in e.problems:
            print(problem, file=sys.stderr, flush=True)
        return _failed(progress, e.problems, e.exit_code)
    except KeyboardInterrupt:
        return _failed(progress, (Problem("interrupted", "the same command goes on from the newest checkpoint"),), 130)
    except Exception as e:
        traceback.print_exc()
        text = f"the {stage} stage failed unexpectedly: {type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
        print(text, file=sys.stderr, flush=True)
        return _failed(progress, (Problem(text, "the traceback is in the log of the stage; please report it"),), 1)


def _run(stage: str, job: TuningJob, folders: Folders, progress: Progress) -> int:
    os.environ["HF_HUB_OFFLINE"] = (
        "1"  # everything was fetched; nothing that a library wants to look up is worth waiting for
    )
    try:
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"the training libraries are not installed: {e}", "pip install 'kaito-tuner-qlora[train]'"
        ) from e
    from kaito_tuner_qlora.train import Interrupted, train

    try:
        if stage == "train":
            train(job, folders, progress)
        else:
            from kaito_tuner_qlora.verify import verify

            verify(job, folders, progress)
    except Interrupted as e:
        return e.exit_code
    except OSError as e:
        raise Failure(
            f"{e.strerror or e}{f': {e.filename}' if e.filename else ''}", "check the disk and the folders of the job"
        ) from e
    return 0


def _several_processes(stage: str, count: int) -> None:
    """Becomes torchrun, which starts this command once per GPU."""
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        "-m",
        "kaito_tuner_qlora",
        stage,
    ]
    os.execv(sys.executable, [sys.executable, *command])  # noqa: S606 (a list of our own words, no shell)


def _failed(progress: Progress | None, problems: tuple[Problem, ...], code: int) -> int:
    if progress is not None:
        message = "; ".join(f"{p.field}: {p.message}" if p.field else p.message for p in problems)
        progress.emit("failed", message=message, remedy=problems[0].remedy, exit_code=code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
