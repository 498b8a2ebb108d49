"""`decide`: from one Workspace and what is known of its world to what shall be done. Pure: no clock, no network, no cluster.

    accept ──> nodes ──> workload ──> outcome ──> serving      and, when the Workspace is deleted: cleanup

Each phase is a file. What was decided before is never remembered, only seen: after any crash, the same question gets the
same answer."""

from __future__ import annotations

import math

from kaito_core.controller.reconcile.accept import accept
from kaito_core.controller.reconcile.case import Case, seconds_or_never
from kaito_core.controller.reconcile.cleanup import cleanup
from kaito_core.controller.reconcile.decision import Decision, Deletion
from kaito_core.controller.reconcile.machines import GONE, MACHINE_LOST, holds
from kaito_core.controller.reconcile.nodes import give_up, next_candidate, nodes
from kaito_core.controller.reconcile.observed import Observed, World
from kaito_core.controller.reconcile.outcome import outcome, release
from kaito_core.controller.reconcile.serving import needs_serving_plan, retire, serve
from kaito_core.controller.reconcile.tenants import warn_of_next_revision
from kaito_core.controller.reconcile.workload import outdated, workload
from kaito_core.kube.kinds import REVISIONS, Object


def decide(workspace: Object, observed: Observed, world: World) -> Decision:
    """What to do about ``workspace`` now."""
    case = Case(workspace, observed, world)
    if case.deleting:
        cleanup(case)
    elif case.serves:
        serve(case)
    elif case.finished or not case.tunes:
        retire(case)
        release(case)
    elif case.job is not None and case.job_is_current:
        outcome(case, case.job)
    else:
        _start(case)
    if not case.deleting:
        warn_of_next_revision(case)
    return case.decision()


def needs_plan(case: Case) -> bool:
    """Whether the decision will look at `Observed.planned`, which is not for nothing."""
    if case.deleting or case.name_conflicts:
        return False
    if case.serves:
        return needs_serving_plan(case)
    return case.tunes and not (case.finished or (case.job is not None and case.job_is_current))


def _start(case: Case) -> None:
    """This revision has no job yet; one of another may still be there, and goes."""
    replaced = outdated(case)
    plan = case.observed.planned.plan
    if not accept(case) or plan is None:
        return
    case.delete.extend(Deletion(REVISIONS, r["metadata"]["name"], r["metadata"]["uid"]) for r in case.history.surplus)
    if replaced:
        _without_end(case)
        return
    ready = nodes(case, plan)
    if ready is not None:
        chosen = next_candidate(case, plan)
        workload(case, plan.on(chosen) if chosen else plan, ready)


def _without_end(case: Case) -> None:
    """A job whose pods do not end (their kubelet is dead) keeps no machine that is paid for."""
    deleted = seconds_or_never(((case.job or {}).get("metadata") or {}).get("deletionTimestamp"))
    if case.attempt is None or not math.isfinite(deleted) or not holds(case, case.attempt):
        return
    left = deleted + GONE - case.observed.now
    if left > 0:
        case.look_again(left)
        return
    give_up(case, MACHINE_LOST, f"the pods of the job before did not end within {GONE / 60:.0f} minutes")
