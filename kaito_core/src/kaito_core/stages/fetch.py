"""``fetch``: the training data and the model's files, into the job's folders."""

from __future__ import annotations

import importlib.resources
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kaito_core.problems import UserError
from kaito_core.progress import Progress
from kaito_core.stages.process import cache
from kaito_core.workloads.job import Folders, TuningJob

NEEDED = ("config.json", "tokenizer.json")
"""Without these a folder is no model that kaito can tune."""


def body(job: TuningJob, folders: Folders, events: Progress) -> Mapping[str, Any]:
    files = _data(job, folders, events)
    weights = _model(job, folders.weights, events)
    return {"files": len(files), "bytes": sum(p.stat().st_size for p in files), "weights_bytes": weights}


def _data(job: TuningJob, folders: Folders, events: Progress) -> list[Path]:
    from kaito_core.data.addresses import private_addresses_allowed
    from kaito_core.data.fetch import fetch

    if job.data.volume is not None:
        found = [p for p in sorted(folders.data.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        if not found:
            raise UserError(
                f"the data volume is empty: {folders.data}", "put the data files there", field="tuning.input"
            )
        events.message(f"data: {len(found)} file(s) in the volume")
        return found
    if job.data.image:
        from kaito_core.artifacts.credentials import credentials_for
        from kaito_core.artifacts.pull import pull
        from kaito_core.oci_reference import Reference

        reference = Reference.parse(job.data.image)
        # What an earlier version of the workspace fetched would be trained on as well.
        shutil.rmtree(folders.data, ignore_errors=True)
        pull(reference, folders.data, credentials_for(reference))
        return [p for p in sorted(folders.data.rglob("*")) if p.is_file()]
    fetched = fetch(
        job.data.urls,
        folders.data,
        cache(),
        base=Path.cwd(),
        allow_private=private_addresses_allowed(),
        token=os.environ.get("HF_TOKEN", ""),
    )
    for file in fetched:
        events.message(f"data: {file.path.name}, {file.bytes:,} bytes, sha256 {file.sha256[:12]}…")
    return [f.path for f in fetched]


def _model(job: TuningJob, into: Path, events: Progress) -> int:
    """Put the model's files into ``into``; their size in bytes."""
    source = job.preset.source
    if job.model_folder:
        _link(Path(job.model_folder), into)
        where = job.model_folder
    elif job.model_image:
        from kaito_core.artifacts.credentials import credentials_for
        from kaito_core.artifacts.pull import pull
        from kaito_core.oci_reference import Reference

        reference = Reference.parse(job.model_image)
        pull(reference, into, credentials_for(reference))
        where = job.model_image
    elif source.package:
        shipped = importlib.resources.files(source.package)
        with importlib.resources.as_file(shipped.joinpath(source.path) if source.path else shipped) as folder:
            into.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.iterdir()):
                if file.is_file():
                    shutil.copyfile(file, into / file.name)
        where = f"the package {source.package}"
    else:
        from kaito_core.data.hub import fetch_model

        fetch_model(source.hub, source.revision, into, token=os.environ.get("HF_TOKEN"))
        where = f"{source.hub} at {source.revision[:12]}"
    missing = [n for n in NEEDED if not (into / n).is_file()]
    if missing or not list(into.glob("*.safetensors")):
        raise UserError(
            f"{where} is not a model that can be tuned: {', '.join(missing) or 'no *.safetensors file'} is missing",
            "it needs config.json, tokenizer.json and the weights as safetensors, as on the hub",
            field="tuning.preset",
        )
    size = sum(p.stat().st_size for p in into.iterdir() if p.is_file())
    events.message(f"model: {job.preset.name} from {where}, {size:,} bytes")
    return size


def _link(folder: Path, into: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"the folder {folder} with the weights of the model is not there",
            "put the model's files there, or point KAITO_MODELS at the folder above it",
            field="tuning.preset",
        )
    into.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        target = into / file.name
        if file.is_file():
            target.unlink(missing_ok=True)
            target.symlink_to(file.resolve())
