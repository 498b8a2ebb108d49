"""Fourth phase: how far the job is, how it ended, and its machines given back the moment it has.

The job itself decides whether a failed pod is tried again; the Workspace has failed when the job has, and not before
(KAITO says so at the first failed pod, its defect 2)."""

from __future__ import annotations

from typing import Any

from kaito_core.api import conditions
from kaito_core.api.resource import seconds_of
from kaito_core.controller.reconcile.case import Case, find, seconds
from kaito_core.controller.reconcile.decision import Deletion
from kaito_core.controller.reconcile.diagnosis import (
    Trouble,
    containers,
    last_words,
    latest,
    stage,
    started,
    trouble,
)
from kaito_core.controller.reconcile.machines import SETTLED, holds, machines_are_there
from kaito_core.controller.reconcile.nodes import give_up, wait_in_vain
from kaito_core.controller.reconcile.starting import (
    FAILED_CREATE,
    POD_MISSING,
    SUSPENDED,
    in_vain,
    retry_in,
    retry_words,
    suspended,
    waiting_for,
)
from kaito_core.kube.kinds import JOBS, Object

PATIENCE = 600.0
"""Seconds that a pod may wait for what will not come by itself (an image that is not there) while its machine costs money."""

NOT_STARTED = "the pod has not started yet"

SPOT_CHECK = 30.0
"""Seconds between looks at a pod that is stuck, so that the patience ends on time."""

EVENTS_CHECK = 10.0
"""Seconds until the Events are read that may say why there is no pod."""


def outcome(case: Case, job: Object) -> None:
    """Say how the job is doing; on its end, say how it ended."""
    pods = sorted(case.observed.pods, key=lambda p: str(p["metadata"].get("creationTimestamp", "")))
    pod = latest(pods)
    case.stays_accepted()  # else there were no job
    ended = {c["type"] for c in job.get("status", {}).get("conditions", ()) if c.get("status") == "True"}
    if ended & {"Complete", "Failed"} and _pods_are_behind(case, job, pods, ended):
        case.look_again(BEHIND)
        return
    if "Complete" in ended:
        _succeeded(case, pods)
        return
    given_up = in_vain(case)
    if "Failed" not in ended and given_up is not None:
        _without_machine(case, job, str(given_up["reason"]), str(given_up.get("message", "")))
        return
    if "Failed" not in ended and not machines_are_there(case, JOBS, job, pod):
        return
    now = trouble(pod) if pod is not None else None
    if "Failed" in ended:
        _failed(case, job, [t for p in pods if (t := trouble(p)) is not None])
        return
    if pod is not None and now is not None and (now.stuck or pays_for_nothing(case, now)):
        waited = case.observed.now - seconds(pod["metadata"]["creationTimestamp"])
        if waited > PATIENCE:
            case.delete.append(Deletion(JOBS, job["metadata"]["name"], job["metadata"]["uid"]))
            case.set(conditions.JOB_STARTED, "False", now.reason, now.message)
            case.failed(f"{now.message}; given up after {waited / 60:.0f} minutes", note=now.reason)
            case.again = True
            return
        case.look_again(SPOT_CHECK)
    waits = waiting_for(case, job, pods, 1, conditions.JOB_STARTED)
    held = case.attempt is not None and holds(case, case.attempt)
    if waits is not None and held and waits.is_over(case.observed.now):
        _without_machine(case, job, waits.reason, waits.last_words)
        return
    if waits is not None and waits.reason in (FAILED_CREATE, SUSPENDED):
        _say_it_waits(case, waits.reason, waits.message)
    else:
        _running(case, pods, pod, now)
    if waits is not None and (held or waits.reason in (FAILED_CREATE, POD_MISSING)):  # Events are not watched
        case.look_again(EVENTS_CHECK if waits.reason == POD_MISSING else SPOT_CHECK)


def _pods_are_behind(case: Case, job: Object, pods: list[Object], ended: set[str]) -> bool:
    """Whether the job's end is known and that of its pod is not: each kind of object has a cache of its own, and what was made is said
    by the pod. Not for long: pods that are really gone say nothing any more."""
    phase = "Succeeded" if "Complete" in ended else "Failed"
    if any(p.get("status", {}).get("phase") == phase for p in pods):
        return False
    since = [
        c.get("lastTransitionTime") for c in job["status"]["conditions"] if c.get("type") in ("Complete", "Failed")
    ]
    return any(t and case.observed.now - seconds(t) < SETTLED for t in since)


