"""The provisioner against a cluster in memory: one order of events a test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from asking import ID, NC6S, NC24ADS, TAGS, request
from karpenter_double import AKS_CLASS, EC2_CLASS, Cluster, Object, condition, node_class

from kaito_core.kube.errors import ApiError, Forbidden, Invalid, NotFound, TooManyRequests, Unreachable
from kaito_core.kube.kinds import Kind
from kaito_core.planning import catalogue
from kaito_core.plugins.types import (
    InsufficientCapacity,
    NodeStatus,
    NotAuthorized,
    Offer,
    ProvisioningError,
    QuotaExceeded,
    Requirements,
    Transient,
    Unsupported,
)
from kaito_provisioner_karpenter.flavours import NODE_CLAIMS
from kaito_provisioner_karpenter.provisioner import EVENT_COMES, FRESH, KarpenterNodes

OFF = {"KAITO_AWS_CHECKS": "off"}


def nodes(cluster: Cluster, **environ: str) -> KarpenterNodes:
    provisioner = KarpenterNodes({**OFF, **environ}, clock=lambda: cluster.now)
    provisioner.attach(cluster)
    return provisioner


def azure_node(**labels: str) -> Object:
    labels = {"topology.kubernetes.io/region": "eastus", **{k.replace("_", "/"): v for k, v in labels.items()}}
    return {"kind": "Node", "metadata": {"name": "system", "labels": labels}, "spec": {"providerID": "azure:///x"}}


def failed(status: NodeStatus, kind: type[ProvisioningError]) -> str:
    assert (status.phase, type(status.failure)) == ("failed", kind), status
    return status.message


# --- the way there and back


def test_a_machine_comes_and_goes() -> None:
    cluster = Cluster(AKS_CLASS)
    karpenter = nodes(cluster)
    assert karpenter.observe(ID).phase == "absent"
    assert karpenter.ensure(request()).phase == "pending"
    for step in (cluster.launch, cluster.register):
        step(ID)
        assert karpenter.ensure(request()).phase == karpenter.observe(ID).phase == "pending"
    cluster.initialize(ID)
    ready = NodeStatus(ID, "ready", (f"node-{ID}-1",), {"kaito.sh/request": ID})
    assert karpenter.observe(ID) == ready
    assert karpenter.ensure(request()) == replace(ready, offer=NC6S)
    assert cluster.nodes[f"node-{ID}-1"]["metadata"]["labels"].items() >= {**ready.selector, **TAGS}.items()
    assert cluster.made == [ID]
    assert karpenter.release(ID).phase == karpenter.release(ID).phase == "releasing"
    assert karpenter.observe(ID).phase == "releasing"
    cluster.finish_deletions()
    assert karpenter.release(ID).phase == "absent"
    assert not list(karpenter.held())


def test_two_machines_are_two_claims() -> None:
    cluster = Cluster(AKS_CLASS)
    karpenter = nodes(cluster)
    karpenter.ensure(request(count=2))
    second = f"{ID}-1"
    assert cluster.made == [ID, second]
    cluster.register(ID)
    cluster.initialize(ID)
    status = karpenter.ensure(request(count=2))
    assert status.phase == karpenter.observe(ID).phase == "pending"
    assert status.message.startswith("1 of 2 machines are ready")
    cluster.register(second)
    cluster.initialize(second)
    assert karpenter.ensure(request(count=2)).nodes == (f"node-{ID}-1", f"node-{second}-2")
    assert len(list(karpenter.held())) == 1


def test_gpu_provisioner_gets_one_after_the_other() -> None:
    cluster = Cluster(azure_node())
    karpenter = nodes(cluster)
    karpenter.ensure(request(count=2))
    karpenter.ensure(request(count=2))
    assert cluster.made == [ID]
    cluster.register(ID)
    karpenter.ensure(request(count=2))
    assert cluster.made == [ID, f"{ID}1"]


def test_a_lost_machine_is_replaced() -> None:
    cluster = Cluster(AKS_CLASS)
    karpenter = nodes(cluster)
    karpenter.ensure(request())
    cluster.register(ID)
    cluster.initialize(ID)
    assert karpenter.ensure(request()).phase == "ready"
    cluster.lose(ID)
    assert karpenter.ensure(request()).phase == "pending"
    assert cluster.made == [ID, ID]


def test_a_node_whose_claim_was_removed_by_force_is_given_back() -> None:
    cluster = Cluster(AKS_CLASS)
    karpenter = nodes(cluster)
    karpenter.ensure(request())
    cluster.register(ID)
    del cluster.claims[ID]
    assert karpenter.ensure(request()).phase == "releasing"
    assert cluster.made == [ID]
    assert [h.request_id for h in karpenter.held()] == [ID]
    assert karpenter.observe(ID).phase == "releasing"
    assert "its Node is left" in karpenter.release(ID).message
    cluster.finish_deletions()
    assert karpenter.release(ID).phase == "absent"


def test_held_is_what_was_made_for_kaito_and_how_long_ago() -> None:
    theirs = {"kind": "NodeClaim", "metadata": {"name": "theirs", "labels": {"kaito.sh/workspace": "x"}}, "spec": {}}
    cluster = Cluster(AKS_CLASS, theirs)
    nodes(cluster).ensure(request())
    cluster.now += 90
    (held,) = nodes(cluster).held()
    assert (held.request_id, held.tags, held.age) == (ID, TAGS, 90)


def test_a_machine_that_is_being_taken_away_is_lost() -> None:
    """The host begins anew when it hears that, with another request."""
    cluster = Cluster(AKS_CLASS)
    karpenter = nodes(cluster)
    karpenter.ensure(request())
    cluster.register(ID)
    cluster.initialize(ID)
    cluster.claims[ID]["metadata"]["deletionTimestamp"] = cluster.time
    assert karpenter.ensure(request()).phase == "releasing"


def test_the_status_says_which_of_the_offers_it_has_become() -> None:
    spot = replace(NC24ADS, capacity_type="spot")
    asked = request(NC6S, replace(NC6S, capacity_type="spot"), NC24ADS, spot)
    cluster = Cluster(AKS_CLASS)
    karpenter = nodes(cluster)
    karpenter.ensure(asked)
    cluster.register(ID)
    cluster.initialize(ID)
    assert karpenter.ensure(asked).offer == spot


# --- Karpenter gives up


@pytest.mark.parametrize("restarted", [False, True])
def test_a_failure_says_which_offers_were_asked_for_too(restarted: bool) -> None:
    elsewhere = replace(NC24ADS, region="westus")
    cluster = Cluster(AKS_CLASS)
    karpenter = nodes(cluster)
    karpenter.ensure(request(NC6S, NC24ADS, elsewhere))
    cluster.no_capacity(ID)
    late = Offer("cheaper-since-then", 6, 1 << 37, NC6S.gpu, 1, "karpenter", "azure", "eastus")
    if restarted:
        assert nodes(cluster).ensure(request(NC6S, NC24ADS)).asked == (NC24ADS,)
    else:
        assert karpenter.ensure(request(NC6S, NC24ADS, late)).asked == (NC24ADS,)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("insufficient capacity, all requested instance types were unavailable during launch", InsufficientCapacity),
        (
            "insufficient capacity, regional on-demand vCPU quota limit for subscription has been reached.",
            QuotaExceeded,
        ),
    ],
)
def test_a_claim_that_was_given_up_is_not_made_again(
    restarted: bool, words: str, kind: type[ProvisioningError]
) -> None:
    cluster = Cluster(AKS_CLASS)
    karpenter = nodes(cluster)
    karpenter.ensure(request())
    cluster.no_capacity(ID, words)
    karpenter = nodes(cluster) if restarted else karpenter
    for _ in range(3):
        assert failed(karpenter.ensure(request()), kind) == words
    assert karpenter.release(ID).phase == "absent"
    assert failed(karpenter.ensure(request()), kind) == words
    assert cluster.made == [ID]


def test_a_claim_that_is_still_going_is_given_up_too() -> None:
    cluster = Cluster(AKS_CLASS)
    nodes(cluster).ensure(request())
    cluster.say(ID, "InsufficientCapacityError", "insufficient capacity")
    cluster.claims[ID]["metadata"]["deletionTimestamp"] = cluster.time
    failed(nodes(cluster).ensure(request()), InsufficientCapacity)


def test_an_event_that_comes_late_is_waited_for() -> None:
    cluster = Cluster(AKS_CLASS)
    karpenter = nodes(cluster)
    karpenter.ensure(request())
    del cluster.claims[ID]
    assert "waiting for the reason" in karpenter.ensure(request()).message
    cluster.now += EVENT_COMES / 2
    cluster.say(ID, "InsufficientCapacityError", "insufficient capacity, with fleet error(s), VcpuLimitExceeded: x")
    failed(karpenter.ensure(request()), QuotaExceeded)
    assert cluster.made == [ID]


def test_without_an_event_its_last_words_count() -> None:
    cluster = Cluster(AKS_CLASS)
    karpenter = nodes(cluster)
    karpenter.ensure(request())
    cluster.launch_failed(ID, "something strange")
    failed(karpenter.ensure(request()), Transient)
    del cluster.claims[ID]  # Karpenter's five minutes are over
    assert karpenter.ensure(request()).phase == "pending"
    cluster.now += EVENT_COMES
    assert "it last said: something strange" in failed(karpenter.ensure(request()), InsufficientCapacity)
    assert cluster.made == [ID]


def test_the_remaining_hole_costs_a_second_claim_and_no_second_machine() -> None:
    """Restarted, and the event lost: nobody can know. The first never had a machine."""
    cluster = Cluster(AKS_CLASS)
    nodes(cluster).ensure(request())
    del cluster.claims[ID]
    assert nodes(cluster).ensure(request()).phase == "pending"
    assert cluster.made == [ID, ID]
    assert len(cluster.claims) == 1


def test_quota_told_by_a_condition_ends_the_wait() -> None:
    cluster = Cluster(azure_node())
    karpenter = nodes(cluster)
    karpenter.ensure(request())
    cluster.launch_failed(ID, "OperationNotAllowed: exceeding approved standardNCSv3Family Cores quota")
    failed(karpenter.ensure(request()), QuotaExceeded)
    failed(karpenter.observe(ID), QuotaExceeded)


# --- node classes


def test_no_claim_is_made_for_a_node_class_that_is_not_ready() -> None:
    sick = node_class("karpenter.k8s.aws/v1", "EC2NodeClass", "gpu", condition("Ready", "False"),
                      condition("SubnetsReady", "False", "SubnetsNotFound", "no subnet"))  # fmt: skip
    cluster = Cluster(sick)
    karpenter = nodes(cluster, KAITO_REGION="us-east-1")
    status = karpenter.ensure(request())
    assert (status.phase, cluster.made) == ("pending", [])
    assert status.message == "the node class EC2NodeClass/gpu is not ready: SubnetsNotFound: no subnet"
    (offer,) = karpenter.offers(Requirements())
    assert offer.retired == status.message
    sick["status"]["conditions"] = [condition("Ready", "True")]
    cluster.now += FRESH
    karpenter.ensure(request())
    assert cluster.made == [ID]


def test_a_claim_that_a_sick_node_class_cost_is_made_again_when_it_is_well() -> None:
    cluster = Cluster(AKS_CLASS)
    karpenter = nodes(cluster)
    karpenter.ensure(request())
    cluster.say(ID, "NodeClassNotReady", "NodeClassRef not ready, x")
    del cluster.claims[ID]
    assert karpenter.ensure(request()).phase == "pending"
    assert cluster.made == [ID, ID]


def test_several_node_classes_need_a_name() -> None:
    cluster = Cluster(AKS_CLASS, EC2_CLASS)
    said = failed(nodes(cluster).ensure(request()), Unsupported)
    assert "AKSNodeClass/default, EC2NodeClass/gpu" in said
    (offer,) = nodes(cluster).offers(Requirements(instance_types=("Standard_NC6s_v3",)))
    assert offer.retired == said
    assert not list(nodes(cluster).offers(Requirements()))
    assert cluster.made == []
    nodes(cluster, KAITO_NODE_CLASS="EC2NodeClass/gpu").ensure(request())
    assert cluster.claims[ID]["spec"]["nodeClassRef"]["kind"] == "EC2NodeClass"


def test_a_machine_that_is_there_needs_no_node_class() -> None:
    cluster = Cluster(AKS_CLASS)
    nodes(cluster).ensure(request())
    del cluster.objects["AKSNodeClass"]
    assert nodes(cluster).ensure(request()).phase == "pending"
    assert cluster.made == [ID]


# --- offers


def test_offers_are_of_the_clusters_cloud_and_region() -> None:
    found = list(nodes(Cluster(AKS_CLASS, azure_node())).offers(Requirements(capacity_types=("on-demand", "spot"))))
    assert {(o.provisioner, o.cloud, o.region) for o in found} == {("karpenter", "azure", "eastus")}
    assert {o.capacity_type for o in found} == {"on-demand", "spot"}
    named = Requirements(instance_types=("standard_nc24ads_a100_v4",))
    (offer,) = nodes(Cluster(AKS_CLASS, azure_node())).offers(named)
    assert offer.instance_type == "Standard_NC24ads_A100_v4"


def test_without_a_region_there_are_no_prices() -> None:
    found = list(nodes(Cluster(EC2_CLASS)).offers(Requirements()))
    assert found
    assert not any(o.price or o.region for o in found)


def test_gpu_provisioner_offers_nothing_but_on_demand() -> None:
    cluster = Cluster(azure_node())
    assert {o.capacity_type for o in nodes(cluster).offers(Requirements(capacity_types=("on-demand", "spot")))} == {"on-demand"}  # fmt: skip
    assert not list(nodes(cluster).offers(Requirements(capacity_types=("spot",))))


def test_without_karpenter_there_is_nothing() -> None:
    karpenter = nodes(Cluster(AKS_CLASS, karpenter=False))
    assert not list(karpenter.offers(Requirements()))
    assert not list(karpenter.held())
    assert karpenter.observe(ID).phase == karpenter.release(ID).phase == "absent"
    alone = KarpenterNodes({})
    assert not list(alone.offers(Requirements()))
    assert alone.release(ID).phase == "absent"
    failed(alone.ensure(request()), Unsupported)


LISTED = """\
# what the simulator has
instance_type,capacity_type,price_per_hour,gpu,gpus,gpu_memory_mib,cpus,memory_gib
Standard_NC24ads_A100_v4,on-demand,3.67,,,,,
big,spot,1.5,A100 80GB,8,80000,96,1000
cpu,,,,,,4,16
"""


def listed(text: str) -> Object:
    metadata = {"name": "machines", "namespace": "kaito", "creationTimestamp": "2026-11-24T00:00:00Z"}
    return {"kind": "ConfigMap", "metadata": metadata, "data": {"offers.csv": text}}


KWOK_CLASS = node_class("karpenter.kwok.sh/v1alpha1", "KWOKNodeClass", "default")


def test_a_config_map_lists_the_machines_of_an_unknown_cloud() -> None:
    karpenter = nodes(Cluster(KWOK_CLASS, listed(LISTED)), KAITO_KARPENTER_OFFERS="kaito/machines")
    a100, big, cpu = karpenter.offers(Requirements(capacity_types=("on-demand", "spot")))
    assert (a100.gpu, a100.cpus) == (catalogue.instance_types()["standard_nc24ads_a100_v4"].gpu, 24)
    assert a100.price is not None
    assert (a100.price.per_hour, a100.price.source, a100.price.date) == (3.67, "ConfigMap kaito/machines", "2026-11-24")
    assert (big.gpus, big.gpu.memory if big.gpu else 0, big.capacity_type) == (8, 80000 << 20, "spot")
    assert (cpu.gpu, cpu.gpus, cpu.price) == (None, 0, None)
    assert not list(nodes(Cluster(KWOK_CLASS)).offers(Requirements()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,price\nx,1\n", "needs the columns"),
        ("instance_type\nnever-heard-of\n", "row 1: never-heard-of is in no catalogue"),
        ("instance_type,cpus\nx,many\n", "row 1"),
        ("instance_type,capacity_type\nx,reserved\n", "on-demand or spot"),
    ],
)
def test_a_list_with_a_mistake_is_said_where(text: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    karpenter = nodes(Cluster(KWOK_CLASS, listed(text)), KAITO_KARPENTER_OFFERS="kaito/machines")
    assert not list(karpenter.offers(Requirements()))
    assert words in caplog.text


# --- what the API server says no with


class Behind(Cluster):
    """The host's cache has not heard yet of what was made."""

    def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] | None = None, *, fresh: bool = False
    ) -> Iterable[Object]:
        stale = kind == NODE_CLAIMS and not fresh
        return [] if stale else super().list(kind, namespace, labels)


