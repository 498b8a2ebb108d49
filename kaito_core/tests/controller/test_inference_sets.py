"""What the InferenceSet controller decides, rule by rule; then the whole controller on an API server of plain dicts, whose caches
lag behind and which lets it die after any write."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections.abc import Mapping
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kaito_core.api import Workspace, labels, read_workspace
from kaito_core.api.inference_set import TEMPLATE, config_of
from kaito_core.controller.configs import Configs, digest
from kaito_core.controller.decide_set import (
    BURST,
    TAKEN,
    ObservedSet,
    SetDecision,
    decide_set,
    merge_patch,
    serves,
)
from kaito_core.controller.inference_sets import InferenceSetController
from kaito_core.controller.reconcile.revisions import served_by
from kaito_core.controller.reconcile.serving import CONFIG_CHECK
from kaito_core.kube.client import Client
from kaito_core.kube.errors import AlreadyExists, Conflict, Forbidden
from kaito_core.kube.kinds import CONFIG_MAPS, EVENTS, INFERENCE_SETS, SERVICES, WORKSPACES, Kind, Object
from kaito_core.problems import Failure

NOW = 1_800_000_000.0


def inference_set(replicas: int = 3, *, uid: str = "set-1", preset: str = "phi-4", **spec: Any) -> Object:
    """An InferenceSet as an API server has it."""
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "InferenceSet",
        "metadata": {"name": "llm", "namespace": "default", "uid": uid, "generation": 1, "resourceVersion": "1"},
        "spec": {
            "replicas": replicas,
            "template": {
                "metadata": {"labels": {"team": "a"}, "annotations": {"kaito.sh/runtime": "vllm"}},
                "inference": {"preset": {"name": preset}},
            },
            **spec,
        },
    }


def having(obj: Object, **inference: Any) -> Object:
    """The same set with another template."""
    changed = copy.deepcopy(obj)
    changed["spec"]["template"]["inference"].update(inference)
    changed["metadata"]["generation"] += 1
    return changed


def stored(obj: Object, number: int = 0, *, ready: bool | None = None, **metadata: Any) -> Object:
    """What the API server makes of an object."""
    made = copy.deepcopy(obj)
    made["metadata"] |= {
        "uid": f"{obj['kind']}-{number}",
        "resourceVersion": "7",
        "generation": 1,
        "creationTimestamp": f"2026-01-01T00:00:0{number}Z",
        **metadata,
    }
    if ready is not None:
        made["status"] = status(made, ready)
    return made


def status(workspace: Object, ready: bool) -> dict[str, Any]:
    """What its controller says of a Workspace as it is now."""
    about = {"annotations": served_by(workspace)}
    return {"conditions": [condition(ready, workspace["metadata"]["generation"])], "serving": about}


def condition(ready: bool, generation: int, message: str = "") -> dict[str, Any]:
    reason = "WorkspaceInferenceStatusSuccess" if ready else "WorkspaceInferenceStatusPending"
    return {
        "type": "InferenceReady",
        "status": "True" if ready else "False",
        "reason": reason,
        "message": message,
        "observedGeneration": generation,
    }


def decide(obj: Object, *workspaces: Object, service: Object | None = None) -> SetDecision:
    return decide_set(obj, ObservedSet(NOW, workspaces, service or service_of(obj)))


def service_of(obj: Object) -> Object:
    (service,) = (o for k, o in decide_set(obj, ObservedSet(NOW)).create if k == SERVICES)
    return service


def replicas_of(obj: Object, *ready: bool) -> list[Object]:
    """Its Workspaces, by number."""
    wanted = copy.deepcopy(obj)
    wanted["spec"]["replicas"] = len(ready)
    made = [o for k, o in decide_set(wanted, ObservedSet(NOW)).create if k == WORKSPACES]
    return [stored(o, i, ready=r) for i, (o, r) in enumerate(zip(made, ready, strict=True))]


def deleted(decision: SetDecision) -> list[str]:
    return [d.name for d in decision.delete]


def said(decision: SetDecision) -> tuple[str, str, str]:
    """Status, reason and message of the condition InferenceSetReady."""
    assert decision.status is not None
    (found,) = (c for c in decision.status["conditions"] if c["type"] == "InferenceSetReady")
    return found["status"], found["reason"], found["message"]


def counts(decision: SetDecision) -> tuple[int, int, int]:
    """There, ready, of the present template."""
    assert decision.status is not None
    return cast(
        "tuple[int, int, int]",
        tuple(decision.status[f] for f in ("replicas", "readyReplicas", "updatedReplicas")),
    )


# --- what is made


def test_a_new_set_gets_its_workspaces_and_one_service_for_all_of_them() -> None:
    obj = inference_set(labelSelector={"matchLabels": {"apps": "llm"}})
    decision = decide_set(obj, ObservedSet(NOW))
    (_, service), *made = decision.create
    assert [k for k, _ in made] == [WORKSPACES] * 3
    assert [o["metadata"]["name"] for _, o in made] == ["llm-0", "llm-1", "llm-2"]
    assert service["spec"] == {
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 5000}],
        "selector": {labels.INFERENCE_SET: "llm"},
    }
    for obj_made in (service, *(o for _, o in made)):
        assert obj_made["metadata"]["labels"][labels.INFERENCE_SET] == "llm"
        assert obj_made["metadata"]["ownerReferences"][0]["uid"] == "set-1"
    workspace, problems = read_workspace(made[0][1])
    assert workspace is not None
    assert not problems
    assert workspace.metadata.labels["team"] == "a"
    assert workspace.metadata.annotations["kaito.sh/runtime"] == "vllm"
    assert workspace.resource.label_selector is not None
    assert workspace.resource.label_selector.match_labels == {"apps": "llm"}
    assert counts(decision) == (3, 0, 3)
    assert decision.status is not None
    assert decision.status["selector"] == f"{labels.INFERENCE_SET}=llm"
    assert decision.status["observedGeneration"] == 1
    assert said(decision)[:2] == ("False", "inferencesetNotReady")


def test_at_rest_nothing_is_written() -> None:
    obj = inference_set()
    first = decide(obj, *replicas_of(obj, True, True, True))
    assert not first.acts
    assert said(first) == ("True", "inferencesetReady", "3 of 3 replicas are ready")
    obj["status"] = dict(first.status or {})
    again = decide_set(obj, ObservedSet(NOW + 999, tuple(replicas_of(obj, True, True, True)), service_of(obj)))
    assert not again.acts
    assert not again.notes
    assert again.status == obj["status"]


def test_many_replicas_are_made_little_by_little() -> None:
    made = [o for k, o in decide_set(inference_set(1000), ObservedSet(NOW)).create if k == WORKSPACES]
    assert len(made) == BURST


def test_none_is_made_in_place_of_one_that_still_holds_its_machine() -> None:
    obj = inference_set(2)
    first, second = replicas_of(obj, True, True)
    second["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"
    decision = decide(obj, first, second)
    assert not decision.acts
    assert counts(decision) == (1, 1, 1)
    assert "on the way out: llm-1" in said(decision)[2]
    assert [o["metadata"]["name"] for _, o in decide(obj, first).create] == ["llm-1"]


def test_a_limit_of_machines_limits_the_replicas() -> None:
    obj = inference_set(5, nodeCountLimit=5)
    obj["spec"]["template"]["resource"] = {"count": 2}
    decision = decide(obj)
    assert len(decision.create) == 2
    assert said(decision)[:2] == ("False", "NodeCountLimit")
    assert "nodeCountLimit 5 allows 2, of 2 each" in said(decision)[2]
    assert [n.type for n in decision.notes if n.reason == "NodeCountLimit"] == ["Warning"]


# --- fewer replicas


def test_those_go_first_that_are_not_ready_then_the_newest() -> None:
    obj = inference_set(1)
    assert deleted(decide(obj, *replicas_of(obj, True, True, False, True))) == ["llm-2", "llm-3", "llm-1"]
    assert deleted(decide(obj, *replicas_of(obj, False, True))) == ["llm-0"]
    old = replicas_of(inference_set(preset="phi-3"), True, True)
    new = replicas_of(obj, True, True, True)[2:]
    assert deleted(decide(obj, *old, *new)) == ["llm-1", "llm-0"], "of the ready ones those of an earlier template"


def test_down_to_none_and_up_again_uses_the_lowest_numbers() -> None:
    nothing = decide(inference_set(0), *replicas_of(inference_set(), True, False, True))
    assert sorted(deleted(nothing)) == ["llm-0", "llm-1", "llm-2"]
    assert said(nothing)[:2] == ("True", "inferencesetReady")
    obj = inference_set(3)
    third = replicas_of(obj, True, True, True)[2]
    assert [o["metadata"]["name"] for _, o in decide(obj, third).create] == ["llm-0", "llm-1"]


# --- another template


def test_what_can_be_changed_in_place_keeps_its_machine_and_rolls_one_by_one() -> None:
    old = inference_set()
    new = having(old, config="serving")
    workspaces = replicas_of(old, True, True, True)
    decision = decide(new, *workspaces)
    assert not decision.delete
    (change,) = decision.change
    assert change.name == "llm-0"
    assert change.patch["inference"] == {"config": "serving"}
    assert change.patch["metadata"]["resourceVersion"] == "7"
    assert counts(decision) == (3, 2, 1)
    after = patched(workspaces[0], change.patch)
    assert not serves(after), "what its conditions say is about the time before"
    waiting = decide(new, after, *workspaces[1:])
    assert not waiting.acts
    assert "1 of 3 have the present template" in said(waiting)[2]
    after["status"] = status(after, True)
    assert [c.name for c in decide(new, after, *workspaces[1:]).change] == ["llm-1"]


def test_what_cannot_be_changed_in_place_is_made_anew_one_by_one() -> None:
    new = having(inference_set(), preset={"name": "phi-3"})
    workspaces = replicas_of(inference_set(), True, True, True)
    decision = decide(new, *workspaces)
    assert deleted(decision) == ["llm-0"]
    assert decision.delete[0].uid == workspaces[0]["metadata"]["uid"]
    assert not decision.change
    made = decide(new, *workspaces[1:])
    assert [o["metadata"]["name"] for _, o in made.create] == ["llm-0"]
    assert not made.delete


@pytest.mark.parametrize(("allowed", "at_once"), [(2, 2), ("25%", 1), ("50%", 2), ("100%", 4), (9, 4)])
def test_how_many_may_be_away_at_one_time(allowed: int | str, at_once: int) -> None:
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": allowed}}
    new = having(inference_set(4, updateStrategy=strategy), config="serving")
    workspaces = replicas_of(inference_set(4), True, True, True, True)
    assert len(decide(new, *workspaces).change) == at_once


def test_one_that_is_away_by_itself_counts() -> None:
    old, new = inference_set(), having(inference_set(), config="serving")
    current = patched(replicas_of(old, False)[0], decide(new, replicas_of(old, False)[0]).change[0].patch)
    assert not decide(new, current, *replicas_of(old, True, True, True)[1:]).change


def test_a_template_that_never_worked_is_mended_without_waiting() -> None:
    workspaces = replicas_of(inference_set(), False, False, True)
    assert [c.name for c in decide(having(inference_set(), config="c"), *workspaces).change] == ["llm-0", "llm-1"]


def test_on_delete_only_new_ones_follow_the_template() -> None:
    new = having(inference_set(updateStrategy={"type": "OnDelete"}), config="serving")
    decision = decide(new, *replicas_of(inference_set(), True, True))
    assert not decision.change
    assert not decision.delete
    assert [o["inference"]["config"] for _, o in decision.create] == ["serving"]
    assert counts(decision) == (3, 2, 1)


def test_labels_and_annotations_follow_the_template_and_others_stay() -> None:
    old = inference_set(1)
    (workspace,) = replicas_of(old, True)
    workspace["metadata"]["annotations"]["somebody"] = "else"
    new = copy.deepcopy(old)
    new["spec"]["template"]["metadata"] = {"labels": {"tier": "x"}, "annotations": {}}
    after = patched(workspace, decide(new, workspace).change[0].patch)
    assert after["metadata"]["labels"] == {"tier": "x", labels.INFERENCE_SET: "llm"}
    assert set(after["metadata"]["annotations"]) == {"somebody", TEMPLATE}
    assert not serves(after), "what its controller says is about another runtime"
    new["spec"]["template"]["metadata"]["annotations"] = {"kaito.sh/runtime": "vllm"}
    after = patched(workspace, decide(new, workspace).change[0].patch)
    assert serves(after), "nothing that is served has changed"


def test_a_changed_config_map_rolls_one_by_one() -> None:
    obj = having(inference_set(), config="serving")

    def looked(config: str, *workspaces: Object) -> SetDecision:
        return decide_set(obj, ObservedSet(NOW, workspaces, service_of(obj), config))

    made = [o for k, o in looked("aaa").create if k == WORKSPACES]
    workspaces = [stored(o, i, ready=True) for i, o in enumerate(made)]
    at_rest = looked("aaa", *workspaces)
    assert not at_rest.acts
    assert at_rest.look_again_after == CONFIG_CHECK
    changed = looked("bbb", *workspaces)
    assert [c.name for c in changed.change] == ["llm-0"]
    assert set(changed.change[0].patch["metadata"]["annotations"]) == {TEMPLATE, "kaito.sh/runtime"}
    after = patched(workspaces[0], changed.change[0].patch)
    assert not serves(after), "no generation tells that it shall have other settings: its controller has to"
    assert not looked("bbb", after, *workspaces[1:]).acts
    after["status"] = status(after, True)
    assert [c.name for c in looked("bbb", after, *workspaces[1:]).change] == ["llm-1"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"labels": 1}', "[" * 100_000, '{"annotations": {"a": "b"}}'])
def test_whatever_stands_where_the_last_template_should(text: str) -> None:
    obj = inference_set(1)
    (workspace,) = replicas_of(obj, True)
    workspace["metadata"]["annotations"][TEMPLATE] = text
    after = patched(workspace, decide(obj, workspace).change[0].patch)
    assert not decide(obj, after).acts


def test_a_default_that_is_written_out_changes_nothing() -> None:
    obj = inference_set(1)
    workspaces = replicas_of(obj, True)
    obj["spec"]["template"]["resource"] = {"count": 1}
    obj["spec"]["template"]["inference"]["preset"]["accessMode"] = "public"
    assert not decide(obj, *workspaces).acts


# --- others' objects, and what is wrong


def test_somebody_else_s_objects_stay_and_are_named() -> None:
    obj = inference_set()
    theirs = replicas_of(inference_set(uid="set-0"), True, True)
    service = service_of(inference_set(uid="set-0"))
    decision = decide(obj, theirs[1], service=service)
    assert [o["metadata"]["name"] for _, o in decision.create] == ["llm-0", "llm-2"]
    assert not decision.delete
    assert not decision.change
    status, reason, message = said(decision)
    assert (status, reason) == ("False", "NameTaken")
    assert "already a Service default/llm, and it is not of this InferenceSet" in message
    assert "already a Workspace default/llm-1, and it is not of this InferenceSet" in message
    assert decision.look_again_after == TAKEN
    assert [n.reason for n in decision.notes if n.type == "Warning"] == ["NameTaken"]


def test_its_own_are_known_by_their_owner_even_without_the_label() -> None:
    obj = inference_set(1)
    (workspace,) = replicas_of(obj, True)
    del workspace["metadata"]["labels"][labels.INFERENCE_SET]
    assert not decide(obj, workspace).acts


def test_a_set_that_makes_no_sense_touches_nothing() -> None:
    obj = inference_set(0)
    obj["spec"]["template"]["inference"] = {"preset": {"name": "p"}, "template": {"spec": {}}, "config": "Not A Name"}
    decision = decide_set(obj, ObservedSet(NOW, tuple(replicas_of(inference_set(), True, True))))
    assert not decision.acts
    status, reason, message = said(decision)
    assert (status, reason) == ("False", "InvalidInferenceSet")
    assert "spec.template.inference: has both preset and template" in message
    assert "spec.template.inference.config: 'Not A Name' is not a Kubernetes name" in message


def test_a_set_that_is_being_deleted_makes_nothing() -> None:
    obj = inference_set()
    obj["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"
    decision = decide_set(obj, ObservedSet(NOW))
    assert not decision.acts
    assert decision.status is not None
    assert [c["type"] for c in decision.status["conditions"]] == ["InferenceSetDeleting"]


def test_it_says_what_a_replica_waits_for() -> None:
    obj = inference_set(2)
    first, second = replicas_of(obj, True, False)
    second["status"]["conditions"].append(
        {"type": "Accepted", "status": "False", "reason": "NoNode", "message": "sold out everywhere"}
    )
    assert said(decide(obj, first, second))[2] == "1 of 2 replicas are ready; llm-1: NoNode: sold out everywhere"


# --- the whole controller, its API server, and everything that can happen


class Crash(BaseException):
    """The controller dies here."""


def patched(obj: Object, patch: Mapping[str, Any]) -> Object:
    """What an API server makes of a merge patch: a new state, and a new generation when more than metadata changed."""
    after = cast("Object", _merged(obj, patch))
    parts = ("spec", "resource", "inference")
    if any(obj.get(p) != after.get(p) for p in parts):
        after["metadata"]["generation"] = obj["metadata"]["generation"] + 1
    return after


def _merged(base: Any, patch: Any) -> Any:
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    result = dict(base) if isinstance(base, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


class Server:
    """An API server of plain dicts: the methods of `Client` that the controller uses, and its history for the caches."""

    def __init__(self) -> None:
        self.objects: dict[tuple[Kind, str], Object] = {}
        self.history: list[tuple[Kind, Object | None, Object | None]] = []
        self.requests = 0
        self.writes = 0
        self.crash_after = -1
        self.refuse = ""
        self.slow = True
        """Workspaces have a finalizer, so that they stay for a while."""

    # --- the client

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        self.requests += 1
        return copy.deepcopy(self.objects.get((kind, name)))

    def list(self, kind: Kind, namespace: str = "", **_: Any) -> tuple[list[Object], str]:
        self.requests += 1
        found = [copy.deepcopy(o) for (k, _), o in self.objects.items() if k == kind]
        return found, str(len(self.history))

    def create(self, kind: Kind, obj: Object) -> Object:
        if kind == EVENTS:
            return obj
        if self.refuse:
            raise Forbidden(f"create {kind}: {self.refuse}", status=403)
        if (kind, obj["metadata"]["name"]) in self.objects:
            raise AlreadyExists("it is there", status=409, reason="AlreadyExists")
        made = copy.deepcopy(obj)
        made["metadata"] |= {"uid": f"u-{len(self.history)}", "generation": 1, "creationTimestamp": self._time()}
        return self._write(kind, obj["metadata"]["name"], made)

    def patch(self, kind: Kind, name: str, namespace: str, patch: Any, *, subresource: str = "") -> Object:
        if kind == EVENTS:
            return {}
        old = self.objects[kind, name]
        version = patch.get("metadata", {}).get("resourceVersion", old["metadata"]["resourceVersion"])
        if version != old["metadata"]["resourceVersion"]:
            raise Conflict("it is newer", status=409)
        assert subresource == ("status" if kind == INFERENCE_SETS else "")
        return self._write(kind, name, patched(old, patch))

    def delete(self, kind: Kind, name: str, namespace: str = "", *, uid: str = "") -> bool:
        old = self.objects.get((kind, name))
        if old is None or old["metadata"]["uid"] != uid:
            return False
        if "deletionTimestamp" not in old["metadata"]:
            left = {**old, "metadata": {**old["metadata"], "deletionTimestamp": self._time()}}
            self._write(kind, name, left if self.slow else None)
        return True

    # --- what others do

    def put(self, kind: Kind, name: str, obj: Object | None) -> None:
        """A write that is not the controller's."""
        crash, self.crash_after = self.crash_after, -1
        self._write(kind, name, obj)
        self.crash_after = crash
        self.writes -= 1

    def _write(self, kind: Kind, name: str, obj: Object | None) -> Object:
        self.requests += 1
        old = self.objects.get((kind, name))
        if obj is None:
            del self.objects[kind, name]
        else:
            obj = copy.deepcopy(obj)
            obj["metadata"]["resourceVersion"] = str(len(self.history) + 1)
            self.objects[kind, name] = obj
        self.history.append((kind, old, obj))
        self.writes += 1
        self.crash_after -= 1
        if self.crash_after == 0:  # it was done, and nobody heard of it
            raise Crash
        return copy.deepcopy(obj) if obj is not None else {}

    def _time(self) -> str:
        return f"2026-01-01T00:{len(self.history) // 60 % 60:02}:{len(self.history) % 60:02}Z"


