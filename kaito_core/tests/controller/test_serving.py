"""What the controller decides about endpoints, on plain dicts; then the same with crashes anywhere."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kaito_core.controller.reconcile.case import Case
from kaito_core.controller.reconcile.decide import needs_plan
from kaito_core.controller.reconcile.serving import CONFIG_CHECK
from kaito_core.controller.reconcile.starting import LONGEST_RETRY_SECONDS
from kaito_core.kube.kinds import ENDPOINT_SLICES, SERVICES, STATEFUL_SETS
from kaito_core.plugins.types import Gpu, InsufficientCapacity
from kaito_core.testing.planning import GIB

from .simulation import WORLD, Crash, Simulation, workspace_object
from .test_decide import FINISHED, ended

ACTIVATOR = ("10.0.0.1", 20001)
IDLE = 900.0
A100 = Gpu("A100", 80 * GIB, (8, 0))


def serving(policy: str = "onDemand", **given: Any) -> Simulation:
    obj = workspace_object(inference={"preset": {"name": "tiny"}, "policy": policy})
    del obj["tuning"]
    return Simulation(workspace=obj, activator=ACTIVATOR, **given)


def tuned(**given: Any) -> Simulation:
    """A Workspace whose tuning has just ended well."""
    simulation = Simulation(activator=ACTIVATOR, **given)
    simulation.settle()
    simulation.pod(container=ended(0, FINISHED))
    simulation.end_job("Complete")
    simulation.settle()
    return simulation


def awake(simulation: Simulation) -> Simulation:
    """Somebody has asked, and the pod answers."""
    simulation.demand = True
    simulation.settle()
    simulation.answers()
    simulation.settle()
    return simulation


def ports(simulation: Simulation) -> list[tuple[int, Any]]:
    return [(p["port"], p["targetPort"]) for p in simulation.objects[SERVICES, "one"]["spec"]["ports"]]


def phase(simulation: Simulation) -> str:
    assert simulation.workspace is not None
    return str(simulation.workspace["status"]["serving"]["phase"])


def test_after_a_tuning_the_service_is_there_and_no_machine() -> None:
    """What the quick start shows: ready, with the Service's two ports; a GPU that idles is money burnt."""
    simulation = tuned()
    assert simulation.state == "Succeeded"
    assert simulation.condition("WorkspaceSucceeded")["status"] == "True"
    assert simulation.condition("InferenceReady")["status"] == "True"
    assert simulation.condition("ResourceReady")["status"] == "True"
    assert ports(simulation) == [(80, 5000), (29500, 29500)]
    assert not simulation.machines
    held = simulation.objects[ENDPOINT_SLICES, "one-activator"]
    assert held["endpoints"][0]["addresses"] == ["10.0.0.1"]
    assert held["ports"][0]["port"] == 20001
    assert held["metadata"]["labels"]["kubernetes.io/service-name"] == "one"


def test_what_has_no_effect_on_an_endpoint_stays_in_its_status() -> None:
    simulation = serving("always")
    assert simulation.workspace is not None
    simulation.workspace["metadata"]["annotations"] = {"kaito.sh/performance-mode": "throughput"}
    simulation.settle()
    simulation.answers()
    simulation.settle()
    assert phase(simulation) == "Ready"
    accepted = simulation.condition("Accepted")
    assert accepted["status"] == "True"
    assert accepted["message"].startswith("metadata.annotations.kaito.sh/performance-mode: has no effect here")


def test_the_first_request_gets_a_machine_and_idleness_gives_it_back() -> None:
    simulation = tuned()
    simulation.demand = True
    simulation.settle()
    assert len(simulation.machines) == 1
    assert simulation.told is not None
    assert not simulation.told.address
    job = json.loads(_config(simulation)["serving.json"])
    assert [(a["name"], a["image"]) for a in job["adapters"]] == [("one", "r.io/a:1")]
    simulation.answers()
    simulation.settle()
    assert simulation.told.address == "http://10.0.0.9:5000"
    assert (ENDPOINT_SLICES, "one-activator") not in simulation.objects
    simulation.demand = False
    simulation.last_request, simulation.in_flight = simulation.now + 60, 1
    simulation.now += 2 * IDLE
    simulation.settle()
    assert phase(simulation) == "Ready", "it is still answering"
    simulation.in_flight = 0
    simulation.settle()
    assert phase(simulation) == "Asleep"
    assert not simulation.machines
    assert not simulation.servers
    assert (ENDPOINT_SLICES, "one-activator") in simulation.objects
    assert simulation.condition("InferenceReady")["status"] == "True"
    assert simulation.state == "Succeeded"


def _config(simulation: Simulation) -> dict[str, str]:
    return next(
        o["data"] for (k, _), o in simulation.objects.items() if k.kind == "ConfigMap" and "serving.json" in o["data"]
    )


