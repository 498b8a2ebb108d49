"""Following a Workspace: what a terminal shows of conditions and logs, whatever breaks on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.cli.cluster import follow as follow_module
from kaito_core.cli.cluster.follow import failure, follow
from kaito_core.cli.cluster.logs import Printer, show_logs
from kaito_core.cli.cluster.pod_log import container_lines
from kaito_core.cli.cluster.workspace import news, succeeded, tried
from kaito_core.cli.follow import Follower
from kaito_core.controller.reconcile.revisions import hash_of
from kaito_core.kube.errors import Forbidden, Unreachable
from kaito_core.kube.kinds import JOBS, PODS, STATEFUL_SETS, WORKSPACES, Kind, Object, owner_reference
from kaito_core.problems import Failure
from kaito_core.progress import log_line

TUNING = {"preset": {"name": "demo-phi-3"}, "method": "qlora"}


def condition(kind: str, status: str, message: str = "", reason: str = "r", generation: int = 1) -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": message, "observedGeneration": generation}


def workspace(*conditions: Object, generation: int = 1, **status: Any) -> Object:
    metadata = {"name": "small", "namespace": "default", "uid": "w", "generation": generation}
    return {
        "kind": "Workspace",
        "metadata": metadata,
        "tuning": TUNING,
        "status": {"conditions": list(conditions), **status},
    }


def runs(kind: Kind, owner: str = "w") -> Object:
    """The Workspace's job, or its StatefulSet."""
    reference = {"kind": "Workspace", "name": "small", "uid": owner, "controller": True}
    metadata = {"name": "small", "namespace": "default", "uid": kind.kind, "ownerReferences": [reference]}
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata}


RUNS = {kind: runs(kind) for kind in (JOBS, STATEFUL_SETS)}


def pod(name: str, **states: str) -> Object:
    """A pod with its containers' states by name."""
    annotations = {"workspace.kaito.io/hash": hash_of(workspace())}
    containers = [{"name": c.replace("_", "-"), "state": {s: {}}} for c, s in states.items()]
    return {
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": name,
            "annotations": annotations,
            "creationTimestamp": name,
            "ownerReferences": [owner_reference(RUNS[JOBS])],
        },
        "spec": {"containers": [{"name": c["name"]} for c in containers]},
        "status": {"phase": "Running", "containerStatuses": containers},
    }


Step = Callable[[], Object | None]


@dataclass
class Scripted:
    """A cluster that shows one state of the Workspace after another, and breaks every stream where it is told to."""

    states: list[Object | Exception | None]
    pods: list[Object] = field(default_factory=list)
    printed: dict[str, list[str]] = field(default_factory=dict)
    """By pod."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """How many lines each stream of a pod's log gives before it breaks."""
    before_read: Callable[[str], None] = lambda pod: None

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        if kind is PODS:
            return next((p for p in self.pods if p["metadata"]["name"] == name), None)
        if kind in RUNS:
            return RUNS[kind]
        assert kind is WORKSPACES
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return state

    def list(self, kind: Kind, namespace: str = "", *, labels: str = "") -> tuple[list[Object], str]:
        assert labels == "kaito.sh/workspace=small"
        return self.pods, "1"

    def logs(
        self, pod: str, namespace: str, container: str, *, follow: bool = False, since_seconds: int | None = None
    ) -> Iterator[str]:
        # Whatever was said lately comes again: all of it, here, where a test takes no time.
        self.before_read(pod)
        cuts = self.cuts.get(pod, [])
        if not cuts:
            self.pods = [ended(p) if p["metadata"]["name"] == pod else p for p in self.pods]
            yield from self.printed.get(pod, [])
            return
        yield from self.printed[pod][: cuts.pop(0)]
        raise Unreachable("the connection ended")


def ended(of: Object) -> Object:
    statuses = [{**c, "state": {"terminated": {}}} for c in of["status"]["containerStatuses"]]
    return {**of, "status": {"phase": "Succeeded", "containerStatuses": statuses}}


def followed(cluster: Scripted, **options: Any) -> tuple[Object, list[str]]:
    said: list[str] = []
    with Follower("small") as follower:
        end = follow(cluster, "small", "default", follower, look=0.02, say=said.append, **options)
    return end, said


DONE = workspace(condition("WorkspaceSucceeded", "True"), state="Succeeded")


def event(stage: str, kind: str, **fields: Any) -> str:
    return log_line({"event": kind, "stage": stage, **fields})


# --- the end


def test_only_the_condition_of_the_present_generation_is_the_end() -> None:
    """KAITO's condition says nothing of whether it is about what was applied just now."""
    assert succeeded(DONE) is True
    old = workspace(condition("WorkspaceSucceeded", "True", generation=1), generation=2)
    assert succeeded(old) is None
    pending = workspace(condition("WorkspaceSucceeded", "False", reason="workspacePending"))
    assert succeeded(pending) is None
    assert succeeded(workspace(condition("WorkspaceSucceeded", "False", reason="workspaceFailed"))) is False
    assert succeeded({"metadata": {"generation": 1}}) is None


