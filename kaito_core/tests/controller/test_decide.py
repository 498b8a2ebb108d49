"""What the controller decides, phase by phase, on plain dicts; then the same with crashes anywhere."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kaito_core.controller.act import ask
from kaito_core.controller.reconcile.case import Case
from kaito_core.controller.reconcile.decide import decide
from kaito_core.controller.reconcile.decision import Ensure, Observe, Release
from kaito_core.controller.reconcile.diagnosis import trouble
from kaito_core.controller.reconcile.observed import Installed, Observed, Planned, Refusal
from kaito_core.controller.reconcile.outcome import PATIENCE
from kaito_core.controller.reconcile.starting import LONGEST_RETRY_SECONDS
from kaito_core.plugins.types import InsufficientCapacity, NodeStatus, NotAuthorized, QuotaExceeded, Transient
from kaito_core.problems import Problem

from .simulation import START, WORLD, Crash, Simulation, planned, workspace_object

FINISHED = {
    "event": "finished",
    "stage": "push",
    "results": {
        "train": {"metrics": {"steps": 32}},
        "verify": {"eval_loss_before": 4.5, "eval_loss_after": 1.25},
        "push": {"image": "r.io/a:1", "digest": "sha256:abc"},
    },
}


def ended(code: int, said: dict[str, Any] | None = None, reason: str = "Error") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, "message": json.dumps(said) if said else ""}}


def ready() -> Simulation:
    """A Workspace whose job has just been made."""
    simulation = Simulation()
    simulation.settle()
    return simulation


# --- accept


@pytest.mark.parametrize(
    ("refusal", "reason", "state"),
    [
        ("InvalidWorkspace", "workspaceFailed", "Failed"),
        ("PlanRefused", "workspaceFailed", "Failed"),
        ("DoesNotFit", "workspaceFailed", "Failed"),
        ("NoNode", "workspacePending", "Pending"),
        ("ConfigMapMissing", "workspacePending", "Pending"),
        ("SecretMissing", "workspacePending", "Pending"),
    ],
)
def test_what_cannot_be_run_is_said_and_nothing_is_asked_for(refusal: Refusal, reason: str, state: str) -> None:
    problem = Problem("unknown preset 'phi-33'", "did you mean phi-3?", "tuning.preset.name")
    observed = Observed(START, planned=Planned(None, refusal, (problem,)), provisioners={"cloud": Installed()})
    decision = decide(workspace_object(), observed, WORLD)
    assert decision.finalizer is None
    assert decision.ask is None
    assert not decision.create
    assert decision.status is not None
    assert decision.status["state"] == state
    found = {c["type"]: (c["status"], c["reason"], c["message"]) for c in decision.status["conditions"]}
    words = "tuning.preset.name: unknown preset 'phi-33' – did you mean phi-3?"
    assert found["Accepted"] == ("False", refusal, words)
    assert found["WorkspaceSucceeded"] == ("False", reason, words)
    assert found["ResourceReady"][0] == "False"
    assert all(c["observedGeneration"] == 1 for c in decision.status["conditions"])


@pytest.mark.parametrize("steps", range(6))
def test_what_is_asked_for_is_written_down_before_it_is_asked(steps: int) -> None:
    """The finalizer and the attempt: wherever the controller dies, whoever comes next knows whom to ask for what."""
    simulation = Simulation(crash_after=steps)
    with contextlib.suppress(Crash):
        simulation.reconcile()
    if simulation.bought:
        assert simulation.workspace is not None
        assert simulation.workspace["metadata"]["finalizers"] == ["workspace.finalizer.kaito.sh"]
        assert [a["instanceType"] for a in written(simulation)] == simulation.bought


def written(simulation: Simulation) -> list[dict[str, Any]]:
    """The attempts that the API server knows of: the first one may be an annotation still."""
    assert simulation.workspace is not None
    first = json.loads(simulation.workspace["metadata"]["annotations"]["kaito.sh/asked"])
    return list(simulation.workspace.get("status", {}).get("attempts") or [first])


def test_what_has_no_effect_is_said_in_the_status_as_long_as_the_revision_lasts() -> None:
    obj = workspace_object()
    obj["metadata"]["annotations"] = {"kaito.sh/node-image-family": "azurelinux"}
    simulation = Simulation(workspace=obj)
    simulation.settle()
    said = "metadata.annotations.kaito.sh/node-image-family: has no effect here"
    assert simulation.condition("Accepted")["message"].startswith(said)
    simulation.pod(container=ended(0, FINISHED))
    simulation.end_job("Complete")
    simulation.settle()
    assert simulation.state == "Succeeded"
    assert simulation.condition("Accepted")["message"].startswith(said)


def test_nothing_is_held_where_nothing_has_to_be_given_back() -> None:
    """Nodes that were there before: one write less, and deleting the Workspace waits for nobody."""
    simulation = Simulation(holds=False)
    simulation.settle()
    assert simulation.job is not None
    assert simulation.workspace is not None
    assert not simulation.workspace["metadata"].get("finalizers")
    assert simulation.writes == 4, "revision, ConfigMap, Job, status"


# --- nodes


def test_a_provisioner_that_is_gone_lets_no_machine_be_forgotten() -> None:
    """Asked for, the controller died, and its next image came without the plugin: the Workspace waits until somebody gives it back."""
    simulation = Simulation(crash_after=3)
    with contextlib.suppress(Crash):
        simulation.reconcile()
    assert simulation.machines
    assert simulation.workspace is not None
    simulation.remove()
    observed = replace(simulation.observe(), provisioners={})
    decision = decide(simulation.workspace, observed, WORLD)
    assert decision.finalizer is None
    assert decision.status is not None
    found = {c["type"]: c["reason"] for c in decision.status["conditions"]}
    assert found["WorkspaceDeleting"] == "ProvisionerMissing"
    answer = ask({}, Release("cloud", "ws1"))
    assert (answer.phase, type(answer.failure)) == ("releasing", Transient)


def test_a_node_class_that_the_workspace_names_is_handed_on() -> None:
    """KAITO's annotation ``kaito.sh/node-class-name``."""
    obj = workspace_object()
    obj["metadata"]["annotations"] = {"kaito.sh/node-class-name": "gpu"}
    simulation = Simulation(workspace=obj)
    simulation.settle()
    assert simulation.tags == {
        "kaito.sh/workspace": "one",
        "kaito.sh/workspacenamespace": "default",
        "kaito.sh/node-class-name": "gpu",
    }


