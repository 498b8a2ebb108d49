"""Machines that are bought, from the quick start's YAML to the adapter, on real nodes: agent pools from an Azure that a server plays,
and NodeClaims that the real Karpenter core fulfils. The controller runs on this machine, with the plugins that are installed here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kaito_core import __version__
from kaito_core.api.crd import crd_yaml
from kaito_core.testing.registry import free_port
from tests.cluster.system import CAPABILITY, CLASS, CRDS, END_TO_END, PASSWORD, USER, System, training, values
from tests.conftest import ROOT

if TYPE_CHECKING:
    from kaito_provisioner_aks.testing.arm_server import ArmServer

pytestmark = END_TO_END


@pytest.fixture(scope="module", autouse=True)
def prepared(system: System) -> None:
    """What a cluster has in which a controller works, whether the tests of installing ran before or not; and no GPU of its own."""
    system.kubectl("apply", "--server-side", "-f", "-", stdin=crd_yaml())
    system.kubectl("wait", "--for=condition=Established", "crd/workspaces.kaito.sh", "--timeout=60s")
    for name, server in (("kaito-pull", system.registry.host), ("pods-login", system.output)):
        login = ("--docker-server", server, "--docker-username", USER, "--docker-password", PASSWORD)
        made = system.kubectl("create", "secret", "docker-registry", name, *login, "--dry-run=client", "-o", "yaml")
        system.kubectl("apply", "-f", "-", stdin=made)
    for node in system.get("nodes", "", "-l", "nvidia.com/gpu.count")["items"]:
        system.cluster.leave(node["metadata"]["name"])
        system.kubectl("delete", "node", node["metadata"]["name"])


def _plugin(folder: Path) -> Path:
    """A folder for PYTHONPATH with the plugin that moves the computing to the CPU."""
    target = folder / "cpu-plugin"
    made = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        target,
        ROOT / "tests" / "cluster" / "cpu_plugin",
    ]
    subprocess.run(made, check=True)
    return target


@contextmanager
def controller(system: System, folder: Path, **environment: str) -> Iterator[None]:
    """``kaito controller`` as a process of this machine, with the plugins that are installed here."""
    own = {k: str(v) for k, v in values(system)["podEnv"].items()}
    command = [sys.executable, "-m", "kaito_core", "controller", "--no-leader-election",
               "--tuner-image", f"{system.registry.host}/kaito/kaito-tuner:{__version__}", "--image-pull-secret", "kaito-pull",
               "--compute-capability", f"tuner={CAPABILITY}",
               "--checkpoint-storage-class", CLASS, "--metrics-address", "127.0.0.1:0", "--health-address", "127.0.0.1:0"]  # fmt: skip
    env = {**os.environ, "KUBECONFIG": str(system.cluster.kubeconfig), "KAITO_POD_ENV": json.dumps(own),
           "PYTHONPATH": str(_plugin(folder)), **environment}  # fmt: skip
    with (folder / "controller.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env=env)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def azure(system: System) -> Iterator[tuple[ArmServer, list[str]]]:
    """Azure's resource manager, played by a server of the plugin: a pool that is made is a real node that joins. The server, and the
    nodes that there are now."""
    from kaito_provisioner_aks.testing import arm_server

    nodes: list[str] = []

    def joined(pool: dict[str, Any]) -> None:
        labels, taints = arm_server.node_labels(pool), arm_server.node_taints(pool)
        for name in arm_server.node_names(pool):
            system.cluster.join(name, labels=labels, taints=taints, gpus=arm_server.node_gpus(pool))
            nodes.append(name)

    def left(pool: str) -> None:
        for name in [n for n in nodes if pool in n]:
            system.cluster.leave(name)
            system.kubectl("delete", "node", name, "--ignore-not-found")  # as Azure's cloud controller does
            nodes.remove(name)

    with arm_server.ArmServer(create_seconds=1, delete_seconds=1, on_created=joined, on_deleted=left) as server:
        yield server, nodes


def test_the_quick_start_through_agent_pools(system: System, tmp_path: Path) -> None:
    """Apply, agent pool, node, tuning, adapter, pool deleted: with the machine that the quick start names. Azure's answer to the
    first request is lost after it has acted."""
    with azure(system) as (server, nodes), controller(system, tmp_path, **server.environment):
        server.cloud.fail("put", "lost", times=1)
        system.tune("bought", "small.jsonl", secret="pods-login")
        ended = system.result("bought")
        assert ended["status"]["state"] == "Succeeded", system.report() + (tmp_path / "controller.log").read_text()
        [attempt] = ended["status"]["attempts"]
        assert (attempt["provisioner"], attempt["instanceType"]) == ("aks", "Standard_NC6s_v3")
        assert attempt["pricePerHour"] > 0
        system.until("the pool deleted, and its node", lambda: not server.cloud.pools and not nodes)
        assert len(server.cloud.created) == 1, "bought once"
        system.until("the attempt's end", lambda: system.workspace("bought")["status"]["attempts"][-1].get("ended"))
        [pod] = system.pods("bought")
        assert pod["spec"]["nodeName"].startswith("aks-")


def test_a_spot_machine_that_is_taken_away(system: System, tmp_path: Path) -> None:
    """Another one is got, and the training goes on from its checkpoint. The first offer is out of capacity on top of it."""
    config = training(system, "spot", max_steps=80, save_steps=5, per_device_train_batch_size=4)
    types = {"instanceTypes": ["Standard_NC16as_T4_v3", "Standard_NC4as_T4_v3"], "capacityType": "spot"}

    def step() -> int:
        return int(system.workspace("spot").get("status", {}).get("progress", {}).get("step", 0))

    with azure(system) as (server, nodes), controller(system, tmp_path, **server.environment):
        server.cloud.fail("put", "broken", times=1)
        system.tune("spot", "long.jsonl", config=config, secret="pods-login", resource=types)
        system.until("some steps", lambda: step() >= 10, 600)
        server.cloud.evict(server.cloud.created[-1])
        ended = system.result("spot", 900)
        assert ended["status"]["state"] == "Succeeded", system.report() + (tmp_path / "controller.log").read_text()
        tried = [(a["instanceType"], a["capacityType"], a.get("reason")) for a in ended["status"]["attempts"]]
        assert tried[0] == ("Standard_NC16as_T4_v3", "spot", "InsufficientCapacity")
        assert tried[1] == ("Standard_NC4as_T4_v3", "spot", "MachineLost")
        last = system.pods("spot")[-1]
        log = system.kubectl("logs", last["metadata"]["name"], "-c", last["spec"]["containers"][0]["name"])
        assert re.search(r"going on from checkpoint-(\d+)", log), log[-3000:]
        system.until("the pool deleted, and its node", lambda: not server.cloud.pools and not nodes)


@contextmanager
def karpenter(system: System, folder: Path) -> Iterator[None]:
    """The real Karpenter core with its simulated cloud; each node that it makes is a real one that joins, until it is deleted."""
    crds, program = Path(os.environ.get(CRDS, "nowhere")), system.cluster.programs / "karpenter-kwok"
    if not (crds / "instance-types.json").exists() or not program.exists():
        pytest.skip(f"{CRDS} names no folder with Karpenter's definitions, or KUBEBUILDER_ASSETS has no karpenter-kwok")
    for file in sorted(crds.glob("*.yaml")):
        system.kubectl("apply", "--server-side", "-f", str(file))
    system.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    node_class = {"apiVersion": "karpenter.kwok.sh/v1alpha1", "kind": "KWOKNodeClass", "metadata": {"name": "default"}}
    csv = "instance_type,capacity_type,price_per_hour\nStandard_NC6s_v3,on-demand,3.06\n"
    machines = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "machines"}, "data": {"offers.csv": csv}}
    for obj in (node_class, machines):
        system.kubectl("apply", "-f", "-", stdin=json.dumps(obj))
    env = {**os.environ, "INSTANCE_TYPES_FILE_PATH": str(crds / "instance-types.json"), "KUBERNETES_MIN_VERSION": "1.19.0-0",
           "SYSTEM_NAMESPACE": "kube-system", "DISABLE_LEADER_ELECTION": "true", "METRICS_PORT": str(free_port()),
           "HEALTH_PROBE_PORT": str(free_port()), "KUBECONFIG": str(system.cluster.kubeconfig)}  # fmt: skip
    stop = threading.Event()
    broke: list[Exception] = []
    machine_room = threading.Thread(target=_machines, args=(system, stop, broke))
    with (folder / "karpenter.log").open("wb") as log:
        process = subprocess.Popen([program], env=env, stdout=log, stderr=log, cwd=folder)
    machine_room.start()
    try:
        yield
    finally:
        stop.set()
        machine_room.join()
        process.kill()
        process.wait()
        assert not broke, broke


def _machines(system: System, stop: threading.Event, broke: list[Exception]) -> None:
    """Where Karpenter's cloud makes a machine, one starts."""
    try:
        _follow_nodes(system, stop)
    except Exception as e:
        broke.append(e)