def test_a_failure_says_what_the_condition_says() -> None:
    error = failure(
        workspace(condition("WorkspaceSucceeded", "False", "the disk is full", "workspaceFailed")), "--context x "
    )
    assert "default/small failed: the disk is full" in str(error)
    assert "kaito logs --context x -n default small" in str(error)


def test_it_waits_for_machines_to_be_given_back_when_nobody_else_does() -> None:
    attempt = {"provisioner": "cloud", "instanceType": "m", "started": "t"}
    holding = workspace(*DONE["status"]["conditions"], attempts=[attempt])
    free = workspace(*DONE["status"]["conditions"], attempts=[{**attempt, "ended": "t"}])
    assert followed(Scripted([holding, free]))[0] is holding
    assert followed(Scripted([holding, free]), until_released=True)[0] is free


def test_a_deleted_workspace_is_not_followed_for_ever() -> None:
    with pytest.raises(Failure, match="was deleted"):
        followed(Scripted([workspace(), None]))


# --- what happened


def test_every_change_is_a_line_and_nothing_is_said_twice() -> None:
    waiting = workspace(condition("ResourceReady", "False", "waiting for a machine"))
    attempt = {"provisioner": "cloud", "instanceType": "Standard_X", "started": "t", "pricePerHour": 0.9}
    asked = workspace(*waiting["status"]["conditions"], attempts=[attempt])
    given_up = {**attempt, "ended": "t", "reason": "InsufficientCapacity", "message": "none left"}
    ready = workspace(condition("ResourceReady", "True"), attempts=[given_up], workerNodes=["gpu-1"])
    assert news(None, waiting) == ["ResourceReady: no – waiting for a machine"]
    assert news(waiting, waiting) == []
    assert news(waiting, asked) == ["asking cloud for Standard_X, $0.90 an hour"]
    assert news(asked, ready) == [
        "cloud for Standard_X, $0.90 an hour: InsufficientCapacity: none left",
        "on gpu-1",
        "ResourceReady: yes",
    ]
    assert news(None, workspace(condition("ResourceReady", "True", generation=1), generation=2)) == []


def test_what_came_to_nothing_is_a_table() -> None:
    """Of the revision that was run last, in the cloud's own words."""
    attempt = {"provisioner": "cloud", "started": "t", "ended": "t", "revision": 2}
    first = {**attempt, "instanceType": "Standard_X", "reason": "QuotaExceeded", "message": "0 of 24 vCPUs left"}
    second = {**attempt, "instanceType": "Standard_Long", "reason": "TimedOut", "message": "not ready"}
    old = {**first, "revision": 1}
    assert tried(workspace(attempts=[old, first, second])) == [
        "cloud for Standard_X     QuotaExceeded  0 of 24 vCPUs left",
        "cloud for Standard_Long  TimedOut       not ready",
    ]
    assert tried(workspace()) == []


def test_an_api_server_that_is_away_is_said_once_and_waited_for() -> None:
    away = Unreachable("get workspaces: refused")
    end, said = followed(Scripted([workspace(), away, away, away, DONE]))
    assert end is DONE
    assert said == ["get workspaces: refused; trying again", "the API server answers again"]


def test_what_is_not_permitted_is_not_tried_for_ever() -> None:
    with pytest.raises(Forbidden):
        followed(Scripted([workspace(), Forbidden("no", status=403)]))


# --- logs


def test_stages_and_steps_are_shown_as_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        event("train", "started"),
        "a library says something",
        event("train", "message", text="going on from checkpoint-4"),
        event("train", "step", step=5, steps=5, loss=0.5, tokens_per_second=10, seconds_left=0),
        event("train", "step", step="a newer tuner's idea of a step"),
        event("train", "eval", step=5, loss=0.25),
        event("train", "finished"),
    ]
    cluster = Scripted([workspace(), workspace(), DONE], [pod("p1", small="running")], {"p1": lines})
    assert followed(cluster)[1] == ["pod p1"]
    assert capsys.readouterr().out.splitlines() == [
        "train",
        "  going on from checkpoint-4",
        "  step 5/5  loss 0.5000  10 tokens/s  0 s left",
        "  step 5: held-out loss 0.2500",
    ]


def test_a_pod_that_is_replaced_is_left_for_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Scripted(
        [*[workspace()] * 8, DONE],
        [pod("p1", small="running")],
        {"p1": [event("train", "message", text="first")], "p2": [event("train", "message", text="second")]},
    )

    def replace(name: str) -> None:
        if name == "p1":
            cluster.pods.append(pod("p2", small="running"))

    cluster.before_read = replace
    assert followed(cluster)[1] == ["pod p1", "pod p2, in place of the one before"]
    assert capsys.readouterr().out.split() == ["first", "second"]


