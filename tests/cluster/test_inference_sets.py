"""InferenceSets on a real API server with its own controllers: garbage collection, `kubectl scale`, an autoscaler.

The controller is the real one. What the Workspace controller would say of each replica the test says itself, where a rollout is
looked at; where the controller is a process of its own, with no rights but the chart's, both run in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from kaito_core.api import labels
from kaito_core.api.crd import crd, inference_set_crd
from kaito_core.controller.inference_sets import InferenceSetController
from kaito_core.install import objects
from kaito_core.kube.client import Client, connect
from kaito_core.kube.kinds import CRDS, INFERENCE_SETS, NAMESPACES, SERVICES, WORKSPACES, Kind, Object
from kaito_core.testing.cluster import Cluster, running_cluster, why_no_cluster
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(bool(why_no_cluster()), reason=why_no_cluster())

AUTOSCALERS = Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
SECONDS = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        client = connect(kubeconfig=str(running.kubeconfig))
        for definition in (crd(), inference_set_crd()):
            client.apply(CRDS, definition)
        while not (client.serves(WORKSPACES) and client.serves(INFERENCE_SETS)):
            time.sleep(0.1)
        yield running


class World:
    """A namespace with one InferenceSet in it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.client: Client = connect(kubeconfig=str(cluster.kubeconfig), user_agent="test")
        self.namespace = f"sets-{uuid4().hex[:6]}"
        self.client.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})

    def make(self, replicas: int) -> None:
        spec = {
            "replicas": replicas,
            "template": {
                "metadata": {"labels": {"team": "a"}},
                "resource": {"instanceType": "Standard_Nowhere"},
                "inference": {"preset": {"name": "phi-4"}},
            },
        }
        self.client.create(
            INFERENCE_SETS,
            {
                "apiVersion": INFERENCE_SETS.api_version,
                "kind": INFERENCE_SETS.kind,
                "metadata": {"name": "llm", "namespace": self.namespace},
                "spec": spec,
            },
        )

    def template(self, **inference: Any) -> None:
        patch = {"spec": {"template": {"inference": inference}}}
        self.client.patch(INFERENCE_SETS, "llm", self.namespace, patch)

    def kubectl(self, *arguments: str) -> str:
        return self.cluster.kubectl(*arguments, "-n", self.namespace)

    @property
    def set(self) -> Object:
        found = self.client.get(INFERENCE_SETS, "llm", self.namespace)
        assert found is not None
        return found

    def workspaces(self) -> dict[str, Object]:
        return {w["metadata"]["name"]: w for w in self.client.list(WORKSPACES, self.namespace)[0]}

    def tell(self, name: str, ready: bool) -> None:
        """What the Workspace controller would say."""
        generation = self.workspaces()[name]["metadata"]["generation"]
        condition = {
            "type": "InferenceReady",
            "status": "True" if ready else "False",
            "reason": "x",
            "message": "" if ready else "the model is being loaded",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
            "observedGeneration": generation,
        }
        patch = {"status": {"conditions": [condition]}}
        self.client.patch(WORKSPACES, name, self.namespace, patch, subresource="status")

    def serving(self) -> set[str]:
        """The Workspaces that serve what they ask for now."""
        return {
            name
            for name, w in self.workspaces().items()
            for c in w.get("status", {}).get("conditions", ())
            if c["status"] == "True" and c["observedGeneration"] == w["metadata"]["generation"]
        }

    def all_ready(self) -> None:
        for name in sorted(self.workspaces().keys() - self.serving()):
            self.tell(name, True)

    def condition(self) -> dict[str, str]:
        found = self.set.get("status", {}).get("conditions", [])
        return found[0] if found else {"status": "", "reason": "", "message": ""}

    def until(self, true: Callable[[], Any]) -> None:
        deadline = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < deadline, json.dumps([self.set, *self.workspaces().values()], indent=1)
            time.sleep(0.05)

    def at_rest(self) -> None:
        status = self.set["spec"]["replicas"], self.set["metadata"]["generation"]
        self.until(
            lambda: (
                (self.set["status"].get("readyReplicas"), self.set["status"]["observedGeneration"]) == status
                and self.condition()["status"] == "True"
            )
        )


@pytest.fixture
def world(cluster: Cluster) -> Iterator[World]:
    """The controller of InferenceSets runs here, and nobody looks after Workspaces."""
    world = World(cluster)
    client = connect(kubeconfig=str(cluster.kubeconfig), user_agent="sets")
    controller = InferenceSetController(client, namespace=world.namespace)
    controller.start_watching()
    controller.start_workers(2)
    yield world
    controller.stop()