def test_a_job_is_made_when_the_machine_is_ready_and_not_before() -> None:
    simulation = Simulation(pending=3)
    simulation.reconcile()
    assert simulation.job is None
    assert simulation.writes == 2, "finalizer with the attempt, revision; nothing more before there is news"
    simulation.now += 6
    simulation.reconcile()
    assert simulation.condition("ResourceReady")["message"] == "on its way"
    simulation.settle()
    assert sorted(simulation.kinds()) == ["ConfigMap", "ControllerRevision", "Job"]
    assert simulation.bought == ["cheap"]
    assert simulation.condition("ResourceReady")["status"] == "True"
    assert simulation.workspace is not None
    assert simulation.workspace["status"]["workerNodes"] == ["node-1"]


def test_nothing_more_is_written_once_the_job_is_there() -> None:
    simulation = ready()
    assert simulation.writes <= 6, "finalizer, revision, status, ConfigMap, Job, status"
    before = simulation.writes
    simulation.reconcile()
    assert simulation.writes == before


@pytest.mark.parametrize("kind", [InsufficientCapacity, QuotaExceeded])
def test_the_next_offer_is_tried_when_one_cannot_be_had(kind: type[InsufficientCapacity]) -> None:
    simulation = Simulation(failures={"cheap": kind("none left in westeurope")})
    simulation.settle()
    assert simulation.bought == ["dear"]
    assert simulation.workspace is not None
    first, second = simulation.workspace["status"]["attempts"]
    assert (first["instanceType"], first["reason"], first["message"]) == (
        "cheap",
        kind.__name__,
        "none left in westeurope",
    )
    assert "ended" not in second