def _without_machine(case: Case, job: Object, reason: str, message: str) -> None:
    """Give back a machine that has waited for the job's pod in vain. Once that is written the job goes, since its pods are bound to that
    machine, and all of it is tried again later. A suspended job stays, and waits for nothing that is paid for."""
    _say_it_waits(case, reason, message)
    held = case.attempt is not None
    wait_in_vain(case, reason, message)
    if held:
        return
    if reason == SUSPENDED and suspended(job):
        return
    case.end(JOBS, job, foreground=True)
    if retry_in(case) > 0:
        case.pending(retry_words(case))


def _say_it_waits(case: Case, reason: str, message: str) -> None:
    if case.set(conditions.JOB_STARTED, "False", reason, message):
        case.note("Warning", reason, message)
    case.waiting(message)


def pays_for_nothing(case: Case, now: Trouble) -> bool:
    """Whether a machine that was got for it waits for a pod that cannot go there: a disk that nobody makes, as a rule. On nodes that are
    there anyway a pod may wait as long as it likes."""
    return now.reason == "Unschedulable" and case.attempt is not None and holds(case, case.attempt)


def _running(case: Case, pods: list[Object], pod: Object | None, now: Trouble | None) -> None:
    before = [t for p in pods[:-1] if (t := trouble(p)) is not None]
    again = f"try {len(pods)}; before it: {before[-1].message}" if before else ""
    if pod is not None and (started(pod) or now is not None):  # before that, nothing has happened on its node
        _about_nodes(case, pod)
    if pod is not None and started(pod) and now is None:
        if case.set(conditions.JOB_STARTED, "True", "WorkspaceTuningJobStatusStarted", again) and before:
            case.note("Warning", before[-1].reason, f"{before[-1].message}; the job goes on")
        case.set(conditions.WORKSPACE_SUCCEEDED, "False", "workspacePending", again)
        case.state("Running")
        _progress(case, pod)
        return
    reason = now.reason if now else "WorkspaceTuningJobStatusPending"
    message = now.message if now else again or NOT_STARTED
    if case.set(conditions.JOB_STARTED, "False", reason, message) and now:
        case.note("Warning", now.reason, now.message)
    case.set(conditions.WORKSPACE_SUCCEEDED, "False", "workspacePending", message if now else again)
    case.state("Running" if before or (pod is not None and started(pod)) else "Pending")


def _about_nodes(case: Case, pod: Object) -> None:
    name = pod.get("spec", {}).get("nodeName", "")
    if not name or name not in case.observed.nodes:
        return
    if list(case.status.get("workerNodes", ())) != [name]:
        case.status["workerNodes"] = [name]
    node = case.observed.nodes[name]
    ready = find(node.get("status", {}).get("conditions"), "Ready") if node else None
    if node is not None and (ready is None or ready.get("status") == "True"):
        case.set(conditions.NODES_READY, "True", "NodesReady", "")
        return
    words = (
        f"the node {name} is gone"
        if node is None
        else f"the node {name} is not ready: {(ready or {}).get('message', '')}"
    )
    if case.set(conditions.NODES_READY, "False", "NodeNotReady", words):
        case.note("Warning", "NodeNotReady", words)


BEHIND = 1.0
"""Seconds until it is looked again whether a cache has caught up."""


def _progress(case: Case, pod: Object) -> None:
    said = case.observed.progress
    running = stage(pod)
    old: dict[str, Any] = case.status.get("progress") or {}
    if said is not None:
        new = dict(said.fields)
        cost = _cost(case, said.time)
        if cost is not None:
            new["costSoFar"] = cost
        case.status["progress"] = new
    elif running in ("fetch", "check") and old.get("stage") != running:
        case.status["progress"] = {"stage": running}


def _cost(case: Case, until: float) -> float | None:
    """US dollars for the machines until then; None when nobody knows their price."""
    attempt = case.attempt
    price = attempt.get("pricePerHour") if attempt else None
    if attempt is None or price is None:
        return None
    return round(max(0.0, until - seconds(attempt["started"])) / 3600 * float(price), 4)


