"""However long a Workspace lives: what its status holds stays within what the API server takes, and no name for a machine comes twice."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest

from kaito_core.api.crd import inference_set_crd
from kaito_core.controller.decide_set import ObservedSet, decide_set
from kaito_core.controller.reconcile.case import KEPT_ATTEMPTS, error_patch, request_id
from kaito_core.controller.reconcile.decision import Ensure, Observe, Release
from kaito_core.controller.reconcile.nodes import MOST_TRIED
from kaito_core.plugins.types import InsufficientCapacity, NodeStatus, Transient
from kaito_core.problems import Failure

from .simulation import (
    OFFERS,
    STATUS_SCHEMA,
    Crash,
    Simulation,
    bounds,
    too_much,
    workspace_object,
)
from .test_serving import serving

MANY = 250
WAKES = 105


def attempts(simulation: Simulation) -> list[dict[str, Any]]:
    assert simulation.workspace is not None
    return list(simulation.workspace["status"]["attempts"])


@pytest.mark.parametrize(("times", "crashes"), [(MANY, False), (105, True)])
def test_a_job_outlives_any_number_of_machines(times: int, crashes: bool) -> None:
    simulation = Simulation()
    for n in range(times):
        simulation.crash_after = n % 7 if crashes else -1
        with contextlib.suppress(Crash):
            simulation.settle()
        simulation.crash_after = -1
        simulation.settle()
        assert simulation.job is not None
        simulation.take_away()
    simulation.settle()
    assert len(simulation.requests) == len(set(simulation.requests)) == times + 1, "no request id comes twice"
    assert simulation.most == 1
    assert len(attempts(simulation)) == KEPT_ATTEMPTS
    assert attempts(simulation)[-1]["number"] == times
    assert "ended" not in attempts(simulation)[-1], "what holds a machine is never dropped"
    simulation.remove()
    simulation.settle()
    assert simulation.workspace is None
    assert not simulation.machines


def test_an_endpoint_wakes_any_number_of_times() -> None:
    simulation = serving()
    for _ in range(WAKES):
        simulation.demand = True
        simulation.settle()
        simulation.answers()
        simulation.settle()
        simulation.demand = False
        simulation.now += 10_000
        simulation.settle()
        assert not simulation.machines
    assert len(set(simulation.requests)) == WAKES
    assert len(attempts(simulation)) == KEPT_ATTEMPTS


@pytest.mark.parametrize("before", [1, 49, 50, 51, 99, 100])
@pytest.mark.parametrize("going_on", [False, True])
def test_a_status_from_before_attempts_had_numbers_is_counted_on(before: int, going_on: bool) -> None:
    old: dict[str, Any] = {"provisioner": "cloud", "instanceType": "cheap", "region": "", "capacityType": "on-demand",
                           "started": "2027-01-15T07:00:00Z", "revision": 1}  # fmt: skip
    simulation = Simulation()
    simulation.settle()
    assert simulation.workspace is not None
    now = attempts(simulation)[-1]
    ended = [{**old, "ended": "2027-01-15T07:30:00Z", "reason": "MachineLost"} for _ in range(before)]
    used = {request_id("u-1", ended[:n]) for n in range(before)}
    simulation.workspace["status"]["attempts"] = [*ended[: before - going_on], *([now] if going_on else [])]
    if going_on:
        assert request_id("u-1", attempts(simulation)) == request_id("u-1", ended[: before - 1]), (
            "the machine that it has"
        )
    simulation.machines = {request_id("u-1", attempts(simulation)): "cheap"} if going_on else {}
    del simulation.requests[:]
    for _ in range(3):
        simulation.take_away()
        simulation.settle()
        simulation.change(input={"urls": [f"https://example.com/{len(simulation.requests)}.jsonl"]})
        simulation.settle()
    assert len(simulation.requests) == len(set(simulation.requests)) >= 3
    assert not set(simulation.requests) & used


def test_no_more_offers_are_tried_than_are_remembered() -> None:
    """Else the first one would be forgotten, and tried again, for ever."""
    offers = tuple(replace(OFFERS[0], instance_type=f"type-{n}", region=f"r{n}") for n in range(MOST_TRIED + 30))
    simulation = Simulation(offers=offers, failures={o.instance_type: InsufficientCapacity("none") for o in offers})
    for _ in range(10):
        with contextlib.suppress(AssertionError):  # so many decisions are made in several reconciles
            simulation.settle()
    assert simulation.state == "Failed"
    assert len(attempts(simulation)) == MOST_TRIED
    assert not simulation.machines


LONG = "x" * 100_000


class Talkative(Simulation):
    """A cloud that says more, and is asked for more, than anything can hold."""

    def answer(self, question: Ensure | Observe | Release) -> NodeStatus:
        if isinstance(question, Ensure):
            asked = tuple(replace(OFFERS[0], instance_type=f"type-{n}") for n in range(500))
            return NodeStatus(
                question.request.id, "failed", message=LONG, failure=InsufficientCapacity(LONG), asked=asked
            )
        return super().answer(question)


def test_every_bound_of_the_crd_is_kept_by_who_writes_there() -> None:
    """Enumerated from the CRD: a bound that is new there needs its place here."""
    kept = set()

    def wrote(simulation: Simulation, *places: str) -> None:
        assert simulation.workspace is not None
        assert not list(too_much(STATUS_SCHEMA, simulation.workspace["status"]))
        kept.update(places)

    talks = Talkative()
    talks.settle()
    attempt = attempts(talks)[0]
    assert len(attempt["alternatives"]) == 64
    assert len(attempt["message"]) <= 1024
    wrote(talks, "status.attempts[].alternatives", "status.conditions[].type", "status.conditions[].reason")

    many = Simulation()
    for _ in range(150):
        many.settle()
        many.take_away()
    wrote(many, "status.attempts")

    for failing in (
        Simulation(failures={"cheap": Transient(LONG)}),
        Simulation(refuses=LONG),
        Simulation(refused=LONG),
        serving("always", refuses=LONG),
        serving("always", refused=LONG),
    ):
        with contextlib.suppress(AssertionError):
            failing.settle()
        failing.reconcile()
        wrote(failing, "status.conditions[].message")
    workspace = workspace_object()
    workspace["status"] = error_patch(workspace, Failure(LONG), 0.0)["status"]
    assert not list(too_much(STATUS_SCHEMA, json.loads(json.dumps(workspace["status"]))))
    assert kept == set(bounds(STATUS_SCHEMA))


def test_the_status_of_a_set_keeps_its_bounds() -> None:
    version = inference_set_crd()["spec"]["versions"][-1]
    schema = version["schema"]["openAPIV3Schema"]["properties"]["status"]
    assert {b.removeprefix("status.conditions[].") for b in bounds(schema)} == {"type", "reason", "message"}
    wrong = {"metadata": {"name": "llm", "namespace": "default", "uid": "u"}, "spec": {"replicas": LONG}}
    said = decide_set({"apiVersion": "kaito.sh/v1beta1", "kind": "InferenceSet", **wrong}, ObservedSet(0.0)).status
    assert said is not None
    assert said["conditions"]
    assert not list(too_much(schema, json.loads(json.dumps(said))))


def test_the_simulation_refuses_what_the_api_server_would() -> None:
    assert list(too_much(STATUS_SCHEMA, {"attempts": [{}] * 101}))
    assert list(too_much(STATUS_SCHEMA, {"conditions": [{"message": "x" * 32769}]}))
