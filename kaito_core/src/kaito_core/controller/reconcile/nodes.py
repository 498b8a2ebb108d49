"""Second phase: machines to run on. Asks one provisioner at a time, and goes to the next offer when one cannot be had.

what the provisioner says      what follows
InsufficientCapacity           given back, then the next offer
QuotaExceeded, Unsupported     the same
nothing for too long           the same (``TimedOut``, after the provisioner's own patience)
Transient                      the same offer again, later each time
NotAuthorized                  the end: no other offer would change that
"""

from __future__ import annotations

import json
from typing import Any

from kaito_core.api import conditions, labels
from kaito_core.controller.reconcile.case import SHOWN, Case, find, first_attempt, number_of, seconds
from kaito_core.controller.reconcile.decision import Ensure, Release
from kaito_core.controller.reconcile.observed import Installed
from kaito_core.controller.reconcile.starting import FAILED_CREATE, refused_for_too_long, retry_in, retry_words
from kaito_core.planning.plan import Candidate, Plan, requirements
from kaito_core.plugins.types import NodeRequest, NodeStatus, NotAuthorized, Offer, Transient

POLL = 5.0
"""Seconds between two looks at machines that are on their way; a Node that joins is noticed at once."""

SOONEST, LATEST = 5.0, 120.0
"""Seconds until something is tried again that the provisioner says may work in a moment: half as long as it has been tried by
then, which doubles from time to time, within these bounds."""

GIVEN_UP = frozenset({"InsufficientCapacity", "QuotaExceeded", "Unsupported", "TimedOut"})
"""How an attempt ends after which the next offer is tried."""

MOST_TRIED = 40
"""Offers that are tried one after the other. Fewer than `KEPT_ATTEMPTS`: what is no longer listed would be tried again, for ever."""

NOT_AUTHORIZED = NotAuthorized.__name__
"""How an attempt ends after which nothing is tried."""


def nodes(case: Case, plan: Plan) -> NodeStatus | None:
    """The machines, once they are ready; None while they are not, with everything said and asked that there is."""
    if case.attempt is not None and case.attempt.get("reason"):
        give_up(case, case.attempt["reason"], case.attempt.get("message", ""))  # begun before, and not at its end yet
        return None
    refused = refused_for_too_long(case)
    if refused and case.attempt is not None and _installed(case, case.attempt).holds:
        wait_in_vain(case, FAILED_CREATE, refused)
        return None
    if case.attempt is None and not case.serving and retry_in(case) > 0:
        case.pending(retry_words(case))
        case.look_again(retry_in(case))
        return None
    candidate = next_candidate(case, plan)
    if case.attempt is not None and (candidate is None or not _same(case.attempt, candidate.offer)):
        if case.attempt["provisioner"] in case.observed.planned.failed:
            case.pending(f"{case.attempt['provisioner']} does not answer; what it was asked for is waited for")
            pending = find(case.status.get("conditions"), conditions.RESOURCE_READY) or {}
            silent = case.observed.now - seconds(pending["lastTransitionTime"])
            patience = _installed(case, case.attempt).patience
            if min(silent, _waited(case)) > patience:
                give_up(case, "TimedOut", f"the provisioner has not answered for {patience / 60:.0f} minutes")
            else:
                case.look_again(SOONEST)
            return None
        # What was asked for is not offered any more. It is given back first: nothing may be held at two places.
        give_up(case, "OfferGone", "it is not offered any more")
        return None
    if candidate is None:
        _none_left(case)
        return None
    also = _alternatives(case, plan, candidate)
    if case.attempt is None:
        case.begin_attempt(_attempt(candidate.offer) | _price(candidate.offer))
    tags = {labels.WORKSPACE: case.name, labels.WORKSPACE_NAMESPACE: case.namespace}
    annotations = case.workspace["metadata"].get("annotations") or {}
    if labels.NODE_CLASS_NAME in annotations:
        tags[labels.NODE_CLASS_NAME] = str(annotations[labels.NODE_CLASS_NAME])
    request = NodeRequest(case.request_id, candidate.offer, requirements(plan.workspace), tags, also)
    case.status["targetNodeCount"] = request.requirements.count
    ask = Ensure(candidate.offer.provisioner, request)
    status = case.observed.asked.get(ask.key)
    if status is None:
        if _installed(case, candidate.offer).holds and not _written(case):
            # Before the first effect outside: from here on, deleting the Workspace waits until everything is given back, and
            # whoever comes after a crash knows whom we asked.
            if not case.has_finalizer:
                case.finalizer = True
                if (
                    len(case.attempts) == 1 and not case.serving
                ):  # in one write; the status follows when there is more to say
                    case.annotations = {labels.ASKED: json.dumps(case.attempt)}
                    case.silent = True
            case.again = True
            case.pending(f"{candidate.offer.provisioner} is asked for {candidate.offer}")
        else:
            case.ask = ask
        return None
    if status.phase == "ready":
        _ready(case, request, status)
        return status
    if status.phase == "failed":
        _failed(case, request, status)
        return None
    if status.phase == "releasing":
        give_up(case, "Lost", status.message or "it is being taken away")
        return None
    if not _installed(case, candidate.offer).holds or _waited(case) >= POLL:
        case.pending(status.message or f"waiting for {candidate.offer}")
    else:  # it may be ready in a moment, and what is written says enough until then
        case.silent = not case.serving
    if not _out_of_patience(case, request, status.message):
        case.look_again(POLL)
    return None