def answers(workspace: Object) -> bool:
    """Whether requests to it are answered, by this world's own laws."""
    found = workspace.get("status", {}).get("conditions", [])
    generation = workspace["metadata"]["generation"]
    about = workspace.get("status", {}).get("serving", {}).get("annotations")
    is_so = condition(True, generation) in found and about == served_by(workspace)
    return is_so and "deletionTimestamp" not in workspace["metadata"]


class Controlled:
    """One InferenceSet, its controller, and caches that lag."""

    def __init__(self, obj: Object) -> None:
        self.server = Server()
        self.server.put(INFERENCE_SETS, "llm", obj)
        self.restart()

    def restart(self, behind: int = 0) -> None:
        """A new controller, whose caches are so many changes late."""
        self.controller = InferenceSetController(cast(Client, self.server), clock=lambda: NOW)
        self.controller._configs = Configs(cast(Client, self.server), itertools.count(step=60).__next__)
        self._at = dict.fromkeys((r.kind for r in self.controller.reflectors), 0)
        for reflector in self.controller.reflectors:
            reflector.has_synced = True
            self.see(reflector.kind, len(self.server.history) - behind)

    def see(self, kind: Kind, changes: int) -> None:
        """The cache of this kind hears of so many changes more."""
        (reflector,) = (r for r in self.controller.reflectors if r.kind == kind)
        for _ in range(min(changes, len(self.server.history) - self._at[kind])):
            number = self._at[kind]
            self._at[kind] += 1
            of, old, new = self.server.history[number]
            if of == kind:
                # A watch with a label selector tells of those that have the label.
                selected = new is not None and (
                    kind == INFERENCE_SETS or labels.INFERENCE_SET in new["metadata"]["labels"]
                )
                shown = copy.deepcopy(new if selected else old)
                if shown is not None:
                    reflector._take("MODIFIED" if selected else "DELETED", shown)
            reflector._heard(str(number + 1))

    def reconcile(self) -> None:
        with contextlib.suppress(Failure):
            self.controller.reconcile("default", "llm")

    def settle(self) -> None:
        """Caches catch up and everything comes to rest."""
        for _ in range(60):
            for kind in self._at:
                self.see(kind, len(self.server.history))
            before = self.server.writes
            self.reconcile()
            if self.server.writes == before and self._at == dict.fromkeys(self._at, len(self.server.history)):
                return
        raise AssertionError("it never comes to rest")

    @property
    def set(self) -> Object:
        return self.server.objects[INFERENCE_SETS, "llm"]

    def workspaces(self) -> dict[str, Object]:
        """Those of the set."""
        uid = self.set["metadata"]["uid"]
        return {
            name: o
            for (kind, name), o in self.server.objects.items()
            if kind == WORKSPACES and any(r["uid"] == uid for r in o["metadata"].get("ownerReferences", ()))
        }

    def edit(self, **spec: Any) -> None:
        """A person changes the set."""
        self.server.put(INFERENCE_SETS, "llm", patched(self.set, {"spec": spec}))

    def tell(self, name: str, ready: bool) -> None:
        """The Workspace controller says how a Workspace is."""
        old = self.server.objects[WORKSPACES, name]
        self.server.put(WORKSPACES, name, {**old, "status": status(old, ready)})

    def finish(self, name: str) -> None:
        """The machine has been given back."""
        self.server.put(WORKSPACES, name, None)