def test_made_scaled_and_removed(world: World) -> None:
    world.make(3)
    world.until(lambda: set(world.workspaces()) == {"llm-0", "llm-1", "llm-2"})
    service = world.client.get(SERVICES, "llm", world.namespace)
    assert service is not None
    assert [(p["port"], p["targetPort"]) for p in service["spec"]["ports"]] == [(80, 5000)]
    assert service["spec"]["selector"] == {labels.INFERENCE_SET: "llm"}
    world.tell("llm-1", False)
    world.until(lambda: "llm-0: waiting for its controller" in world.condition()["message"])
    for name in ("llm-0", "llm-2"):
        world.tell(name, True)
    world.until(lambda: "llm-1: x: the model is being loaded" in world.condition()["message"])
    assert world.kubectl("get", "is", "llm", "--no-headers").split()[:4] == ["llm", "3", "2", "3"]
    world.kubectl("scale", "inferenceset/llm", "--replicas=2")  # the one that does not serve goes
    world.until(lambda: set(world.workspaces()) == {"llm-0", "llm-2"})
    world.at_rest()
    world.kubectl("scale", "inferenceset/llm", "--replicas=4")
    world.until(lambda: set(world.workspaces()) == {"llm-0", "llm-1", "llm-2", "llm-3"})
    world.all_ready()
    world.at_rest()
    world.kubectl("delete", "workspace", "llm-3", "--wait=false")  # by mistake
    world.until(lambda: "llm-3" in world.workspaces() and "llm-3" not in world.serving())
    world.kubectl("scale", "inferenceset/llm", "--replicas=0")
    world.until(lambda: not world.workspaces())


def test_a_changed_template_rolls_and_two_of_three_serve_all_the_time(world: World) -> None:
    world.make(3)
    world.until(lambda: len(world.workspaces()) == 3)
    world.all_ready()
    world.at_rest()
    before = {n: w["metadata"]["uid"] for n, w in world.workspaces().items()}
    for change, replaced in (({"config": "serving"}, False), ({"preset": {"name": "phi-4-mini-instruct"}}, True)):
        world.template(**change)
        for _ in range(3):
            world.until(lambda: len(world.serving()) == 2 and len(world.workspaces()) == 3)
            time.sleep(0.3)  # it could go on, and does not
            assert len(world.serving()) == 2
            world.all_ready()
        world.at_rest()
        for name, workspace in world.workspaces().items():
            assert workspace["inference"].get("config") == "serving"
            assert workspace["inference"]["preset"]["name"] == change.get("preset", {"name": "phi-4"})["name"]
            assert (workspace["metadata"]["uid"] != before[name]) == replaced
        assert world.set["status"]["updatedReplicas"] == 3


def test_somebody_else_s_objects_are_left_alone(world: World) -> None:
    other = {
        "apiVersion": WORKSPACES.api_version,
        "kind": "Workspace",
        "metadata": {"name": "llm-0", "namespace": world.namespace},
        "inference": {"preset": {"name": "phi-3"}},
    }
    made = world.client.create(WORKSPACES, other)
    world.make(2)
    world.until(lambda: world.condition()["reason"] == "NameTaken")
    words = f"already a Workspace {world.namespace}/llm-0, and it is not of this InferenceSet: it has no owner"
    assert words in world.condition()["message"]
    world.kubectl("scale", "inferenceset/llm", "--replicas=0")
    world.until(lambda: "llm-1" not in world.workspaces())
    assert world.workspaces()["llm-0"]["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    assert "NameTaken" in world.kubectl("get", "events", "--field-selector=type=Warning")


def test_at_rest_nothing_is_written(world: World) -> None:
    world.make(2)
    world.until(lambda: len(world.workspaces()) == 2)
    world.all_ready()
    world.at_rest()

    def writes() -> list[dict[str, Any]]:
        return [
            r
            for r in world.cluster.audit()
            if "(sets)" in r.get("userAgent", "")
            and r["verb"] in ("create", "patch", "update", "delete")
            and r.get("objectRef", {}).get("namespace") == world.namespace
        ]

    time.sleep(0.5)  # what was still on its way has arrived
    before = len(writes())
    assert before
    world.kubectl("annotate", "workspace", "llm-0", "somebody=looks")  # it is looked at again
    time.sleep(1.0)
    assert len(writes()) == before


@pytest.mark.slow
def test_an_autoscaler_of_kubernetes_scales_it(world: World) -> None:
    """It needs no metrics to see that one replica is less than its minimum, and writes through the scale subresource."""
    world.make(1)
    metric = {
        "type": "Pods",
        "pods": {"metric": {"name": "waiting"}, "target": {"type": "AverageValue", "averageValue": "5"}},
    }
    world.client.create(
        AUTOSCALERS,
        {
            "apiVersion": AUTOSCALERS.api_version,
            "kind": AUTOSCALERS.kind,
            "metadata": {"name": "llm", "namespace": world.namespace},
            "spec": {
                "scaleTargetRef": {"apiVersion": "kaito.sh/v1alpha1", "kind": "InferenceSet", "name": "llm"},
                "minReplicas": 2,
                "maxReplicas": 3,
                "metrics": [metric],
            },
        },
    )
    world.until(lambda: len(world.workspaces()) == 2)
    assert world.set["spec"]["replicas"] == 2


@pytest.mark.slow  # the collector of a new cluster learns of new kinds every 30 seconds
def test_deleted_with_all_it_made_or_without(world: World) -> None:
    world.make(2)
    world.until(lambda: len(world.workspaces()) == 2)
    world.kubectl("delete", "inferenceset", "llm", "--cascade=foreground")
    world.until(lambda: not world.workspaces() and world.client.get(SERVICES, "llm", world.namespace) is None)
    world.make(1)
    world.until(lambda: len(world.workspaces()) == 1)
    world.kubectl("delete", "inferenceset", "llm", "--cascade=orphan")
    world.until(lambda: not world.workspaces()["llm-0"]["metadata"].get("ownerReferences"))
    world.make(1)  # one of the same name is another one
    world.until(lambda: world.condition()["reason"] == "NameTaken")


def test_what_the_documentation_shows_is_accepted(cluster: Cluster) -> None:
    page = (ROOT / "docs" / "inference-sets.md").read_text(encoding="utf-8")
    shown = [
        yaml.safe_load(textwrap.dedent(b)) for b in re.findall(r"(?:^    .*\n)+", page, re.MULTILINE) if "kind:" in b
    ]
    known = [o for o in shown if o["kind"] in ("InferenceSet", "HorizontalPodAutoscaler")]
    assert {o["kind"] for o in shown} - {o["kind"] for o in known} == {"ScaledObject", "PodMonitor"}
    for obj in known:
        cluster.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(obj))