def test_pods_of_an_earlier_revision_are_another_run() -> None:
    other = pod("p1", small="running")
    other["metadata"]["annotations"] = {"workspace.kaito.io/hash": "another"}
    assert followed(Scripted([workspace(), DONE], [other]))[1] == []


@pytest.mark.parametrize("owner", ["", "another-job"])
def test_a_pod_with_the_label_alone_is_none_of_the_workspace_s(owner: str) -> None:
    """Its lines would be shown as those of the training, and its events as the progress."""
    theirs = pod("p1", small="running")
    reference = {**owner_reference(RUNS[JOBS]), "uid": owner}
    theirs["metadata"]["ownerReferences"] = [reference] if owner else []
    cluster = Scripted([workspace(), DONE], [theirs], {"p1": [event("train", "step", step=7, steps=9)]})
    assert followed(cluster)[1] == []


@given(st.integers(0, 30), st.lists(st.integers(0, 30), max_size=6))
def test_streams_that_break_anywhere_lose_nothing_and_repeat_nothing(count: int, cuts: list[int]) -> None:
    lines = [f"line {n}" for n in range(count)]
    cluster = Scripted([DONE], [pod("p1", small="running")], {"p1": lines}, {"p1": cuts})
    found = [line for _, line in container_lines(cluster, cluster.pods[0], follow=True, pause=0)]
    assert found == lines


def test_a_log_that_is_gone_does_not_hide_the_next_one() -> None:
    """A container that has ended on a node that is away: its log will not come any more."""
    cluster = Scripted([DONE], [ended(pod("p1", fetch="running"))])
    cluster.printed, cluster.cuts = {"p1": []}, {"p1": [0] * 5}
    both = {**cluster.pods[0], "spec": {"containers": [{"name": "fetch"}, {"name": "never"}]}}
    assert list(container_lines(cluster, both, follow=True, pause=0)) == []
    assert cluster.cuts == {"p1": []}


def test_logs_show_words_and_no_events(capsys: pytest.CaptureFixture[str]) -> None:
    printed = [
        ("fetch", event("fetch", "started")),
        ("fetch", event("fetch", "message", text="3 rows")),
        ("small", event("train", "started")),
        ("small", "a library says something"),
        ("small", event("train", "step", step=1)),
        ("small", event("push", "message", text="pushed")),
    ]
    for only, shown in (
        ("", "--- fetch|3 rows|--- train|a library says something|--- push|pushed"),
        ("push", "--- push|pushed"),
    ):
        printer = Printer(only)
        for container, line in printed:
            printer.line(container, line)
        assert capsys.readouterr().out.splitlines() == shown.split("|")
        assert printer.stages == ["fetch", "train", "push"]
    assert json.loads(printed[0][1].partition("] ")[2])["event"] == "started"


# --- endpoints


def endpoint(*conditions: Object, phase: str = "", policy: str = "always", **status: Any) -> Object:
    made = workspace(*conditions, **({"serving": {"phase": phase}} if phase else {}), **status)
    del made["tuning"]
    return {**made, "inference": {"preset": {"name": "demo-phi-3"}, "policy": policy}}


def server(name: str, **states: str) -> Object:
    """A pod of an endpoint; its containers are started again when they end."""
    made = pod(name, **states)
    made["metadata"] |= {"labels": {"kaito.sh/serving": "true"}, "annotations": {}}
    made["metadata"]["ownerReferences"] = [owner_reference(RUNS[STATEFUL_SETS])]
    made["spec"]["restartPolicy"] = "Always"
    return made


ANSWERS = endpoint(condition("InferenceReady", "True"), condition("WorkspaceSucceeded", "True"), phase="Ready")
REFUSED = condition("Accepted", "False", "tests do not serve", "PolicyRefused")


@pytest.mark.parametrize(
    ("found", "end"),
    [
        (endpoint(), None),
        (endpoint(condition("InferenceReady", "False", "the pod starts"), phase="Starting"), None),
        (ANSWERS, True),
        (endpoint(condition("InferenceReady", "False", "none left"), phase="Failed"), False),
        (endpoint(condition("InferenceReady", "False", "none left", generation=0), phase="Failed"), None),
        (endpoint(REFUSED, condition("WorkspaceSucceeded", "True")), False),
        (endpoint(condition("Accepted", "False", "no such Secret", "SecretMissing")), None),
        (endpoint(condition("InferenceReady", "False", "nobody holds it", "NoActivator"), policy="onDemand"), False),
    ],
)
def test_an_endpoint_is_at_its_end_when_it_answers_or_will_not(found: Object, end: bool | None) -> None:
    assert succeeded(found) is end