def test_when_nothing_can_be_had_every_reason_is_told() -> None:
    simulation = Simulation(failures={"cheap": InsufficientCapacity("sold out"), "dear": QuotaExceeded("0 of 0 cores")})
    simulation.settle()
    assert simulation.state == "Failed"
    message = simulation.condition("WorkspaceSucceeded")["message"]
    assert "cheap: sold out" in message
    assert "dear: 0 of 0 cores" in message
    assert not simulation.machines


def test_what_may_work_in_a_moment_is_tried_again_and_what_is_forbidden_is_not() -> None:
    simulation = Simulation(failures={"cheap": Transient("429: slow down")})
    decision = simulation.reconcile()
    assert decision is not None
    assert decision.look_again_after
    assert simulation.state == "Pending"
    simulation.failures = {"cheap": NotAuthorized("no write access to the node pool")}
    simulation.settle()
    assert simulation.state == "Failed"
    assert "no write access" in simulation.condition("WorkspaceSucceeded")["message"]


def test_later_each_time_and_as_late_as_the_cloud_asks() -> None:
    simulation = Simulation(failures={"cheap": Transient("429: slow down")})
    waits = []
    for _ in range(4):
        decision = simulation.reconcile()
        assert decision is not None
        assert decision.look_again_after is not None
        waits.append(decision.look_again_after)
        simulation.now += max(decision.look_again_after, 10)
    assert waits == sorted(waits)
    assert waits[0] < waits[-1]
    simulation.failures = {"cheap": Transient("429: slow down", retry_after=300.0)}
    decision = simulation.reconcile()
    assert decision is not None
    assert decision.look_again_after == 300.0


@pytest.mark.parametrize("answer", [{"pending": 99}, {"failures": {"cheap": Transient("it breaks each time")}}])
def test_what_takes_too_long_is_given_up_for_the_next_offer(answer: dict[str, Any]) -> None:
    simulation = Simulation(**answer)
    simulation.reconcile()
    simulation.now += 3600
    simulation.pending = min(simulation.pending, 1)
    simulation.settle()
    assert simulation.workspace is not None
    first, second = simulation.workspace["status"]["attempts"]
    assert (first["instanceType"], first["reason"]) == ("cheap", "TimedOut")
    assert second["instanceType"] == "dear"
    assert list(simulation.machines.values()) == ["dear"]
    assert simulation.most == 1


def test_giving_back_takes_its_time_and_nothing_is_asked_for_meanwhile() -> None:
    """Whatever is begun is ended, also by a controller that knows of it only from the status."""
    simulation = Simulation(broken={"cheap": InsufficientCapacity("it never joined")}, gone_after=3)
    for _ in range(3):
        simulation.reconcile()
        assert list(simulation.machines.values()) == ["cheap"]
    simulation.settle()
    assert simulation.bought == ["cheap", "dear"]
    assert simulation.most == 1
    assert simulation.workspace is not None
    assert [a.get("reason") for a in simulation.workspace["status"]["attempts"]] == ["InsufficientCapacity", None]


def test_what_would_do_as_well_is_named_and_not_tried_again_where_it_was_asked_for() -> None:
    simulation = Simulation()
    simulation.settle()
    assert simulation.tagged[0] == ("cheap", "dear")
    both = Simulation()
    plain = both.answer

    def answer(question: Ensure | Observe | Release) -> NodeStatus:
        if not isinstance(question, Ensure):
            return plain(question)
        failure = InsufficientCapacity("none of them")
        return NodeStatus(question.request.id, "failed", failure=failure, asked=question.request.also)

    both.answer = answer  # type: ignore[method-assign]
    both.settle()
    assert both.state == "Failed"
    assert both.workspace is not None
    [attempt] = both.workspace["status"]["attempts"]
    assert attempt["alternatives"] == ["dear"]


