"""Bring your own nodes: what the cluster's nodes offer, and what is said when they do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.api import labels
from kaito_core.existing.node import quantity, read_node
from kaito_core.existing.provisioner import ExistingNodes
from kaito_core.kube.kinds import NODES, Kind
from kaito_core.planning import catalogue
from kaito_core.plugins.types import NodeRequest, NodeStatus, Offer, Requirements, Unsupported

GIB, MIB = 1 << 30, 1 << 20
TYPE = "node.kubernetes.io/instance-type"
T4 = {"nvidia.com/gpu.product": "Tesla-T4", "nvidia.com/gpu.count": "1", "nvidia.com/gpu.memory": "15360"}
A100 = {
    "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB",
    "nvidia.com/gpu.count": "2",
    "nvidia.com/gpu.memory": "81920",
    "nvidia.com/gpu.compute.major": "8",
    "nvidia.com/gpu.compute.minor": "0",
}
ANY = Offer("", 0, 0)
"""A question about machines of any kind."""

Object = dict[str, Any]


def node(
    name: str,
    gpus: int = 0,
    *,
    ready: str = "True",
    resource: str = "nvidia.com/gpu",
    spec: Mapping[str, Any] | None = None,
    cpus: str = "3920m",
    has: Mapping[str, str] | None = None,
    **label: str,
) -> Object:
    """A Node object; its labels are ``has``, and ``label`` for those whose name Python can write."""
    allocatable = {"cpu": cpus, "memory": "16074744Ki"} | ({resource: str(gpus)} if gpus else {})
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(has or {}), **label}},
        "spec": dict(spec or {}),
        "status": {
            "allocatable": allocatable,
            "conditions": [{"type": "Ready", "status": ready, "message": "" if ready == "True" else "kubelet is silent"}],
        },
    }  # fmt: skip


class Nodes:
    """A cluster that has nodes, and takes nothing that would change it."""

    def __init__(self, *nodes: Object) -> None:
        self.nodes = list(nodes)

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        return next((n for n in self.nodes if n["metadata"]["name"] == name), None)

    def list(self, kind: Kind, namespace: str = "", labels: Mapping[str, str] | None = None) -> Iterable[Object]:
        assert kind == NODES
        return [n for n in self.nodes if (labels or {}).items() <= n["metadata"]["labels"].items()]

    def apply(self, kind: Kind, obj: Mapping[str, Any]) -> Object:
        raise AssertionError("no node is ever changed")

    def delete(self, kind: Kind, name: str, namespace: str = "") -> None:
        raise AssertionError("no node is ever changed")


def existing(*nodes: Object) -> ExistingNodes:
    provisioner = ExistingNodes()
    provisioner.attach(Nodes(*nodes))
    return provisioner


def offers(*nodes: Object, types: tuple[str, ...] = (), count: int = 1, **wanted: str) -> list[Offer]:
    return list(existing(*nodes).offers(Requirements(types, wanted, count)))


def ensure(
    *nodes: Object, types: tuple[str, ...] = (), count: int = 1, offer: Offer = ANY, **wanted: str
) -> NodeStatus:
    return existing(*nodes).ensure(NodeRequest("ws1", offer, Requirements(types, wanted, count)))


def said(*nodes: Object, **asked: Any) -> str:
    """The message of what is pending."""
    status = ensure(*nodes, **asked)
    assert status.phase == "pending"
    return status.message


# --- what is offered


def test_a_machine_that_was_got_for_a_workspace_is_nobody_else_s() -> None:
    """It goes when that Workspace has ended, and a job on it would go with it."""
    held = node("a", 1, has=T4 | {"kaito.sh/workspace": "one", "kaito.sh/workspacenamespace": "team"})
    assert offers(held) == []
    assert said(held) == "the cluster has no node that was not got for another Workspace"
    (offer,) = offers(held, node("b", 1, has=T4))
    assert ensure(held, node("b", 1, has=T4), offer=offer).nodes == ("b",)


def test_a_node_tells_its_gpus_itself() -> None:
    """KAITO's defect 5: it finds the number of GPUs only by an instance type, which must be empty for such nodes."""
    (offer,) = offers(node("a", 2, has=A100, app="tune"), app="tune")
    assert offer.gpu is not None
    assert (offer.gpu.model, offer.gpus, offer.gpu.compute_capability) == ("A100-SXM4-80GB", 2, (8, 0))
    assert (offer.cpus, offer.memory, offer.price, offer.provisioner) == (3, 16074744 << 10, None, "existing")


