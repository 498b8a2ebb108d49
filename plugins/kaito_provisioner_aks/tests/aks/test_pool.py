"""A request as the body of a PUT, and an answer as what is known of a pool."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.api.labels import WORKSPACE, WORKSPACE_NAMESPACE
from kaito_core.plugins.types import CapacityType, Gpu, NodeRequest, Offer, Requirements, Unsupported
from kaito_provisioner_aks import pool
from kaito_provisioner_aks.settings import Settings
from kaito_provisioner_aks.testing.arm_server import TOKEN, Cloud

SETTINGS = Settings("s", "g", "c")
SIZE = "Standard_NC24ads_A100_v4"
TAGS = {WORKSPACE: "phi", WORKSPACE_NAMESPACE: "team"}
NOW = 1_780_000_000.0


def request(name: str = "ws012345678", *, spot: bool = False, zone: str = "", **requirements: Any) -> NodeRequest:
    kind: CapacityType = "spot" if spot else "on-demand"
    offer = Offer(SIZE, 24, 198 << 30, Gpu("A100-80GB", 80 << 30), 1, "aks", "azure", "eastus", zone, kind)
    return NodeRequest(name, offer, Requirements(**requirements), TAGS)


def properties(request: NodeRequest, **settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = pool.body(request, Settings("s", "g", "c", **settings), "eastus", NOW)["properties"]
    return found


def test_a_gpu_pool() -> None:
    assert properties(request(count=2, labels={"app": "tune"})) == {
        "mode": "User",
        "type": "VirtualMachineScaleSets",
        "count": 2,
        "vmSize": SIZE,
        "osType": "Linux",
        "osSKU": "Ubuntu",
        "osDiskType": "Managed",
        "osDiskSizeGB": 256,
        "enableAutoScaling": False,
        "scaleDownMode": "Delete",
        "nodeTaints": ["sku=gpu:NoSchedule"],
        "nodeLabels": {
            "app": "tune",
            "kaito.sh/workspace": "phi",
            "kaito.sh/workspacenamespace": "team",
            "kaito.sh/managed-by": "kaito-controller",
            "kaito.sh/creation-timestamp": "2026-05-28T20-26-40Z",
            "kaito.sh/machine-type": "gpu",
        },
        "tags": {
            "kaito.sh_workspace": "phi",
            "kaito.sh_workspacenamespace": "team",
            "kaito.sh_managed-by": "kaito-controller",
            "kaito.sh_creation-timestamp": "2026-05-28T20-26-40Z",
        },
    }


def test_a_spot_pool_in_a_zone_with_everything_set() -> None:
    made = properties(
        request(spot=True, zone="eastus-2"), gpu_driver="None", os_disk_gb=512, os_sku="AzureLinux", subnet="/s"
    )
    assert made["scaleSetPriority"] == "Spot"
    assert made["scaleSetEvictionPolicy"] == "Delete"
    assert made["spotMaxPrice"] == -1
    assert made["availabilityZones"] == ["2"]
    assert made["gpuProfile"] == {"driver": "None"}
    assert (made["osDiskSizeGB"], made["osSKU"], made["vnetSubnetID"]) == (512, "AzureLinux", "/s")


def test_zones_that_are_asked_for() -> None:
    assert properties(request(zones=("1", "eastus-3", "eastus-1")))["availabilityZones"] == ["1", "3"]
    with pytest.raises(Unsupported, match="'somewhere' is not a zone"):
        pool.body(request(zones=("somewhere",)), SETTINGS, "eastus", NOW)


@pytest.mark.parametrize("label", [
    {"node.kubernetes.io/instance-type": SIZE}, {"topology.kubernetes.io/region": "eastus"}, {"kubernetes.io/os": "linux"},
    {"accelerator": "nvidia"}, {"kubernetes.azure.com/accelerator": "nvidia"}, {"kubernetes.azure.com/mode": "user"},
])  # fmt: skip
def test_labels_that_aks_sets_itself_are_left_to_it(label: dict[str, str]) -> None:
    assert not label.keys() & properties(request(labels=label))["nodeLabels"].keys()


@pytest.mark.parametrize(("label", "words"), [
    ({"node.kubernetes.io/instance-type": "Standard_NC6s_v3"}, "AKS does not let an agent pool have the label"),
    ({"kubernetes.azure.com/team": "x"}, "AKS does not let an agent pool have the label kubernetes.azure.com/team=x"),
    ({"agentpool": "gpu"}, "AKS does not let an agent pool have the label agentpool=gpu"),
    ({"karpenter.sh/nodepool": "kaito"}, "Karpenter's"),
])  # fmt: skip
def test_labels_that_cannot_be_given(label: dict[str, str], words: str) -> None:
    with pytest.raises(Unsupported, match=re.escape(words)):
        pool.body(request(labels=label), SETTINGS, "eastus", NOW)


@given(st.text(max_size=14))
def test_only_names_that_aks_takes_are_sent(name: str) -> None:
    if re.fullmatch("[a-z][a-z0-9]{0,11}", name):
        pool.body(request(name), SETTINGS, "eastus", NOW)
    else:
        with pytest.raises(Unsupported, match="must match regex pattern"):
            pool.body(request(name), SETTINGS, "eastus", NOW)


PREFIX = st.sampled_from(
    ["", "example.com/", "kaito.sh/", "node.kubernetes.io/", "kubernetes.azure.com/", "karpenter.sh/"]
)
LABELS = st.dictionaries(st.builds("{}{}".format, PREFIX, st.from_regex("[a-z]{1,8}", fullmatch=True)), st.from_regex("[a-z0-9]{0,8}", fullmatch=True), max_size=4)  # fmt: skip


@given(LABELS, st.integers(1, 8), st.booleans(), st.lists(st.sampled_from(["1", "2", "eastus-3"]), max_size=3))
def test_what_is_sent_is_taken_and_read_back(labels: dict[str, str], count: int, spot: bool, zones: list[str]) -> None:
    """Azure takes every body that we make, and what it answers says what we asked for."""
    wanted = request(spot=spot, count=count, labels=labels, zones=tuple(zones))
    cloud = Cloud()
    try:
        body = pool.body(wanted, SETTINGS, "eastus", NOW)
    except Unsupported:
        assert any(k.startswith(("node.kubernetes.io/", "kubernetes.azure.com/", "karpenter.sh/")) for k in labels)
        return
    path = (
        "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/kaito-test/providers/"
        "Microsoft.ContainerService/managedClusters/kaito-test/agentPools/ws012345678?api-version=2026-08-01"
    )
    answer = cloud.handle("PUT", path, {"authorization": f"Bearer {TOKEN}", "if-none-match": "*"}, body)
    assert answer.status == 201, answer.body
    read = pool.read(answer.body or {})
    assert (read.name, read.phase, read.vm_size, read.count, read.spot) == ("ws012345678", "pending", SIZE, count, spot)
    assert pool.is_workspaces(read)
    assert {k: read.marks[k] for k in TAGS} == TAGS
    assert read.age(NOW + 60) == 60
    assert labels.items() <= read.labels.items()


@pytest.mark.parametrize("lost", ["nodeLabels", "tags"])
def test_a_pool_is_known_by_its_labels_or_by_its_tags(lost: str) -> None:
    """Whoever sets one of them with az replaces it as a whole."""
    answer = {"name": "ws012345678", **pool.body(request(), SETTINGS, "eastus", NOW)}
    answer["properties"] = {**answer["properties"], lost: {"cost": "x"}}
    assert pool.is_workspaces(pool.read(answer))
    assert pool.read(answer).age(NOW + 5) == 5


@pytest.mark.parametrize(("state", "phase"), [
    ("Creating", "pending"), ("Scaling", "pending"), ("Updating", "pending"), ("Upgrading", "pending"), ("Starting", "pending"),
    ("SomethingNew", "pending"), ("Succeeded", "succeeded"), ("Failed", "failed"), ("Canceled", "failed"), ("Deleting", "deleting"),
])  # fmt: skip
def test_states(state: str, phase: str) -> None:
    assert pool.read({"name": "p", "properties": {"provisioningState": state}}).phase == phase


@given(st.dictionaries(st.text(max_size=5), st.none() | st.text(max_size=5) | st.integers(0, 5), max_size=4))
def test_an_answer_may_lack_anything(properties: dict[str, Any]) -> None:
    read = pool.read({"properties": properties})
    assert not pool.is_workspaces(read)
    assert read.age(NOW) == float("inf")


def test_ready_nodes() -> None:
    def node(name: str, ready: str, **more: Any) -> dict[str, Any]:
        return {
            "metadata": {"name": name, "labels": {"agentpool": "p"}, **more.pop("metadata", {})},
            "spec": more,
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        }

    nodes = [
        node("b", "True"),
        node("a", "True"),
        node("c", "Unknown"),
        node("d", "True", unschedulable=True),
        node("e", "True", metadata={"deletionTimestamp": "now"}),
        {"metadata": {"name": "f"}},
    ]
    assert pool.ready_nodes(nodes) == ["a", "b"]
    assert pool.selector("p", nodes[:1]) == {"agentpool": "p"}
    newer = {"metadata": {"labels": {"kubernetes.azure.com/agentpool": "p"}}}
    assert pool.selector("p", [newer]) == {"kubernetes.azure.com/agentpool": "p"}
