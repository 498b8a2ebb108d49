"""Checkpoints that are whole or are not there.

A checkpoint is written into a folder of another name, flushed, and renamed. A run that is killed at any instant leaves the
older checkpoint, or the new one, never a torn one; what is left of a torn one is removed by the next run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

WRITING = "being-written"
PARTS = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
"""What a checkpoint must hold to be gone on from."""


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
