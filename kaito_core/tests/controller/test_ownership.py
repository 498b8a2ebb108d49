"""Whose an object is, is asked before it is made, changed or deleted, and before anything is decided from it: by its owner's uid.

The kinds of objects are those that the controller really makes; a kind that is added is in these tests by itself."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from uuid import uuid4

import pytest

from kaito_core.api import labels
from kaito_core.controller.settings import Settings
from kaito_core.controller.workspaces import WorkspaceController
from kaito_core.kube.client import Client, connect
from kaito_core.kube.errors import Conflict
from kaito_core.kube.kinds import (
    CONFIG_MAPS,
    ENDPOINT_SLICES,
    JOBS,
    NAMESPACES,
    PODS,
    REVISIONS,
    SECRETS,
    SERVICES,
    STATEFUL_SETS,
    VOLUME_CLAIMS,
    WORKSPACES,
    Kind,
    Object,
    owner_reference,
)
from kaito_core.plugins.manager import PluginManager
from kaito_core.progress import log_line
from kaito_core.testing.provisioner import FakeProvisioner

from .api_server import Place, Plugins, World
from .simulation import OFFERS, Simulation, workspace_object
from .test_decide import FINISHED, ended


def reference(kind: str, name: str, uid: str, *, controller: bool = True) -> Object:
    return {"apiVersion": "v1", "kind": kind, "name": name, "uid": uid, "controller": controller}


OWNERS: dict[str, tuple[list[Object], str]] = {
    "another's": ([reference("Deployment", "web", "d-1")], "it belongs to the Deployment web"),
    "another Workspace's": ([reference("Workspace", "two", "u-2")], "it belongs to the Workspace two"),
    "an earlier Workspace's": (
        [reference("Workspace", "one", "u-0")],
        "it belongs to an earlier Workspace of this name",
    ),
    "without an owner": ([], "it has no owner"),
    "not controlled": ([reference("Workspace", "one", "u-1", controller=False)], "it has no owner"),
}
"""What an object that is not ours has for owners, and what is said of it."""


def tuning() -> World:
    return World(workspace_object(), checkpoint_storage_class="fast")


def serving(machines: int = 1) -> World:
    given = {"preset": {"name": "tiny"}, "policy": "always"}
    obj = workspace_object(resource={"count": machines}, inference=given)
    del obj["tuning"]
    return World(obj)


WORLDS: dict[str, Callable[[], World]] = {
    "tuning": tuning,
    "serving": serving,
    "serving on two machines": lambda: serving(2),
}


@functools.cache
def made(which: str) -> tuple[Place, ...]:
    """The objects that the controller makes where no other owner has one."""
    world = WORLDS[which]()
    world.settle()
    return tuple(p for p in world.server.objects if p[0] not in (WORKSPACES, SECRETS))


def test_the_kinds_of_objects_are_these() -> None:
    kinds = {kind for which in WORLDS for kind, _ in made(which)}
    assert kinds == {CONFIG_MAPS, REVISIONS, VOLUME_CLAIMS, JOBS, STATEFUL_SETS, SERVICES}
    assert sum(kind == SERVICES for kind, _ in made("serving on two machines")) == 2


def theirs(place: Place, owners: list[Object], *, labelled: bool) -> Object:
    named = {labels.WORKSPACE: "one", labels.REVISION_NAME: "one"} if labelled else {}
    return {
        "metadata": {"name": place[1], "labels": named, "ownerReferences": owners},
        "spec": {"selector": {"app": "theirs"}},
    }


PLACES = [(which, place) for which in WORLDS for place in made(which)]
CASES = pytest.mark.parametrize(("which", "place"), PLACES, ids=lambda v: v if isinstance(v, str) else f"{v[0]}")


@pytest.mark.parametrize("labelled", [False, True], ids=["without our label", "with our label"])
@pytest.mark.parametrize("owners", OWNERS)
@CASES
def test_what_is_another_s_is_neither_changed_nor_deleted(
    which: str, place: Place, owners: str, labelled: bool
) -> None:
    references, words = OWNERS[owners]
    world = WORLDS[which]()
    before = world.server.put(place[0], theirs(place, references, labelled=labelled))
    world.settle()
    assert world.server.objects[place] == before
    accepted = world.condition("Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "NameTaken")
    assert f"already a {place[0].kind} default/{place[1]}" in accepted["message"]
    assert words in accepted["message"]
    assert not world.cloud.machines, "a machine is paid for that nothing can run on"
    if place[0] not in (CONFIG_MAPS, REVISIONS):
        assert not world.cloud.bought, "it is known before a machine is asked for"
    world.delete()
    world.settle()
    assert world.workspace is None, "its deletion does not wait for another's object"
    assert world.server.objects[place] == before


@CASES
def test_once_it_is_gone_the_workspace_runs(which: str, place: Place) -> None:
    world = WORLDS[which]()
    world.server.put(place[0], theirs(place, OWNERS["another's"][0], labelled=False))
    world.settle()
    world.server.remove(*place)
    world.settle()
    assert world.condition("Accepted")["status"] == "True"
    assert set(made(which)) == {p for p in world.server.objects if p[0] not in (WORKSPACES, SECRETS)}


@CASES
def test_what_appears_between_the_look_and_the_write_is_not_taken_over(which: str, place: Place) -> None:
    world, kept = WORLDS[which](), dict[str, Object]()

    def appear(verb: str, kind: Any, name: str) -> None:
        if (kind, name) == place and not kept:
            kept["it"] = world.server.put(kind, theirs(place, OWNERS["another's"][0], labelled=False))

    world.server.before_write = appear
    world.settle()
    assert world.server.objects[place] == kept["it"]
    assert world.condition("Accepted")["reason"] == "NameTaken"
    assert not world.cloud.machines


CHANGES: dict[str, Callable[[World], None]] = {
    "is changed": lambda world: world.change(
        metadata={"annotations": annotations(world) | {labels.ENABLE_LOAD_BALANCER: "true"}, "generation": 2},
        **{
            part: (world.workspace or {})[part] | given
            for part, given in OTHERWISE.items()
            if part in (world.workspace or {})
        },
    ),
    "is deleted": lambda world: world.delete(),
}
OTHERWISE: dict[str, Object] = {
    "tuning": {"output": {"image": "r.io/a:2", "imagePushSecret": "push"}},
    "inference": {"adapters": [{"source": {"name": "a", "image": "r.io/a:1"}}]},
}


def annotations(world: World) -> dict[str, str]:
    return dict((world.workspace or {})["metadata"].get("annotations") or {})


@pytest.mark.parametrize("change", CHANGES)
@CASES
def test_what_replaced_ours_unseen_is_not_deleted_and_not_changed(which: str, place: Place, change: str) -> None:
    """The caches still show ours; then they catch up."""
    world = WORLDS[which]()
    world.settle()
    world.server.remove(*place)
    before = world.server.put(place[0], theirs(place, OWNERS["another's"][0], labelled=False))
    CHANGES[change](world)
    world.settle(late=True)
    assert world.server.objects[place] == before
    world.settle()
    assert world.server.objects[place] == before
    assert change == "is changed" or world.workspace is None


def test_our_own_of_an_earlier_release_are_taken_up() -> None:
    """They have had the Workspace as their controller from the first release on: an upgrade refuses nothing of its own."""
    for which in WORLDS:
        world = WORLDS[which]()
        world.settle()
        known = copy.deepcopy(world.server.objects)
        again = WORLDS[which]()
        again.server.objects.update(known)
        again.server._count = world.server._count
        again.settle()
        assert again.condition("Accepted")["status"] == "True"
        assert set(again.server.objects) == set(known)


def asleep() -> Simulation:
    """An endpoint on demand, whose first request has not come yet."""
    obj = workspace_object(inference={"preset": {"name": "tiny"}, "policy": "onDemand"})
    del obj["tuning"]
    return Simulation(workspace=obj, activator=("10.0.0.1", 20001))


@pytest.mark.parametrize("owners", OWNERS)
def test_the_activator_joins_no_service_of_another(owners: str) -> None:
    """An EndpointSlice counts for the Service whose name is in its label, whichever owner that has: their requests would come to us."""
    references, words = OWNERS[owners]
    simulation = asleep()
    simulation.settle()
    ours = simulation.objects[SERVICES, "one"]
    before = {"metadata": {"name": "one", "uid": "their", "ownerReferences": references}, "spec": {}}
    simulation.objects[SERVICES, "one"] = copy.deepcopy(before)
    simulation.demand = True
    simulation.settle()
    assert simulation.objects[SERVICES, "one"] == before
    assert (ENDPOINT_SLICES, "one-activator") not in simulation.objects
    assert words in simulation.condition("InferenceReady")["message"]
    assert simulation.told is not None
    assert simulation.told.refused
    assert not simulation.bought
    simulation.objects[SERVICES, "one"] = ours
    simulation.demand = False
    simulation.settle()
    assert (ENDPOINT_SLICES, "one-activator") in simulation.objects
    assert simulation.condition("Accepted")["status"] == "True"


# --- pods: a job's through its Job, an endpoint's through its StatefulSet


def another_s(pod: Object, owners: str, **status: Any) -> Object:
    """A pod that looks like ours in all but its owner."""
    made = copy.deepcopy(pod)
    made["metadata"] |= {"name": "one-00", "uid": "their", "creationTimestamp": "2027-01-15T09:00:00Z"}
    made["metadata"]["ownerReferences"] = [*PODS_OF[owners]]
    made["status"] |= status
    return made


PODS_OF: dict[str, list[Object]] = {
    "no owner": [],
    "a job of the same name before it": [reference("Job", "one", "j-0")],
    "the Workspace itself": [reference("Workspace", "one", "u-1")],
    "another StatefulSet": [reference("StatefulSet", "one", "s-0")],
}


@pytest.mark.parametrize("owners", PODS_OF)
@pytest.mark.parametrize(
    "container",
    [
        ended(2, {"event": "failed", "stage": "check", "message": "wrong"}),
        {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}},
        ended(137, {}),
    ],
    ids=["failed", "stuck", "killed"],
)
def test_a_pod_with_the_label_does_not_fail_the_workspace(owners: str, container: Object) -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.pod()
    simulation.settle()
    job = simulation.job
    theirs = another_s(simulation.pods[0], owners)
    theirs["status"]["containerStatuses"][0]["state"] = container
    simulation.pods.append(theirs)
    simulation.now += 3600
    simulation.settle()
    assert simulation.job == job
    assert simulation.state == "Running"
    assert simulation.condition("JobStarted")["status"] == "True"


@pytest.mark.parametrize("owners", PODS_OF)
def test_a_pod_with_the_label_does_not_say_what_was_made(owners: str) -> None:
    simulation = Simulation()
    simulation.settle()
    simulation.pod(container=ended(0, FINISHED))
    simulation.end_job("Complete")
    said = copy.deepcopy(FINISHED)
    said["results"]["push"] = {"image": "evil.io/theirs:1", "digest": "sha256:0"}
    theirs = another_s(simulation.pods[0], owners)
    theirs["status"]["containerStatuses"][0]["state"] = ended(0, said)
    simulation.pods.append(theirs)
    simulation.settle()
    assert simulation.workspace is not None
    assert simulation.workspace["status"]["adapter"]["image"] == "r.io/a:1"
    assert "theirs" not in str(simulation.workspace["status"])


@pytest.mark.parametrize("owners", PODS_OF)
def test_a_pod_with_the_label_answers_no_request(owners: str) -> None:
    """It is ready, and ours is not; later ours is gone, and its machine is given back."""
    simulation = asleep()
    simulation.demand = True
    simulation.settle()
    ready = {"conditions": [{"type": "Ready", "status": "True"}], "podIP": "10.6.6.6"}
    theirs = another_s(simulation.servers[0], owners, **ready)
    theirs["metadata"]["name"] = "one-0"
    simulation.servers.insert(0, theirs)
    simulation.settle()
    assert simulation.told is not None
    assert not simulation.told.address
    assert simulation.condition("InferenceReady")["status"] == "False"
    simulation.answers()
    simulation.settle()
    assert simulation.told.address == "http://10.0.0.9:5000"
    simulation.demand = False
    simulation.now += 7200
    simulation.reconcile()
    simulation.servers.append(theirs)
    simulation.settle()
    assert not simulation.machines, "another's pod keeps no machine of ours"


def test_a_pod_with_the_label_says_nothing_of_the_progress() -> None:
    """Nor is its log read: ten thousand of them would be ten thousand requests."""
    world = tuning()
    world.settle()
    job = world.server.objects[JOBS, "one"]
    running = {"containerStatuses": [{"name": "one", "state": {"running": {}}}]}
    ours: Object = {"name": "ours", "labels": {labels.WORKSPACE: "one"}, "ownerReferences": [owner_reference(job)]}
    world.server.put(PODS, {"metadata": ours, "spec": {"nodeName": ""}, "status": running})
    world.server.printed["ours"] = [log_line({"event": "step", "stage": "train", "step": 3, "steps": 9, "time": 1.0})]
    for n, references in enumerate(PODS_OF.values()):
        metadata = {
            **ours,
            "name": f"theirs-{n}",
            "ownerReferences": references,
            "creationTimestamp": "2030-01-01T00:00:00Z",
        }
        world.server.put(PODS, {"metadata": metadata, "spec": {"nodeName": ""}, "status": running})
        world.server.printed[f"theirs-{n}"] = [log_line({"event": "step", "stage": "train", "step": 8, "time": 2.0})]
    world.see()
    world.controller._following._round()
    world.settle()
    assert world.server.read == ["ours"]
    assert world.workspace is not None
    assert world.workspace["status"]["progress"]["step"] == 3


def test_a_pod_is_deleted_through_its_stateful_set_alone() -> None:
    """Of several machines the old pods are taken away together: by owner, not by label."""
    world = serving(2)
    world.settle()
    servers = world.server.objects[STATEFUL_SETS, "one"]
    ours = {"name": "one-0", "labels": {labels.WORKSPACE: "one", labels.SERVING: "true"}}
    ours["ownerReferences"] = [reference("StatefulSet", "one", servers["metadata"]["uid"])]  # type: ignore[assignment]
    world.server.put(PODS, {"metadata": ours, "spec": {"nodeName": ""}})
    for n, (references, _) in enumerate(OWNERS.values()):
        world.server.put(PODS, {"metadata": {**ours, "name": f"theirs-{n}", "ownerReferences": references}})
    world.change(
        metadata={"generation": 2}, inference={"preset": {"name": "tiny"}, "policy": "always", "config": "settings"}
    )
    world.server.put(CONFIG_MAPS, {"metadata": {"name": "settings"}, "data": {"inference_config.yaml": "gib: 2"}})
    world.settle()
    assert {name for kind, name in world.server.objects if kind == PODS} == {f"theirs-{n}" for n in range(len(OWNERS))}


# --- on a real API server


POD = {"metadata": {"labels": {"app": "theirs"}}, "spec": {"containers": [{"name": "c", "image": "r.io/theirs:1"}]}}
SELECTOR = {"matchLabels": {"app": "theirs"}}
SPECS: dict[Kind, Object] = {
    SERVICES: {"ports": [{"name": "http", "port": 80}], "selector": {"app": "theirs"}},
    STATEFUL_SETS: {"replicas": 0, "serviceName": "theirs", "selector": SELECTOR, "template": POD},
    JOBS: {"suspend": True, "template": {**POD, "spec": {**POD["spec"], "restartPolicy": "Never"}}},
    VOLUME_CLAIMS: {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
}


@pytest.fixture
def client(workspaces: Any) -> Client:
    return connect(kubeconfig=str(workspaces.kubeconfig))


@contextmanager
def looking_after(client: Client, names: Iterable[str]) -> Iterator[FakeProvisioner]:
    """The real controller of these Workspaces; its cloud."""
    cloud = FakeProvisioner(OFFERS)
    settings = Settings(
        tuner_image="r.io/tuner:1", runtime_images={"echo": "r.io/echo:1"}, checkpoint_storage_class="fast"
    )
    controller = WorkspaceController(client, cast(PluginManager, Plugins(cloud)), settings, names=names)
    controller.start_watching()
    controller.start_workers(2)
    try:
        yield cloud
    finally:
        controller.stop(5)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def accepted(workspace: Object | None) -> Object:
    found = (workspace or {}).get("status", {}).get("conditions", ())
    return next((c for c in found if c["type"] == "Accepted"), {})


def essence(obj: Object | None) -> Object:
    """What of an object only those change who write it."""
    assert obj is not None
    kept = ("uid", "labels", "annotations", "ownerReferences", "deletionTimestamp")
    return {"metadata": {k: v for k, v in obj["metadata"].items() if k in kept}, "spec": obj.get("spec")}


def wanted(name: str, namespace: str, *, tunes: bool) -> Object:
    """A Workspace as a person writes it."""
    obj = workspace_object(metadata={"name": name, "namespace": namespace})
    if not tunes:
        del obj["tuning"]
        obj |= {"resource": {"count": 2}, "inference": {"preset": {"name": "tiny"}, "policy": "always"}}
    return obj


def head(kind: Kind, name: str, namespace: str, owner: Object | None = None) -> Object:
    metadata: Object = {"name": name, "ownerReferences": [owner_reference(owner)] if owner else []}
    if kind.namespaced:
        metadata["namespace"] = namespace
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata}


def test_a_real_api_server_keeps_what_is_another_s(client: Client) -> None:
    """A Workspace for each kind of object and owner, and one with the name of the cluster's own Service: nothing of others is touched, no
    machine is bought, and all of them can be deleted."""
    team = f"team-{uuid4().hex[:6]}"
    client.create(NAMESPACES, head(NAMESPACES, team, ""))
    client.create(SECRETS, head(SECRETS, "push", team))
    web = client.create(CONFIG_MAPS, head(CONFIG_MAPS, "web", team))
    their: dict[str, tuple[Kind, str, str]] = {"kubernetes": (SERVICES, "kubernetes", "default")}
    for owner in (None, web):
        for kind, name in [*made("tuning"), *made("serving on two machines")]:
            if kind in SPECS:
                whose = f"w{len(their)}-{'owned' if owner else 'alone'}"
                their[whose] = kind, name.replace("one", whose), team
                client.create(kind, {**head(kind, their[whose][1], team, owner), "spec": SPECS[kind]})
    before = {whose: essence(client.get(*place)) for whose, place in their.items()}

    def found(whose: str) -> Object | None:
        return client.get(WORKSPACES, whose, their[whose][2])

    with looking_after(client, their) as cloud:
        for whose, (kind, _, namespace) in their.items():
            client.create(WORKSPACES, wanted(whose, namespace, tunes=kind in (JOBS, VOLUME_CLAIMS)))
        until(lambda: all(accepted(found(whose)).get("reason") == "NameTaken" for whose in their))
        words = "already a Service default/kubernetes, and it is not of this Workspace: it has no owner"
        assert words in accepted(found("kubernetes"))["message"]
        assert all("the ConfigMap web" in accepted(found(w))["message"] for w in their if w.endswith("owned"))
        assert not cloud.bought
        for whose, (_, _, namespace) in their.items():
            client.delete(WORKSPACES, whose, namespace)
        until(lambda: not any(map(found, their)))
    assert {whose: essence(client.get(*place)) for whose, place in their.items()} == before


@pytest.mark.parametrize("kind", [SERVICES, STATEFUL_SETS, ENDPOINT_SLICES], ids=str)
def test_an_apply_makes_an_object_or_changes_the_one_that_is_meant(client: Client, kind: Kind) -> None:
    """What the controller relies on where an object comes, or is replaced, between its look and its write."""
    content = {"spec": SPECS[kind]} if kind in SPECS else {"addressType": "IPv4", "endpoints": []}
    obj = head(kind, "applied", "default") | content
    another = "11111111-1111-1111-1111-111111111111"
    with pytest.raises(Conflict):
        client.apply(kind, obj, uid=another)
    uid = client.apply(kind, obj, uid="")["metadata"]["uid"]
    labelled = {**obj, "metadata": {**obj["metadata"], "labels": {"a": "b"}}}
    for wrong in ("", another):
        with pytest.raises(Conflict):
            client.apply(kind, labelled, uid=wrong)
    there = client.get(kind, "applied", "default")
    assert there is not None
    assert "labels" not in there["metadata"]
    made = client.apply(kind, labelled, uid=uid)["metadata"]
    assert (made["uid"], made["labels"]) == (uid, {"a": "b"})
    client.delete(kind, "applied", "default")
