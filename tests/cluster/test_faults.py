"""What happens to the controller and to its API server, in the manner of Sieve: in every phase of a Workspace something goes
wrong, a person acts meanwhile, and in the end everything must be as if nothing had happened. A real API server with its
controllers; kwok plays the kubelets, and the fake cloud, which writes down what it sold, gets the machines.

What must hold however it went: each Workspace ends as it was last written, no machine was bought twice for one wish, and
none is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from kaito_core.api import labels
from kaito_core.api.crd import crd
from kaito_core.controller.reconcile.revisions import hash_of
from kaito_core.kube.client import Client, connect
from kaito_core.kube.errors import ApiError
from kaito_core.kube.kinds import CRDS, JOBS, NAMESPACES, NODES, PODS, SECRETS, WORKSPACES, Object
from kaito_core.plugins.types import Offer, Price
from kaito_core.testing.cluster import Cluster, running_cluster, why_no_cluster
from kaito_core.testing.provisioner import Fault
from kaito_core.testing.provisioner_plugin import CloudFolder

KWOK = shutil.which("kwok", path=os.environ.get("KUBEBUILDER_ASSETS", os.defpath))
REASON = why_no_cluster() or ("" if KWOK else "the folder of KUBEBUILDER_ASSETS has no kwok, which plays the kubelets")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

MACHINE = Offer("Standard_Test", cpus=4, memory=16 << 30, price=Price(0.5, "test", "2026-01-01"))
DEARER = Offer("Standard_Dearer", cpus=4, memory=16 << 30, price=Price(0.7, "test", "2026-01-01"))
FINISHED = {
    "event": "finished",
    "stage": "push",
    "results": {"verify": {"eval_loss_before": 3.0, "eval_loss_after": 1.0}, "push": {"digest": "sha256:abc"}},
}
SECONDS = 90.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("kwok")
    with running_cluster() as cluster:
        client = connect(kubeconfig=str(cluster.kubeconfig))
        client.apply(CRDS, crd())
        while not client.serves(WORKSPACES):
            time.sleep(0.1)
        stages = Path(__file__).with_name("kubelets.yaml")
        command = [
            str(KWOK),
            "--kubeconfig",
            cluster.kubeconfig,
            "--config",
            stages,
            "--manage-all-nodes",
            "--enable-crds=",
        ]
        with (folder / "log").open("wb") as log:
            kwok = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            yield cluster
        finally:
            kwok.kill()
            kwok.wait()


class World:
    """A namespace, a cloud, and the controllers that look after it."""

    def __init__(self, cluster: Cluster, folder: Path, stack: ExitStack) -> None:
        self.cluster = cluster
        self.client: Client = connect(kubeconfig=str(cluster.kubeconfig), user_agent="test")
        self.namespace = f"faults-{uuid4().hex[:6]}"
        self.client.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})
        self.client.create(SECRETS, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "push", "namespace": self.namespace}})  # fmt: skip
        # Two answers to every question of the cloud, so that there is a time in between.
        self.cloud = CloudFolder(
            folder / "cloud", [MACHINE, DEARER], kubeconfig=str(cluster.kubeconfig), ready_after=1, gone_after=1
        )
        self.controllers: list[subprocess.Popen[bytes]] = []
        self._folder = folder
        self._stack = stack

    # --- the controller

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        where = ["--metrics-address", "127.0.0.1:0", "--health-address", "127.0.0.1:0", "--namespace", self.namespace]
        command = [
            sys.executable,
            "-m",
            "kaito_core",
            "controller",
            "--tuner-image",
            "r.io/tuner:1",
            *where,
            *arguments,
        ]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KAITO_", "KUBERNETES_"))}
        env = {**kept, "KUBECONFIG": str(self.cluster.kubeconfig), **self.cloud.environment}
        with (self._folder / f"controller-{len(self.controllers)}.log").open("wb") as log:
            started = subprocess.Popen(command, stderr=log, env=env, cwd=self._folder)
        self.controllers.append(started)
        self._stack.callback(self.kill, started)
        return started

    def alone(self) -> subprocess.Popen[bytes]:
        return self.start("--no-leader-election")

    @staticmethod
    def kill(controller: subprocess.Popen[bytes]) -> None:
        controller.kill()
        controller.wait()

    # --- what a person does

    def create(self, name: str) -> None:
        tuning = {
            "preset": {"name": "demo-phi-3"},
            "method": "qlora",
            "input": {"urls": ["https://example.com/a.jsonl"]},
            "output": {"image": f"r.io/{name}:1", "imagePushSecret": "push"},
        }
        metadata = {"name": name, "namespace": self.namespace}
        self.client.create(WORKSPACES, {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": metadata, "tuning": tuning})  # fmt: skip

    def change(self, name: str) -> None:
        self.client.patch(WORKSPACES, name, self.namespace, {"tuning": {"output": {"image": f"r.io/{name}:2"}}})

    def remove(self, name: str) -> None:
        self.client.delete(WORKSPACES, name, self.namespace)

    # --- what is

    def get(self, name: str) -> Object | None:
        return self.client.get(WORKSPACES, name, self.namespace)

    def status(self, name: str) -> dict[str, Any]:
        return dict((self.get(name) or {}).get("status") or {})

    def pods(self, name: str) -> list[Object]:
        return self.client.list(PODS, self.namespace, labels=f"{labels.WORKSPACE}={name}")[0]

    def runs(self, name: str) -> bool:
        return any(p["status"].get("phase") == "Running" for p in self.pods(name))

    def bought(self) -> Counter[str]:
        """How often a machine was sold, by request."""
        return Counter(e["id"] for e in self.cloud.provisioner().events if e["event"] == "bought")

    def until(self, what: str, done: Callable[[], Any]) -> None:
        deadline = time.monotonic() + SECONDS
        while True:
            with suppress(ApiError):
                if done():
                    return
            assert time.monotonic() < deadline, f"{what}: not within {SECONDS:.0f} s\n{self.report()}"
            time.sleep(0.2)

    def report(self) -> str:
        listed = self.client.list(WORKSPACES, self.namespace)[0]
        said = [f"{w['metadata']['name']}: {json.dumps(w.get('status'))}" for w in listed]
        logs = [p.read_text()[-3000:] for p in sorted(self._folder.glob("controller-*.log"))]
        return "\n".join([*said, *logs])

    # --- what the kubelet does

    def end(self, pod: Object, code: int = 0, says: dict[str, Any] | None = None) -> None:
        annotations = {"test.kaito.sh/exit": str(code), "test.kaito.sh/says": json.dumps(says or FINISHED)}
        with suppress(ApiError):
            self.client.patch(PODS, pod["metadata"]["name"], self.namespace, {"metadata": {"annotations": annotations}})

    @contextmanager
    def everything_ends(self) -> Iterator[None]:
        """Pods that run come to a good end, as long as this lasts."""
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(0.3):
                with suppress(ApiError):
                    for pod in self.client.list(PODS, self.namespace)[0]:
                        if "test.kaito.sh/exit" not in pod["metadata"].get("annotations", {}):
                            self.end(pod)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield
        stop.set()
        thread.join()


@pytest.fixture
def world(cluster: Cluster, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(cluster, tmp_path, stack)


def said(status: dict[str, Any], kind: str) -> dict[str, Any]:
    """A condition; empty when there is none of that type."""
    return next((c for c in status.get("conditions", ()) if c["type"] == kind), {})


# --- in every phase


PHASES = ("new", "waiting", "running", "ended")
ACTS = ("nothing", "change", "delete")


def to_every_phase(world: World, controller: Callable[[], object]) -> list[str]:
    """A Workspace for each phase and each thing that a person may do, in that phase now; without a controller ``new``."""
    by_phase = {phase: [f"{phase}-{act}" for act in ACTS] for phase in PHASES}
    later = ("running", "ended")
    for phase in later:
        for name in by_phase[phase]:
            world.create(name)
    world.until("pods that run", lambda: all(world.runs(n) for p in later for n in by_phase[p]))
    for name in by_phase["ended"]:
        for pod in world.pods(name):
            world.end(pod)
    world.until("the end of some", lambda: all(world.status(n).get("state") == "Succeeded" for n in by_phase["ended"]))
    for name in by_phase["waiting"]:
        world.create(name)
    world.until("machines on their way", lambda: all(world.status(n).get("attempts") for n in by_phase["waiting"]))
    controller()
    for name in by_phase["new"]:
        world.create(name)
    for phase in PHASES:
        world.change(f"{phase}-change")
        world.remove(f"{phase}-delete")
    return [name for phase in PHASES for name in by_phase[phase]]


def all_is_well(world: World, names: list[str]) -> None:
    """Everything has ended as it was last written, and nothing is left."""

    def ended(name: str) -> bool:
        workspace = world.get(name)
        if workspace is None or name.endswith("-delete"):
            return workspace is None and name.endswith("-delete")
        status = workspace.get("status") or {}
        done = status.get("state") == "Succeeded" and status.get("finishedRevision") == hash_of(workspace)
        return done and all(a.get("ended") for a in status["attempts"])

    with world.everything_ends():
        for name in names:
            world.until(f"the end of {name}", lambda name=name: ended(name))
    for name in names:
        if not name.endswith("-delete"):
            wanted = f"r.io/{name}:{2 if name.endswith('-change') else 1}"
            assert world.status(name)["adapter"] == {
                "image": wanted, "digest": "sha256:abc", "evalLossBefore": 3.0, "evalLossAfter": 1.0
            }  # fmt: skip
    cloud = world.cloud.provisioner()
    world.until("all machines given back", lambda: not cloud.machines)
    assert not [n for n in world.client.list(NODES)[0] if n["metadata"]["labels"].get(labels.WORKSPACE_NAMESPACE) == world.namespace]  # fmt: skip
    assert set(world.bought().values()) == {1}, "two machines for one wish"
    left = {j["metadata"]["name"] for j in world.client.list(JOBS, world.namespace)[0]}
    assert left == {n for n in names if not n.endswith("-delete")}
    for name in names:  # and the rest goes too, with nobody to hold it
        world.remove(name)
    world.until("the end of all", lambda: not world.client.list(WORKSPACES, world.namespace)[0])
    world.until("what they owned gone", lambda: not world.client.list(JOBS, world.namespace)[0])


def test_killed_in_every_phase(world: World) -> None:
    controller = world.alone()
    names = to_every_phase(world, lambda: world.kill(controller))
    with world.everything_ends():
        time.sleep(2.0)  # what runs ends while nobody looks
    world.alone()
    all_is_well(world, names)


def test_the_api_server_goes_away_in_every_phase(world: World, cluster: Cluster) -> None:
    controller = world.alone()

    def restart() -> None:
        cluster.kill_api_server()
        time.sleep(2.0)
        cluster.start_api_server()

    names = to_every_phase(world, restart)
    all_is_well(world, names)
    assert controller.poll() is None, "it waits for the API server, it does not end"


def test_of_two_controllers_one_works_and_the_other_takes_over(world: World, cluster: Cluster) -> None:
    lease = ["--lease-namespace", world.namespace]
    first = world.start(*lease)
    world.until("a leader", lambda: _holder(world))
    leader = _holder(world)
    world.start(*lease)
    names = to_every_phase(world, lambda: world.kill(first))
    all_is_well(world, names)
    assert _holder(world) not in ("", leader)


def _holder(world: World) -> str:
    from kaito_core.kube.kinds import LEASES

    lease = world.client.get(LEASES, "kaito-controller", world.namespace) or {}
    return str(lease.get("spec", {}).get("holderIdentity") or "")


def test_somebody_else_writes_to_the_same_objects_all_the_time(world: World) -> None:
    """Conflicts, one after the other: what others wrote stays, and so does what we wrote."""
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.wait(0.02):
            number += 1
            with suppress(ApiError):
                for workspace in world.client.list(WORKSPACES, world.namespace)[0]:
                    name = workspace["metadata"]["name"]
                    patch = {"metadata": {"annotations": {"example.com/number": str(number)}, "finalizers": None}}
                    finalizers = {*workspace["metadata"].get("finalizers", ()), "example.com/theirs"}
                    if "deletionTimestamp" in workspace["metadata"]:
                        finalizers.discard("example.com/theirs")
                    patch["metadata"] |= {"finalizers": sorted(finalizers), "resourceVersion": workspace["metadata"]["resourceVersion"]}  # fmt: skip
                    world.client.patch(WORKSPACES, name, world.namespace, patch)

    world.alone()
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        names = to_every_phase(world, lambda: None)
        all_is_well(world, names)
    finally:
        stop.set()
        thread.join()


# --- at the very calls of the cloud


@pytest.mark.parametrize("call", ["ensure", "release"])
def test_killed_before_it_could_note_what_the_cloud_answered(world: World, call: Any) -> None:
    world.cloud.change(faults=[Fault("crash", call)])
    controller = world.alone()
    world.create("one")
    with world.everything_ends():
        world.until("the crash", lambda: controller.poll() is not None)
    world.alone()
    all_is_well(world, ["one"])


def test_an_answer_that_is_lost_buys_nothing_twice(world: World) -> None:
    world.cloud.change(faults=[Fault("answer-lost", "ensure"), Fault("answer-lost", "release")])
    world.alone()
    world.create("one")
    all_is_well(world, ["one"])


def test_deleted_while_the_cloud_hangs(world: World) -> None:
    world.cloud.change(faults=[Fault("hang", "ensure", seconds=3.0)])
    world.alone()
    world.create("one-delete")
    world.until("the question", lambda: world.cloud.provisioner().calls("ensure"))
    world.remove("one-delete")
    world.until("its end", lambda: world.get("one-delete") is None)
    world.until("all machines given back", lambda: not world.cloud.provisioner().machines)


def test_the_next_offer_when_the_first_cannot_be_had(world: World) -> None:
    """Each attempt is written down in the cloud's own words."""
    no = Fault("refused", "ensure", "Standard_Test", 0, "InsufficientCapacity", "no Standard_Test in zone 2")
    world.cloud.change(faults=[no])
    world.alone()
    world.create("one")
    with world.everything_ends():
        world.until("the end", lambda: world.status("one").get("state") == "Succeeded")
    first, second = world.status("one")["attempts"]
    assert (first["instanceType"], first["reason"]) == ("Standard_Test", "InsufficientCapacity")
    assert "no Standard_Test in zone 2" in first["message"]
    assert second["instanceType"] == "Standard_Dearer"
    assert world.cloud.provisioner().bought == ["Standard_Dearer"]