def test_a_machine_that_was_taken_away_is_followed_by_another_and_the_job_goes_on_there() -> None:
    """KAITO's defect 9: a spot eviction loses everything."""
    simulation = ready()
    simulation.pod()
    simulation.reconcile()
    first = simulation.job
    simulation.take_away()
    simulation.settle()
    assert simulation.bought == ["cheap", "cheap"]
    assert simulation.job is not None
    assert first is not None
    assert simulation.job["metadata"]["uid"] != first["metadata"]["uid"]
    assert "MachineLost" in simulation.notes
    assert simulation.workspace is not None
    assert [a.get("reason") for a in simulation.workspace["status"]["attempts"]] == ["MachineLost", None]
    hashes = [j["metadata"]["annotations"]["workspace.kaito.io/hash"] for j in (first, simulation.job)]
    assert hashes[0] == hashes[1], "the same revision, so the same checkpoints"


def test_a_cloud_that_does_not_answer_loses_nobody_the_machine_that_was_asked_of_it() -> None:
    simulation = Simulation(pending=9)
    simulation.reconcile()
    assert simulation.workspace is not None
    observed = simulation.observe()
    silent = replace(planned(simulation.workspace, ()), failed=frozenset({"cloud"}))
    decision = decide(simulation.workspace, replace(observed, planned=silent), WORLD)
    assert decision.ask is None
    assert decision.look_again_after
    gone = decide(simulation.workspace, replace(observed, planned=planned(simulation.workspace, ())), WORLD)
    assert isinstance(gone.ask, Release), "what is really not offered any more is given back"


@pytest.mark.parametrize(("refusal", "kept"), [("SecretMissing", True), ("NoNode", True), ("PolicyRefused", False)])
def test_what_may_come_back_is_waited_for_with_the_machine_in_hand(refusal: Refusal, kept: bool) -> None:
    simulation = Simulation(pending=9)
    simulation.reconcile()
    assert simulation.workspace is not None
    no = Planned(None, refusal, (Problem("not now"),))
    decision = decide(simulation.workspace, replace(simulation.observe(), planned=no), WORLD)
    assert (decision.ask is None) is kept
    if kept:
        assert decision.status is not None
        simulation.workspace["status"] = dict(decision.status)
        simulation.now += 3600
        later = decide(simulation.workspace, replace(simulation.observe(), planned=no), WORLD)
        assert isinstance(later.ask, Release)


def test_a_node_that_is_not_seen_yet_is_not_lost() -> None:
    simulation = ready()
    simulation.node = None
    simulation.now += 1
    simulation.settle()
    assert simulation.bought == ["cheap"]


# --- workload and outcome


def test_a_finished_job_is_success_and_the_machine_is_given_back_at_once() -> None:
    """KAITO's defect 8: its node stays, and is paid for, until the Workspace is deleted."""
    simulation = ready()
    simulation.pod(container=ended(0, FINISHED, "Completed"))
    simulation.end_job("Complete")
    simulation.settle()
    assert simulation.state == "Succeeded"
    assert not simulation.machines
    assert simulation.workspace is not None
    assert simulation.workspace["status"]["adapter"] == {
        "image": "r.io/a:1",
        "digest": "sha256:abc",
        "evalLossBefore": 4.5,
        "evalLossAfter": 1.25,
    }
    progress = simulation.workspace["status"]["progress"]
    assert (progress["step"], progress["steps"]) == (32, 32), "not what was seen last in the log"
    for kind in ("ResourceReady", "JobStarted", "WorkspaceSucceeded"):
        assert simulation.condition(kind)["status"] == "True"