def _succeeded(case: Case, pods: list[Object]) -> None:
    results: dict[str, Any] = {}
    for pod in pods:
        for container in containers(pod.get("status", {})):
            said = last_words(container)
            if said.get("event") == "finished":
                results.update(said.get("results", {}))
    pushed, verified = results.get("push", {}), results.get("verify", {})
    output = case.workspace.get("tuning", {}).get("output", {}).get("image", "")
    adapter = {
        "image": pushed.get("image", output),
        "digest": pushed.get("digest", ""),
        "evalLossBefore": verified.get("eval_loss_before"),
        "evalLossAfter": verified.get("eval_loss_after"),
    }
    case.status["adapter"] = {k: v for k, v in adapter.items() if v not in (None, "")} or {"image": ""}
    trained = results.get("train", {}).get("metrics", {})
    if isinstance(trained, dict) and trained.get("steps"):
        # What was seen last in a log may be long before the end.
        progress = case.status.setdefault("progress", {})
        progress.update(stage="push", step=trained["steps"], steps=trained["steps"])
    case.set(conditions.JOB_STARTED, "True", "WorkspaceTuningJobStatusStarted", "")
    _say_success(case)
    case.status["finishedRevision"] = case.history.current.hash
    _last_progress(case)
    case.again = True


def _say_success(case: Case) -> None:
    message = f"the adapter is in {case.status['adapter'].get('image') or 'its volume'}"
    if case.set(conditions.WORKSPACE_SUCCEEDED, "True", "workspaceSucceeded", message):
        case.note("Normal", "WorkspaceSucceeded", message)
    case.state("Succeeded")


def _failed(case: Case, job: Object, troubles: list[Trouble]) -> None:
    condition = find(job.get("status", {}).get("conditions"), "Failed") or {}
    if troubles:
        message = troubles[-1].message
        if len(troubles) > 1:
            message += f" (try {len(troubles)}, the last one)"
    else:
        message = str(condition.get("message") or condition.get("reason") or "the job failed")
    case.set(conditions.JOB_STARTED, "False", "WorkspaceTuningJobStatusFailed", message)
    case.failed(message)
    _last_progress(case)
    case.again = True


def _last_progress(case: Case) -> None:
    progress = case.status.get("progress")
    if progress:
        progress.pop("secondsLeft", None)
        cost = _cost(case, case.observed.now)
        if cost is not None:
            progress["costSoFar"] = cost


def release(case: Case, reason: str = "") -> None:
    """Give the machines back: this revision has ended, and nobody pays for a machine that has nothing to do (KAITO keeps
    it until the Workspace is deleted, its defect 8)."""
    accepted = find(case.status.get("conditions"), conditions.ACCEPTED)
    if accepted and accepted["status"] == "False" and not case.serving:
        # A change that could not be run was taken back: what this revision made is still there.
        case.stays_accepted()
        if "adapter" in case.status:
            _say_success(case)
    attempt = case.attempt
    if attempt is None:
        return
    if case.observed.provisioners and attempt.get("provisioner") not in case.observed.provisioners:
        _cannot_release(case, attempt)
        return
    if _kept(case, attempt):
        return
    state = str(case.status.get("state", ""))
    why = reason if case.serving and case.status.get("serving", {}).get("lastRequest") else state
    give_up(case, str(attempt.get("reason") or why), str(attempt.get("message", "")))
    if case.attempt is None:
        if state == "Succeeded":
            message = "the machines were given back after the job"
            case.set(conditions.RESOURCE_READY, "True", "workspaceResourceStatusSuccess", message)
        case.unset(conditions.NODES_READY)


def _kept(case: Case, attempt: dict[str, Any]) -> bool:
    """Whether its machines wait for the next job of this Workspace, as ``resource.keep`` asks."""
    keep = seconds_of(str(case.workspace.get("resource", {}).get("keep", ""))) or 0.0
    if not keep or attempt.get("reason") or not holds(case, attempt):
        return False
    left = seconds(attempt.setdefault("idleSince", case.time)) + keep - case.observed.now
    if left > 0:
        case.look_again(left)
    return left > 0


def _cannot_release(case: Case, attempt: dict[str, Any]) -> None:
    message = (
        f"the machines of the request {case.request_id} cannot be given back: the node provisioner "
        f"{attempt.get('provisioner')!r} that got them is not installed any more"
    )
    if case.set(conditions.NODES_READY, "Unknown", "ProvisionerMissing", message):
        case.note("Warning", "ProvisionerMissing", message)
    case.look_again(60.0)