# --- which


def next_candidate(case: Case, plan: Plan) -> Candidate | None:
    """The one whose attempt goes on, else the best that has not been tried for this revision."""
    usable = [c for c in plan.candidates if not c.rejected]
    if case.attempt is not None:
        going_on = [c for c in usable if _same(case.attempt, c.offer)]
        if going_on:
            return going_on[0]
    tried = _given_up(case)
    if len(tried) >= MOST_TRIED:
        return None
    return next((c for c in usable if not any(_covers(a, c.offer) for a in tried)), None)


def _alternatives(case: Case, plan: Plan, candidate: Candidate) -> tuple[Offer, ...]:
    """Offers of the same provisioner on which the job runs in just the same way, and that have not been tried."""
    offer, tried = candidate.offer, _given_up(case)
    return tuple(
        c.offer
        for c in plan.candidates
        if not c.rejected
        and c is not candidate
        and (c.offer.provisioner, c.offer.gpus) == (offer.provisioner, offer.gpus)
        and (c.runtime, c.fit.configuration) == (candidate.runtime, candidate.fit.configuration)
        and not any(_covers(a, c.offer) for a in tried)
    )


def _given_up(case: Case) -> list[dict[str, Any]]:
    revision = case.history.current.number
    begun = str((case.status.get("serving") or {}).get("since", "")) if case.serving else ""
    tried = [a for a in case.attempts if a.get("reason") in GIVEN_UP and a.get("revision") == revision]
    return [a for a in tried if str(a.get("started", "")) >= begun]  # an endpoint begins anew each time it is woken


def _attempt(offer: Offer) -> dict[str, Any]:
    return {
        "provisioner": offer.provisioner,
        "instanceType": offer.instance_type,
        "region": offer.region,
        "capacityType": offer.capacity_type,
    }


def _price(offer: Offer) -> dict[str, Any]:
    return {"pricePerHour": offer.price.per_hour} if offer.price else {}


def _same(attempt: dict[str, Any], offer: Offer) -> bool:
    return all(attempt.get(k, "") == v for k, v in _attempt(offer).items())


def _covers(attempt: dict[str, Any], offer: Offer) -> bool:
    """Whether this offer was asked for in that attempt."""
    named = (attempt.get("instanceType"), *attempt.get("alternatives", ()))
    return _same({**attempt, "instanceType": offer.instance_type}, offer) and offer.instance_type in named


def _installed(case: Case, asked: Offer | dict[str, Any]) -> Installed:
    """What is known of the provisioner of an offer, or of an attempt."""
    name = asked.provisioner if isinstance(asked, Offer) else str(asked["provisioner"])
    return case.observed.provisioners.get(name, Installed())


def _written(case: Case) -> bool:
    """Whether the API server has this attempt, and holds the Workspace for it."""
    written = (case.workspace.get("status") or {}).get("attempts") or []
    if not written and len(case.attempts) == 1:
        return case.has_finalizer and first_attempt(case.workspace) is not None
    return (
        case.has_finalizer
        and bool(written)
        and not written[-1].get("ended")
        and number_of(written) == number_of(case.attempts)
    )


# --- what was said


def _ready(case: Case, request: NodeRequest, status: NodeStatus) -> None:
    if case.attempt is not None:
        case.attempt["revision"] = (
            case.history.current.number
        )  # of an earlier one where its machines were kept for this
        case.attempt.pop("idleSince", None)
    if status.offer is not None and case.attempt is not None:
        case.attempt.pop("pricePerHour", None)
        case.attempt.update(_attempt(status.offer) | _price(status.offer))
    if len(status.nodes) == request.requirements.count:  # else the scheduler takes its pick
        case.status["workerNodes"] = list(status.nodes)
    case.set(conditions.NODES_READY, "True", "NodesReady", "")
    case.set(conditions.RESOURCE_READY, "True", "workspaceResourceStatusSuccess", "")