def test_a_change_of_what_is_served_is_no_new_training() -> None:
    """The controller leaves the condition of the tuning as it was then."""
    tuned = workspace(condition("WorkspaceSucceeded", "True", generation=1), generation=2)
    tuned["status"]["finishedRevision"] = hash_of(tuned)
    assert succeeded({**tuned, "inference": {"policy": "always"}}) is True
    assert succeeded({**tuned, "tuning": {**TUNING, "method": "lora"}}) is None


def test_the_log_of_what_serves_is_shown_until_it_answers(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [event("fetch", "started"), event("fetch", "message", text="12 files"), event("serve", "serving")]
    cluster = Scripted([endpoint(), endpoint(), ANSWERS], [server("small-0", small="running"), server("small-1")])
    cluster.printed = {"small-0": lines}
    end, said = followed(cluster)
    assert end is ANSWERS
    assert said == ["pod small-0", "InferenceReady: yes"]
    assert capsys.readouterr().out.splitlines() == ["fetch", "  12 files"]


def test_what_was_refused_before_is_no_end_until_the_controller_has_looked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A ConfigMap that is mended changes nothing of the Workspace."""
    still = endpoint(REFUSED)
    end, said = followed(Scripted([still, still, ANSWERS]), refused="tests do not serve")
    assert end is ANSWERS
    assert said[0] == "it was refused before: tests do not serve; the controller looks again within a minute"
    other = endpoint({**REFUSED, "message": "something else"})
    assert followed(Scripted([still, other, ANSWERS]), refused="tests do not serve")[0] is other
    monkeypatch.setattr(follow_module, "LOOKS_AGAIN", 0.0)
    assert followed(Scripted([still, ANSWERS]), refused="tests do not serve")[0] is still


def test_who_looks_after_an_endpoint_alone_does_so_until_it_is_ended() -> None:
    """There is nobody else, and an endpoint has no end of its own."""
    reached: list[Object] = []
    with pytest.raises(Failure, match="was deleted"):
        followed(Scripted([endpoint(), ANSWERS, ANSWERS, None]), until_released=True, reached=reached.append)
    assert reached == [ANSWERS]


def test_a_server_that_is_started_again_has_another_log() -> None:
    """It may well begin like the one before."""
    first = server("small-0", small="running")
    cluster = Scripted([ANSWERS], [first], {"small-0": ["loading", "ready"]})
    starts = iter([["loading", "out of memory"], ["loading", "ready"]])

    def restart(name: str) -> None:
        lines = next(starts, None)
        if lines is None:
            cluster.pods = []
            return
        cluster.printed["small-0"] = lines
        count = cluster.pods[0]["status"]["containerStatuses"][0].get("restartCount", 0)
        again = {"name": "small", "restartCount": count + 1, "state": {"waiting": {}}, "lastState": {"terminated": {}}}
        cluster.pods = [{**first, "status": {"phase": "Running", "containerStatuses": [again]}}]

    cluster.before_read = restart
    cluster.cuts = {"small-0": [9, 9, 9]}
    found = [line for _, line in container_lines(cluster, first, follow=True, pause=0)]
    assert found[:4] == ["loading", "out of memory", "loading", "ready"]


def test_the_logs_of_an_endpoint_are_those_of_what_serves(capsys: pytest.CaptureFixture[str]) -> None:
    job, serves = pod("job", small="terminated"), server("small-0", fetch="terminated", small="running")
    printed = {"job": [event("train", "message", text="trained")], "small-0": ["a line of the server"]}
    tuned = workspace(condition("WorkspaceSucceeded", "True"), state="Succeeded")

    def shown(found: Object, pods: list[Object], **options: Any) -> list[str]:
        show_logs(Scripted([found], pods, printed), found, **options)  # type: ignore[arg-type]
        return capsys.readouterr().out.splitlines()

    fetched = ["--- fetch", "a line of the server", "--- serve", "a line of the server"]
    assert shown(tuned, [job, serves]) == fetched
    assert shown(tuned, [job]) == ["--- train", "trained"]
    assert shown(tuned, [job, serves], stage="train") == ["--- train", "trained"]
    assert shown(tuned, [job, serves], stage="serve") == fetched[2:]
    assert shown(ANSWERS, [serves], stage="fetch") == fetched[:2]
    starts = endpoint(condition("InferenceReady", "False", "no node takes the pod"), phase="Starting")
    show_logs(Scripted([starts], [server("small-0", small="waiting")]), starts)  # type: ignore[arg-type]
    assert capsys.readouterr().err == "nothing has been printed yet: no node takes the pod\n"
    asleep = endpoint(condition("InferenceReady", "True", "asleep: …", "OnDemand"), phase="Asleep")
    with pytest.raises(Failure, match="there is no pod of small: asleep"):
        shown(asleep, [])
