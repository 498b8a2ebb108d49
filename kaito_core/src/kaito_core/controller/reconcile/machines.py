"""The machines of what runs already: whether they are still there, and what is done when one is lost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kaito_core.api import conditions
from kaito_core.controller.reconcile.case import Case, find, seconds
from kaito_core.controller.reconcile.decision import Observe
from kaito_core.controller.reconcile.nodes import POLL, give_up
from kaito_core.controller.reconcile.observed import Installed
from kaito_core.kube.kinds import Kind, Object

SETTLED = 15.0
"""Seconds that machines must have been ready for before one that is not seen is taken for gone: caches are a little behind."""

MACHINE_LOST = "MachineLost"

GONE = 600.0
"""Seconds after which a machine whose kubelet says nothing is taken for gone, even if its Node object is still there."""


def machines_are_there(case: Case, kind: Kind, runs: Object, pod: Object | None) -> bool:
    """Whether what runs (a job, an endpoint) has what it runs on; where it has not, what is done about it is decided here."""
    attempt = case.attempt
    if attempt is None and case.attempts and case.attempts[-1].get("reason") == MACHINE_LOST:
        # Only now that the end of the attempt is written: else a crash in between would have its request answered once more.
        case.end(kind, runs, foreground=True)
        return False
    if attempt is None or not holds(case, attempt):
        case.set(conditions.RESOURCE_READY, "True", "workspaceResourceStatusSuccess", "")
        return True
    if attempt.get("reason") == MACHINE_LOST:
        _another_machine(case, kind, runs, str(attempt.get("message", "")))  # begun before, and not at its end yet
        return False
    ready = find(case.status.get("conditions"), conditions.RESOURCE_READY)
    if ready is None or ready["status"] != "True":
        return _noted(case, kind, runs, attempt)
    bound = pod.get("spec", {}).get("nodeName") if pod is not None else ""
    lost = _lost(case, {*case.status.get("workerNodes", ()), *([bound] if bound else [])})
    if not lost:
        return True
    if case.observed.now - seconds(ready["lastTransitionTime"]) < SETTLED:
        case.look_again(SETTLED)
        return True
    _another_machine(case, kind, runs, lost)
    return False


def _noted(case: Case, kind: Kind, runs: Object, attempt: dict[str, Any]) -> bool:
    """A controller died after it had made the job and before it could note what it runs on: the provisioner knows."""
    question = Observe(str(attempt["provisioner"]), case.request_id)
    answer = case.observed.asked.get(question.key)
    if answer is None:
        case.ask = question
        return False
    if answer.phase in ("absent", "failed", "releasing"):
        _another_machine(case, kind, runs, answer.message or "the machine is gone")
        return False
    if answer.phase != "ready":
        case.look_again(POLL)
        return True
    case.status["workerNodes"] = list(answer.nodes)
    case.status["targetNodeCount"] = int((case.workspace.get("resource") or {}).get("count") or 1)
    case.set(conditions.NODES_READY, "True", "NodesReady", "")
    case.set(conditions.RESOURCE_READY, "True", "workspaceResourceStatusSuccess", "")
    return True


def _lost(case: Case, names: Iterable[str]) -> str:
    """Why one of these machines is no more; empty when all are there."""
    for name in sorted(names):
        if name not in case.observed.nodes:
            continue
        node = case.observed.nodes[name]
        if node is None or "deletionTimestamp" in node["metadata"]:
            return f"the machine {name} is gone"
        answers = find(node.get("status", {}).get("conditions"), "Ready") or {}
        since = answers.get("lastTransitionTime")
        if answers.get("status") in ("False", "Unknown") and since and case.observed.now - seconds(since) > GONE:
            return f"the machine {name} has not answered for {GONE / 60:.0f} minutes"
    return ""


def _another_machine(case: Case, kind: Kind, runs: Object, why: str) -> None:
    """A spot machine that was taken away, or one that died: what is left of it is given back, then everything begins anew on another.
    The job's pods are bound to the labels of the machine that is gone, so the job is made anew as well; what it has done is with
    its checkpoints."""
    if case.attempt is not None and not case.attempt.get("reason"):
        spot = case.attempt.get("capacityType") == "spot"
        case.note("Warning", MACHINE_LOST, f"{why}{' (a spot machine)' if spot else ''}; getting another one")
    case.set(conditions.NODES_READY, "False", "NodeNotReady", why)
    case.set(conditions.RESOURCE_READY, "False", "workspaceResourceStatusNotReady", f"{why}; getting another one")
    if not case.serving:
        case.set(conditions.JOB_STARTED, "False", "WorkspaceTuningJobStatusPending", f"{why}; it goes on where it was")
    case.waiting(why)
    give_up(case, MACHINE_LOST, why)
    if case.attempt is None:
        case.status.pop("workerNodes", None)


def holds(case: Case, attempt: dict[str, Any]) -> bool:
    """Whether the machines of this attempt were got for it, and have to be given back."""
    return case.observed.provisioners.get(str(attempt["provisioner"]), Installed()).holds
