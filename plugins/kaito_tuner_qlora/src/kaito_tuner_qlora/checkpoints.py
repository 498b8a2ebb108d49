"""Checkpoints that are whole or are not there.

A checkpoint is written into a folder of another name, flushed, and renamed. A run that is killed at any instant leaves the
older checkpoint, or the new one, never a torn one; what is left of a torn one is removed by the next run.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

WRITING = "being-written"
ADAPTER, STATE = "adapter_config.json", "trainer_state.json"
PARTS = (ADAPTER, "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", STATE)
"""What a checkpoint must hold to be gone on from."""

REACHED = "kaito.json"


@dataclass(frozen=True)
class Reached:
    """What a checkpoint is a part of, and how much of it is done."""

    steps: int
    """Optimizer steps of the whole training."""
    step_rows: int
    """Rows of a step, of all processes together."""
    rows: int | None
    """Rows that were trained, each as often as it was; None: not written down."""


def write_reached(folder: Path, reached: Reached) -> None:
    """Beside what transformers writes, which does not say how many processes share a step."""
    (folder / REACHED).write_text(json.dumps(asdict(reached)) + "\n", encoding="utf-8")


def read_reached(folder: Path) -> Reached:
    """Of a whole checkpoint; also of those before there was such a file."""
    if (folder / REACHED).is_file():
        return Reached(**json.loads((folder / REACHED).read_text(encoding="utf-8")))
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    processes = len(list(folder.glob("rng_state*.pth")))  # one of each; a step was so many rows in each of them
    return Reached(state["max_steps"], state["train_batch_size"] * max(1, processes), None)


def read_adapter(folder: Path) -> dict[str, Any]:
    """peft's configuration of the adapter in a whole checkpoint."""
    config: dict[str, Any] = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    return config


def step_of(folder: Path) -> int:
    """The optimizer step at which a checkpoint was written."""
    return int(folder.name.rpartition("-")[2])


def all_of(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest step first."""
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if step.isdigit() and all((path / part).is_file() for part in PARTS):
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def newest(folder: Path) -> Path | None:
    """The checkpoint to go on from; None when there is none."""
    return next(reversed(all_of(folder)), None)


def publish(written: Path, final: Path) -> None:
    """Makes a written folder durable and visible under its final name, in place of an older one of that name."""
    for path in [*written.rglob("*"), written]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if final.exists():
        shutil.rmtree(final)
    written.rename(final)


def keep(folder: Path, count: int) -> None:
    """Removes all but the newest ``count`` checkpoints."""
    for path in all_of(folder)[: -count or None]:
        shutil.rmtree(path, ignore_errors=True)