def _failed(case: Case, request: NodeRequest, status: NodeStatus) -> None:
    """The provisioner said no. What follows depends on the kind of no; its words are kept."""
    failure = status.failure
    kind = type(failure).__name__ if failure else "Unsupported"
    message = f"{request.offer.provisioner} cannot get {request.offer.instance_type}: {status.message or failure}"
    if isinstance(failure, Transient):
        case.pending(f"{message}; trying again")
        if not _out_of_patience(case, request, status.message or str(failure)):
            later = min(LATEST, max(SOONEST, _waited(case) / 2))
            case.look_again(max(later, failure.retry_after or 0.0))
        return
    case.pending(message)
    if case.attempt is not None and status.asked:
        case.attempt["alternatives"] = list(dict.fromkeys(o.instance_type for o in status.asked))[:64]
    # Given back before anything else is asked for: a machine that comes late after all would be paid twice.
    give_up(case, kind, status.message or str(failure))


def _out_of_patience(case: Case, request: NodeRequest, words: str) -> bool:
    """Whether it has taken too long, and is being given up for the next offer."""
    patience = _installed(case, request.offer).patience
    if _waited(case) <= patience:
        return False
    give_up(case, "TimedOut", f"not ready after {patience / 60:.0f} minutes" + (f": {words}" if words else ""))
    return True


def _waited(case: Case) -> float:
    """Seconds since the attempt began."""
    return case.observed.now - seconds(case.attempt["started"]) if case.attempt else 0.0


REMEDIES = {
    "QuotaExceeded": "ask the cloud for more quota",
    "InsufficientCapacity": "allow more (resource.instanceTypes, regions, zones, capacityType: auto), or try again later",
    "TimedOut": "see why machines do not join: `kaito doctor`, and the provisioner's own log",
    "Unsupported": "choose other machines in resource",
}
"""What helps against what, when every offer has failed."""


def _none_left(case: Case) -> None:
    """Every offer was tried. What each of them said is in the message, and in ``status.attempts``."""
    tried = _given_up(case)
    said = "; ".join(f"{a['instanceType']}: {a.get('message') or a['reason']}" for a in tried)
    helps = "; ".join(dict.fromkeys(REMEDIES[a["reason"]] for a in tried))
    message = f"no machine could be had ({said}) – {helps}" if said else "no machine can be had"
    case.set(conditions.RESOURCE_READY, "False", "workspaceResourceStatusNotReady", message)
    case.failed(message)


# --- giving back


def wait_in_vain(case: Case, reason: str, message: str) -> None:
    """Give back machines that have waited in vain. An endpoint has failed, for a while; a job waits for the next try."""
    if case.attempt is not None and not case.attempt.get("reason"):
        case.note("Warning", reason, message)
    if case.serving:
        if case.attempt is not None:
            case.attempt.update(reason=reason, message=message[:SHOWN])
        case.failed(message)
        case.again = True
        return
    case.pending(message)
    give_up(case, reason, message)
    if case.attempt is None:
        case.status.pop("workerNodes", None)


def give_up(case: Case, reason: str, message: str) -> None:
    """Give back what the present attempt may have got, and end it; asks to be called again until that is done."""
    attempt = case.attempt
    if attempt is None:
        return
    # Whoever looks next goes on giving it back, and does not ask for it again.
    attempt.update(reason=reason, message=message[:SHOWN])
    if not given_back(case, str(attempt["provisioner"])):
        return
    case.end_attempt(reason, message)
    case.again = True
    if reason in GIVEN_UP or reason == NOT_AUTHORIZED:
        words = f"{attempt['provisioner']} cannot get {attempt.get('instanceType')}: {message}"
        case.note("Warning", reason, words)
        if reason == NOT_AUTHORIZED:
            case.failed(words)


def given_back(case: Case, provisioner: str) -> bool:
    """Whether nothing is left of the present request there; asks for it, and to be called again, as long as there is."""
    release = Release(provisioner, case.request_id)
    answer = case.observed.asked.get(release.key)
    if answer is None:
        case.ask = release
    elif answer.phase == "absent":
        case.unset(conditions.NODES_READY)  # no words of a release that took its time outlive it
    else:
        if answer.message:
            case.set(conditions.NODES_READY, "Unknown", "ReleasePending", f"{provisioner}: {answer.message}")
        case.look_again(POLL)
    return answer is not None and answer.phase == "absent"
