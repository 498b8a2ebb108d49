"""Pods that a real API server does not take: real quotas, the real controllers of Jobs and StatefulSets, a cloud that counts. And what
a Workspace's status may hold there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from kaito_core.controller.reconcile.starting import FIRST_RETRY_SECONDS, NO_POD_SECONDS
from kaito_core.kube.errors import ApiError, NotFound
from kaito_core.kube.kinds import JOBS, NAMESPACES, PODS, SECRETS, STATEFUL_SETS, WORKSPACES, Kind, Object
from kaito_core.plugins.types import Offer, Price
from kaito_core.testing.provisioner_plugin import ENVIRONMENT, CloudFolder

from .simulation import Simulation
from .test_attempts import MANY

if TYPE_CHECKING:
    from kaito_core.kube.client import Client
    from kaito_core.testing.cluster import Cluster

QUOTAS = Kind("v1", "ResourceQuota", "resourcequotas")
MACHINE = Offer("Standard_Test", cpus=4, memory=16 << 30, price=Price(0.5, "test", "2026-01-01"))
SPECS: dict[str, dict[str, Any]] = {
    "tuned": {
        "tuning": {
            "preset": {"name": "demo-phi-3"},
            "method": "qlora",
            "input": {"urls": ["https://example.com/a.jsonl"]},
            "output": {"image": "r.io/a:1", "imagePushSecret": "push"},
        }
    },
    "served": {
        "resource": {"labelSelector": {"matchLabels": {"app": "served"}}},
        "inference": {"template": {"spec": {"containers": [{"name": "web", "image": "r.io/web:1"}]}}},
    },
}


class World:
    """A namespace, a cloud and a controller whose clock the test moves on."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client = client
        self.namespace = f"quota-{uuid4().hex[:6]}"
        self.ahead = 0.0
        self.cloud = CloudFolder(folder, [MACHINE], kubeconfig="")
        client.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})
        self.create(SECRETS, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "push"}})

    def create(self, kind: Kind, obj: Object) -> None:
        self.client.create(kind, {**obj, "metadata": {**obj["metadata"], "namespace": self.namespace}})

    def start(self, plugins: list[str]) -> Callable[[float], None]:
        from kaito_core.controller.settings import Settings
        from kaito_core.controller.workspaces import WorkspaceController
        from kaito_core.plugins.manager import load_plugins

        settings = Settings(tuner_image="r.io/tuner:1")
        clock = lambda: time.time() + self.ahead  # noqa: E731 – what the controller calls
        controller = WorkspaceController(
            self.client, load_plugins(plugins), settings, namespace=self.namespace, clock=clock
        )
        controller.start_watching()
        controller.start_workers(2)
        return controller.stop

    def status(self, name: str) -> dict[str, Any]:
        return dict((self.client.get(WORKSPACES, name, self.namespace) or {}).get("status") or {})

    def said(self, name: str) -> str:
        return json.dumps(self.status(name), ensure_ascii=False).replace('\\"', '"')

    def held(self) -> int:
        return len(self.cloud.provisioner().machines)

    def until(self, done: Callable[[], Any]) -> None:
        """Look again and again, and let the controller look too: its clock is not that of its queue."""
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, "\n".join(map(self.said, SPECS))
            for name in SPECS:
                patch = {"metadata": {"annotations": {"test.kaito.sh/look": str(time.monotonic())}}}
                with suppress(NotFound):
                    self.client.patch(WORKSPACES, name, self.namespace, patch)
            time.sleep(0.3)


@pytest.fixture
def client(workspaces: Cluster) -> Client:
    from kaito_core.kube.client import connect

    return connect(kubeconfig=str(workspaces.kubeconfig), user_agent="test")