@pytest.mark.parametrize("kind", ["Complete", "Failed"])
def test_an_end_is_not_told_before_the_pod_that_can_tell_how_is_seen(kind: str) -> None:
    """The caches of jobs and pods are two: after an API server was away, one may be complete before the other."""
    simulation = ready()
    pod = simulation.pod()
    simulation.end_job(kind, lastTransitionTime=Case(workspace_object(), Observed(simulation.now), WORLD).time)
    decision = simulation.reconcile()
    assert decision is not None
    assert decision.look_again_after == 1.0
    assert simulation.state not in ("Succeeded", "Failed")
    code, phase = (0, "Succeeded") if kind == "Complete" else (1, "Failed")
    pod["status"] |= {
        "phase": phase,
        "containerStatuses": [{"name": "one", "image": "i", "state": ended(code, FINISHED, "x")}],
    }
    simulation.settle()
    assert simulation.state == phase
    if kind == "Complete":
        assert simulation.workspace is not None
        assert simulation.workspace["status"]["adapter"]["digest"] == "sha256:abc"


def test_pods_that_are_gone_are_not_waited_for() -> None:
    simulation = ready()
    simulation.end_job("Complete", lastTransitionTime=Case(workspace_object(), Observed(simulation.now), WORLD).time)
    simulation.now += 20
    simulation.settle()
    assert simulation.state == "Succeeded"


def test_a_machine_is_kept_for_the_next_job_as_long_as_asked() -> None:
    simulation = Simulation(workspace_object(resource={"keep": "10m"}))
    simulation.settle()
    simulation.end_job("Complete")
    decision = simulation.reconcile()
    assert decision is not None
    assert decision.look_again_after == 600
    assert simulation.machines
    simulation.now += 300
    simulation.change(input={"urls": ["https://example.com/b.jsonl"]})
    simulation.settle()
    simulation.end_job("Complete")
    simulation.settle()
    assert simulation.bought == ["cheap"]
    simulation.now += 599
    simulation.settle()
    assert simulation.machines
    simulation.now += 2
    simulation.settle()
    assert not simulation.machines
    assert simulation.workspace is not None
    assert [a["reason"] for a in simulation.workspace["status"]["attempts"]] == ["Succeeded"]


def test_one_failed_pod_is_not_a_failed_workspace() -> None:
    """KAITO's defect 2: it says Failed at the first failed pod, while the job tries again, and flips later."""
    simulation = ready()
    simulation.pod(container=ended(137, reason="OOMKilled"))
    assert simulation.job is not None
    simulation.job["status"] = {"failed": 1, "active": 0}
    simulation.settle()
    assert simulation.state == "Running"
    assert simulation.condition("JobStarted")["reason"] == "ContainerOOMKilled"
    simulation.pod()
    simulation.settle()
    assert simulation.state == "Running"
    assert simulation.condition("JobStarted")["status"] == "True"
    assert "ran out of memory" in simulation.condition("JobStarted")["message"]
    simulation.end_job("Complete")
    simulation.settle()
    assert simulation.state == "Succeeded"


def test_a_failed_stage_fails_the_workspace_with_its_own_words() -> None:
    """KAITO's defect 1: when its trainer crashes, the pusher waits for ever and the GPU is billed."""
    simulation = ready()
    said = {"event": "failed", "stage": "check", "message": "the registry says 401", "remedy": "mend the Secret 'push'"}
    simulation.pod(container=ended(2, said))
    simulation.end_job("Failed", reason="PodFailurePolicy", message="exit code 2")
    simulation.settle()
    assert simulation.state == "Failed"
    words = "the stage 'check' failed: the registry says 401 – mend the Secret 'push'"
    assert simulation.condition("WorkspaceSucceeded")["message"] == words
    assert not simulation.machines


def test_an_image_that_never_comes_does_not_hold_a_machine_for_ever() -> None:
    simulation = ready()
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "r.io/tuner:1: not found"}}
    simulation.pod(container=waiting)
    simulation.settle()
    assert simulation.state == "Pending"
    assert simulation.condition("JobStarted")["reason"] == "ImagePullError"
    assert "r.io/tuner:1: not found" in simulation.condition("JobStarted")["message"]
    simulation.now += PATIENCE + 60
    simulation.settle()
    assert simulation.state == "Failed"
    assert not simulation.machines
    assert simulation.job is None