def test_nothing_is_called_gone_on_the_word_of_a_cache() -> None:
    cluster = Behind(AKS_CLASS)
    nodes(cluster).ensure(request())
    assert cluster.made == [ID]
    assert [h.request_id for h in nodes(cluster).held()] == [ID]
    assert nodes(cluster).release(ID).phase == "releasing"
    cluster.claims.clear()
    assert nodes(cluster).release(ID).phase == "absent"


class Refusing(Cluster):
    """Refuses to write."""

    def __init__(self, error: ApiError, *objects: Object) -> None:
        super().__init__(*objects)
        self.error = error

    def apply(self, kind: Kind, obj: Mapping[str, Any]) -> Object:
        raise self.error

    def delete(self, kind: Kind, name: str, namespace: str = "") -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Forbidden("may not create nodeclaims", status=403), NotAuthorized),
        (Invalid("spec is immutable", status=422), Unsupported),
        (TooManyRequests("wait", retry_after=7), Transient),
        (Unreachable("no answer"), Transient),
        (ApiError("boom", status=500), Transient),
    ],
)
def test_a_refusal_has_a_type(error: ApiError, kind: type[ProvisioningError]) -> None:
    karpenter = nodes(Refusing(error, AKS_CLASS))
    status = karpenter.ensure(request())
    failed(status, kind)
    if isinstance(status.failure, Transient) and isinstance(error, TooManyRequests):
        assert status.failure.retry_after == 7


def test_a_question_that_fails_costs_nobody_else_his_offers() -> None:
    class Silent(Cluster):
        def list(
            self, kind: Kind, namespace: str = "", labels: Mapping[str, str] | None = None, *, fresh: bool = False
        ) -> Iterable[Object]:
            raise Unreachable("no answer")

    karpenter = nodes(Silent())
    assert not list(karpenter.offers(Requirements()))
    with pytest.raises(Transient):
        karpenter.release(ID)
    with pytest.raises(Transient):
        list(karpenter.held())


def test_the_double_knows_what_it_does_not_serve() -> None:
    with pytest.raises(NotFound):
        Cluster().list(Kind("x/v1", "X", "xes"))


def test_alternatives_go_into_one_claim() -> None:
    cluster = Cluster(AKS_CLASS)
    nodes(cluster).ensure(request(NC6S, NC24ADS, Offer("x", 1, 1)))
    types = cluster.claims[ID]["spec"]["requirements"][0]["values"]
    assert types == [NC6S.instance_type, NC24ADS.instance_type]
