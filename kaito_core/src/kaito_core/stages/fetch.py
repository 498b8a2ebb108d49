"""``fetch``: the training data and the model's files, into the job's folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kaito_core.problems import UserError
from kaito_core.progress import Progress
from kaito_core.stages import model_files
from kaito_core.stages.process import cache
from kaito_core.stages.volume import stay_inside
from kaito_core.workloads.job import Folders, TuningJob


def body(job: TuningJob, folders: Folders, events: Progress) -> Mapping[str, Any]:
    files = _data(job, folders, events)
    weights = model_files.bring(job, folders.weights, events)
    return {"files": len(files), "bytes": sum(p.stat().st_size for p in files), "weights_bytes": weights}


def _data(job: TuningJob, folders: Folders, events: Progress) -> list[Path]:
    from kaito_core.addresses import private_addresses_allowed
    from kaito_core.data.fetch import fetch

    if job.data.volume is not None:
        found = [p for p in sorted(folders.data.rglob("*")) if p.is_file() and not p.name.startswith(".")]
        if not found:
            raise UserError(
                f"the data volume is empty: {folders.data}", "put the data files there", field="tuning.input"
            )
        stay_inside(found, folders.data, job.data.volume, "tuning.input.volumeSource")
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