@pytest.mark.parametrize("holds", [True, False])
def test_a_pod_that_no_node_takes_does_not_hold_a_machine_that_is_paid_for(holds: bool) -> None:
    simulation = Simulation(holds=holds)
    simulation.settle()
    waits = {"type": "PodScheduled", "reason": "Unschedulable", "message": "unbound PersistentVolumeClaims"}
    simulation.pod(running=False, conditions=[waits])
    simulation.settle()
    assert simulation.state == "Pending"
    simulation.now += PATIENCE + 60
    simulation.settle()
    assert simulation.state == ("Failed" if holds else "Pending")
    if holds:
        assert not simulation.machines
        assert "unbound PersistentVolumeClaims" in simulation.condition("WorkspaceSucceeded")["message"]


def test_a_changed_input_runs_the_job_anew_and_a_finished_one_is_left_alone() -> None:
    simulation = ready()
    simulation.pod(container=ended(0, FINISHED, "Completed"))
    simulation.end_job("Complete")
    simulation.settle()
    simulation.settle()
    assert simulation.bought == ["cheap"]
    simulation.change(input={"urls": ["https://example.com/b.jsonl"]})
    simulation.settle()
    assert simulation.state == "Pending"
    assert simulation.job is not None
    assert simulation.job["metadata"]["annotations"]["workspace.kaito.io/revision"] == "2"
    assert simulation.bought == ["cheap", "cheap"]
    assert sorted(simulation.kinds()) == ["ConfigMap", "ControllerRevision", "ControllerRevision", "Job"]


def test_a_return_to_an_earlier_state_is_a_new_revision() -> None:
    simulation = ready()
    first = "https://example.com/a.jsonl"
    for url in ("https://example.com/b.jsonl", first):
        simulation.change(input={"urls": [url]})
        simulation.settle()
    assert simulation.job is not None
    assert simulation.job["metadata"]["annotations"]["workspace.kaito.io/revision"] == "3"


def test_only_the_last_ten_revisions_are_kept() -> None:
    simulation = ready()
    for number in range(14):
        simulation.change(input={"urls": [f"https://example.com/{number}.jsonl"]})
        simulation.settle()
    assert sum(k == "ControllerRevision" for k in simulation.kinds()) == 10


# --- what is wrong with a pod


@pytest.mark.parametrize(
    ("status", "reason", "words"),
    [
        ({"reason": "Evicted", "message": "low on resource: ephemeral-storage"}, "NodeDiskPressure", "ephemeral"),
        ({"reason": "Evicted", "message": "low on resource: memory"}, "NodeMemoryPressure", "memory"),
        (
            {"conditions": [{"type": "DisruptionTarget", "status": "True", "message": "node is being deleted"}]},
            "PodEvicted",
            "node is being deleted",
        ),
        (
            {"conditions": [{"type": "PodScheduled", "reason": "Unschedulable", "message": "0/3 nodes available"}]},
            "Unschedulable",
            "0/3 nodes",
        ),
    ],
)
def test_diagnosis(status: dict[str, Any], reason: str, words: str) -> None:
    simulation = Simulation()
    found = trouble(simulation.pod(running=True, **status))
    assert found is not None
    assert found.reason == reason
    assert words in found.message


def test_a_pod_that_runs_has_no_trouble() -> None:
    assert trouble(Simulation().pod()) is None


def test_words_that_are_not_json_do_no_harm() -> None:
    simulation = Simulation()
    state = {"terminated": {"exitCode": 1, "reason": "Error", "message": "Segmentation fault"}}
    found = trouble(simulation.pod(container=state))
    assert found is not None
    assert found.message == "the container 'one' ended with exit code 1 (Segmentation fault)"


# --- cleanup


def test_deleting_gives_the_machine_back_before_the_workspace_goes() -> None:
    simulation = ready()
    simulation.remove()
    simulation.settle()
    assert simulation.workspace is None
    assert not simulation.machines