def test_a_node_without_discovery_is_known_by_its_instance_type() -> None:
    (offer,) = offers(node("a", 1, has={TYPE: "Standard_NC4as_T4_v3"}))
    known = catalogue.instance_types()["standard_nc4as_t4_v3"]
    assert (offer.gpu, offer.gpus, offer.cloud) == (known.gpu, 1, "azure")


def test_memory_by_discovery_is_what_the_catalogue_says_can_be_used() -> None:
    (told,) = offers(node("a", 1, has=T4))
    (known,) = offers(node("a", 1, has={TYPE: "g4dn.xlarge"}))
    assert told.device_memory == pytest.approx(known.device_memory, rel=0.01)


def test_older_labels_of_the_compute_capability_count() -> None:
    older = {"nvidia.com/cuda.compute.major": "7", "nvidia.com/cuda.compute.minor": "5"}
    gpu = read_node(node("a", 1, has=T4 | older)).offer.gpu
    assert gpu is not None
    assert gpu.compute_capability == (7, 5)
    assert not gpu.has_bfloat16


def test_an_amd_gpu_is_one() -> None:
    (offer,) = offers(node("a", 8, resource="amd.com/gpu", has={TYPE: "Standard_ND96isr_MI300X_v5"}))
    assert offer.gpu is not None
    assert (offer.gpu.vendor, offer.gpus) == ("amd", 8)


def test_a_node_without_gpu_is_an_offer_too() -> None:
    (offer,) = offers(node("a"))
    assert (offer.gpu, offer.gpus, str(offer)) == (None, 0, "node (3 CPUs, no GPU)")


def test_one_offer_for_each_kind_of_machine() -> None:
    few_kib_less = node("b", 1, has=T4)
    few_kib_less["status"]["allocatable"]["memory"] = "16074740Ki"
    found = offers(node("a", 1, has=T4), few_kib_less, node("c", 2, has=A100))
    assert [(o.instance_type, o.gpus, o.memory) for o in found] == [
        ("Tesla-T4", 1, 16074740 << 10),
        ("NVIDIA-A100-SXM4-80GB", 2, 16074744 << 10),
    ]


def test_what_takes_no_pods_is_not_offered() -> None:
    tainted = {"taints": [{"key": "team", "value": "other", "effect": "NoSchedule"}]}
    assert not offers(
        node("a", 1, has=T4, ready="False"), node("b", 1, has=T4, spec={"unschedulable": True}),
        node("c", 1, has=T4, spec=tainted), node("d", has=T4), node("e", 1),
    )  # fmt: skip


