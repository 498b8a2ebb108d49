"""Every wait has a limit that does not depend on an object which may never come: no machine is paid for without a reason."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kaito_core.controller.reconcile.starting import (
    FIRST_RETRY_SECONDS,
    LONGEST_RETRY_SECONDS,
    NO_POD_SECONDS,
    NOT_READY_SECONDS,
    NOT_STARTED_SECONDS,
)
from kaito_core.kube.errors import Forbidden
from kaito_core.kube.kinds import CONFIG_MAPS, JOBS, STATEFUL_SETS

from .simulation import Crash, Simulation
from .test_serving import IDLE, awake, phase, serving

QUOTA = 'pods "one-0" is forbidden: exceeded quota: gpus, requested: pods=1, used: pods=0, limited: pods=0'
LOOK = 60.0
"""Seconds between two looks of the test: no decision asks to be looked at more seldom while it waits for a pod."""


def tuning(**given: Any) -> Simulation:
    simulation = Simulation(**given)
    simulation.settle()
    return simulation


def endpoint(policy: str = "always", count: int = 1, **given: Any) -> Simulation:
    simulation = serving(policy, **given)
    assert simulation.workspace is not None
    simulation.workspace["resource"] = {"count": count}
    simulation.demand = True
    simulation.settle()
    return simulation


def container(state: dict[str, Any], name: str = "one") -> dict[str, Any]:
    return {"name": name, "image": "r.io/x:1", "state": state}


CREATING = {"waiting": {"reason": "ContainerCreating"}}
FETCHED = {"terminated": {"exitCode": 0, "finishedAt": "2027-01-15T08:10:00Z"}}


# --- the waits


def no_pod_of_the_job() -> Simulation:
    return tuning(refused=QUOTA)


def no_pod_and_no_word_why() -> Simulation:
    return tuning()


def a_suspended_job() -> Simulation:
    simulation = tuning()
    assert simulation.job is not None
    simulation.job["spec"]["suspend"] = True
    return simulation


def a_running_job_that_is_suspended() -> Simulation:
    simulation = tuning()
    simulation.pod()
    simulation.settle()
    simulation.now += 3 * 3600
    simulation.pods.clear()
    assert simulation.job is not None
    simulation.job["spec"]["suspend"] = True
    return simulation


def no_second_pod_after_the_first_failed() -> Simulation:
    simulation = tuning()
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": "2027-01-15T08:05:00Z"}}
    simulation.pod(container=ended, phase="Failed")
    simulation.settle()
    simulation.refused = QUOTA
    return simulation


def a_pod_that_does_not_end() -> Simulation:
    simulation = tuning()
    simulation.pod()["metadata"]["deletionTimestamp"] = "2027-01-15T08:02:00Z"
    return simulation


def an_image_that_is_pulled_for_ever() -> Simulation:
    simulation = tuning()
    simulation.pod(container=CREATING)
    return simulation


def an_image_that_is_pulled_for_ever_after_the_data_was_fetched() -> Simulation:
    simulation = tuning()
    simulation.pod(container=CREATING, initContainerStatuses=[container(FETCHED, "fetch")])
    return simulation


def an_image_that_is_not_there() -> Simulation:
    simulation = tuning()
    simulation.pod(container={"waiting": {"reason": "ImagePullBackOff", "message": "not found"}})
    return simulation


def a_pod_that_no_node_takes() -> Simulation:
    simulation = tuning()
    waits = {"type": "PodScheduled", "reason": "Unschedulable", "message": "unbound PersistentVolumeClaims"}
    simulation.pod(running=False, conditions=[waits])
    return simulation


def a_pod_of_which_the_scheduler_says_nothing() -> Simulation:
    simulation = tuning()
    simulation.pod()["status"] = {"phase": "Pending"}
    return simulation


def a_job_that_is_refused() -> Simulation:
    return denied(JOBS)


def a_config_map_that_is_refused() -> Simulation:
    return denied(CONFIG_MAPS)


def denied(kind: Any, simulation: Simulation | None = None) -> Simulation:
    simulation = simulation or Simulation()
    simulation.denied[kind] = Forbidden('admission webhook "no.gpu" denied the request', status=403)
    simulation.reconcile()
    assert simulation.failed
    return simulation


def a_job_that_does_not_go() -> Simulation:
    simulation = tuning()
    simulation.pod()
    simulation.settle()
    simulation.change(input={"urls": ["https://example.com/b.jsonl"]})
    assert simulation.job is not None
    simulation.job["metadata"]["deletionTimestamp"] = "2027-01-15T08:00:30Z"
    return simulation


def a_node_that_never_joins() -> Simulation:
    simulation = Simulation(pending=1_000_000)
    simulation.reconcile()
    return simulation


def a_cloud_that_answers_nothing() -> Simulation:
    simulation = Simulation(pending=1_000_000)
    simulation.reconcile()
    simulation.unanswered = True
    return simulation


def no_pod_of_the_endpoint() -> Simulation:
    return endpoint(refused=QUOTA)


def no_pod_of_an_endpoint_on_demand() -> Simulation:
    return endpoint("onDemand", refused=QUOTA)


def one_pod_of_two() -> Simulation:
    return endpoint(count=2, refused=QUOTA, admitted=1)


def no_pod_after_it_was_ready() -> Simulation:
    simulation = awake(endpoint())
    simulation.now += 10 * IDLE
    simulation.servers.clear()
    simulation.refused = QUOTA
    return simulation


def a_server_whose_image_is_pulled_for_ever() -> Simulation:
    simulation = endpoint()
    simulation.servers[0]["status"]["containerStatuses"] = [container(CREATING)]
    return simulation


def a_server_that_is_never_ready() -> Simulation:
    simulation = endpoint()
    simulation.servers[0]["status"]["containerStatuses"] = [container({"running": {}})]
    return simulation


def a_stateful_set_that_is_refused() -> Simulation:
    return denied(STATEFUL_SETS, serving("always"))


def a_change_that_cannot_be_planned_while_no_pod_comes() -> Simulation:
    simulation = endpoint(refused=QUOTA)
    simulation.config, simulation.refuses = "bbb", "no such flag"
    simulation.reconcile()
    return simulation


def servers_that_do_not_end() -> Simulation:
    simulation = awake(serving("onDemand"))
    simulation.demand = False
    simulation.now += 2 * IDLE
    plain = simulation._delete
    simulation._delete = lambda kind, name: None if kind == STATEFUL_SETS else plain(kind, name)  # type: ignore[method-assign]
    return simulation


@dataclass(frozen=True)
class Row:
    begins: Callable[[], Simulation]
    limit: float
    """Seconds after which no machine is held any more, give or take the test's looks."""
    says: str
    """What the status says meanwhile, or then."""


