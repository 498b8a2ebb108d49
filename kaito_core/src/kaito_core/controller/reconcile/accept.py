"""First phase: can this Workspace be run at all? Whatever is wrong is said before a machine is asked for."""

from __future__ import annotations

from kaito_core.api import conditions
from kaito_core.controller.reconcile.case import Case, find, seconds, words
from kaito_core.controller.reconcile.nodes import give_up
from kaito_core.controller.reconcile.observed import WAITING
from kaito_core.controller.reconcile.tenants import not_allowed
from kaito_core.kube.kinds import REVISIONS

WAIT = 15.0
"""Seconds until it is looked again whether a missing ConfigMap or Secret, which nobody watches, has appeared."""


KEPT = 300.0
"""Seconds for which machines that were asked for are kept while something is missing that may come back: a Secret that is being
replaced, a cloud that does not answer."""


def accept(case: Case) -> bool:
    """Whether there is a plan to go on with; the revision is on its way into the history."""
    refusal, problems = case.observed.planned.refusal, case.observed.planned.problems
    if forbidden := not_allowed(case):
        refusal, problems = "PolicyRefused", tuple(forbidden)
    if refusal is not None:
        waiting = refusal in WAITING
        ends = not waiting or refusal == "NameTaken" or _waited(case) > KEPT
        message = words(problems)
        if case.set(conditions.ACCEPTED, "False", refusal, message):
            case.note("Warning", refusal, message)
        kept = "machines were asked for, and are " + ("given back" if ends else "kept for a while")
        asked = kept if case.attempt else "no machine has been asked for"
        case.set(conditions.RESOURCE_READY, "False", "workspaceResourceStatusNotReady", asked)
        reason = "workspacePending" if waiting else "workspaceFailed"
        case.set(conditions.WORKSPACE_SUCCEEDED, "False", reason, message)
        case.state("Pending" if waiting else "Failed")
        if ends:
            give_up(case, "Refused", message)
        if waiting and (case.attempt is not None or refusal != "NoNode"):
            case.look_again(WAIT)
        case.look_for_names()
        return False
    case.set(conditions.ACCEPTED, "True", "Planned", words(problems))
    case.status.pop("finishedRevision", None)  # of an earlier revision: from here on it can be run again
    if case.history.missing is not None:
        case.create.append((REVISIONS, case.history.missing))
    return True


def _waited(case: Case) -> float:
    """Seconds since the Workspace could last be planned."""
    accepted = find(case.status.get("conditions"), conditions.ACCEPTED)
    return case.observed.now - seconds(accepted["lastTransitionTime"]) if accepted else 0.0