def test_always_is_there_without_anybody_asking() -> None:
    simulation = serving("always")
    simulation.settle()
    assert len(simulation.machines) == 1
    assert simulation.state == "NotReady"
    simulation.answers()
    simulation.settle()
    assert simulation.state == "Ready"
    assert simulation.condition("WorkspaceSucceeded")["status"] == "True"
    simulation.now += 10 * IDLE
    simulation.settle()
    assert phase(simulation) == "Ready"


def test_never_is_never() -> None:
    obj = workspace_object()
    obj["metadata"]["annotations"] = {"kaito.sh/serve-after-tuning": "never"}
    simulation = tuned(workspace=obj)
    assert (SERVICES, "one") not in simulation.objects
    assert not simulation.condition("InferenceReady")


def test_a_machine_that_cannot_be_had_is_said_and_tried_again_when_somebody_asks_again() -> None:
    failures = {name: InsufficientCapacity(f"no {name} left") for name in ("cheap", "dear")}
    simulation = serving(failures=dict(failures))
    simulation.settle()
    simulation.demand = True
    simulation.settle()
    assert phase(simulation) == "Failed"
    assert simulation.told is not None
    assert simulation.told.refused
    assert "no cheap left" in simulation.told.words
    assert "no dear left" in simulation.told.words
    simulation.failures.clear()
    simulation.now += 30
    simulation.settle()
    assert len(simulation.machines) == 1


def test_an_endpoint_that_cannot_become_well_holds_no_machine() -> None:
    """An adapter of another model: found out by the stage ``check``, which the kubelet would start again for ever."""
    simulation = serving("always")
    simulation.settle()
    words = {"event": "failed", "stage": "check", "message": "the adapter is of another model", "remedy": "take it out"}
    again = {"waiting": {"reason": "CrashLoopBackOff"}}
    [pod] = simulation.servers
    pod["status"]["initContainerStatuses"] = [{"name": "check", "state": again, "lastState": ended(2, words)}]
    simulation.settle()
    assert phase(simulation) == "Failed"
    assert "the adapter is of another model – take it out" in simulation.condition("InferenceReady")["message"]
    assert not simulation.machines
    assert not simulation.servers
    simulation.now += 10_000
    simulation.settle()
    assert len(simulation.bought) == 1, "the same is not tried again"
    assert simulation.workspace is not None
    simulation.workspace["resource"] = {"count": 1, "keep": "1m"}
    simulation.settle()
    assert len(simulation.bought) == 2, "something was changed"


def test_a_changed_endpoint_rolls_over_and_the_tuning_is_not_done_again() -> None:
    simulation = awake(tuned())
    before = simulation.objects[STATEFUL_SETS, "one"]["metadata"]["annotations"]["workspace.kaito.io/hash"]
    assert simulation.workspace is not None
    adapter = {"source": {"name": "second", "image": "r.io/b:2"}}
    simulation.workspace["inference"] = {"adapters": [adapter]}
    simulation.settle()
    after = simulation.objects[STATEFUL_SETS, "one"]["metadata"]["annotations"]["workspace.kaito.io/hash"]
    assert before != after
    assert simulation.told is not None
    assert not simulation.told.address, "the new pod is not ready: requests are held, not refused"
    assert (ENDPOINT_SLICES, "one-activator") in simulation.objects
    simulation.answers()
    simulation.settle()
    assert simulation.told.address
    assert simulation.bought == ["cheap", "cheap"], "one for the tuning, one for serving"


def test_changed_settings_roll_over_though_the_workspace_is_the_same() -> None:
    simulation = serving(config="aaa")
    assert simulation.workspace is not None
    simulation.workspace["inference"]["config"] = "settings"
    awake(simulation)
    assert simulation.workspace["status"]["serving"]["config"] == "aaa"
    old = simulation.servers[0]["metadata"]["uid"]
    simulation.demand = False
    decision = simulation.reconcile()
    assert decision is not None
    assert decision.look_again_after == CONFIG_CHECK, "nobody watches the ConfigMap"
    simulation.config = "bbb"
    simulation.settle()
    assert simulation.servers[0]["metadata"]["uid"] != old
    assert simulation.workspace["status"]["serving"]["config"] == "bbb"
    assert simulation.condition("InferenceReady")["status"] == "False"
    simulation.answers()
    simulation.settle()
    assert simulation.condition("InferenceReady")["status"] == "True"
    assert simulation.bought == ["cheap"]


