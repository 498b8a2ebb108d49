"""What claims, nodes and events are taken to say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from karpenter_double import condition, node_class

from kaito_core.plugins.types import (
    InsufficientCapacity,
    NotAuthorized,
    ProvisioningError,
    QuotaExceeded,
    Transient,
    Unsupported,
)
from kaito_provisioner_karpenter.failures import failure_of
from kaito_provisioner_karpenter.flavours import (
    AWS,
    AZURE,
    GPU_PROVISIONER,
    NodeClass,
    other_flavours,
    pick,
    read_node_class,
)
from kaito_provisioner_karpenter.reading import evidence, gone_without_word, read_claim

NOW = 1_800_000_000.0
FAMILY = ("Operation could not be completed as it results in exceeding approved standardDASv5Family Cores quota. "
          "Additional details - Deployment Model: Resource Manager, Location: eastus, Current Limit: 100")  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "message", "kind"),
    [
        ("", "creating instance, insufficient capacity, with fleet error(s), InsufficientInstanceCapacity: We currently do not have sufficient m7g.8xlarge capacity in the Availability Zone you requested (eu-west-1c).", InsufficientCapacity),
        ("", "insufficient capacity, all requested instance types were unavailable during launch", InsufficientCapacity),
        ("", "insufficient capacity, with fleet error(s), VcpuLimitExceeded: You have requested more vCPU capacity than your current vCPU limit of 64 allows for the instance bucket", QuotaExceeded),
        ("", "insufficient capacity, with fleet error(s), MaxSpotInstanceCountExceeded: Max spot instance count exceeded", QuotaExceeded),
        ("", "insufficient capacity, regional on-demand vCPU quota limit for subscription has been reached.", QuotaExceeded),
        ("", "insufficient capacity, with fleet error(s), UnfulfillableCapacity: Unable to fulfill capacity", InsufficientCapacity),
        ("SubscriptionQuotaReached", "creating nodeclaim, creating instance failed, ...", QuotaExceeded),
        ("ZonalAllocationFailure", "creating nodeclaim, creating instance failed", InsufficientCapacity),
        ("OverconstrainedZonalAllocationFailure", "creating instance failed", InsufficientCapacity),
        ("SKUNotAvailable", "the requested SKU", InsufficientCapacity),
        ("LaunchFailed", f'creating instance, agentPool.BeginCreateOrUpdate for "x" failed: OperationNotAllowed {FAMILY}', QuotaExceeded),
        ("LaunchFailed", "ErrCode_InsufficientVCPUQuota: Insufficient vcpu quota requested 24, remaining 6 for family x", QuotaExceeded),
        ("LaunchFailed", "AllocationFailed: Allocation failed. We do not have sufficient capacity for the requested VM size in this region.", InsufficientCapacity),
        ("LaunchFailed", "OperationNotAllowed: Operation is not allowed: Another operation (Updating) is in progress", Transient),
        ("LaunchFailed", "AuthorizationFailed: The client 'x' does not have authorization to perform action 'y'", NotAuthorized),
        ("Unauthorized", "UnauthorizedOperation: You are not authorized to perform this operation", NotAuthorized),
        ("RequestLimitExceeded", "RequestLimitExceeded: Request limit exceeded.", Transient),
        ("LaunchFailed", "Throttled: The PutManagedClusterHandler.PUT request limit has been exceeded for SubID='x'", Transient),
        ("LaunchFailed", "The VM size of Standard_D2_v2 is not allowed in your subscription in location 'eastus'.", Unsupported),
        ("LaunchFailed", "agentpool name(x) is invalid, must match regex pattern: ^[a-z][a-z0-9]{0,11}$", Unsupported),
        ("LaunchFailed", "translating nodeclaim to node, instance type not found (instance-type=no-such-type)", Unsupported),
        ("NodeClassReadinessUnknown", "", Transient),
        ("LaunchFailed", "something that nobody has seen before", Transient),
    ],
)  # fmt: skip
def test_words_become_types(reason: str, message: str, kind: type[ProvisioningError]) -> None:
    failure = failure_of(reason, message)
    assert type(failure) is kind
    assert message in str(failure)


@given(st.text(max_size=20), st.text(max_size=300))
def test_any_words_are_some_failure(reason: str, message: str) -> None:
    assert isinstance(failure_of(reason, message), ProvisioningError)


def claim(*conditions: dict[str, Any], node: str = "", gpus: str = "1", **metadata: str) -> dict[str, Any]:
    return {
        "metadata": {"name": "c", "annotations": {"kaito.sh/gpus": gpus}, "creationTimestamp": "2027-01-15T08:00:00Z", **metadata},
        "status": {"conditions": list(conditions), **({"nodeName": node} if node else {})},
    }  # fmt: skip


def node(ready: str = "True", gpus: int = 1, **metadata: str) -> dict[str, Any]:
    allocatable = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    return {"metadata": {"name": "n", **metadata}, "status": {"conditions": [condition("Ready", ready)], "allocatable": allocatable}}  # fmt: skip


LAUNCHED, REGISTERED, INITIALIZED = (condition(k, "True") for k in ("Launched", "Registered", "Initialized"))
DONE = (LAUNCHED, REGISTERED, INITIALIZED)


@pytest.mark.parametrize(
    ("made", "there", "phase", "words"),
    [
        (claim(condition("Launched", "Unknown", "AwaitingReconciliation", "object is awaiting reconciliation")), None, "pending", "waiting for Karpenter"),
        (claim(), None, "pending", "no controller has looked"),
        (claim(condition("Launched", "Unknown", "LaunchFailed", "some network error")), None, "failed", "some network error"),
        (claim(LAUNCHED, condition("Registered", "Unknown", "NodeNotFound")), None, "pending", "is launched; its node has not joined"),
        (claim(LAUNCHED, condition("Registered", "False", "MultipleNodesFound", "Invariant violated")), None, "pending", "Invariant violated"),
        (claim(LAUNCHED, REGISTERED, condition("Initialized", "Unknown", "ResourceNotRegistered", 'Resource "nvidia.com/gpu" was requested but not registered'), node="n"), node(gpus=0), "pending", "device plugin"),
        (claim(LAUNCHED, REGISTERED, condition("Initialized", "Unknown", "NodeNotReady", "Node status is NotReady"), node="n"), node("False"), "pending", "NotReady"),
        (claim(*DONE, node="n"), None, "pending", "not seen yet"),
        (claim(*DONE, node="n"), node("False"), "pending", "not ready"),
        (claim(*DONE, node="n"), node(gpus=0), "pending", "0 of 1 GPUs"),
        (claim(*DONE, node="n"), node(deletionTimestamp="2027-01-15T08:00:00Z"), "pending", "being taken away"),
        (claim(*DONE, node="n"), node(), "ready", ""),
        (claim(*DONE, node="n", gpus="0"), node(gpus=0), "ready", ""),
        (claim(*DONE, condition("Drained", "Unknown", "Draining"), node="n", deletionTimestamp="2027-01-15T08:00:00Z"), node(), "leaving", "Draining"),
    ],
)  # fmt: skip
def test_a_claim_says_how_far_it_is(made: dict[str, Any], there: dict[str, Any] | None, phase: str, words: str) -> None:
    reading = read_claim(made, there, NOW + 120)
    assert reading.phase == phase
    assert words in reading.message
    assert (reading.failure is not None) == (phase == "failed")


conditions = st.lists(
    st.builds(
        condition,
        st.sampled_from(["Launched", "Registered", "Initialized", "Ready", "Drained"]),
        st.sampled_from(["True", "False", "Unknown"]),
        st.sampled_from(["", "LaunchFailed", "NodeNotFound", "AwaitingReconciliation"]),
        st.text(max_size=10),
    ),
    max_size=6,
)


@given(conditions, st.none() | st.builds(node, st.sampled_from(["True", "False"]), st.integers(0, 2)))
def test_only_a_node_that_can_be_used_is_ready(found: list[dict[str, Any]], there: dict[str, Any] | None) -> None:
    reading = read_claim(claim(*found, node="n"), there, NOW)
    assert (reading.failure is None) == (reading.phase != "failed")
    assert reading.message or reading.phase == "ready"
    if reading.phase == "ready":
        last = {c["type"]: c["status"] for c in found}
        assert last["Launched"] == last["Registered"] == last["Initialized"] == "True"
        assert there is not None
        assert there["status"]["allocatable"]


def event(name: str, reason: str, message: str, kind: str = "NodeClaim") -> dict[str, Any]:
    return {"involvedObject": {"kind": kind, "name": name}, "reason": reason, "message": message}


def test_the_event_that_tells_most_counts() -> None:
    events = [
        event("c", "Launched", "Status condition transitioned"),
        event("c", "InsufficientCapacityError", "NodeClaim c event: insufficient capacity, all requested instance types were unavailable during launch"),
        event("c", "InsufficientCapacityError", "NodeClaim c event: insufficient capacity, regional vCPU quota limit for subscription has been reached."),
        event("other", "InsufficientCapacityError", "AuthorizationFailed"),
        {"involvedObject": {"kind": "NodeClaim"}, "reason": "Finalized", "message": "Finalized karpenter.sh/termination"},
    ]  # fmt: skip
    failure = evidence(events, "c")
    assert isinstance(failure, QuotaExceeded)
    assert str(failure).startswith("insufficient capacity, regional")
    assert evidence(events, "new") is None
    unknown = evidence([event("c", "InsufficientCapacityError", "something new")], "c")
    assert type(unknown) is InsufficientCapacity


def test_a_claim_that_went_silently_is_judged_by_its_last_words() -> None:
    assert type(gone_without_word("LaunchFailed", "AuthorizationFailed: no")) is NotAuthorized
    assert type(gone_without_word("LaunchFailed", "a strange thing")) is InsufficientCapacity
    assert "a strange thing" in str(gone_without_word("LaunchFailed", "a strange thing"))
    assert "no event says why" in str(gone_without_word("", ""))


# --- node classes


def test_the_only_node_class_is_taken_and_of_several_one_must_be_named() -> None:
    default, gpu, ec2 = NodeClass(AZURE, "default"), NodeClass(AZURE, "gpu"), NodeClass(AWS, "gpu")
    assert pick([default]) == default
    assert pick([default, gpu], "gpu") == gpu
    assert pick([default, gpu, ec2], "EC2NodeClass/gpu") == ec2
    assert pick([default, ec2], "EC2NodeClass") == ec2
    assert pick([default], "KaitoNodeClass").flavour is GPU_PROVISIONER
    assert pick([], azure_nodes=True).flavour is GPU_PROVISIONER
    with pytest.raises(Unsupported, match="AKSNodeClass/default, AKSNodeClass/gpu"):
        pick([default, gpu])
    with pytest.raises(Unsupported, match="no node class other"):
        pick([default], "other")
    with pytest.raises(Unsupported, match="has no node class"):
        pick([])


def test_a_node_class_that_is_not_ready_says_why() -> None:
    well = node_class("v1", "EC2NodeClass", "gpu", condition("Ready", "True"))
    assert read_node_class(AWS, well) == NodeClass(AWS, "gpu")
    assert read_node_class(AWS, node_class("v1", "EC2NodeClass", "gpu")).trouble == ""
    sick = node_class("v1", "EC2NodeClass", "gpu", condition("Ready", "False", "UnhealthyDependents", "SubnetsReady=False"),
                      condition("SubnetsReady", "False", "SubnetsNotFound", "SubnetSelector did not match any Subnets"))  # fmt: skip
    assert read_node_class(AWS, sick).trouble == "SubnetsNotFound: SubnetSelector did not match any Subnets"


def test_node_classes_of_other_clouds_are_found_by_their_definitions() -> None:
    def crd(group: str, kind: str, scope: str = "Cluster") -> dict[str, Any]:
        versions = [
            {"name": "v1alpha1", "served": True, "storage": False},
            {"name": "v1", "served": True, "storage": True},
        ]
        return {"spec": {"group": group, "scope": scope, "versions": versions, "names": {"kind": kind, "plural": kind.lower() + "es"}}}  # fmt: skip

    (gce, eks) = other_flavours([crd("karpenter.k8s.gcp", "GCENodeClass"), crd("eks.amazonaws.com", "NodeClass"),
                                 crd("karpenter.k8s.aws", "EC2NodeClass"), crd("apps.x", "Widget"), crd("y", "ANodeClass", "Namespaced")])  # fmt: skip
    assert (gce.node_class.api_version, gce.node_class.plural, gce.cloud) == (
        "karpenter.k8s.gcp/v1",
        "gcenodeclasses",
        "",
    )
    assert eks.cloud == "aws"
