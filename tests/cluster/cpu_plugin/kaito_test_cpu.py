"""The GPUs of the test's nodes are only numbers: everything is planned for them, and then computed on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

from kaito_core.api import Workspace
from kaito_core.plugins import hookimpl
from kaito_core.workloads.workload import Workload

IMAGE = "test.kaito.sh/image"
"""An annotation: the image of this Workspace's pod."""


@hookimpl
def kaito_workload(workspace: Workspace, workload: Workload) -> Workload:
    (path,) = workload.files  # of a tuning, or of an endpoint
    job = json.loads(workload.files[path])
    job["configuration"].update(device="cpu", dtype="float32")
    return replace(
        workload,
        files={path: json.dumps(job)},
        # One thread: two of them wait for each other on a machine that also runs a cluster.
        env={**workload.env, "OMP_NUM_THREADS": "1"},
        image=workspace.metadata.annotations.get(IMAGE, workload.image),
    )