# --- the whole controller as a process, with the chart's rights


@pytest.fixture
def with_the_chart_s_rights(cluster: Cluster, tmp_path: Path) -> Path:
    """A kubeconfig of somebody who may do what the chart's ClusterRole says, and nothing else."""
    client = connect(kubeconfig=str(cluster.kubeconfig))
    name = f"controller-{uuid4().hex[:6]}"
    role = next(o for o in objects("kaito-system", "r.io", "1") if o["kind"] == "ClusterRole")
    rbac = "rbac.authorization.k8s.io"
    client.create(
        Kind(f"{rbac}/v1", "ClusterRole", "clusterroles", namespaced=False),
        {**role, "metadata": {"name": name}},
    )
    account = {"kind": "ServiceAccount", "name": name, "namespace": "default"}
    client.create(
        Kind(f"{rbac}/v1", "ClusterRoleBinding", "clusterrolebindings", namespaced=False),
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": name},
            "subjects": [account],
        },
    )
    cluster.kubectl("create", "serviceaccount", name, "-n", "default")
    token = cluster.kubectl("create", "token", name, "-n", "default").strip()
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    written = tmp_path / "kubeconfig"
    written.write_text(yaml.safe_dump(config))
    written.chmod(0o600)
    return written


@pytest.mark.slow
def test_killed_in_the_middle_there_is_never_one_too_many(
    cluster: Cluster, with_the_chart_s_rights: Path, tmp_path: Path
) -> None:
    world = World(cluster)
    command = [sys.executable, "-m", "kaito_core", "controller", "--tuner-image", "r.io/tuner:1", "--no-leader-election",
               "--namespace", world.namespace, "--metrics-address", "127.0.0.1:0", "--health-address", "127.0.0.1:0"]  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KAITO_", "KUBERNETES_"))}
    env = {**kept, "KUBECONFIG": str(with_the_chart_s_rights)}
    log = tmp_path / "log"

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(command, stderr=out, env=env, cwd=tmp_path)

    world.make(0)
    running = start()
    try:
        for replicas in (6, 2, 5):
            world.kubectl("scale", "inferenceset/llm", f"--replicas={replicas}")
            before = len(world.workspaces())
            world.until(lambda n=before: len(world.workspaces()) != n)  # it has begun
            running.kill()
            running.wait()
            assert len(world.workspaces()) <= 6
            running = start()
            world.until(lambda n=replicas: set(world.workspaces()) == {f"llm-{i}" for i in range(n)})
        # Both controllers are at work: the Workspace controller says why none of them can be served.
        world.until(lambda: "llm-0: NoNode: " in world.condition()["message"])
        world.kubectl("scale", "inferenceset/llm", "--replicas=1")
        world.until(lambda: set(world.workspaces()) == {"llm-0"})
        running.terminate()
        assert running.wait(60) == 0
    finally:
        running.kill()
        running.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    ours = [line for line in lines if line.get("inferenceset") == "llm"]
    assert ours
    assert not [line for line in ours if line["level"] != "info"]