def test_what_the_api_server_refuses_is_said_in_the_status() -> None:
    world = Controlled(inference_set(1))
    world.server.refuse = "exceeded quota: gpus"
    world.reconcile()
    (found,) = world.set["status"]["conditions"]
    assert found["status"] == "False"
    assert "exceeded quota: gpus; trying again" in found["message"]
    world.server.refuse = ""
    world.settle()
    assert set(world.workspaces()) == {"llm-0"}


def test_at_rest_the_api_server_is_not_even_asked() -> None:
    world = Controlled(inference_set(2))
    world.settle()
    for name in world.workspaces():
        world.tell(name, True)
    world.settle()
    before = world.server.requests
    world.reconcile()
    assert world.server.requests == before


def test_an_orphaned_workspace_is_not_taken_over() -> None:
    """`kubectl delete --cascade=orphan` leaves them; a new set of that name has another uid."""
    world = Controlled(inference_set(1))
    world.settle()
    world.server.put(INFERENCE_SETS, "llm", inference_set(1, uid="set-2"))
    kept = copy.deepcopy(world.server.objects[WORKSPACES, "llm-0"])
    world.settle()
    assert world.server.objects[WORKSPACES, "llm-0"] == kept
    assert "is not of this InferenceSet" in world.set["status"]["conditions"][0]["message"]