PATIENCE = 1800.0
WAITS = [
    Row(no_pod_of_the_job, NO_POD_SECONDS, "exceeded quota: gpus"),
    Row(no_pod_and_no_word_why, NO_POD_SECONDS, "kubectl describe job one"),
    Row(a_suspended_job, NO_POD_SECONDS, "suspended"),
    Row(a_running_job_that_is_suspended, NO_POD_SECONDS, "suspended"),
    Row(no_second_pod_after_the_first_failed, NO_POD_SECONDS + 300, "exceeded quota: gpus"),
    Row(a_pod_that_does_not_end, NO_POD_SECONDS + 120, "was not made"),
    Row(an_image_that_is_pulled_for_ever, NOT_STARTED_SECONDS, "no container of the pod runs"),
    Row(
        an_image_that_is_pulled_for_ever_after_the_data_was_fetched,
        NOT_STARTED_SECONDS + 600,
        "no container of the pod runs",
    ),
    Row(an_image_that_is_not_there, NO_POD_SECONDS, "not found"),
    Row(a_pod_that_no_node_takes, NO_POD_SECONDS, "unbound PersistentVolumeClaims"),
    Row(a_pod_of_which_the_scheduler_says_nothing, NOT_STARTED_SECONDS, "no container of the pod runs"),
    Row(a_job_that_is_refused, NO_POD_SECONDS, 'webhook "no.gpu" denied'),
    Row(a_config_map_that_is_refused, NO_POD_SECONDS, 'webhook "no.gpu" denied'),
    Row(a_job_that_does_not_go, 600 + 30, "being removed"),
    Row(a_node_that_never_joins, PATIENCE, "not ready after 30 minutes"),
    Row(a_cloud_that_answers_nothing, PATIENCE, "has not answered for 30 minutes"),
    Row(no_pod_of_the_endpoint, NO_POD_SECONDS, "exceeded quota: gpus"),
    Row(no_pod_of_an_endpoint_on_demand, NO_POD_SECONDS, "exceeded quota: gpus"),
    Row(one_pod_of_two, NO_POD_SECONDS, "1 of 2 pods cannot be made"),
    Row(no_pod_after_it_was_ready, NO_POD_SECONDS, "exceeded quota: gpus"),
    Row(a_server_whose_image_is_pulled_for_ever, NOT_STARTED_SECONDS, "no container of the pod runs"),
    Row(a_server_that_is_never_ready, NOT_READY_SECONDS, "is not ready"),
    Row(a_stateful_set_that_is_refused, NO_POD_SECONDS, 'webhook "no.gpu" denied'),
    Row(a_change_that_cannot_be_planned_while_no_pod_comes, NO_POD_SECONDS, "no such flag"),
    Row(servers_that_do_not_end, 600, "asleep"),
]