def test_what_cannot_be_served_any_more_goes_on_as_it_was_and_falls_asleep() -> None:
    """Somebody breaks the ConfigMap: that is said, and keeps nobody from being answered."""
    simulation = awake(serving(config="aaa"))
    assert simulation.workspace is not None
    before = simulation.servers[0]["metadata"]["uid"]
    simulation.config, simulation.refuses = "bbb", "max-model-len: is no number"
    simulation.settle()
    assert simulation.condition("Accepted")["message"] == "max-model-len: is no number"
    assert simulation.servers[0]["metadata"]["uid"] == before
    assert simulation.told is not None
    assert simulation.told.address, "the pod answers still"
    assert (ENDPOINT_SLICES, "one-activator") not in simulation.objects, "nobody gets a 503 in its place"
    simulation.config = "aaa"
    simulation.settle()
    assert simulation.condition("Accepted")["status"] == "True", "it was taken back"
    assert simulation.servers[0]["metadata"]["uid"] == before
    simulation.config = "bbb"
    simulation.settle()
    simulation.demand = False
    simulation.now += 2 * IDLE
    simulation.settle()
    assert phase(simulation) == "Asleep"
    assert not simulation.machines


def test_a_machine_does_not_wait_for_an_image_for_ever() -> None:
    simulation = serving("always")
    simulation.settle()
    [pod] = simulation.servers
    pod["metadata"]["creationTimestamp"] = "2027-01-15T08:00:00Z"
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
    pod["status"]["containerStatuses"] = [{"name": "one", "image": "r.io/x:1", "state": waiting}]
    simulation.settle()
    assert simulation.condition("InferenceReady")["reason"] == "ImagePullError"
    assert simulation.machines
    simulation.now += 700
    simulation.settle()
    assert phase(simulation) == "Failed"
    assert not simulation.machines


def test_who_has_gone_is_not_waited_for() -> None:
    simulation = serving()
    simulation.settle()
    simulation.demand = True
    simulation.settle()
    assert simulation.machines
    simulation.demand = False
    simulation.now += 2 * IDLE
    simulation.settle()
    assert phase(simulation) == "Asleep"
    assert not simulation.machines


def test_several_machines_change_together() -> None:
    """A pod of the new form finds no place among those of the old one."""
    simulation = serving("always")
    assert simulation.workspace is not None
    simulation.workspace["resource"] = {"count": 2}
    simulation.settle()
    assert [p["metadata"]["name"] for p in simulation.servers] == ["one-0", "one-1"]
    assert "one-headless" in {n for _, n in simulation.objects}
    simulation.answers()
    simulation.settle()
    old = {p["metadata"]["uid"] for p in simulation.servers}
    simulation.workspace["inference"]["adapters"] = [{"source": {"name": "second", "image": "r.io/b:2"}}]
    simulation.settle()
    assert len(simulation.servers) == 2
    assert not old & {p["metadata"]["uid"] for p in simulation.servers}
    assert simulation.told is not None
    assert not simulation.told.address
    simulation.answers()
    simulation.settle()
    assert simulation.told.address


def test_a_lost_machine_is_replaced() -> None:
    simulation = awake(tuned())
    simulation.take_away()
    simulation.settle()
    assert len(simulation.machines) == 1
    assert "MachineLost" in simulation.notes
    simulation.answers()
    simulation.settle()
    assert phase(simulation) == "Ready"


def test_a_policy_that_becomes_never_takes_everything_away() -> None:
    simulation = awake(tuned())
    assert simulation.workspace is not None
    simulation.workspace["inference"] = {"policy": "never"}
    simulation.settle()
    assert not {SERVICES, STATEFUL_SETS, ENDPOINT_SLICES} & {k for k, _ in simulation.objects}
    assert not simulation.machines


def test_deleting_gives_the_machine_back_first() -> None:
    simulation = awake(tuned(gone_after=1))
    simulation.remove()
    simulation.reconcile()
    assert simulation.workspace is not None
    simulation.settle()
    assert simulation.workspace is None
    assert not simulation.machines


@pytest.mark.parametrize("policy", ["onDemand", "always"])
def test_at_rest_nothing_is_written(policy: str) -> None:
    simulation = awake(serving(policy))
    before = simulation.writes
    for _ in range(5):
        simulation.reconcile()
    assert simulation.writes == before