OWNERS: dict[str, tuple[list[Object], str]] = {
    "another's": ([{"kind": "App", "name": "web", "uid": "a-1", "controller": True}], "it belongs to the App web"),
    "an earlier set's": (
        [{"kind": "InferenceSet", "name": "llm", "uid": "set-0", "controller": True}],
        "it belongs to an earlier InferenceSet of this name, which is gone",
    ),
    "without an owner": ([], "it has no owner"),
    "not controlled": (
        [{"kind": "InferenceSet", "name": "llm", "uid": "set-1", "controller": False}],
        "it has no owner",
    ),
}


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("references", "words"), OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize(("kind", "name"), [(WORKSPACES, "llm-0"), (SERVICES, "llm")], ids=["Workspace", "Service"])
def test_what_is_another_s_is_neither_changed_nor_deleted(
    kind: Kind, name: str, references: list[Object], words: str, labelled: bool
) -> None:
    world = Controlled(inference_set(1))
    theirs = stored(replicas_of(inference_set(1), True)[0])
    theirs["metadata"] |= {"name": name, "ownerReferences": references, "uid": "their"}
    theirs["metadata"]["labels"] = {labels.INFERENCE_SET: "llm"} if labelled else {}
    world.server.put(kind, name, theirs)
    world.restart()
    before = copy.deepcopy(world.server.objects[kind, name])
    for replicas in (1, 3, 0):
        world.edit(replicas=replicas, template=TEMPLATES[replicas])
        world.settle()
        assert world.server.objects[kind, name] == before
        if replicas:
            (found,) = (c for c in world.set["status"]["conditions"] if c["reason"] == "NameTaken")
            assert (
                f"already a {kind.kind} default/{name}, and it is not of this InferenceSet: {words}" in found["message"]
            )