POWERED_ON = "machines.test/powered-on"
"""A finalizer: the Node goes when its machine has, as with a real cloud, and never before. A kubelet that outlived its Node would
register it once more, and nothing would delete that one."""


def _follow_nodes(system: System, stop: threading.Event) -> None:
    running: dict[str, dict[str, Any]] = {}
    while not stop.wait(0.5):
        nodes = {
            n["metadata"]["name"]: n["metadata"] for n in system.get("nodes", "", "-l", "kaito.sh/request")["items"]
        }
        for name in [n for n in nodes if n not in running and "deletionTimestamp" not in nodes[n]]:
            if _hold(system, nodes[name], [POWERED_ON]):
                running[name] = nodes[name]
                system.cluster.join(name, gpus=1)
        for name in [n for n in running if "deletionTimestamp" in nodes.get(n, {})]:
            system.cluster.leave(name)
            _hold(system, running.pop(name), [])


def _hold(system: System, node: dict[str, Any], finalizers: list[str]) -> bool:
    """Set the finalizers that belong to this test, beside Karpenter's own; False when the Node is gone."""
    metadata = {"name": node["name"], "uid": node["uid"], "finalizers": finalizers}
    obj = {"apiVersion": "v1", "kind": "Node", "metadata": metadata}
    arguments = ("apply", "--server-side", "--field-manager=machines", "-o", "name", "-f", "-")
    return bool(system.kubectl(*arguments, stdin=json.dumps(obj), check=False))


def test_the_quick_start_through_karpenter(system: System, tmp_path: Path) -> None:
    """Apply, NodeClaim, node, tuning, adapter, claim and node gone."""
    own = {"KAITO_KARPENTER_OFFERS": "default/machines", "KAITO_NODE_CLASS": "KWOKNodeClass/default"}
    with karpenter(system, tmp_path), controller(system, tmp_path, **own):
        system.tune("claimed", "small.jsonl", secret="pods-login")
        ended = system.result("claimed")
        assert ended["status"]["state"] == "Succeeded", system.report() + (tmp_path / "controller.log").read_text()
        [attempt] = ended["status"]["attempts"]
        assert (attempt["provisioner"], attempt["pricePerHour"]) == ("karpenter", 3.06)
        [pod] = system.pods("claimed")
        node = pod["spec"]["nodeName"]
        system.until("the claim gone", lambda: not system.get("nodeclaims")["items"])
        system.until("the node gone", lambda: node not in system.kubectl("get", "nodes", "-o", "name"))
        system.until("the attempt's end", lambda: system.workspace("claimed")["status"]["attempts"][-1].get("ended"))
