"""``python -m kaito_tuner_qlora train|verify``: one stage of a tuning workload, in a process of its own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from kaito_core.problems import KaitoError, UserError
from kaito_core.progress import Progress
from kaito_core.stages.process import run_stage
from kaito_core.workloads.job import Folders, TuningJob

STAGES = ("train", "verify")

SHUTDOWN_SECONDS = 110
"""How long torchrun waits, after SIGTERM or the end of one process, for the others to end before it kills them: a step and its
checkpoint must be done by then. Ten seconds before a pod's and a local run's own limit (120)."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in STAGES:
        print(f"usage: python -m kaito_tuner_qlora {'|'.join(STAGES)}", file=sys.stderr)
        return 2
    stage = arguments[0]
    if stage == "train" and "RANK" not in os.environ and (count := _processes()) > 1:
        _become_several(stage, count)

    def body(job: TuningJob, folders: Folders, events: Progress) -> Mapping[str, Any] | None:
        # Everything was fetched; nothing that a library wants to look up is worth waiting for.
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            module = importlib.import_module(f"kaito_tuner_qlora.{stage}")
        except ImportError as e:
            raise UserError(
                f"the training libraries are not installed: {e}", "pip install 'kaito-tuner-qlora[train]'"
            ) from e
        result: Mapping[str, Any] | None = getattr(module, stage)(job, folders, events)
        return result

    return run_stage(stage, body)


def _processes() -> int:
    """How many processes the job wants; a job that cannot be read is the stage's to tell."""
    try:
        return TuningJob.load().configuration.processes
    except KaitoError:
        return 1


def _become_several(stage: str, count: int) -> None:
    """Becomes torchrun, which starts this command once per GPU."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}")
    # A list of our own words, no shell.
    os.execv(sys.executable, [sys.executable, *launch, "-m", "kaito_tuner_qlora", stage])  # noqa: S606


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