TEMPLATES: list[dict[str, Any]] = [
    {"inference": {"preset": {"name": "phi-4"}, "config": None}},
    {"inference": {"preset": {"name": "phi-4"}, "config": "serving"}},
    {"inference": {"preset": {"name": "phi-3"}, "config": None}},
    {"inference": {"preset": {"name": "phi-4"}}, "metadata": {"labels": {"team": None, "tier": "b"}}},
    {"inference": {"preset": {"name": "phi-4"}}, "resource": {"instanceType": "x"}},
]


class Life(RuleBasedStateMachine):
    """An InferenceSet's life in any order, with the controller dying after any write and caches that lag. Never more Workspaces
    than wanted are made, never is one that serves touched when too few would be left, nobody else's is touched; and in the end
    everything is as wanted."""

    @initialize(
        replicas=st.integers(0, 4), allowed=st.sampled_from([1, 2, "50%"]), foreign=st.booleans(), slow=st.booleans()
    )
    def begin(self, replicas: int, allowed: int | str, foreign: bool, slow: bool) -> None:
        strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": allowed}}
        self.world = Controlled(inference_set(replicas, updateStrategy=strategy))
        self.server = self.world.server
        self.server.slow = slow
        self.foreign: dict[str, Object] = {}
        for name in ["llm-1", "other-0"] if foreign else []:
            theirs = stored(replicas_of(inference_set(1, uid="set-0"), True)[0])
            theirs["metadata"] |= {"name": name, "labels": {}}
            self.server.put(WORKSPACES, name, theirs)
            self.foreign[name] = copy.deepcopy(self.server.objects[WORKSPACES, name])
        self.world.restart()
        self._watch_over()

    def _watch_over(self) -> None:
        """Look at every write of the controller right after it."""
        create, patch, delete = self.server.create, self.server.patch, self.server.delete

        def created(kind: Kind, obj: Object) -> Object:
            if kind == WORKSPACES:
                assert len(self.world.workspaces()) < self.world.set["spec"]["replicas"]
            return create(kind, obj)

        def changed(kind: Kind, name: str, namespace: str, given: Any, *, subresource: str = "") -> Object:
            if kind != WORKSPACES:
                return patch(kind, name, namespace, given, subresource=subresource)
            return self._touched(name, lambda: patch(kind, name, namespace, given))

        def removed(kind: Kind, name: str, namespace: str = "", *, uid: str = "") -> bool:
            return bool(self._touched(name, lambda: delete(kind, name, namespace, uid=uid)))

        vars(self.server).update(create=created, patch=changed, delete=removed)

    def _touched(self, name: str, write: Any) -> Any:
        served = answers(self.server.objects[WORKSPACES, name])
        try:
            return write()
        finally:
            spec = self.world.set["spec"]
            allowed = spec["updateStrategy"]["rollingUpdate"]["maxUnavailable"]
            away = -(-spec["replicas"] // 2) if allowed == "50%" else allowed
            left = sum(map(answers, self.world.workspaces().values()))
            assert not served or left >= spec["replicas"] - max(1, away)

    @rule(crash_after=st.sampled_from([-1, -1, 1, 2, 3, 4]), behind=st.integers(0, 6))
    def reconcile(self, crash_after: int, behind: int) -> None:
        self.server.crash_after = crash_after
        try:
            self.world.reconcile()
        except Crash:
            self.world.restart(behind)
        self.server.crash_after = -1

    @rule(kind=st.sampled_from([WORKSPACES, INFERENCE_SETS, SERVICES]), changes=st.integers(1, 12))
    def a_cache_catches_up(self, kind: Kind, changes: int) -> None:
        self.world.see(kind, changes)

    @rule(replicas=st.integers(0, 4))
    def scale(self, replicas: int) -> None:
        self.world.edit(replicas=replicas)

    @rule(template=st.sampled_from(TEMPLATES))
    def another_template(self, template: dict[str, Any]) -> None:
        self.world.edit(template=template)

    @rule(text=st.sampled_from(["a: 1", "a: 2", ""]))
    def another_config_map(self, text: str) -> None:
        config = {"metadata": {"name": "serving"}, "data": {"inference_config.yaml": text}}
        if text or (CONFIG_MAPS, "serving") in self.server.objects:
            self.server.put(CONFIG_MAPS, "serving", config if text else None)

    @precondition(lambda self: self.world.workspaces())
    @rule(data=st.data(), ready=st.booleans())
    def a_workspace_changes(self, data: st.DataObject, ready: bool) -> None:
        self.world.tell(data.draw(st.sampled_from(sorted(self.world.workspaces()))), ready)

    @rule()
    def all_get_ready(self) -> None:
        for name in self.world.workspaces():
            self.world.tell(name, True)

    @precondition(lambda self: self.world.workspaces())
    @rule(data=st.data())
    def a_person_removes_one(self, data: st.DataObject) -> None:
        self.world.finish(data.draw(st.sampled_from(sorted(self.world.workspaces()))))

    @precondition(lambda self: any("deletionTimestamp" in w["metadata"] for w in self.world.workspaces().values()))
    @rule()
    def machines_are_given_back(self) -> None:
        for name, workspace in self.world.workspaces().items():
            if "deletionTimestamp" in workspace["metadata"]:
                self.world.finish(name)

    @invariant()
    def nobody_else_s_is_touched(self) -> None:
        for name, obj in getattr(self, "foreign", {}).items():
            assert self.server.objects[WORKSPACES, name] == obj

    def teardown(self) -> None:
        if not hasattr(self, "foreign"):
            return
        for name in self.foreign:  # whoever has the name heeds the words of the condition
            self.server.put(WORKSPACES, name, None)
        self._go_on()
        spec, status = self.world.set["spec"], self.world.set["status"]
        there = self.world.workspaces()
        assert len(there) == spec["replicas"]
        for workspace in there.values():
            wanted = spec["template"]
            read = Workspace.model_validate({k: v for k, v in workspace.items() if k != "status"})
            assert read.inference is not None
            assert read.inference.to_object() == wanted["inference"]
            config = self.server.objects.get((CONFIG_MAPS, wanted["inference"].get("config")))
            assert config_of(workspace["metadata"]["annotations"][TEMPLATE]) == digest(config and config["data"])
            assert {**wanted["metadata"]["labels"], labels.INFERENCE_SET: "llm"} == workspace["metadata"]["labels"]
            assert read.resource.instance_type == wanted.get("resource", {}).get("instanceType", "")
        assert (status["replicas"], status["readyReplicas"], status["updatedReplicas"]) == (len(there),) * 3
        assert status["conditions"][-1]["reason"] == "inferencesetReady"
        before = self.server.writes
        self.world.reconcile()
        assert self.server.writes == before, "at rest nothing is written"

    def _go_on(self) -> None:
        """Everybody does what is theirs, until nobody has anything left to do."""
        for _ in range(30):
            self.world.settle()
            before = len(self.server.history)
            self.machines_are_given_back()
            for name, workspace in self.world.workspaces().items():
                if not answers(workspace):
                    self.world.tell(name, True)
            if len(self.server.history) == before:
                return
        raise AssertionError("it never comes to rest")


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(
    ("old", "new", "patch"),
    [
        ({}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, {"a": {"c": None}}),
        ({"a": 1, "b": [1]}, {"b": [1]}, {"a": None}),
        ({"a": 1}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": {"b": 1}}, {}),
    ],
)
def test_a_patch_says_what_changes_and_no_more(old: Any, new: Any, patch: Any) -> None:
    assert merge_patch(old, new) == patch
    assert json.loads(json.dumps(_merged(old, patch))) == new