class Endpoints(RuleBasedStateMachine):
    """Requests, idleness, lost machines, changes and crashes in any order."""

    @initialize(policy=st.sampled_from(["onDemand", "always"]), after=st.booleans())
    def begin(self, policy: str, after: bool) -> None:
        self.simulation = tuned() if after else serving(policy)

    def run(self) -> None:
        with contextlib.suppress(Crash):
            self.simulation.settle()

    @rule(steps=st.integers(0, 12))
    def the_controller_dies(self, steps: int) -> None:
        self.simulation.crash_after = steps
        self.run()
        self.simulation.crash_after = -1

    @rule(asks=st.booleans())
    def somebody_asks(self, asks: bool) -> None:
        self.simulation.demand = asks
        self.run()

    @rule()
    def the_pod_answers(self) -> None:
        self.simulation.answers()
        self.run()

    @rule(seconds=st.sampled_from([10.0, 120.0, 2000.0]))
    def time_passes(self, seconds: float) -> None:
        self.simulation.now += seconds
        self.run()

    @rule()
    def the_machine_is_lost(self) -> None:
        self.simulation.take_away()
        self.run()

    @precondition(lambda self: self.simulation.workspace is not None)
    @rule(config=st.sampled_from(["", "aaa", "bbb"]), refuses=st.sampled_from(["", "", "no such flag"]))
    def settings_change(self, config: str, refuses: str) -> None:
        self.simulation.config, self.simulation.refuses = config, refuses

    @rule(policy=st.sampled_from(["onDemand", "always", "never"]))
    def the_policy_changes(self, policy: str) -> None:
        workspace = self.simulation.workspace
        assert workspace is not None
        workspace["inference"] = {**workspace.get("inference", {}), "policy": policy}
        self.run()

    @invariant()
    def never_two_machines(self) -> None:
        if hasattr(self, "simulation"):
            assert self.simulation.most <= 1

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        simulation = self.simulation
        if simulation.workspace is not None:
            # Whatever has happened: it can be brought up, and falls asleep, and lets go of everything.
            simulation.workspace["inference"] = {**simulation.workspace.get("inference", {}), "policy": "onDemand"}
            simulation.refuses, simulation.demand = "", False
            for _ in range(2):  # what waits in vain is given up, and may be tried again
                simulation.now += LONGEST_RETRY_SECONDS
                simulation.settle()
            awake(simulation)
            assert phase(simulation) == "Ready"
            simulation.demand = False
            simulation.now += 10 * IDLE
            simulation.settle()
            assert phase(simulation) == "Asleep"
            assert not simulation.machines
            simulation.remove()
            simulation.settle()
        assert not simulation.machines


TestEndpoints = Endpoints.TestCase
TestEndpoints.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)


# --- what a second reading found


def test_the_activator_stays_until_kubernetes_itself_sends_to_the_pod() -> None:
    """Seen on a real node: the pod was ready, the activator gone, the Service empty, and four requests refused."""
    simulation = tuned(routes=False)
    awake(simulation)
    assert simulation.told is not None
    assert simulation.told.address, "what still comes to the activator is sent on"
    assert (ENDPOINT_SLICES, "one-activator") in simulation.objects
    simulation.routes = True
    simulation.settle()
    assert (ENDPOINT_SLICES, "one-activator") not in simulation.objects


def test_a_pod_that_goes_is_no_trouble() -> None:
    simulation = awake(tuned())
    [pod] = simulation.servers
    pod["metadata"]["deletionTimestamp"] = "2027-01-15T08:00:00Z"
    pod["status"] = {
        "containerStatuses": [{"name": "one", "state": ended(143, {"event": "interrupted", "stage": "serve"})}]
    }
    simulation.settle()
    assert "Interrupted" not in simulation.notes
    assert (ENDPOINT_SLICES, "one-activator") in simulation.objects


def test_an_endpoint_that_is_well_is_not_planned_again() -> None:
    for policy in ("always", "onDemand"):
        simulation = awake(serving(policy))
        assert simulation.workspace is not None
        assert not needs_plan(Case(simulation.workspace, simulation.observe(), WORLD))


def test_a_pod_that_starts_again_does_not_put_a_busy_endpoint_to_sleep() -> None:
    simulation = awake(tuned())
    simulation.demand = False
    simulation.now += 5 * IDLE
    simulation.last_request = simulation.now - 10
    simulation.settle()
    assert phase(simulation) == "Ready"
    simulation.last_request = 0.0  # the new container has said nothing yet
    simulation.answers(ready=False)
    simulation.settle()
    assert phase(simulation) == "Ready"
    assert simulation.machines


def test_what_is_made_on_another_machine_is_told_how_that_one_is_used() -> None:
    """The same revision, laid out anew: a ConfigMap of its own, and the one before goes."""
    simulation = awake(tuned())
    first = _configs(simulation)
    simulation.demand = False
    simulation.now += 5 * IDLE
    simulation.settle()
    assert phase(simulation) == "Asleep"
    simulation.offers = tuple(replace(o, gpu=A100, gpus=1) for o in simulation.offers)
    awake(simulation)
    assert _configs(simulation) != first
    job = json.loads(_config(simulation)["serving.json"])
    assert job["configuration"]["device"] == "cuda"
    mounted = simulation.objects[STATEFUL_SETS, "one"]["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"]
    assert mounted in _configs(simulation)
    assert len(_configs(simulation)) == 1


def _configs(simulation: Simulation) -> set[str]:
    return {n for (k, n), o in simulation.objects.items() if k.kind == "ConfigMap" and "serving.json" in o["data"]}