def words(simulation: Simulation) -> str:
    """All that the status says."""
    assert simulation.workspace is not None
    status = simulation.workspace.get("status", {})
    said = [*status.get("conditions", ()), *status.get("attempts", ())]
    return "\n".join(str(s.get("message", "")) for s in said)


@pytest.mark.parametrize("row", WAITS, ids=lambda row: row.begins.__name__)
def test_no_machine_waits_longer_than_its_limit_and_the_status_says_for_what(row: Row) -> None:
    simulation = row.begins()
    assert len(simulation.machines) == 1
    began, first, said = simulation.now, list(simulation.requests), words(simulation)
    while first[-1] in simulation.machines:
        simulation.now += LOOK
        simulation.reconcile()
        said += "\n" + words(simulation)
        assert simulation.now - began <= row.limit + 3 * LOOK, said
    assert simulation.now - began >= row.limit - LOOK, "not before"
    assert row.says in said
    assert simulation.most == 1


RETRIED = (
    no_pod_of_the_job,
    no_pod_and_no_word_why,
    a_job_that_is_refused,
    a_config_map_that_is_refused,
    no_pod_of_the_endpoint,
    no_pod_of_an_endpoint_on_demand,
    one_pod_of_two,
    a_server_whose_image_is_pulled_for_ever,
    a_stateful_set_that_is_refused,
)


@pytest.mark.parametrize("begins", RETRIED)
def test_another_machine_is_got_later_each_time(begins: Callable[[], Simulation]) -> None:
    simulation = begins()
    limit = next(row.limit for row in WAITS if row.begins is begins)
    bought, held, look, days = [simulation.now], 0.0, 300.0, 3.0
    for _ in range(int(days * 24 * 3600 / look)):
        simulation.now += look
        held += look * len(simulation.machines)
        simulation.reconcile()
        if len(simulation.requests) > len(bought):
            bought.append(simulation.now)
        elif not simulation.machines and simulation.job is None:
            assert "is got again at 20" in words(simulation)
    gaps = [later - earlier for earlier, later in itertools.pairwise(bought)]
    assert len(gaps) >= 5
    assert all(later >= earlier - look for earlier, later in itertools.pairwise(gaps))
    assert FIRST_RETRY_SECONDS <= gaps[0] <= FIRST_RETRY_SECONDS + limit + 5 * look
    assert gaps[-1] <= LONGEST_RETRY_SECONDS + limit + 5 * look
    assert held <= 0.15 * days * 24 * 3600
    assert len(set(simulation.requests)) == len(simulation.requests)
    # And once nothing refuses it any more, it goes on by itself.
    simulation.refused = ""
    simulation.denied.clear()
    simulation.now += LONGEST_RETRY_SECONDS
    simulation.settle()
    assert len(simulation.machines) == 1
    assert simulation.job is not None or simulation.servers


