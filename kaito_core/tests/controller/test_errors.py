"""Whatever the API server answers, the end is that of a run without an error: an error is said, and writes over nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from kaito_core.kube.errors import ApiError, Conflict, Forbidden, TooManyRequests, Unreachable
from kaito_core.kube.kinds import CONFIG_MAPS, JOBS

from .simulation import Simulation, workspace_object
from .test_decide import FINISHED, ended
from .test_serving import IDLE, serving

ERRORS = (
    ApiError("500: internal error", status=500),
    TooManyRequests("429: too many requests", status=429),
    Conflict("409: the object has been modified", status=409),
    Forbidden("403: not permitted", status=403),
    Unreachable("timed out"),
)

# --- lives, each of which ends somewhere


def succeeds(simulation: Simulation) -> None:
    settle(simulation)
    simulation.pod(container=ended(0, FINISHED))
    simulation.end_job("Complete")
    settle(simulation)


def fails(simulation: Simulation) -> None:
    settle(simulation)
    simulation.pod(container=ended(2, {"event": "failed", "stage": "check", "message": "no rows"}))
    simulation.end_job("Failed", message="exit code 2")
    settle(simulation)


def is_ready(simulation: Simulation) -> None:
    simulation.demand = True
    settle(simulation)
    simulation.answers()
    settle(simulation)


def falls_asleep(simulation: Simulation) -> None:
    is_ready(simulation)
    simulation.demand = False
    simulation.now += 2 * IDLE
    settle(simulation)


def is_tuned_and_served(simulation: Simulation) -> None:
    simulation.activator = ("10.0.0.1", 20001)
    succeeds(simulation)
    is_ready(simulation)


def is_deleted(simulation: Simulation) -> None:
    settle(simulation)
    simulation.remove()
    settle(simulation)


def is_deleted_while_serving(simulation: Simulation) -> None:
    is_ready(simulation)
    simulation.remove()
    settle(simulation)


def has_no_machine(simulation: Simulation) -> None:
    simulation.offers = ()
    settle(simulation)


def gives_up_for_want_of_a_pod(simulation: Simulation) -> None:
    simulation.refused = "exceeded quota"
    settle(simulation)
    simulation.now += 700
    settle(simulation)


def settle(simulation: Simulation) -> None:
    for _ in range(30):
        before = simulation.writes
        simulation.reconcile()
        if simulation.workspace is None:
            return
        if not simulation.failed and simulation.writes == before and not simulation._is_leaving():
            return
    raise AssertionError("it never comes to rest")


def tuned(**given: Any) -> Simulation:
    return Simulation(workspace_object(), **given)


LIVES: list[tuple[Callable[..., Simulation], Callable[[Simulation], None]]] = [
    (tuned, succeeds),
    (tuned, fails),
    (tuned, has_no_machine),
    (tuned, gives_up_for_want_of_a_pod),
    (tuned, is_deleted),
    (tuned, is_tuned_and_served),
    (lambda **given: serving("always", **given), is_ready),
    (lambda **given: serving("onDemand", **given), falls_asleep),
    (lambda **given: serving("onDemand", **given), is_deleted_while_serving),
    (lambda **given: serving("always", **given), gives_up_for_want_of_a_pod),
]


def end(simulation: Simulation) -> Any:
    """What there is in the end, but for names and times that must differ."""
    objects = sorted((str(kind), name) for kind, name in simulation.objects)
    told = simulation.told and (simulation.told.address, simulation.told.refused)
    if simulation.workspace is None:
        return None, objects, sorted(simulation.machines)
    status = copy.deepcopy(simulation.workspace.get("status", {}))
    conditions = {c["type"]: (c["status"], c["reason"], c["message"]) for c in status.pop("conditions")}
    finalizers = simulation.workspace["metadata"].get("finalizers")
    return status, conditions, finalizers, objects, sorted(simulation.machines), told


@pytest.mark.parametrize("lost", [False, True], ids=["not-done", "answer-lost"])
@pytest.mark.parametrize(("begin", "live"), LIVES, ids=lambda f: f.__name__.strip("<>"))
def test_an_error_of_the_api_server_changes_no_end(
    begin: Callable[..., Simulation], live: Callable[[Simulation], None], lost: bool
) -> None:
    """Every write of every life × every error."""
    clean = begin(gone_after=1)
    live(clean)
    wanted, calls = end(clean), clean.writes
    assert calls > 1
    for error in (ERRORS[0], ERRORS[-1]) if lost else ERRORS:  # what was done is not called refused
        for at in range(calls):
            simulation = begin(gone_after=1, error=error, error_at=at, answer_lost=lost)
            live(simulation)
            assert simulation.error_at < 0, "it was met"
            assert end(simulation) == wanted, (error, at)
            assert simulation.most <= 1
            assert simulation.bought == clean.bought


def test_what_fails_is_said_as_long_as_it_fails_and_nothing_else_is_changed() -> None:
    simulation = Simulation(denied={JOBS: Forbidden("the webhook says no", status=403)})
    simulation.reconcile()
    simulation.reconcile()
    assert simulation.condition("Reconciled")["status"] == "False"
    assert simulation.condition("Reconciled")["message"] == "the webhook says no; trying again"
    since = simulation.condition("Reconciled")["lastTransitionTime"]
    simulation.now += 30
    simulation.reconcile()
    assert simulation.condition("Reconciled")["lastTransitionTime"] == since
    simulation.denied.clear()
    simulation.settle()
    assert not simulation.condition("Reconciled")
    assert {JOBS, CONFIG_MAPS} <= {k for k, _ in simulation.objects}
