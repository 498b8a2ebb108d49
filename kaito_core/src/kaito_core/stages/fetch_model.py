"""``fetch-model``: the model's files and every adapter, into the folders that a server reads them from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kaito_core.artifacts.image import NEEDED
from kaito_core.artifacts.model_files import PICKLES
from kaito_core.plugins.types import ServedAdapter
from kaito_core.problems import UserError
from kaito_core.progress import Progress
from kaito_core.stages import model_files
from kaito_core.stages.cached_folder import link_files
from kaito_core.stages.process import ServingFolders
from kaito_core.stages.volume import stay_inside
from kaito_core.workloads.serving import ServingJob

ANNOTATIONS = ".image.json"
"""Beside an adapter that came from an image: the image's annotations, which say what it belongs to."""

PLACES = ("", "data", "adapter")
"""Where a volume may have an adapter: in it, below ``/data`` when it is made from an image, or where ``kaito`` puts a tuned one."""


def body(job: ServingJob, folders: ServingFolders, events: Progress) -> Mapping[str, Any]:
    weights = model_files.bring(job, folders.weights, events)
    _take_away(folders.adapters, {a.name for a in job.adapters})
    for number, adapter in enumerate(job.adapters):
        into = folders.adapters / adapter.name
        field = f"inference.adapters[{number}]"
        if adapter.image:
            where = adapter.image
            _from_image(adapter, into, events)
        else:
            where = _from_volume(adapter, number, into, field)
        events.message(f"adapter {adapter.name!r}: from {where}")
    return {"weights_bytes": weights, "adapters": [a.name for a in job.adapters]}


def _from_image(adapter: ServedAdapter, into: Path, events: Progress) -> None:
    from kaito_core.artifacts.pull import pull

    def pull_adapter(reference: Any, folder: Path, credentials: Any, on_progress: Callable[[int, int], None]) -> Any:
        # An adapter is small: what a killed pull has left is thrown away, and it begins again.
        shutil.rmtree(folder)
        return pull(reference, folder, credentials)

    found = model_files.pulled(adapter.image, "adapter", pull_adapter, events)
    _link(found.path, into)
    (into / ANNOTATIONS).unlink(missing_ok=True)
    (into / ANNOTATIONS).write_text(json.dumps(found.facts.get("annotations", {})), encoding="utf-8")


def _from_volume(adapter: ServedAdapter, number: int, into: Path, field: str) -> str:
    volume = os.environ.get(f"KAITO_ADAPTER_{number}", "")
    if not volume or not Path(volume).is_dir():
        raise UserError(
            f"the volume of the adapter {adapter.name!r} is not there: {volume or f'KAITO_ADAPTER_{number} is not set'}",
            "check the volume source of the adapter",
            field=f"{field}.source.volumeSource",
        )
    found = [p for place in PLACES if (p := Path(volume) / place) and (p / NEEDED[0]).is_file()]
    if not found:
        raise UserError(
            f"the volume of the adapter {adapter.name!r} holds no adapter: there is no {NEEDED[0]} in {volume}"
            f" or in its folders {' and '.join(p for p in PLACES if p)}",
            f"put {' and '.join(NEEDED)} there",
            field=f"{field}.source.volumeSource",
        )
    stay_inside(found[0].iterdir(), Path(volume), adapter.volume or {}, f"{field}.source.volumeSource")
    (into / ANNOTATIONS).unlink(missing_ok=True)
    _link(found[0], into)
    return str(found[0])


def _link(folder: Path, into: Path) -> None:
    files = {p.name: p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")}
    if NEEDED[1] in files:
        # A server takes what it finds; with the weights as safetensors nobody needs a pickle (training_args.bin, optimizer.pt).
        files = {name: p for name, p in files.items() if p.suffix.lower() not in PICKLES}
    link_files(files, into)


def _take_away(folder: Path, names: set[str]) -> None:
    """Remove the adapters that are no longer served: a server may take every folder that it finds for one."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.name not in names:
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()