def test_a_crash_right_after_asking_leaves_no_machine() -> None:
    simulation = Simulation(crash_after=3)
    with pytest.raises(Crash):
        simulation.reconcile()
    assert simulation.machines
    simulation.remove()
    simulation.settle()
    assert simulation.workspace is None
    assert not simulation.machines


def test_a_workspace_whose_provisioner_was_uninstalled_waits_and_says_so() -> None:
    simulation = ready()
    simulation.remove()
    observed = replace(simulation.observe(), provisioners={"other": Installed()})
    assert simulation.workspace is not None
    decision = decide(simulation.workspace, observed, WORLD)
    assert decision.finalizer is None
    assert decision.look_again_after
    assert [n.reason for n in decision.notes] == ["ProvisionerMissing"]


# --- everything at once


class Life(RuleBasedStateMachine):
    """A Workspace's life in any order, with the controller dying at any step. One machine at most at any time, none left
    behind, and in the end the same state as without a crash."""

    @initialize(pending=st.integers(0, 2), failing=st.sampled_from(["", "refused", "broken"]), gone=st.integers(0, 2))
    def begin(self, pending: int, failing: str, gone: int) -> None:
        no = {"cheap": InsufficientCapacity("sold out")}
        self.simulation = Simulation(
            pending=pending,
            failures=no if failing == "refused" else {},
            broken=no if failing == "broken" else {},
            gone_after=gone,
        )

    @property
    def alive(self) -> bool:
        return self.simulation.workspace is not None

    @rule(crash_after=st.integers(-1, 8))
    def reconcile(self, crash_after: int) -> None:
        self.simulation.crash_after = crash_after
        with contextlib.suppress(Crash):
            self.simulation.reconcile()
        self.simulation.crash_after = -1

    @precondition(lambda self: self.simulation.job is not None and not self.simulation.pods)
    @rule()
    def a_pod_starts(self) -> None:
        self.simulation.pod()

    @precondition(lambda self: self.simulation.job is not None)
    @rule(kind=st.sampled_from(["Complete", "Failed"]))
    def the_job_ends(self, kind: str) -> None:
        if not (self.simulation.job or {}).get("status", {}).get("conditions"):
            self.simulation.end_job(kind, message="by the test")

    @precondition(lambda self: self.alive and "deletionTimestamp" not in self.simulation.workspace["metadata"])
    @rule(url=st.sampled_from(["a", "b"]))
    def the_user_changes_the_input(self, url: str) -> None:
        self.simulation.change(input={"urls": [f"https://example.com/{url}.jsonl"]})

    @precondition(lambda self: self.simulation.machines and not self.simulation.leaving)
    @rule()
    def the_cloud_takes_the_machine_away(self) -> None:
        self.simulation.take_away()

    @rule(seconds=st.integers(1, 4000))
    def time_goes_by(self, seconds: int) -> None:
        self.simulation.now += seconds

    @precondition(lambda self: self.alive)
    @rule()
    def the_user_deletes_it(self) -> None:
        if "deletionTimestamp" not in self.simulation.workspace["metadata"]:
            self.simulation.remove()

    @invariant()
    def one_machine_at_most(self) -> None:
        if hasattr(self, "simulation"):
            assert self.simulation.most <= 1

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        simulation = self.simulation
        simulation.settle(40)
        if simulation.workspace is not None and simulation.state == "Pending" and not simulation.machines:
            simulation.now += LONGEST_RETRY_SECONDS  # no pod came, and a machine is got again later
            simulation.settle(40)
        if simulation.workspace is None:
            assert not simulation.machines
            return
        if simulation.state in ("Succeeded", "Failed"):
            assert not simulation.machines
        else:
            assert len(simulation.machines) == 1
            assert simulation.job is not None
        hashes = [c["lastTransitionTime"] for c in simulation.workspace["status"]["conditions"]]
        assert all(hashes)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=300, stateful_step_count=20, deadline=None)
