"""Third phase: the objects that train. Made once for a revision; a changed Workspace replaces the job."""

from __future__ import annotations

from typing import Any

from kaito_core.api import conditions, labels
from kaito_core.controller.reconcile.case import Case
from kaito_core.controller.reconcile.outcome import NOT_STARTED
from kaito_core.kube.kinds import CONFIG_MAPS, JOBS, VOLUME_CLAIMS
from kaito_core.planning.plan import Plan
from kaito_core.plugins.types import NodeStatus
from kaito_core.workloads.kubernetes import config_map, job, results_claim, results_claim_name


def workload(case: Case, plan: Plan, nodes: NodeStatus) -> None:
    """Create what this revision needs."""
    settings = case.world.settings
    rendered = case.world.workload(plan.workspace, plan)
    where: dict[str, Any] = {"namespace": case.namespace, "owner": case.workspace, "revision": case.history.current}
    tuning = plan.workspace.tuning
    checkpoints = tuning.checkpoints.volume_source if tuning and tuning.checkpoints else None
    if checkpoints is None and settings.checkpoint_storage_class:
        case.create.append(
            (
                VOLUME_CLAIMS,
                results_claim(
                    case.name,
                    namespace=case.namespace,
                    owner=case.workspace,
                    storage_class=settings.checkpoint_storage_class,
                    size=settings.checkpoint_size,
                ),
            )
        )
        checkpoints = {"persistentVolumeClaim": {"claimName": results_claim_name(case.name)}}
    case.create.append((CONFIG_MAPS, config_map(rendered, **where)))
    case.create.append(
        (
            JOBS,
            job(
                rendered,
                **where,
                selector=nodes.selector,
                checkpoints=checkpoints,
                image=settings.tuner_image,
                image_pull_secrets=settings.image_pull_secrets,
                env=settings.pod_env,
            ),
        )
    )
    case.set(conditions.JOB_STARTED, "False", "WorkspaceTuningJobStatusPending", NOT_STARTED)
    case.set(conditions.WORKSPACE_SUCCEEDED, "False", "workspacePending", "")
    case.state("Pending")
    case.status.pop("progress", None)
    case.status.pop("adapter", None)


def outdated(case: Case) -> bool:
    """Whether a job of another revision, or of an earlier Workspace of this name, is still there; it is asked to go.

    Its pods go first, so that two of them never write to the same checkpoints."""
    old = case.job
    if old is None or case.job_is_current:
        return False
    if "deletionTimestamp" not in old["metadata"]:
        case.end(JOBS, old, foreground=True)
        number = old["metadata"].get("annotations", {}).get(labels.REVISION, 0)
        case.note("Normal", "JobReplaced", f"the job of revision {number} is replaced: the Workspace was changed")
    case.set(conditions.JOB_STARTED, "False", "WorkspaceTuningJobStatusPending", "the job before it is being removed")
    case.set(conditions.WORKSPACE_SUCCEEDED, "False", "workspacePending", "")
    case.state("Pending")
    return True
