"""The provisioner with Microsoft's own packages, over HTTP, against a server that fails in every way that Azure does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from azure.core.exceptions import ClientAuthenticationError
from azure.core.pipeline.policies import SansIOHTTPPolicy

from kaito_core.api.labels import WORKSPACE
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
from kaito_provisioner_aks import arm, market, provisioner, settings
from kaito_provisioner_aks.arm import Arm
from kaito_provisioner_aks.provisioner import AksNodes
from kaito_provisioner_aks.testing import arm_server
from kaito_provisioner_aks.testing.arm_server import ArmServer

from .world import ID, SIZE, TAGS, Nodes, request


class World:
    """Azure, a cluster, and the provisioner between them."""

    def __init__(self, azure: ArmServer, nodes: Nodes) -> None:
        self.azure, self.cloud, self.nodes = azure, azure.cloud, nodes
        self.ahead = 0.0
        self.aks = self.again()

    def again(self) -> AksNodes:
        """The provisioner of a controller that was started anew."""
        made = AksNodes(self.azure.environment, clock=lambda: time.time() + self.ahead)
        made.attach(self.nodes)
        self.aks = made
        return made

    def until(self, phase: str, look: Callable[[], NodeStatus] | None = None) -> NodeStatus:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            status = (look or (lambda: self.aks.ensure(request())))()
            if status.phase == phase:
                return status
            time.sleep(0.02)
        raise AssertionError(f"{status.phase}, not {phase}: {status.message}")


@pytest.fixture
def world() -> Iterator[World]:
    nodes = Nodes()
    with ArmServer(page=2, on_created=nodes.join, on_deleted=nodes.leave) as azure:
        yield World(azure, nodes)


# --- the whole life


def test_from_nothing_to_nodes_and_back(world: World) -> None:
    assert world.aks.observe(ID).phase == "absent"
    assert world.aks.release(ID).phase == "absent"
    began = time.monotonic()
    status = world.aks.ensure(request(count=2, labels={"app": "tune"}))
    assert status.phase == "pending"
    assert time.monotonic() - began < 5, "it does not wait"
    ready = world.until("ready", lambda: world.aks.ensure(request(count=2, labels={"app": "tune"})))
    assert ready.nodes == (f"aks-{ID}-10000000-vmss000000", f"aks-{ID}-10000000-vmss000001")
    assert ready.selector == {"kubernetes.azure.com/agentpool": ID}
    assert world.aks.observe(ID) == ready
    node = world.nodes.objects[ready.nodes[0]]["metadata"]["labels"]
    assert node.items() >= {"app": "tune", **TAGS}.items()
    assert [(h.request_id, h.tags) for h in world.aks.held()] == [(ID, TAGS)]
    assert all(0 <= h.age < 60 for h in world.aks.held())
    assert world.aks.release(ID).phase == "releasing"
    world.until("absent", lambda: world.aks.release(ID))
    assert world.aks.observe(ID).phase == "absent"
    assert not list(world.aks.held())
    assert not world.nodes.objects
    assert world.cloud.created == [ID]


def come_back(world: World, ready: str = "Unknown", seconds: float = 300.0) -> str:
    """The pool is deleted; a kubelet that was still alive registers its Node once more, and dies. The Node's name."""
    name = world.until("ready").nodes[0]
    node = world.nodes.objects[name]
    world.until("absent", lambda: world.aks.release(ID))
    since = datetime.fromtimestamp(time.time() - seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    node["metadata"]["creationTimestamp"] = since
    node["status"]["conditions"] = [{"type": "Ready", "status": ready, "lastTransitionTime": since}]
    world.nodes.objects[name] = node
    return name


@pytest.mark.parametrize("ready", ["Unknown", "False"])
def test_a_node_that_came_back_after_its_pool_is_held_until_it_is_released(world: World, ready: str) -> None:
    """The sweep asks what is held, and releases what no Workspace wants."""
    name = come_back(world, ready)
    [held] = world.aks.held()
    assert (held.request_id, held.tags) == (ID, TAGS)
    assert 299 <= held.age < 360
    assert name in world.nodes.objects
    assert world.aks.release(ID).phase == "absent"
    assert name not in world.nodes.objects
    assert not list(world.aks.held())


def test_a_node_whose_kubelet_never_said_anything_is_held_from_its_creation(world: World) -> None:
    name = come_back(world)
    world.nodes.objects[name]["status"] = {}
    assert 299 <= next(iter(world.aks.held())).age < 360


def test_a_left_node_that_works_or_is_not_ours_is_not_touched(world: World) -> None:
    name = come_back(world, "True")
    assert not list(world.aks.held())
    assert world.aks.release(ID).phase == "absent"
    assert name in world.nodes.objects
    node = world.nodes.objects[name]
    node["status"]["conditions"][0]["status"] = "Unknown"
    node["metadata"]["labels"]["kaito.sh/managed-by"] = "another-team"
    assert not list(world.aks.held())
    assert world.aks.release(ID).phase == "absent"
    assert name in world.nodes.objects


def test_a_left_node_that_may_not_be_deleted_keeps_no_workspace(world: World, caplog: pytest.LogCaptureFixture) -> None:
    come_back(world)
    world.nodes.forbidden = True
    assert world.aks.release(ID).phase == "absent"
    assert "forbidden" in caplog.text


def test_a_pool_that_is_done_waits_for_its_nodes(world: World) -> None:
    world.cloud.on_created = None
    world.aks.ensure(request(count=2))
    time.sleep(0.1)
    assert world.aks.ensure(request(count=2)).message == f"0 of 2 nodes of the agent pool {ID} are ready"
    world.nodes.join(world.cloud.pools[ID])
    late = world.nodes.objects[f"aks-{ID}-10000000-vmss000001"]
    late["status"]["conditions"][0]["status"] = "Unknown"
    words = f"1 of 2 nodes of the agent pool {ID} are ready; aks-{ID}-10000000-vmss000001 is not"
    assert world.aks.ensure(request(count=2)).message == words


def test_spot_machines_that_were_taken_away_are_asked_for_again(world: World) -> None:
    world.until("ready", lambda: world.aks.ensure(request(kind="spot")))
    world.cloud.evict(ID)
    assert world.aks.ensure(request(kind="spot")).phase == "pending"
    world.ahead += provisioner.SHORT
    assert "asked for again" in world.aks.ensure(request(kind="spot")).message
    world.until("ready", lambda: world.aks.ensure(request(kind="spot")))
    assert world.cloud.created == [ID]


def test_a_deleted_pool_is_not_made_again_before_it_is_gone(world: World) -> None:
    world.until("ready")
    world.cloud.delete_seconds = 0.3
    world.aks.release(ID)
    assert world.aks.ensure(request()).phase == "releasing"
    assert world.aks.observe(ID).phase == "releasing"
    assert world.cloud.created == [ID]


# --- what goes wrong at the request

REFUSED: list[tuple[str, type[ProvisioningError], str]] = [
    ("quota", QuotaExceeded, "Insufficient vcpu quota requested 24, remaining 6"),
    ("regional-quota", QuotaExceeded, "Insufficient regional vcpu quota"),
    ("spot-quota", QuotaExceeded, "LowPriorityCores quota"),
    ("preflight", QuotaExceeded, "InvalidTemplateDeployment"),
    ("size", Unsupported, "is not allowed in your subscription"),
    ("zone", Unsupported, "The zone(s) '1'"),
    ("sku", InsufficientCapacity, "Following SKUs have failed for Capacity Restrictions"),
    ("parameter", Unsupported, "agentPoolProfile.name is invalid"),
    ("policy", Unsupported, "disallowed by policy"),
    ("busy", Transient, "Another operation (Updating) is in progress"),
    ("throttled", Transient, "please retry again in 17 seconds"),
    ("arm-throttled", Transient, "Number of requests exceeded"),
    ("authorization", NotAuthorized, "does not have authorization to perform action"),
    ("expired", Transient, "token expiry"),
    ("no-cluster", Unsupported, "managedClusters/kaito-test' under resource group"),
    ("error", Transient, "An internal server error"),
    ("unavailable", Transient, ""),
    ("cut", Transient, "Azure does not answer"),
]


@pytest.mark.parametrize(("kind", "failure", "words"), REFUSED)
def test_what_azure_refuses(world: World, kind: str, failure: type[ProvisioningError], words: str) -> None:
    world.cloud.fail("put", kind)
    with pytest.raises(ProvisioningError) as caught:
        world.aks.ensure(request())
    assert type(caught.value) is failure
    assert words in str(caught.value)
    assert [c[0] for c in world.cloud.calls].count("put") == 1, "a request is made once"
    assert not world.cloud.created
    world.until("ready")


@pytest.mark.parametrize("call", ["get", "delete"])
@pytest.mark.parametrize(
    "kind", ["busy", "throttled", "authorization", "expired", "error", "unavailable", "cut", "no-cluster"]
)
def test_a_release_that_is_refused_is_not_a_release(world: World, call: str, kind: str) -> None:
    world.until("ready")
    world.cloud.fail(call, kind)
    with pytest.raises(ProvisioningError):
        world.aks.release(ID)
    world.until("absent", lambda: world.aks.release(ID))
    assert not world.cloud.pools


def test_the_wait_that_azure_asks_for_is_passed_on_and_not_sat_out(world: World) -> None:
    world.cloud.fail("put", "throttled")
    began = time.monotonic()
    with pytest.raises(Transient) as caught:
        world.aks.ensure(request())
    assert caught.value.retry_after == 17
    assert time.monotonic() - began < 5


def test_an_answer_that_is_lost_buys_nothing_twice(world: World) -> None:
    world.cloud.fail("put", "lost")
    with pytest.raises(Transient):
        world.aks.ensure(request())
    world.again()
    world.until("ready")
    assert world.cloud.created == [ID]


def test_a_look_that_is_late_buys_nothing_twice(world: World) -> None:
    world.cloud.create_seconds = 0.5
    world.aks.ensure(request())
    world.cloud.fail("get", "stale")
    assert world.aks.ensure(request()).phase == "pending"
    assert world.cloud.calls[-2][:1] + world.cloud.calls[-2][2:] == ("put", 412)
    world.cloud.fail("get", "stale", times=2)
    with pytest.raises(Transient):
        world.aks.ensure(request())
    world.until("ready")
    assert world.cloud.created == [ID]


def test_a_call_that_hangs_is_given_up(world: World) -> None:
    given, _ = settings.read(world.azure.environment)
    assert given is not None
    aks = AksNodes(world.azure.environment, edge=Arm(given, read_seconds=0.3))
    world.cloud.fail("put", "hang", seconds=1.0)
    began = time.monotonic()
    with pytest.raises(Transient, match="Azure does not answer"):
        aks.ensure(request())
    assert time.monotonic() - began < 0.9
    time.sleep(1.0)
    world.until("ready")
    assert world.cloud.created == [ID]


def test_azure_that_is_away_is_transient() -> None:
    aks = AksNodes({**ArmServerEnvironment, "KAITO_ARM_ENDPOINT": "http://127.0.0.1:9"})
    for call in (
        lambda: aks.ensure(request()),
        lambda: aks.observe(ID),
        lambda: aks.release(ID),
        lambda: list(aks.held()),
    ):
        with pytest.raises(Transient, match="Azure does not answer"):
            call()


ArmServerEnvironment = {
    "KAITO_AKS_SUBSCRIPTION": arm_server.SUBSCRIPTION,
    "KAITO_AKS_RESOURCE_GROUP": arm_server.GROUP,
    "KAITO_AKS_CLUSTER": arm_server.CLUSTER,
}


def test_a_wrong_token_is_not_authorized(world: World) -> None:
    aks = AksNodes({**world.azure.environment, "KAITO_ARM_TOKEN": "wrong"})
    with pytest.raises(NotAuthorized, match="InvalidAuthenticationToken"):
        aks.ensure(request())


def test_no_credentials_are_not_the_same_as_none_just_now(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_order = True

    class Tokens(SansIOHTTPPolicy[Any, Any]):
        def on_request(self, request: Any) -> None:
            if out_of_order:
                raise ClientAuthenticationError("no token\n\tfrom anybody")
            request.http_request.headers["Authorization"] = f"Bearer {arm_server.TOKEN}"

    given = arm._static
    monkeypatch.setattr(arm, "_static", lambda s: {**given(s), "authentication_policy": Tokens()})
    with pytest.raises(NotAuthorized, match="no token from anybody"):
        world.aks.observe(ID)
    out_of_order = False
    world.aks.observe(ID)
    out_of_order = True
    with pytest.raises(Transient, match="no token from anybody"):
        world.aks.observe(ID)


# --- what fails later


@pytest.mark.parametrize(("code", "failure"), [
    ("AllocationFailed", InsufficientCapacity), ("ZonalAllocationFailed", InsufficientCapacity),
    ("OverconstrainedAllocationRequest", InsufficientCapacity), ("SkuNotAvailable", InsufficientCapacity),
    ("QuotaExceeded", QuotaExceeded), ("VMExtensionProvisioningError", Unsupported), ("NodesNotReady", Unsupported),
    ("LinkedAuthorizationFailed", NotAuthorized), ("SomethingNew", Unsupported),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["broken", "silent"])
def test_a_pool_that_fails_says_so_until_it_is_released(
    world: World, code: str, failure: type[ProvisioningError], kind: str
) -> None:
    world.cloud.fail("put", kind, code=code, message="in Azure's words")
    world.aks.ensure(request())
    status = world.until("failed")
    assert type(status.failure) is failure
    assert "in Azure's words" in status.message
    assert world.aks.ensure(request()).phase == "failed"
    assert world.aks.observe(ID).phase == "failed"
    assert [h.request_id for h in world.aks.held()] == [ID]
    world.until("absent", lambda: world.aks.release(ID))
    assert world.cloud.created == [ID]


def test_a_new_controller_does_not_know_what_only_the_operation_said(world: World) -> None:
    world.cloud.fail("put", "silent")
    world.aks.ensure(request())
    time.sleep(0.1)
    status = world.again().ensure(request())
    assert (status.phase, status.message) == ("failed", "the agent pool failed, and Azure does not say why")


def test_what_failed_in_passing_is_made_whole(world: World) -> None:
    world.cloud.fail("put", "broken", code="AKSOperationPreempted", message="by another operation")
    world.aks.ensure(request())
    status = world.until("ready")
    assert status.nodes
    assert world.cloud.created == [ID]
    assert [c for c in world.cloud.calls if c[0] == "put"] == [("put", ID, 201), ("put", ID, 200)]


def test_a_pool_that_never_leaves_creating_can_be_given_back(world: World) -> None:
    world.cloud.fail("put", "stuck")
    world.aks.ensure(request())
    assert world.aks.ensure(request()).message == f"the agent pool {ID} ({SIZE}) is Creating"
    world.until("absent", lambda: world.aks.release(ID))


# --- other people's pools


def test_a_pool_of_somebody_else_is_neither_used_nor_deleted(world: World) -> None:
    world.until("ready")
    with pytest.raises(Unsupported, match="it is not of this Workspace"):
        world.aks.ensure(request(workspace="other"))
    for pool in world.cloud._pools.values():
        pool.properties |= {"nodeLabels": {WORKSPACE: "phi"}, "tags": {}}
    with pytest.raises(Unsupported, match="it is not of this Workspace"):
        world.aks.ensure(request())
    assert world.aks.release(ID).phase == "absent"
    assert not list(world.aks.held())
    assert world.cloud.pools


def test_a_pool_with_other_machines_is_not_taken_for_the_right_one(world: World) -> None:
    world.until("ready")
    with pytest.raises(Unsupported, match=f"with machines of the type {SIZE}"):
        world.aks.ensure(request(size="Standard_NC4as_T4_v3"))


def test_a_name_that_no_pool_can_have(world: World) -> None:
    with pytest.raises(Unsupported, match="must match regex pattern"):
        world.aks.ensure(request("Not-a-pool"))
    assert world.aks.observe("Not-a-pool").phase == "absent"
    assert world.aks.release("Not-a-pool").phase == "absent"
    assert not world.cloud.calls


# --- what is offered


def offers(world: World, **requirements: Any) -> dict[tuple[str, str], Offer]:
    return {(o.instance_type, o.capacity_type): o for o in world.aks.offers(Requirements(**requirements))}


def test_offers(world: World) -> None:
    found = offers(world)
    offer = found[SIZE, "on-demand"]
    assert (offer.provisioner, offer.region, offer.gpus, offer.retired) == ("aks", "eastus", 1, "")
    assert offer.price is not None
    both = offers(world, instance_types=(SIZE.lower(),), capacity_types=("on-demand", "spot"))
    assert set(both) == {(SIZE, "on-demand"), (SIZE, "spot")}
    assert not offers(world, regions=("westus",))
    assert offers(world, regions=("East US",)).keys() == found.keys()
    assert [c[0] for c in world.cloud.calls].count("cluster") == 1
    assert {c[0] for c in world.cloud.calls} == {"cluster", "usages", "skus", "list"}


@pytest.mark.parametrize(("limits", "count", "reason"), [
    ({"StandardNCADSA100v4Family": 0}, 1, "quota: 0 of 24 vCPUs of StandardNCADSA100v4Family are left in eastus"),
    ({"StandardNCADSA100v4Family": 30}, 2, "quota: 30 of 48 vCPUs of StandardNCADSA100v4Family are left in eastus"),
    ({"cores": 10}, 1, "quota: 10 of 24 vCPUs of all families together are left in eastus"),
    ({"lowPriorityCores": 0, "StandardNCADSA100v4Family": 24}, 1, ""),
])  # fmt: skip
def test_what_a_quota_forbids_is_marked(world: World, limits: dict[str, int], count: int, reason: str) -> None:
    world.cloud.limits = limits
    assert offers(world, count=count)[SIZE, "on-demand"].retired == reason


def test_spot_machines_have_a_quota_of_their_own(world: World) -> None:
    world.cloud.limits = {"lowPriorityCores": 0}
    found = offers(world, instance_types=(SIZE,), capacity_types=("on-demand", "spot"))
    assert found[SIZE, "on-demand"].retired == ""
    assert found[SIZE, "spot"].retired == "quota: 0 of 24 vCPUs of spot machines are left in eastus"


def test_what_a_subscription_may_not_have_is_marked(world: World) -> None:
    world.cloud.restrictions = {
        SIZE: [{"type": "Location", "values": ["eastus"], "reasonCode": "NotAvailableForSubscription"}],
        "Standard_NC4as_T4_v3": [
            {"type": "Zone", "values": ["eastus"], "restrictionInfo": {"zones": ["1"]}, "reasonCode": "QuotaId"}
        ],
    }
    found = offers(world)
    words = f"this subscription may not have {SIZE} in eastus (NotAvailableForSubscription)"
    assert found[SIZE, "on-demand"].retired == words
    assert found["Standard_NC4as_T4_v3", "on-demand"].retired == ""


def test_what_somebody_waits_for_does_not_forbid_itself(world: World) -> None:
    world.cloud.limits = {"StandardNCADSA100v4Family": 24}
    world.until("ready")
    assert offers(world)[SIZE, "on-demand"].retired == ""
    assert "quota" in offers(world)["Standard_NC48ads_A100_v4", "on-demand"].retired


def test_quotas_are_looked_at_more_often_than_sizes(world: World) -> None:
    now = 0.0
    given, _ = settings.read(world.azure.environment)
    assert given is not None
    watch = market.Watch(Arm(given), clock=lambda: now)
    world.cloud.page = 100
    for at in (0.0, 1.0, market.KEPT, market.KEPT_SIZES):
        now = at
        watch("eastus")
    assert [c[0] for c in world.cloud.calls] == ["usages", "skus", "list", "usages", "list", "usages", "skus", "list"]


@pytest.mark.parametrize("call", ["usages", "skus", "list"])
def test_without_quotas_everything_is_offered(world: World, call: str) -> None:
    world.cloud.limits = {"cores": 0}
    world.cloud.fail(call, "authorization", times=0)
    assert offers(world)[SIZE, "on-demand"].retired == ""


def test_where_the_cluster_is_may_be_known_from_its_nodes(world: World) -> None:
    world.cloud.fail("cluster", "error", times=0)
    assert "Azure does not say where the AKS cluster kaito-test is" in offers(world)[SIZE, "on-demand"].retired
    world.until("ready")
    assert offers(world)[SIZE, "on-demand"].retired == ""
    assert offers(world)[SIZE, "on-demand"].region == "eastus"


def test_labels_that_cannot_be_given_are_said_in_the_plan(world: World) -> None:
    found = offers(world, labels={"kubernetes.azure.com/x": "y"})
    assert "AKS does not let an agent pool have the label" in found[SIZE, "on-demand"].retired


def test_a_cluster_that_is_not_of_aks() -> None:
    aks = AksNodes({})
    assert not list(aks.offers(Requirements()))
    assert not list(aks.offers(Requirements(instance_types=("g5.xlarge",))))
    [named] = aks.offers(Requirements(instance_types=(SIZE,)))
    assert "set KAITO_AKS_SUBSCRIPTION and KAITO_AKS_RESOURCE_GROUP and KAITO_AKS_CLUSTER" in named.retired
    assert not list(aks.held())
    with pytest.raises(Unsupported, match="set KAITO_AKS_SUBSCRIPTION"):
        aks.ensure(request())


@pytest.mark.parametrize(("environ", "words"), [
    ({"KAITO_AKS_GPU_DRIVER": "install"}, "KAITO_AKS_GPU_DRIVER is 'install': set it to Install or None"),
    ({"KAITO_AKS_OS_DISK_GB": "12"}, "KAITO_AKS_OS_DISK_GB is '12'"),
    ({"KAITO_AKS_OS_DISK_GB": "much"}, "KAITO_AKS_OS_DISK_GB is 'much'"),
    ({"KAITO_AKS_CLUSTER": ""}, "set KAITO_AKS_CLUSTER"),
])  # fmt: skip
def test_settings_that_are_wrong(environ: dict[str, str], words: str) -> None:
    given, problem = settings.read({**ArmServerEnvironment, **environ})
    assert given is None
    assert words in problem


def test_settings_under_the_names_of_others() -> None:
    given, _ = settings.read({
        "ARM_SUBSCRIPTION_ID": "s", "ARM_RESOURCE_GROUP": "g", "AZURE_CLUSTER_NAME": "c", "LOCATION": "East US",
    })  # fmt: skip
    assert given == settings.Settings("s", "g", "c", "eastus")