@pytest.fixture
def world(client: Client, workspaces: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(client, tmp_path / "cloud")
    world.cloud.change(kubeconfig=str(workspaces.kubeconfig))
    monkeypatch.syspath_prepend(str(tmp_path / "cloud"))
    monkeypatch.setenv(ENVIRONMENT, world.cloud.environment[ENVIRONMENT])
    stop = world.start(["kaito-core", "kaito-preset-demo", "kaito-tuner-qlora", "kaito-fake-cloud"])
    yield world
    stop(5)


def test_a_quota_that_takes_no_pod_holds_no_machine(world: World) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "gpus"}, "spec": {"hard": {"pods": "0"}}}
    world.create(QUOTAS, quota)
    for name, spec in SPECS.items():
        world.create(
            WORKSPACES,
            {"apiVersion": WORKSPACES.api_version, "kind": WORKSPACES.kind, "metadata": {"name": name}, **spec},
        )
    world.until(lambda: world.client.get(JOBS, "tuned", world.namespace))
    world.until(lambda: world.client.get(STATEFUL_SETS, "served", world.namespace))
    assert world.held() == 2
    world.ahead = 6
    for name in SPECS:
        world.until(lambda name=name: "exceeded quota: gpus" in world.said(name))
        assert "a ResourceQuota, a LimitRange" in world.said(name), "and what to do"
    world.ahead += NO_POD_SECONDS
    world.until(lambda: world.held() == 0)
    for name in SPECS:
        world.until(lambda name=name: "a machine is got again at" in world.said(name))
        assert [a["reason"] for a in world.status(name)["attempts"]] == ["FailedCreate"]
    world.client.delete(QUOTAS, "gpus", world.namespace)
    world.ahead += FIRST_RETRY_SECONDS
    world.until(lambda: len(world.client.list(PODS, world.namespace)[0]) == 2)
    assert world.held() == 2
    # And a person suspends the job.
    world.client.delete(WORKSPACES, "served", world.namespace)
    world.until(lambda: world.held() == 1)
    world.client.patch(JOBS, "tuned", world.namespace, {"spec": {"suspend": True}})
    world.until(lambda: "the Job is suspended" in world.said("tuned"))
    world.ahead += NO_POD_SECONDS + 120  # its pod was given 120 s to end
    world.until(lambda: world.held() == 0)
    for pod in world.client.list(PODS, world.namespace)[0]:  # as its kubelet would
        world.client.delete(PODS, pod["metadata"]["name"], world.namespace, grace=0)
    world.ahead += 10 * FIRST_RETRY_SECONDS
    world.client.patch(JOBS, "tuned", world.namespace, {"spec": {"suspend": False}})
    world.until(lambda: world.held() == 1)
    bought = [e["id"] for e in world.cloud.provisioner().events if e["event"] == "bought"]
    assert len(bought) == len(set(bought)) == 5


def test_a_policy_that_takes_no_job_holds_no_machine(world: World) -> None:
    policy, binding = (
        Kind("admissionregistration.k8s.io/v1", kind, plural, namespaced=False)
        for kind, plural in (
            ("ValidatingAdmissionPolicy", "validatingadmissionpolicies"),
            ("ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings"),
        )
    )
    jobs = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
    here = {"matchLabels": {"kubernetes.io/metadata.name": world.namespace}}
    name = world.namespace
    made: dict[Kind, dict[str, Any]] = {
        policy: {
            "matchConstraints": {"resourceRules": [jobs], "namespaceSelector": here},
            "validations": [{"expression": "false", "message": "jobs need a cost centre"}],
        },
        binding: {"policyName": name, "validationActions": ["Deny"]},
    }
    for kind, spec in made.items():
        world.client.create(
            kind, {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": {"name": name}, "spec": spec}
        )
    probe = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe", "namespace": name}}
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}

    def is_enforced() -> bool:
        try:
            world.client.apply(JOBS, {**probe, "spec": {"template": template}}, dry_run=True)
        except ApiError as e:
            return "cost centre" in str(e)
        return False

    world.until(is_enforced)
    world.create(
        WORKSPACES,
        {
            "apiVersion": WORKSPACES.api_version,
            "kind": WORKSPACES.kind,
            "metadata": {"name": "tuned"},
            **SPECS["tuned"],
        },
    )
    world.until(lambda: "jobs need a cost centre" in world.said("tuned"))
    assert world.held() == 1
    said = {c["type"]: c for c in world.status("tuned")["conditions"]}
    assert said["Reconciled"]["status"] == "False"
    world.ahead += NO_POD_SECONDS + 5
    world.until(lambda: world.held() == 0)
    world.until(lambda: "a machine is got again at" in world.said("tuned"))
    assert "Reconciled" not in {c["type"] for c in world.status("tuned")["conditions"]}, "nothing fails any more"
    world.client.delete(binding, name)
    world.client.delete(policy, name)
    world.ahead += FIRST_RETRY_SECONDS
    world.until(lambda: world.client.get(JOBS, "tuned", world.namespace))


def test_the_api_server_takes_the_status_after_any_number_of_attempts(client: Client) -> None:
    name = f"old-{uuid4().hex[:6]}"
    made = {"apiVersion": WORKSPACES.api_version, "kind": WORKSPACES.kind, "metadata": {"name": name}, **SPECS["tuned"]}
    client.create(WORKSPACES, {**made, "metadata": {"name": name, "namespace": "default"}})
    simulation = Simulation()
    for n in range(MANY):
        simulation.settle()
        assert simulation.workspace is not None
        status = simulation.workspace["status"]
        if n % 7 == 0 or n > MANY - 3:
            written = client.patch(WORKSPACES, name, "default", {"status": status}, subresource="status")
            assert written["status"]["attempts"] == status["attempts"], "the number too"
        simulation.take_away()
    assert len(set(simulation.requests)) == MANY
    client.delete(WORKSPACES, name, "default")
