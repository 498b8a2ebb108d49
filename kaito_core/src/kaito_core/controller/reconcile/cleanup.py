"""Last phase: the Workspace is being deleted. Everything outside the cluster goes first, then the finalizer.

What is inside (job, ConfigMap, revisions, claim) belongs to the Workspace and goes with it."""

from __future__ import annotations

from kaito_core.api import conditions
from kaito_core.controller.reconcile.case import Case
from kaito_core.controller.reconcile.decision import Deletion
from kaito_core.controller.reconcile.nodes import given_back
from kaito_core.kube.kinds import JOBS, STATEFUL_SETS

MISSING = 60.0
"""Seconds until it is looked again whether an uninstalled provisioner has come back."""


def cleanup(case: Case) -> None:
    """Stop the job, give the machines back, and only then let the Workspace go."""
    if not case.has_finalizer:
        return
    case.set(conditions.WORKSPACE_DELETING, "True", "workspaceDeleted", "giving back what was got for it")
    if case.job is not None and "deletionTimestamp" not in case.job["metadata"]:
        case.delete.append(Deletion(JOBS, case.job["metadata"]["name"], case.job["metadata"]["uid"]))
    servers = case.observed.stateful_set
    if servers is not None and "deletionTimestamp" not in servers["metadata"]:
        case.delete.append(Deletion(STATEFUL_SETS, servers["metadata"]["name"], servers["metadata"]["uid"]))
    if case.attempt is None or _gone(case, str(case.attempt["provisioner"])):
        case.finalizer = False


def _gone(case: Case, provisioner: str) -> bool:
    if provisioner not in case.observed.provisioners:
        message = (
            f"the node provisioner {provisioner!r} that got the machines of {case.request_id} is not installed: install it "
            "again, or give them back by hand and remove the finalizer"
        )
        if case.set(conditions.WORKSPACE_DELETING, "True", "ProvisionerMissing", message):
            case.note("Warning", "ProvisionerMissing", message)
        case.look_again(MISSING)
        return False
    return given_back(case, provisioner)
