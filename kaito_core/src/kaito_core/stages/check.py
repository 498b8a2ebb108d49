"""``check``: everything that can go wrong before a GPU is used: the data, and the right to push the result.

KAITO finds a wrong push secret after hours of training (its defect 11) and bad data on the GPU node (defect 10).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kaito_core.problems import Failure
from kaito_core.progress import Progress
from kaito_core.workloads.job import Folders, TuningJob

if TYPE_CHECKING:
    from kaito_core.data.doctor import Report


def body(job: TuningJob, folders: Folders, events: Progress) -> Mapping[str, Any]:
    from kaito_core.data.prepare import BadData, data_files, prepare

    _output(job, events)
    files = data_files(folders.data)
    into = folders.results / "prepared"
    try:
        prepared = prepare(files, job.preset, folders.weights, job.config, into, sequence=job.configuration.sequence)
    except BadData as e:
        _tell(e.report, events)
        raise
    _tell(prepared.report, events)
    return {"data": asdict(prepared.facts)}


def _tell(report: Report, events: Progress) -> None:
    for line in report.lines():
        events.message(line)
    for problem in report.problems:
        if problem.severity == "warning":
            events.message(str(problem))


def _output(job: TuningJob, events: Progress) -> None:
    """Prove that the result can be put where it should go."""
    if job.output_image:
        from kaito_core.artifacts.credentials import credentials_for
        from kaito_core.artifacts.registry import check_push
        from kaito_core.oci_reference import Reference

        reference = Reference.parse(job.output_image)
        check_push(reference, credentials_for(reference))
        events.message(f"push rights: {job.output_image} can be written")
    if job.output_volume is not None:
        destination = Path(os.environ["KAITO_DESTINATION"])
        probe = destination / ".kaito-write-test"
        try:
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as e:
            raise Failure(
                f"the output volume {destination} cannot be written: {e.strerror}",
                "mend its permissions",
                field="tuning.output",
            ) from e