def test_the_taints_of_gpu_pools_are_no_hindrance() -> None:
    taints = [
        {"key": "sku", "value": "gpu", "effect": "NoSchedule"},
        {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"},
    ]
    assert offers(node("a", 1, has=T4, spec={"taints": taints}))


def test_a_kind_of_which_there_are_too_few_is_not_offered() -> None:
    nodes = [node("a", 1, has=T4), node("b", 1, has=T4), node("c", 2, has=A100)]
    assert [o.instance_type for o in offers(*nodes, count=2)] == ["Tesla-T4"]
    assert not offers(*nodes, count=3)


def test_a_named_instance_type_is_looked_for_without_regard_to_case() -> None:
    here = node("a", 1, has={TYPE: "Standard_NC4as_T4_v3"})
    assert offers(here, node("b", 1, has=T4), types=("standard_nc4as_t4_V3",)) == offers(here)


def test_labels_that_controllers_set_on_their_own_nodes_are_passed_over() -> None:
    provisioner = existing(node("a", 1, has=T4))
    assert list(provisioner.offers(Requirements(labels={labels.WORKSPACE: "one"})))


@pytest.mark.parametrize(
    ("text", "number"),
    [("3920m", 3.92), ("16Gi", 16 * GIB), ("1e3", 1000), ("12E6", 12e6), ("1.5G", 1.5e9), ("two", 0), ("1Qi", 0)],
)
def test_quantities(text: str, number: float) -> None:
    assert quantity(text) == number


# --- ready


def test_ready_names_the_nodes_and_what_selects_them() -> None:
    nodes = [node("b", 1, has=T4, app="tune"), node("a", 1, has=T4, app="tune"), node("c", 1, has=T4)]
    status = ensure(*nodes, app="tune", offer=offers(*nodes)[0])
    assert (status.phase, status.nodes, status.selector) == ("ready", ("a", "b"), {"app": "tune"})


def test_the_selector_keeps_pods_off_machines_of_another_kind() -> None:
    nodes = [node("a", 1, has=T4, app="tune"), node("b", 2, has=A100, app="tune")]
    status = ensure(*nodes, app="tune", offer=offers(*nodes)[1])
    assert status.nodes == ("b",)
    assert status.selector == {"app": "tune", "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}


def test_a_named_instance_type_is_part_of_the_selector() -> None:
    nodes = [node("a", 1, has={TYPE: "g4dn.xlarge"}), node("b", 1, has={TYPE: "g5.xlarge"})]
    status = ensure(*nodes, types=("G4DN.xlarge",))
    assert (status.nodes, status.selector) == (("a",), {TYPE: "g4dn.xlarge"})


def test_a_machine_that_no_label_tells_from_others_is_taken_by_its_name() -> None:
    status = ensure(node("a", cpus="8"), node("b", cpus="2"), node("c", cpus="2"), offer=offers(node("a", cpus="8"))[0])
    assert (status.nodes, status.selector) == (("a",), {"kubernetes.io/hostname": "a"})
    status = ensure(node("a", cpus="8"), node("b", cpus="2"), node("c", cpus="2"), count=2)
    assert isinstance(status.failure, Unsupported)
    assert status.message.startswith("no label tells b, c from a, which is of another kind")


def test_it_owns_nothing() -> None:
    provisioner = existing(node("a", 1, has=T4))
    request = NodeRequest("ws1", ANY, Requirements())
    assert provisioner.ensure(request).phase == "ready"
    assert provisioner.observe("ws1").phase == provisioner.release("ws1").phase == "absent"
    assert provisioner.ensure(request).phase == "ready"


# --- why not; where KAITO waits until it times out, the node and the label are named


def test_a_label_that_no_node_has() -> None:
    nodes = [node("a", 1, has=T4, app="tuning"), node("b", 1, has=T4)]
    assert said(*nodes, app="tune") == "no node has the label app=tune (a has app=tuning)"
    assert said(*nodes, ap="tune") == "no node has the label ap=tune (did you mean app?)"
    assert said(*nodes, team="mine") == "no node has the label team=mine"


def test_labels_that_no_one_node_has_together() -> None:
    nodes = [node("a", 1, has=T4, app="tune"), node("b", 1, has=T4, team="mine")]
    assert said(*nodes, app="tune", team="mine") == (
        "no node has all of app=tune, team=mine: a lacks team=mine; b lacks app=tune"
    )


def test_an_instance_type_that_no_node_is() -> None:
    assert said(node("a", 1, has={TYPE: "g5.xlarge"}), types=("g4dn.xlarge",)) == (
        "no node is a g4dn.xlarge (there are g5.xlarge)"
    )
    assert said(node("a", 1, has=T4), types=("g4dn.xlarge",)) == (
        "no node is a g4dn.xlarge (none has the label node.kubernetes.io/instance-type)"
    )


def test_a_node_that_takes_no_pods_now() -> None:
    assert said(node("a", 1, has=T4, ready="Unknown")) == "the node a is not Ready (kubelet is silent)"
    assert said(node("a", 1, has=T4, spec={"unschedulable": True})) == "the node a is cordoned"
    leaving = node("a", 1, has=T4)
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert said(leaving) == "the node a is being removed"
    tainted = {"taints": [{"key": "team", "value": "other", "effect": "NoExecute"}]}
    assert said(node("a", 1, has=T4, spec=tainted)) == (
        "the node a is tainted team=other:NoExecute, which the pods of kaito do not tolerate"
    )


def test_a_gpu_that_cannot_be_used() -> None:
    assert said(node("a", has=T4)) == (
        "the node a advertises no nvidia.com/gpu though it has nvidia.com/gpu.product=Tesla-T4: "
        "is the device plugin running there?"
    )
    assert said(node("a", has={TYPE: "g4dn.xlarge"})) == (
        "the node a advertises no nvidia.com/gpu though it has node.kubernetes.io/instance-type=g4dn.xlarge: "
        "is the device plugin running there?"
    )
    assert said(node("a", 1)) == (
        "the node a has nvidia.com/gpu of unknown memory: install GPU feature discovery, or label the node "
        "nvidia.com/gpu.memory=MIB"
    )
    assert "shares each GPU among 4 pods" in said(node("a", 4, has=T4 | {"nvidia.com/gpu.replicas": "4"}))
    assert "with MIG into nvidia.com/mig-1g.10gb" in said(node("a", 7, has=A100, resource="nvidia.com/mig-1g.10gb"))


def test_too_few_nodes() -> None:
    nodes = [node("a", 1, has=T4, app="tune"), node("b", 1, has=T4, app="tune"), node("c", 1, has=T4, app="serve")]
    assert said(*nodes, app="tune", count=3) == (
        "2 of 3 nodes are there (a, b); no other node has the label app=tune (c has app=serve)"
    )
    waiting = [*nodes[:2], node("c", 1, has=T4, app="tune", ready="False")]
    assert said(*waiting, app="tune", count=3) == (
        "2 of 3 nodes are there (a, b); the node c is not Ready (kubelet is silent)"
    )


def test_fewer_gpus_than_planned() -> None:
    two, one = node("a", 2, has=T4), node("a", 1, has=T4)
    status = ensure(one, offer=offers(two)[0])
    assert (status.phase, status.message) == ("failed", "the node a has 1 GPU where 2 are needed")
    assert isinstance(status.failure, Unsupported)


def test_nodes_of_different_kinds_cannot_work_together() -> None:
    status = ensure(node("a", 1, has=T4), node("b", 2, has=A100), count=2)
    assert isinstance(status.failure, Unsupported)
    assert status.message == ("the 2 nodes must be of one kind: a has 1×Tesla-T4; b has 2×A100-SXM4-80GB")


def test_a_node_of_the_planned_kind_may_come_back() -> None:
    nodes = [node("a", 1, has=T4, ready="False"), node("b", 2, has=A100)]
    message = said(*nodes, offer=offers(node("a", 1, has=T4))[0])
    assert message.startswith("the node a is not Ready (kubelet is silent); the node b is a ")


def test_a_cluster_without_nodes() -> None:
    assert said() == "the cluster has no node"
    assert not offers()


def test_hundreds_of_nodes_are_not_all_named() -> None:
    message = said(*(node(f"n{i:03}", 1, has=T4, ready="False") for i in range(500)))
    assert message.endswith("the node n002 is not Ready (kubelet is silent); and 497 more nodes cannot be used")


# --- always

VALUES = st.sampled_from(["", "x", "y"])


@st.composite
def some_nodes(draw: st.DrawFn) -> list[Object]:
    made = []
    for number in range(draw(st.integers(0, 5))):
        has = {k: v for k in ("app", "team") if (v := draw(VALUES))}
        has |= draw(st.sampled_from([{}, T4, A100, {TYPE: "g4dn.xlarge"}, {TYPE: "g5.xlarge"}]))
        spec = {"unschedulable": draw(st.booleans())}
        ready = draw(st.sampled_from(["True", "True", "False"]))
        made.append(node(f"n{number}", draw(st.integers(0, 2)), has=has, spec=spec, ready=ready))
    return made


@given(
    nodes=some_nodes(),
    wanted=st.dictionaries(st.sampled_from(["app", "team"]), st.sampled_from(["x", "y"])),
    types=st.sampled_from([(), ("g4dn.xlarge",)]),
    count=st.integers(1, 3),
)
def test_ready_is_never_said_too_early_and_nothing_else_is_selected(
    nodes: list[Object], wanted: dict[str, str], types: tuple[str, ...], count: int
) -> None:
    provisioner = existing(*nodes)
    requirements = Requirements(types, wanted, count)
    offered = list(provisioner.offers(requirements))
    assert len(offered) == len({(o.instance_type, o.gpu, o.gpus, o.cpus) for o in offered})
    for offer in [*offered, ANY]:
        status = provisioner.ensure(NodeRequest("ws1", offer, requirements))
        if offer is not ANY and status.phase != "ready":
            assert "no label tells" in status.message
        if status.phase != "ready":
            assert status.message
            continue
        assert len(status.nodes) >= count
        selected = [n for n in map(read_node, nodes) if status.selector.items() <= n.labels.items()]
        ready = [n for n in selected if n.usable and n.offer.gpus >= offer.gpus]
        assert set(status.nodes) <= {n.name for n in ready}
        for each in ready:
            assert wanted.items() <= each.labels.items()
            assert not types or each.labels[TYPE] in types
        if offer is not ANY:
            assert {n.name for n in ready} == set(status.nodes)
            assert {replace(n.offer, memory=0) for n in ready} == {replace(offer, memory=0)}


def test_a_node_object_is_read_once() -> None:
    """A thousand Workspaces ask again and again about hundreds of nodes."""
    cluster = Nodes(*(node(f"n{i}", 1, has=T4) for i in range(3)))
    provisioner = ExistingNodes()
    provisioner.attach(cluster)
    first = provisioner._nodes()
    cluster.nodes[1] = node("n1", 1, has=T4, ready="False")
    second = provisioner._nodes()
    assert [a is b for a, b in zip(first, second, strict=True)] == [True, False, True]
    assert second[1].trouble