# --- what only the controller can see


def test_what_the_schema_cannot_see_is_said_before_a_machine_is_asked_for(world: World) -> None:
    """An unknown preset, a model that does not fit, a ConfigMap that is not there. How fast: benchmarks/controller.py."""
    world.cloud.change(
        offers=[Offer("Standard_Small", cpus=1, memory=64 << 20, price=Price(0.1, "test", "2026-01-01"))]
    )
    controller = world.alone()
    world.create("warm")
    world.until("it works", lambda: world.status("warm"))
    changes: dict[str, tuple[dict[str, Any], str, str]] = {
        "unknown": ({"preset": {"name": "phi-33"}}, "PlanRefused", "phi-33"),
        "too-big": ({}, "DoesNotFit", "Standard_Small"),
        "no-config": ({"config": "nowhere"}, "ConfigMapMissing", "nowhere"),
    }
    for name, (tuning, reason, words) in changes.items():
        text = yaml.safe_load(json.dumps(world.get("warm")))
        obj = {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace",
               "metadata": {"name": name, "namespace": world.namespace}, "tuning": {**text["tuning"], **tuning}}  # fmt: skip
        world.client.create(WORKSPACES, obj)
        world.until("the answer", lambda name=name: said(world.status(name), "Accepted"))
        found = said(world.status(name), "Accepted")
        assert (found["status"], found["reason"]) == ("False", reason), found
        assert words in found["message"]
    assert not world.bought()
    assert controller.poll() is None
