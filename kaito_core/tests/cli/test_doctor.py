"""What ``kaito doctor`` finds wrong with a cluster, and what it says to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kaito_core import __version__
from kaito_core.api.crd import crd
from kaito_core.cli.doctor import command
from kaito_core.cli.doctor_checks import CHECKS, Found, Result, examine
from kaito_core.install import definition, namespace, objects
from kaito_core.kube.client import connect
from kaito_core.kube.kinds import LEASES, STORAGE_CLASSES
from kaito_core.plugins.types import Gpu, NodeRequest, Offer, Requirements
from kaito_core.testing.cluster import Cluster, running_cluster, why_no_cluster
from kaito_core.testing.provisioner import FakeProvisioner

NOW = datetime(2027, 1, 15, 8, 0, tzinfo=UTC)
Object = dict[str, Any]

DEPLOYMENT = next(o for o in objects("kaito-system", "r.io", __version__) if o["kind"] == "Deployment")
IMAGE = f"r.io/kaito-tuner:{__version__}"


def deployment(*arguments: str, **status: int) -> Object:
    made = deepcopy(DEPLOYMENT)
    made["status"] = {"readyReplicas": 2, **status}
    made["spec"]["template"]["spec"]["containers"][0]["args"] += arguments
    return made


def lease(age: float = 5.0, holder: str = "controller-1") -> Object:
    renewed = (NOW - timedelta(seconds=age)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return {
        "metadata": {"name": "kaito-controller", "namespace": "kaito-system"},
        "spec": {"holderIdentity": holder, "renewTime": renewed},
    }


def node(name: str, gpus: int = 0, *, ready: str = "True", provider: str = "", **labels: str) -> Object:
    allocatable = {"cpu": "4", "memory": "16Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {
        "metadata": {"name": name, "labels": {f"nvidia.com/gpu.{k}": v for k, v in labels.items()}},
        "spec": {"providerID": provider} if provider else {},
        "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": ready}]},
    }


def pod(image: str, made: int, **waiting: str) -> Object:
    state = {"waiting": waiting} if waiting else {"running": {}}
    return {
        "metadata": {"name": f"one-{made}", "namespace": "default", "creationTimestamp": f"2027-01-15T08:00:0{made}Z"},
        "spec": {
            "initContainers": [{"name": "fetch", "image": image}],
            "containers": [{"name": "one", "image": image}],
        },
        "status": {"initContainerStatuses": [{"name": "fetch", "state": state}]},
    }


STORED = crd() | {"status": {"conditions": [{"type": "Established", "status": "True"}]}}
WELL = Found(
    version="v1.33.1",
    definition=STORED,
    controllers=[deployment("--checkpoint-storage-class=fast")],
    leases=[lease()],
    nodes=[node("a", 1, product="Tesla-T4", memory="15360", count="1")],
    pods=[pod(IMAGE, 1)],
    storage_classes=[{"metadata": {"name": "fast"}}],
    now=NOW,
)
"""A cluster with nothing wrong."""


def results(title: str, **changed: Any) -> list[Result]:
    """What a check says of a cluster in which only this is different."""
    return [r for t, r in examine(replace(WELL, **changed)) if t == title]


def result(title: str, **changed: Any) -> Result:
    (only,) = results(title, **changed)
    return only


def test_a_cluster_that_lacks_nothing() -> None:
    said = examine(WELL)
    assert {r.state for _, r in said} == {"ok"}
    assert [t for t, _ in said] == [c.title for c in CHECKS]


@pytest.mark.parametrize(("version", "state"), [("v1.28.9", "problem"), ("v1.29.0-eks-1", "ok"), ("", "problem")])
def test_the_api_server_is_new_enough(version: str, state: str) -> None:
    assert result("API server", version=version).state == state


def test_the_definition_is_missing_not_served_or_not_ours() -> None:
    assert result("definition", definition=None) == Result(
        "problem",
        "the cluster does not know Workspaces",
        "kaito crd | kubectl apply --server-side --force-conflicts -f -",
    )
    refused = crd() | {"status": {"conditions": [{"type": "Established", "status": "False", "message": "names clash"}]}}
    assert "it is not served: names clash" in result("definition", definition=refused).message
    other = deepcopy(STORED)
    del other["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["tuning"]
    assert "fields would be dropped" in result("definition", definition=other).message
    other["metadata"]["annotations"] = {"controller-gen.kubebuilder.io/version": "v0.15.0"}
    assert "KAITO's own controller" in result("definition", definition=other).message


def test_a_cluster_of_another_version_is_well_in_itself() -> None:
    older = deployment()
    older["metadata"]["labels"]["app.kubernetes.io/version"] = "0.0.9"
    other = deepcopy(STORED)
    del other["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["tuning"]
    found = result("definition", definition=other, controllers=[older])
    assert (found.state, found.remedy) == ("warning", "pip install kaito-core==0.0.9, or upgrade the cluster")
    assert result("controller", controllers=[older]).message.endswith(f"is kaito 0.0.9, and this is {__version__}")


def test_no_controller() -> None:
    assert result("controller", controllers=[], leases=[]).remedy == "kaito install --registry HOST/PATH"
    assert result("controller", controllers=[]).state == "ok", "somebody renews the lease, wherever it runs"


def test_a_controller_that_does_not_come_up_says_why() -> None:
    one = pod("r.io/kaito-controller:1", 1, reason="ImagePullBackOff", message="no such tag")
    one["metadata"]["labels"] = DEPLOYMENT["spec"]["selector"]["matchLabels"]
    found = result("controller", controllers=[deployment(readyReplicas=0)], controller_pods=[one])
    assert found.state == "problem"
    assert "no pod of kaito-system/kaito-controller is ready" in found.message
    assert "no such tag" in found.message
    scaled = deployment()
    scaled["spec"]["replicas"] = 0
    assert result("controller", controllers=[scaled]).message == "kaito-system/kaito-controller is scaled to 0"


def test_nobody_leads() -> None:
    assert "was last heard 300 s ago" in result("leader", leases=[lease(300)]).message
    assert "nobody holds the Lease" in result("leader", leases=[lease(holder="")]).message
    assert "no controller has begun" in result("leader", leases=[]).message
    assert results("leader", controllers=[deployment("--no-leader-election")], leases=[]) == []


def test_rights_that_are_missing() -> None:
    assert result("your rights", not_mine=["create workspaces.kaito.sh"]).state == "problem"
    assert result("your rights", not_mine=["get pods/log"]).message == "in default you may not get pods/log"
    assert result("your rights", not_mine=["get pods/log"]).state == "warning"
    assert [r.state for r in results("its rights", not_theirs=list("abcde"))] == ["problem"] * 4


def test_nodes_that_take_no_pods() -> None:
    assert result("nodes", nodes=[]).state == "problem"
    assert result("nodes", nodes=[], provisioners=["karpenter"]).state == "warning", "they come when they are needed"
    well, lost = results("nodes", nodes=[node("a"), node("b", ready="Unknown")])
    assert (well.message, lost.message) == ("1 of 2 take pods", "the node b is not Ready")


def test_gpus_that_nobody_can_use() -> None:
    plugin_missing = node("b", product="Tesla-T4")
    assert "is the device plugin running there?" in result("GPUs", nodes=[plugin_missing]).message
    assert result("GPUs", nodes=[plugin_missing]).state == "problem"
    assert [r.state for r in results("GPUs", nodes=[*WELL.nodes, plugin_missing])] == ["ok", "warning"]
    assert "install GPU feature discovery" in result("GPUs", nodes=[node("c", 1)]).message


def test_where_machines_come_from() -> None:
    assert result("machines", nodes=[node("a", provider="azure:///x")]) == Result(
        "warning",
        "no node has a GPU that can be used, and no plugin that gets machines of Azure is installed here",
        "add nodes with GPUs, or put kaito-provisioner-aks into the controller's image",
    )
    assert result("machines", nodes=[node("a")], provisioners=["karpenter"]).state == "ok"


def test_an_image_that_cannot_be_pulled() -> None:
    failed = pod(IMAGE, 2, reason="ImagePullBackOff", message="401 Unauthorized")
    found = result("tuner image", pods=[pod(IMAGE, 1), failed])
    assert found.state == "problem"
    assert found.message == f"the pod default/one-2 cannot pull {IMAGE}: 401 Unauthorized"
    assert result("tuner image", pods=[failed, pod(IMAGE, 3)]).state == "ok", "the newest counts"
    assert result("tuner image", pods=[pod("other", 1, reason="ErrImagePull")]).message.endswith("no pod has used yet")


def test_the_image_may_be_in_the_environment() -> None:
    made = deployment()
    container = made["spec"]["template"]["spec"]["containers"][0]
    container["args"] = ["controller"]
    container["env"] = [{"name": "KAITO_TUNER_IMAGE", "value": IMAGE}]
    assert result("tuner image", controllers=[made]).message == IMAGE


def test_where_checkpoints_live() -> None:
    assert result("checkpoints", controllers=[deployment("--checkpoint-storage-class", "slow")]) == Result(
        "problem", "the StorageClass slow is not there (there are fast)", "set checkpoints.storageClass of the chart"
    )
    found = result("checkpoints", controllers=[deployment()])
    assert (found.state, found.remedy) == ("warning", "set checkpoints.storageClass of the chart, to fast for one")


def test_what_may_not_be_read_is_said() -> None:
    found = result("nodes", unread={"nodes": "list nodes: forbidden"})
    assert found == Result("warning", "not checked: list nodes: forbidden")


# --- a real API server


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_no_cluster():
        pytest.skip(reason)
    with running_cluster() as running:
        yield running


def doctor(kubeconfig: Path) -> tuple[int, dict[str, Result]]:
    """Exit code, and the worst of each check."""
    # Whatever else is installed where the tests run: nobody gets machines here.
    env = {"KAITO_PLUGINS": "existing,local"}
    done = CliRunner().invoke(command, ["--json", "--kubeconfig", str(kubeconfig)], standalone_mode=False, env=env)
    assert done.exception is None, done.exception
    said = json.loads(done.stdout)["checks"]
    worst: dict[str, Result] = {}
    for each in sorted(said, key=lambda r: ("ok", "warning", "problem").index(r["state"])):
        worst[each["check"]] = Result(each["state"], each["message"], each["remedy"])
    return int(done.return_value), worst


def test_an_empty_cluster_is_told_what_it_lacks_until_it_lacks_nothing(cluster: Cluster) -> None:
    client = connect(kubeconfig=str(cluster.kubeconfig))
    code, said = doctor(cluster.kubeconfig)
    assert code == 1
    assert {t for t, r in said.items() if r.state == "problem"} == {"definition", "controller", "nodes"}

    from kaito_core.install import kind_of

    for obj in [definition(), namespace("kaito-system"), *objects("kaito-system", "r.io", __version__)]:
        client.apply(kind_of(obj), obj)
    gpu = Gpu("T4", 15 << 30, (7, 5))
    machine = NodeRequest("ws1", Offer("small", 4, 16 << 30, gpu, 1), Requirements())
    FakeProvisioner([], kube=client).ensure(machine)
    client.create(
        STORAGE_CLASSES,
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": "disk"},
            "provisioner": "test",
        },
    )
    held = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", **lease()}
    held["spec"]["renewTime"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    client.create(LEASES, held)
    code, said = doctor(cluster.kubeconfig)
    assert code == 1
    assert {t for t, r in said.items() if r.state == "problem"} == {"controller"}, "nobody starts its pods here"
    assert {t for t, r in said.items() if r.state == "warning"} == {"checkpoints"}
    assert said["GPUs"].message == "1 node with 1×T4"

    cluster.kubectl("delete", "clusterrole", "kaito-controller")
    _, said = doctor(cluster.kubeconfig)
    assert said["its rights"].state == "problem"


def test_a_person_who_may_do_nothing_is_told_so(cluster: Cluster, tmp_path: Path) -> None:
    cluster.kubectl("-n", "default", "create", "serviceaccount", "someone")
    token = cluster.kubectl("-n", "default", "create", "token", "someone").strip()
    config = yaml.safe_load(Path(cluster.kubeconfig).read_text("utf-8"))
    config["users"][0]["user"] = {"token": token}
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config), "utf-8")
    code, said = doctor(kubeconfig)
    assert code == 1
    assert said["your rights"].message.startswith("in default you may not create workspaces.kaito.sh, get workspaces")
    assert said["nodes"].state == "warning"
    assert said["nodes"].message.startswith("not checked: list nodes: ")
    assert token not in str(said)


def test_no_answer_is_a_problem_and_no_traceback(tmp_path: Path) -> None:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:9"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
        "current-context": "c",
    }
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config), "utf-8")
    code, said = doctor(kubeconfig)
    assert code == 1
    assert "https://127.0.0.1:9 (context c) does not answer" in said["API server"].message
