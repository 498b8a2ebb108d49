"""What follows from a NodeClaim, and `kaito aks-provisioner` on a real control plane."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from kaito_core.kube.client import Client, connect
from kaito_core.kube.kinds import EVENTS, NODES
from kaito_core.testing.cluster import Cluster, running_cluster, why_no_cluster
from kaito_provisioner_aks import pool
from kaito_provisioner_aks.claims import claim as claims
from kaito_provisioner_aks.claims.claim import FINALIZER, NODE_CLAIMS
from kaito_provisioner_aks.claims.decide import JOIN_SECONDS, LAUNCH_SECONDS, Observed, decide, leaked, refused
from kaito_provisioner_aks.errors import read_error
from kaito_provisioner_aks.settings import Settings
from kaito_provisioner_aks.testing import arm_server
from kaito_provisioner_aks.testing.arm_server import ArmServer

NOW = 1_780_000_000.0
SETTINGS = Settings("s", "g", "c")
SIZE = "Standard_NC24ads_A100_v4"
NAME = "ws0123abcde"


def claim(name: str = NAME, **more: Any) -> dict[str, Any]:
    """As KAITO makes it."""
    spec = {
        "nodeClassRef": {"group": "kaito.sh", "kind": "KaitoNodeClass", "name": "default"},
        "taints": [{"key": "sku", "value": "gpu", "effect": "NoSchedule"}],
        "requirements": [
            {"key": "karpenter.sh/nodepool", "operator": "In", "values": ["kaito"]},
            {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": [SIZE]},
            {"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]},
        ],
        "resources": {"requests": {"storage": "1024Gi"}},
        **more.pop("spec", {}),
    }
    metadata = {
        "name": name,
        "labels": {
            "karpenter.sh/nodepool": "kaito",
            "kaito.sh/workspace": "phi",
            "kaito.sh/workspacenamespace": "team",
        },
        "annotations": {"karpenter.sh/do-not-disrupt": "true"},
        **more.pop("metadata", {}),
    }
    return {"apiVersion": "karpenter.sh/v1", "kind": "NodeClaim", "metadata": metadata, "spec": spec, **more}


def stored(age: float = 10.0, finalizers: tuple[str, ...] = (FINALIZER,), **more: Any) -> dict[str, Any]:
    """As the API server has it."""
    made = datetime.fromtimestamp(NOW - age, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    metadata = {
        "uid": "u",
        "generation": 1,
        "creationTimestamp": made,
        "finalizers": list(finalizers),
        **more.pop("metadata", {}),
    }
    return claim(metadata={**claim()["metadata"], **metadata}, **more)


def seen(state: str, **properties: Any) -> pool.Pool:
    labels = {pool.MANAGED_BY: claims.OWNER, pool.CREATED: pool.timestamp(NOW - 60)}
    made = {"nodeLabels": labels, "vmSize": SIZE, "count": 1, "nodeImageVersion": "image-1", **properties}
    return pool.read({"name": NAME, "properties": {"provisioningState": state, **made}})


def node(**more: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "aks-1", "labels": {"agentpool": NAME, "node.kubernetes.io/instance-type": SIZE}},
        "spec": {"providerID": "azure:///1", **more},
        "status": {
            "conditions": [{"type": "Ready", "status": "True"}],
            "capacity": {"cpu": "24"},
            "allocatable": {"cpu": "23"},
        },
    }


def conditions(decision: Any) -> dict[str, tuple[str, str, str]]:
    return {c["type"]: (c["status"], c["reason"], c["message"]) for c in decision.status["conditions"]}


# --- decisions


def test_the_finalizer_comes_first() -> None:
    decision = decide(stored(finalizers=()), Observed(NOW, None), SETTINGS)
    assert decision.finalizer is True
    assert decision.put is None


def test_a_pool_is_asked_for_as_gpu_provisioner_would() -> None:
    decision = decide(stored(), Observed(NOW, None), SETTINGS)
    assert decision.put is not None
    properties = decision.put["properties"]
    assert properties["vmSize"] == SIZE
    assert properties["count"] == 1
    assert properties["osDiskSizeGB"] == 1024
    assert properties["nodeTaints"] == ["sku=gpu:NoSchedule"]
    assert properties["nodeLabels"] == {
        "karpenter.sh/nodepool": "kaito", "kaito.sh/workspace": "phi", "kaito.sh/workspacenamespace": "team",
        "kaito.sh/machine-type": "gpu", "kaito.sh/managed-by": "aks-provisioner", "kaito.sh/creation-timestamp": pool.timestamp(NOW),
    }  # fmt: skip
    assert "scaleSetPriority" not in properties
    assert conditions(decision) == {
        "Launched": ("Unknown", "AwaitingReconciliation", "object is awaiting reconciliation"),
        "Registered": ("Unknown", "AwaitingReconciliation", "object is awaiting reconciliation"),
        "Initialized": ("Unknown", "AwaitingReconciliation", "object is awaiting reconciliation"),
        "Ready": ("Unknown", "ReconcilingDependents", "Launched=Unknown, Registered=Unknown, Initialized=Unknown"),
    }


def test_spot_zones_and_the_image_family() -> None:
    wanted = claim()
    wanted["spec"]["requirements"] += [
        {"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["spot", "on-demand"]},
        {"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["eastus-2"]},
    ]
    wanted["spec"]["resources"] = {}
    wanted["metadata"]["annotations"]["kaito.sh/node-image-family"] = "azurelinux"
    made = claims.body(wanted, SETTINGS, NOW)["properties"]
    assert (made["scaleSetPriority"], made["availabilityZones"]) == ("Spot", ["2"])
    assert (made["osSKU"], made["osDiskSizeGB"]) == ("AzureLinux", 256)


@pytest.mark.parametrize(("metadata", "spec", "ours"), [
    ({}, {}, True),
    ({"labels": {}}, {}, True),
    ({}, {"nodeClassRef": {"group": "karpenter.k8s.aws", "kind": "EC2NodeClass", "name": "x"}}, True),
    ({"labels": {}}, {"nodeClassRef": {"group": "karpenter.k8s.aws", "kind": "EC2NodeClass", "name": "x"}}, False),
])  # fmt: skip
def test_whose_a_claim_is(metadata: dict[str, Any], spec: dict[str, Any], ours: bool) -> None:
    assert claims.is_ours(claim(metadata={"name": NAME, **metadata} if metadata else {}, spec=spec)) is ours


def test_a_machine_becomes_a_node() -> None:
    waiting = decide(stored(), Observed(NOW, seen("Creating")), SETTINGS)
    assert conditions(waiting)["Launched"] == (
        "Unknown",
        "AwaitingReconciliation",
        f"the agent pool {NAME} is Creating",
    )
    decision = decide(stored(), Observed(NOW, seen("Succeeded"), (node(),)), SETTINGS)
    assert {k: v[:2] for k, v in conditions(decision).items()} == {
        "Launched": ("True", "Launched"), "Registered": ("True", "Registered"), "Initialized": ("True", "Initialized"),
        "Ready": ("True", "Ready"),
    }  # fmt: skip
    assert decision.status is not None
    assert {k: v for k, v in decision.status.items() if k != "conditions"} == {
        "providerID": "azure:///1", "nodeName": "aks-1", "imageID": "image-1", "capacity": {"cpu": "24"}, "allocatable": {"cpu": "23"},
    }  # fmt: skip
    assert decision.node_labels == {"aks-1": {"karpenter.sh/registered": "true", "karpenter.sh/initialized": "true"}}
    again = decide(stored(status=decision.status), Observed(NOW + 99, seen("Succeeded"), (node(),)), SETTINGS)
    assert again.status == decision.status, "nothing changes when nothing has"


@pytest.mark.parametrize(("spec", "more", "reason"), [
    ({}, {"taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]}, "KnownEphemeralTaintsExist"),
    ({"resources": {"requests": {"storage": "1Gi", "nvidia.com/gpu": "1"}}}, {}, "ResourceNotRegistered"),
])  # fmt: skip
def test_a_node_that_is_not_what_was_asked_for(spec: dict[str, Any], more: dict[str, Any], reason: str) -> None:
    decision = decide(stored(spec=spec), Observed(NOW, seen("Succeeded"), (node(**more),)), SETTINGS)
    assert conditions(decision)["Initialized"][:2] == ("Unknown", reason)
    assert conditions(decision)["Ready"] == ("Unknown", "ReconcilingDependents", "Initialized=Unknown")


@pytest.mark.parametrize(("kind", "reason", "events"), [
    ("quota", "QuotaExceeded", 1), ("sku", "InsufficientCapacity", 1), ("size", "LaunchFailed", 0), ("authorization", "LaunchFailed", 0),
    ("throttled", "LaunchFailed", 0),
])  # fmt: skip
def test_what_azure_refuses_is_in_the_condition(kind: str, reason: str, events: int) -> None:
    answer = arm_server.REFUSALS[kind]
    said = read_error(answer.body, answer.status, 60.0 if kind == "throttled" else None)
    decision = refused(stored(), said, NOW)
    status, why, message = conditions(decision)["Launched"]
    assert (status, why) == ("Unknown", reason)
    assert message.startswith(f'creating instance, agentPool.BeginCreateOrUpdate for "{NAME}" failed: ')
    assert len(message) <= 303
    assert [e[1] for e in decision.events] == ["InsufficientCapacityError"] * events
    assert not decision.delete_claim
    assert decision.again_after == (60.0 if kind == "throttled" else 30.0)
    assert refused(stored(LAUNCH_SECONDS + 1), said, NOW).delete_claim


def test_a_busy_cluster_is_only_waited_for() -> None:
    decision = refused(stored(), read_error(arm_server.REFUSALS["busy"].body, 409), NOW)
    assert (decision.status, decision.delete_claim) == (None, False)


@pytest.mark.parametrize(("age", "observed", "given_up"), [
    (LAUNCH_SECONDS - 1, Observed(NOW, None), False),
    (LAUNCH_SECONDS + 1, Observed(NOW, None), True),
    (LAUNCH_SECONDS + 1, Observed(NOW, seen("Creating")), False),
    (JOIN_SECONDS + 1, Observed(NOW, seen("Creating")), True),
    (JOIN_SECONDS - 1, Observed(NOW, seen("Succeeded")), False),
    (JOIN_SECONDS + 1, Observed(NOW, seen("Succeeded")), True),
    (10, Observed(NOW, seen("Failed", status={"provisioningError": {"code": "AllocationFailed"}})), True),
    (10, Observed(NOW, seen("Failed", status={"provisioningError": {"code": "AKSOperationPreempted"}})), False),
])  # fmt: skip
def test_when_a_claim_is_given_up(age: float, observed: Observed, given_up: bool) -> None:
    assert decide(stored(age), observed, SETTINGS).delete_claim is given_up


def test_a_machine_that_is_gone_is_not_replaced() -> None:
    ready = decide(stored(), Observed(NOW, seen("Succeeded"), (node(),)), SETTINGS).status
    for observed in (Observed(NOW, None), Observed(NOW, seen("Succeeded"))):
        decision = decide(stored(status=ready), observed, SETTINGS)
        assert decision.delete_claim
        assert decision.put is None


def test_deletion_goes_from_the_outside_to_the_inside() -> None:
    gone = stored(metadata={"deletionTimestamp": "now"})
    first = decide(gone, Observed(NOW, seen("Creating")), SETTINGS)
    assert (first.delete_pool, first.finalizer) == (True, None)
    second = decide(gone, Observed(NOW, seen("Deleting")), SETTINGS)
    assert (second.delete_pool, second.finalizer) == (False, None)
    last = decide(gone, Observed(NOW, None, (node(),)), SETTINGS)
    assert (last.delete_nodes, last.finalizer) == (["aks-1"], False)


def test_a_pool_of_somebody_else_is_left_alone() -> None:
    other = seen("Succeeded", nodeLabels={pool.MANAGED_BY: pool.OWNER})
    decision = decide(stored(), Observed(NOW, other), SETTINGS)
    assert "it is not of a NodeClaim" in conditions(decision)["Launched"][2]
    gone = decide(stored(metadata={"deletionTimestamp": "now"}), Observed(NOW, other, (node(),)), SETTINGS)
    assert (gone.delete_pool, gone.delete_nodes, gone.finalizer) == (False, [], False)


def test_pools_without_a_claim() -> None:
    old = seen("Succeeded")
    gpu_provisioners = seen("Succeeded", nodeLabels={"karpenter.sh/nodepool": "kaito", "kaito.sh/workspace": "x"})
    workspaces = seen("Succeeded", nodeLabels={pool.MANAGED_BY: pool.OWNER, "kaito.sh/workspace": "x"})
    young = seen("Creating", nodeLabels={pool.MANAGED_BY: claims.OWNER, pool.CREATED: pool.timestamp(NOW)})
    somebodys = seen("Succeeded", nodeLabels={})
    assert leaked([old, workspaces, young, somebodys], set(), NOW) == [NAME]
    assert leaked([gpu_provisioners], set(), NOW) == [NAME]
    assert leaked([old], {NAME}, NOW) == []


# --- on a real control plane

FOLDER = os.environ.get("KAITO_TEST_KARPENTER_CRDS", "")
REASON = why_no_cluster() or (
    "" if FOLDER else "KAITO_TEST_KARPENTER_CRDS does not name a folder with Karpenter's CRDs"
)
on_a_cluster = pytest.mark.skipif(bool(REASON), reason=REASON)


class System:
    """A control plane that knows NodeClaims, Azure, machines that join as Node objects, and the command."""

    def __init__(self, cluster: Cluster, azure: ArmServer, client: Client) -> None:
        self.cluster, self.azure, self.cloud, self.client = cluster, azure, azure.cloud, client
        self._process: subprocess.Popen[str] | None = None
        self.log: list[str] = []
        azure.cloud.on_created, azure.cloud.on_deleted = self.join, None

    def join(self, made: dict[str, Any]) -> None:
        for number, name in enumerate(arm_server.node_names(made)):
            taints = [
                {
                    "key": t.partition("=")[0],
                    "value": t.partition("=")[2].partition(":")[0],
                    "effect": t.rpartition(":")[2],
                }
                for t in arm_server.node_taints(made)
            ]
            spec = {"providerID": arm_server.provider_id(made, number), "taints": taints}
            self.client.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {
                "name": name, "labels": arm_server.node_labels(made)}, "spec": spec})  # fmt: skip
            # The API server taints what has just been made; a kubelet that reports takes that off.
            self.client.patch(NODES, name, "", {"spec": {"taints": taints}})
            has = {"cpu": "24", "memory": "220Gi", "nvidia.com/gpu": "1"}
            ready = {"type": "Ready", "status": "True", "reason": "Test", "message": ""}
            self.client.patch(
                NODES,
                name,
                "",
                {"status": {"capacity": has, "allocatable": has, "conditions": [ready]}},
                subresource="status",
            )

    def start(self) -> None:
        command = [sys.executable, "-m", "kaito_core", "aks-provisioner", "--kubeconfig", str(self.cluster.kubeconfig),
                   "--no-leader-election", "--health-address", "127.0.0.1:0"]  # fmt: skip
        environment = {**os.environ, **self.azure.environment}
        self._process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.log.extend(process.stderr)

    def stop(self, number: int = signal.SIGTERM) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        return process.wait(60)

    def get(self, name: str) -> dict[str, Any] | None:
        return self.client.get(NODE_CLAIMS, name)

    def condition(self, name: str, kind: str) -> tuple[str, str, str]:
        told = ((self.get(name) or {}).get("status") or {}).get("conditions") or ()
        return next(((c["status"], c["reason"], c["message"]) for c in told if c["type"] == kind), ("", "", ""))

    def until(self, what: str, true: Callable[[], Any], seconds: float = 40.0) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := true():
                return found
            time.sleep(0.05)
        raise AssertionError(
            f"not {what}:\n{''.join(self.log[-40:])}\n{self.cloud.pools}\n{self.client.list(NODE_CLAIMS)[0]}"
        )


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with running_cluster() as cluster, ArmServer(create_seconds=0.5, delete_seconds=0.5) as azure:
        cluster.kubectl("apply", "-f", str(Path(FOLDER) / "karpenter.sh_nodeclaims.yaml"))
        cluster.kubectl("wait", "--for=condition=established", "crd/nodeclaims.karpenter.sh", "--timeout=30s")
        system = System(cluster, azure, connect(kubeconfig=str(cluster.kubeconfig)))
        system.start()
        try:
            yield system
        finally:
            system.stop(signal.SIGKILL)


@on_a_cluster
@pytest.mark.slow
class TestOnACluster:
    """In order; each leaves nothing behind."""

    def test_a_claim_gets_a_node_and_gives_it_back(self, system: System) -> None:
        system.client.create(
            NODE_CLAIMS, claim(spec={"resources": {"requests": {"storage": "512Gi", "nvidia.com/gpu": "1"}}})
        )
        system.until("ready", lambda: system.condition(NAME, "Ready")[0] == "True")
        ready = system.get(NAME)
        assert ready is not None
        assert ready["metadata"]["finalizers"] == [FINALIZER]
        assert ready["metadata"]["labels"].items() >= {
            "node.kubernetes.io/instance-type": SIZE, "karpenter.sh/capacity-type": "on-demand"}.items()  # fmt: skip
        node = ready["status"]["nodeName"]
        assert node.startswith(f"aks-{NAME}-")
        assert ready["status"]["providerID"].startswith("azure:///subscriptions/")
        assert ready["status"]["allocatable"]["nvidia.com/gpu"] == "1"
        found = system.client.get(NODES, node)
        assert found is not None
        assert found["metadata"]["labels"]["karpenter.sh/registered"] == "true"
        assert system.cloud.pools[NAME]["properties"]["osDiskSizeGB"] == 512
        system.client.delete(NODE_CLAIMS, NAME)
        system.until("gone", lambda: system.get(NAME) is None)
        assert not system.cloud.pools
        assert system.client.get(NODES, node) is None
        assert system.cloud.created == [NAME]

    def test_what_azure_refuses_is_said(self, system: System) -> None:
        system.cloud.limits["StandardNCADSA100v4Family"] = 6
        name = "wsquota0001"
        system.client.create(NODE_CLAIMS, claim(name))
        system.until("said", lambda: system.condition(name, "Launched")[1] == "QuotaExceeded")
        assert "Insufficient vcpu quota requested 24, remaining 6" in system.condition(name, "Launched")[2]
        events = system.until("told", lambda: [e for e in system.client.list(EVENTS, "default")[0]
                                               if e["involvedObject"]["name"] == name])  # fmt: skip
        assert events[0]["reason"] == "InsufficientCapacityError"
        assert "insufficient capacity" in events[0]["message"]
        system.client.delete(NODE_CLAIMS, name)
        system.until("gone", lambda: system.get(name) is None)
        system.cloud.limits.clear()

    def test_no_capacity_ends_the_claim_and_leaves_no_pool(self, system: System) -> None:
        name = "wsnothing01"
        system.cloud.fail("put", "broken")
        system.client.create(NODE_CLAIMS, claim(name))
        system.until("made", lambda: name in system.cloud.created)
        system.until("gone", lambda: system.get(name) is None)
        assert not system.cloud.pools
        events = [e for e in system.client.list(EVENTS, "default")[0] if e["involvedObject"]["name"] == name]
        assert {e["reason"] for e in events} == {"InsufficientCapacityError", "NodeClaimGivenUp"}
        assert system.cloud.created.count(name) == 1

    def test_killed_at_any_time_it_buys_once_and_leaves_nothing(self, system: System) -> None:
        system.cloud.fail("put", "lost", name="wscrash0001")
        for number, after in enumerate((0.0, 0.2, 0.5, 0.9)):
            name = f"wscrash000{number}"
            system.client.create(NODE_CLAIMS, claim(name))
            time.sleep(after)
            system.stop(signal.SIGKILL)
            system.start()
            system.until("ready", lambda name=name: system.condition(name, "Ready")[0] == "True")
            system.client.delete(NODE_CLAIMS, name)
            time.sleep(after)
            system.stop(signal.SIGKILL)
            system.start()
            system.until("gone", lambda name=name: system.get(name) is None)
            assert system.cloud.created.count(name) == 1
        assert not system.cloud.pools

    def test_claims_of_others_are_left_alone(self, system: System) -> None:
        other = claim("other", metadata={"name": "other", "labels": {}},
                      spec={"nodeClassRef": {"group": "karpenter.k8s.aws", "kind": "EC2NodeClass", "name": "x"}})  # fmt: skip
        system.client.create(NODE_CLAIMS, other)
        time.sleep(1.0)
        found = system.get("other")
        assert found is not None
        assert "finalizers" not in found["metadata"]
        assert "status" not in found
        system.client.delete(NODE_CLAIMS, "other")

    def test_it_ends_in_peace(self, system: System) -> None:
        assert system.stop() == 0
        last = json.loads(system.until("said", lambda: [line for line in system.log if "stopped" in line])[-1])
        assert last["msg"] == "stopped"


@on_a_cluster
def test_a_cluster_that_knows_no_claims_is_told() -> None:
    with running_cluster(controllers="serviceaccount-controller") as cluster:
        done = subprocess.run(
            [sys.executable, "-m", "kaito_core", "aks-provisioner", "--kubeconfig", str(cluster.kubeconfig), "--health-address", "127.0.0.1:0"],
            env={**os.environ, "KAITO_AKS_SUBSCRIPTION": "s", "KAITO_AKS_RESOURCE_GROUP": "g", "KAITO_AKS_CLUSTER": "c"},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert "does not know NodeClaims" in done.stderr


def test_without_a_cluster_of_aks_it_says_what_to_set() -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KAITO_", "AZURE_", "ARM_"))}
    done = subprocess.run([sys.executable, "-m", "kaito_core", "aks-provisioner"], env=kept, capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "set KAITO_AKS_SUBSCRIPTION and KAITO_AKS_RESOURCE_GROUP and KAITO_AKS_CLUSTER" in done.stderr
