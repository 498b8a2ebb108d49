"""Second phase: machines to run on. Asks one provisioner at a time, and goes to the next offer when one cannot be had."""

from __future__ import annotations

from typing import Any

from kaito_core.api import conditions, labels
from kaito_core.controller.reconcile.case import Case
from kaito_core.controller.reconcile.decision import Ensure, Release
from kaito_core.planning.plan import Candidate, Plan, requirements
from kaito_core.plugins.types import NodeRequest, NodeStatus, NotAuthorized, Offer, Transient

POLL = 5.0
"""Seconds between two looks at machines that are on their way; a Node that joins is noticed at once."""

TRY_AGAIN = 20.0
"""Seconds until something is tried again that the provisioner says may work in a moment."""


def nodes(case: Case, plan: Plan) -> NodeStatus | None:
    """The machines, once they are ready; None while they are not, with everything said and asked that there is."""
    candidate = next_candidate(case, plan)
    if case.attempt is not None and (candidate is None or not _same(case.attempt, candidate.offer)):
        # What was asked for is not offered any more. It is given back first: nothing may be held at two places.
        give_up(case, "OfferGone", "it is not offered any more")
        return None
    if candidate is None:
        _none_left(case)
        return None
    offer = candidate.offer
    request = NodeRequest(
        case.request_id, offer, requirements(plan.workspace), {labels.WORKSPACE: case.name, labels.WORKSPACE_NAMESPACE: case.namespace}
    )  # fmt: skip
    if case.attempt is None:
        about = {"started": case.time, "revision": case.history.current.number}
        price = {"pricePerHour": offer.price.per_hour} if offer.price else {}
        case.attempts.append(_attempt(offer) | about | price)
    ask = Ensure(offer.provisioner, request)
    status = case.observed.asked.get(ask.key)
    if status is None:
        if case.observed.provisioners.get(offer.provisioner, True) and not _written(case):
            # Before the first effect outside: from here on, deleting the Workspace waits until everything is given back, and
            # whoever comes after a crash knows whom we asked.
            case.finalizer = True if not case.has_finalizer else None
            case.again = True
        else:
            case.ask = ask
        return None
    case.status["targetNodeCount"] = request.requirements.count
    if status.phase == "ready":
        if len(status.nodes) == request.requirements.count:  # else the scheduler takes its pick
            case.status["workerNodes"] = list(status.nodes)
        case.set(conditions.NODES_READY, "True", "NodesReady", "")
        case.set(conditions.RESOURCE_READY, "True", "workspaceResourceStatusSuccess", "")
        return status
    if status.phase == "failed":
        _failed(case, request, status)
        return None
    _pending(case, status.message or f"waiting for {offer}")
    case.look_again(POLL)
    return None


def _written(case: Case) -> bool:
    """Whether the API server has this attempt, and holds the Workspace for it."""
    written = (case.workspace.get("status") or {}).get("attempts") or []
    return case.has_finalizer and len(written) == len(case.attempts) and not written[-1].get("ended")


def next_candidate(case: Case, plan: Plan) -> Candidate | None:
    """The one whose attempt goes on, else the best that has not been tried for this revision."""
    usable = [c for c in plan.candidates if not c.rejected]
    if case.attempt is not None:
        going_on = [c for c in usable if _same(case.attempt, c.offer)]
        if going_on:
            return going_on[0]
    tried = _given_up(case)
    return next((c for c in usable if not any(_same(a, c.offer) for a in tried)), None)


GIVEN_UP = frozenset({"InsufficientCapacity", "QuotaExceeded", "Unsupported"})
"""How an attempt ends after which the next offer is tried."""


def _given_up(case: Case) -> list[dict[str, Any]]:
    revision = case.history.current.number
    return [a for a in case.attempts if a.get("reason") in GIVEN_UP and a.get("revision") == revision]


def _attempt(offer: Offer) -> dict[str, Any]:
    return {
        "provisioner": offer.provisioner,
        "instanceType": offer.instance_type,
        "region": offer.region,
        "capacityType": offer.capacity_type,
    }


def _same(attempt: dict[str, Any], offer: Offer) -> bool:
    return all(attempt.get(k, "") == v for k, v in _attempt(offer).items())


def _pending(case: Case, message: str) -> None:
    if case.set(conditions.RESOURCE_READY, "False", "workspaceResourceStatusNotReady", message):
        case.note("Normal", "WaitingForNodes", message)
    case.set(conditions.WORKSPACE_SUCCEEDED, "False", "workspacePending", message)
    case.state("Pending")


def _failed(case: Case, request: NodeRequest, status: NodeStatus) -> None:
    """The provisioner said no. What follows depends on the kind of no; its words are kept."""
    failure = status.failure
    kind = type(failure).__name__ if failure else "Unsupported"
    message = f"{request.offer.provisioner} cannot get {request.offer.instance_type}: {status.message or failure}"
    if isinstance(failure, Transient):
        _pending(case, f"{message}; trying again")
        case.look_again(TRY_AGAIN)
        return
    _pending(case, message)
    # Given back before anything else is asked for: a machine that comes late after all would be paid twice.
    give_up(case, kind, status.message or str(failure))
    if case.attempt is None:
        case.note("Warning", kind, message)
        if isinstance(failure, NotAuthorized):
            case.failed(message)


def _none_left(case: Case) -> None:
    """Every offer was tried. What each of them said is in the message, and in ``status.attempts``."""
    tried = _given_up(case)
    said = "; ".join(f"{a['instanceType']}: {a.get('message') or a['reason']}" for a in tried)
    message = f"no machine could be had ({said})" if said else "no machine can be had"
    case.set(conditions.RESOURCE_READY, "False", "workspaceResourceStatusNotReady", message)
    case.failed(message)


def give_up(case: Case, reason: str, message: str) -> None:
    """Give back what the present attempt may have got, and end it; asks to be called again until that is done."""
    if case.attempt is not None and given_back(case, str(case.attempt["provisioner"])):
        case.end_attempt(reason, message)
        case.again = True


def given_back(case: Case, provisioner: str) -> bool:
    """Whether nothing is left of the present request there; asks for it, and to be called again, as long as there is."""
    release = Release(provisioner, case.request_id)
    answer = case.observed.asked.get(release.key)
    if answer is None:
        case.ask = release
    elif answer.phase != "absent":
        if answer.message:
            case.set(conditions.NODES_READY, "Unknown", "ReleasePending", f"{provisioner}: {answer.message}")
        case.look_again(POLL)
    return answer is not None and answer.phase == "absent"