def test_a_suspended_job_waits_without_a_machine_until_it_is_resumed() -> None:
    simulation = a_suspended_job()
    simulation.now += NO_POD_SECONDS + 1
    simulation.settle()
    assert not simulation.machines
    assert simulation.condition("JobStarted")["reason"] == "JobSuspended"
    before = simulation.writes
    for _ in range(50):
        simulation.now += 3600
        simulation.reconcile()
    assert simulation.writes == before, "at rest nothing is written"
    assert simulation.bought == ["cheap"]
    assert simulation.job is not None
    simulation.job["spec"]["suspend"] = False
    simulation.settle()
    assert simulation.bought == ["cheap", "cheap"]
    assert simulation.job is not None, "made for the new machine"
    simulation.pod()
    simulation.settle()
    assert simulation.state == "Running"


def test_on_nodes_that_are_there_anyway_it_is_said_and_waited_for() -> None:
    simulation = Simulation(holds=False, refused=QUOTA)
    simulation.settle()
    for _ in range(100):
        simulation.now += 600
        simulation.settle()
    assert simulation.condition("JobStarted")["reason"] == "FailedCreate"
    assert simulation.state == "Pending"
    assert simulation.job is not None
    simulation.refused = ""
    simulation.pod()
    simulation.settle()
    assert simulation.state == "Running"


def test_a_changed_workspace_does_not_wait() -> None:
    simulation = no_pod_of_the_job()
    for _ in range(300):
        simulation.now += LOOK
        simulation.reconcile()
    assert not simulation.machines
    before = len(simulation.bought)
    simulation.change(input={"urls": ["https://example.com/b.jsonl"]})
    simulation.settle()
    assert len(simulation.bought) == before + 1


def test_an_endpoint_that_serves_with_fewer_pods_says_so_and_goes_on() -> None:
    simulation = one_pod_of_two()
    simulation.answers()
    simulation.settle()
    for _ in range(100):
        simulation.now += LOOK
        simulation.settle()
    assert phase(simulation) == "Ready"
    assert "1 of 2 pods cannot be made: " + QUOTA in simulation.condition("InferenceReady")["message"]


def test_a_changed_endpoint_that_is_refused_is_served_as_it_was() -> None:
    simulation = awake(serving("always"))
    assert simulation.workspace is not None
    simulation.workspace["inference"]["adapters"] = [{"source": {"name": "second", "image": "r.io/b:2"}}]
    apply = simulation._apply

    def refuse(kind: Any, obj: Any) -> None:
        if kind == STATEFUL_SETS:
            raise Forbidden("denied", status=403)
        apply(kind, obj)

    simulation._apply = refuse  # type: ignore[method-assign]
    for _ in range(100):
        simulation.now += LOOK
        simulation.reconcile()
    assert len(simulation.machines) == 1
    assert simulation.servers
    assert "denied" in simulation.condition("Reconciled")["message"]


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("begins", [no_pod_of_the_job, a_suspended_job, no_pod_of_the_endpoint])
def test_a_crash_while_a_machine_is_given_back_changes_nothing(begins: Callable[[], Simulation], steps: int) -> None:
    simulation = begins()
    simulation.now += NO_POD_SECONDS + 1
    simulation.crash_after = steps
    with contextlib.suppress(Crash):
        simulation.settle()
    simulation.crash_after = -1
    simulation.settle()
    assert not simulation.machines
    assert simulation.bought == ["cheap"]
    assert len(simulation.requests) == 1
