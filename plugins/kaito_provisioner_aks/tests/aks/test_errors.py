"""Every row of what Azure is known to say no with, in the forms in which it says it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.plugins.types import (
    InsufficientCapacity,
    NotAuthorized,
    ProvisioningError,
    QuotaExceeded,
    Transient,
    Unsupported,
)
from kaito_provisioner_aks.errors import SHOWN, Kind, Refused, Said, failure_of, kind_of, read_error

PENDING = "please wait for it to finish before starting a new operation. See https://aka.ms/aks-pending-operation for more details"
QUOTA = (
    "Operation could not be completed as it results in exceeding approved {} quota. Additional details - Deployment Model: "
    "Resource Manager, Location: eastus, Current Limit: 100, Current Usage: 96, Additional Required: 64, (Minimum) New Limit "
    "Required: 160. Submit a request for Quota increase at https://aka.ms/ProdportalCRP"
)
ALLOCATION = "Allocation failed. We do not have sufficient capacity for the requested VM size in this {}. Read more about improving"
TOO_NARROW = (
    "Create or update VMSS failed. Allocation failed. VM(s) with the following constraints cannot be allocated, because the "
    "condition is too restrictive. Constraints applied are: - Differencing (Ephemeral) Disks - VM Size"
)

PUT: list[tuple[int, str, str, Kind, type[ProvisioningError]]] = [
    (400, "ErrCode_InsufficientVCPUQuota", "Insufficient vcpu quota requested 24, remaining 6 for family standardEASv4Family for "
     "region northeurope. If you want to increase the quota, ...", "quota", QuotaExceeded),
    (400, "ErrCode_InsufficientVCPUQuota", "Insufficient regional vcpu quota left for location westus2. left regional vcpu quota 4, "
     "requested quota 6. If you want", "quota", QuotaExceeded),
    (400, "QuotaExceeded", QUOTA.format("LowPriorityCores"), "quota", QuotaExceeded),
    (400, "BadRequest", "The VM size of Standard_D2_v2 is not allowed in your subscription in location 'eastus'. The available VM "
     "sizes are 'standard_b16pls_v2,standard_b2ts_v2'", "unsupported", Unsupported),
    (400, "VMSizeNotSupported", "Virtual Machine size: 'X' is not supported for subscription S in location 'L'. Please refer to "
     "aka.ms/aks/vm-size-selector", "unsupported", Unsupported),
    (400, "BadRequest", "Virtual Machine size: 'X' is not supported for subscription S in location 'L'.", "unsupported", Unsupported),
    (400, "AvailabilityZoneNotSupported", "Preflight validation check for resource(s) failed. Message: The zone(s) '1' for resource "
     "'agentpoolName' is not supported.The supported zones for location 'L' are 'A', 'B'", "unsupported", Unsupported),
    (400, "InvalidParameter", "The value of parameter agentPoolProfile.name is invalid. Please see https://aka.ms/aks-naming-rules "
     "for more details.", "unknown", Unsupported),
    (400, "InvalidParameter", "The value of parameter agentPoolProfile.upgrade.maxSurge is invalid. Error details: Spot pools can't "
     "set max surge.", "unknown", Unsupported),
    (400, "InvalidTemplateDeployment", 'Provisioning of resource(s) for Agent Pool npwin failed. Error: {"code":'
     '"InvalidTemplateDeployment","message":"x","details":[{"code":"QuotaExceeded","message":"y"}]}', "quota", QuotaExceeded),
    (400, "InvalidTemplateDeployment", 'Provisioning of resource(s) for Agent Pool npwin failed. Error: {"details":[{"code":'
     '"SkuNotAvailable","message":"y"}]}', "capacity", InsufficientCapacity),
    (403, "RequestDisallowedByPolicy", "Resource 'p' was disallowed by policy.", "unsupported", Unsupported),
    (401, "ExpiredAuthenticationToken", "The access token expiry UTC time is earlier than now.", "passing", Transient),
    (401, "InvalidAuthenticationToken", "The access token is invalid.", "not-authorized", NotAuthorized),
    (403, "AuthorizationFailed", "The client 'a' with object id 'b' does not have authorization to perform action "
     "'Microsoft.ContainerService/managedClusters/agentPools/write' over scope 's' or the scope is invalid. If access was recently "
     "granted, please refresh your credentials.", "not-authorized", NotAuthorized),
    (403, "SomethingNew", "no", "not-authorized", NotAuthorized),
    (429, "Throttled", "The PutManagedClusterHandler.PUT request limit has been exceeded for SubID='..', please retry again in 17 "
     "seconds.", "throttled", Transient),
    (429, "SubscriptionRequestsThrottled", "Number of requests exceeded.", "throttled", Transient),
    (429, "TooManyRequests", "", "throttled", Transient),
    (404, "ResourceGroupNotFound", "Resource group 'rg' could not be found.", "no-cluster", Unsupported),
    (404, "ResourceNotFound", "The Resource 'Microsoft.ContainerService/managedClusters/c' under resource group 'rg' was not found.",
     "no-cluster", Unsupported),
    (404, "NotFound", "Agent Pool not found", "absent", Unsupported),
    (404, "NotFound", "Could not find the agentpool", "absent", Unsupported),
    (404, "ResourceNotFound", "The Resource 'Microsoft.ContainerService/managedClusters/c/agentPools/p' was not found.", "absent",
     Unsupported),
    # A6: busy, which shares its code with quotas
    (409, "OperationNotAllowed", f"Operation is not allowed: Another operation (Updating) is in progress, {PENDING}", "busy", Transient),
    (400, "OperationNotAllowed", f"Operation is not allowed: Another agentpool operation (p - Creating) is in progress, {PENDING}",
     "busy", Transient),
    (409, "OperationNotAllowed", "Operation is not allowed because there's an in progress create node pool operation", "busy", Transient),
    (409, "OperationNotAllowed", "Managed Cluster operation is not allowed: Another operation (Updating) is in progress on agent pool "
     "(p), please wait", "busy", Transient),
    (409, "OperationNotAllowed", "Unable to perform 'Scaling' operation on 'agentpool' since deletion was issued on 'agentpool'. The "
     "only allowed operation is deletion once deletion has started.", "deleting", Transient),
    (400, "OperationNotAllowed", "managed cluster is in Provisioning State(Succeeded) and Power State(Stopped), ... cannot be "
     "performed", "busy", Transient),
    (409, "OperationNotAllowed", "There has to be at least one agent pool.", "busy", Transient),
    (412, "PreconditionFailed", "Resource not found but ETag header is provided.", "changed", Transient),
    (409, "Conflict", "something else", "passing", Transient),
    (500, "InternalOperationError", "An internal server error occurred", "passing", Transient),
    (503, "", "", "passing", Transient),
    (0, "", "Azure does not answer: refused", "passing", Transient),
]  # fmt: skip
"""At the request itself."""

LATER: list[tuple[str, str, Kind, type[ProvisioningError]]] = [
    ("AllocationFailed", ALLOCATION.format("region"), "capacity", InsufficientCapacity),
    ("ZonalAllocationFailed", ALLOCATION.format("zone"), "capacity", InsufficientCapacity),
    ("OverconstrainedAllocationRequest", TOO_NARROW, "capacity", InsufficientCapacity),
    ("OverconstrainedZonalAllocationRequest", TOO_NARROW, "capacity", InsufficientCapacity),
    ("SkuNotAvailable", "The requested VM size for resource 'Following SKUs have failed for Capacity Restrictions: X' is currently "
     "not available in location 'L'. Please try another size", "capacity", InsufficientCapacity),
    ("OperationNotAllowed", QUOTA.format("standardDASv5Family Cores"), "quota", QuotaExceeded),
    ("QuotaExceeded", QUOTA.format("Total Regional Cores"), "quota", QuotaExceeded),
    ("OperationNotAllowed", QUOTA.format("LowPriorityCores"), "quota", QuotaExceeded),
    ("SpotPriceGreaterThanProvidedMaxPrice", "Unable to perform operation since the provided max price '1 USD' is lower than the "
     "current spot price", "capacity", InsufficientCapacity),
    ("InsufficientSubnetSize", "Pre-allocated IPs 31 exceeds IPs available", "capacity", InsufficientCapacity),
    ("SubnetIsFull", "Subnet nodes does not have enough capacity for 1 IP addresses.", "capacity", InsufficientCapacity),
    ("AzureSpotIsNotSupportedForThisVMSize", "Azure Spot is not supported for this VM size.", "unsupported", Unsupported),
    ("VMExtensionProvisioningError", "VM has reported a failure when processing extension 'vmssCSE'.", "broken", Unsupported),
    ("VMExtensionProvisioningTimeout", "Provisioning of VM extension 'vmssCSE' has timed out.", "broken", Unsupported),
    ("K8SAPIServerConnFailVMExtensionError", "Unable to establish connection", "broken", Unsupported),
    ("OutboundConnFailVMExtensionError", "Unable to establish outbound connection", "broken", Unsupported),
    ("NodesNotReady", "", "broken", Unsupported),
    ("AKSOperationPreempted", "This operation has been preempted by another operation with ID 1", "preempted", Transient),
    ("AKSOperationPreemptedByDelete", "This operation has been preempted by Deleting operation.", "deleting", Transient),
    ("OriginalEtagNotExpect", "", "preempted", Transient),
    ("Canceled", "The operation was overriden and canceled by a later operation 1.", "preempted", Transient),
    ("LinkedAuthorizationFailed", "has permission to perform action on scope, however it does not on the linked scope",
     "not-authorized", NotAuthorized),
    ("SomethingNew", "nobody has seen this before", "unknown", Unsupported),
]  # fmt: skip
"""In the operation, and in the pool's own status."""


@pytest.mark.parametrize(("status", "code", "message", "kind", "failure"), PUT)
@pytest.mark.parametrize("form", ["flat", "wrapped"])
def test_refused_at_once(
    status: int, code: str, message: str, kind: Kind, failure: type[ProvisioningError], form: str
) -> None:
    flat = {"code": code, "details": None, "message": message, "subcode": ""}
    said = read_error(flat if form == "flat" else {"error": {"code": code, "message": message}}, status)
    assert kind_of(said) == kind
    assert type(failure_of(said)) is failure
    assert message[:SHOWN] in str(failure_of(said))


@pytest.mark.parametrize(("code", "message", "kind", "failure"), LATER)
@pytest.mark.parametrize("form", ["bare", "wrapped", "quoted", "json"])
def test_failed_later(code: str, message: str, kind: Kind, failure: type[ProvisioningError], form: str) -> None:
    inner = {"code": code, "message": message}
    terminal = "The resource operation completed with terminal provisioning state 'Failed'."
    forms: dict[str, Any] = {
        "bare": inner,
        "wrapped": {"code": "ResourceOperationFailure", "message": terminal, "details": [inner]},
        "quoted": {
            "code": "ReconcileVMSSAgentPoolFailed",
            "message": f'VMSSAgentPoolReconciler retry failed: Code="{code}" Message="{message}"',
        },
        "json": {"error": {"code": "ResourceOperationFailure", "message": json.dumps({"error": inner})}},
    }
    said = read_error(forms[form])
    assert kind_of(said) == kind
    assert type(failure_of(said)) is failure
    assert message in str(failure_of(said))


def test_the_wait_that_is_asked_for_is_passed_on() -> None:
    failure = failure_of(read_error({"code": "Throttled", "message": "later"}, 429, 17.0))
    assert isinstance(failure, Transient)
    assert failure.retry_after == 17.0


def test_a_long_list_is_cut() -> None:
    assert len(str(read_error({"code": "BadRequest", "message": "standard_a1_v2," * 500}, 400))) < SHOWN + 50


def test_nothing_is_said_without_words() -> None:
    assert str(Refused(Said(503))) == "HTTP 503"


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["code", "message", "details", "error", "innererror", "subcode", "x"]), inner)), st.integers(0, 599))  # fmt: skip
def test_whatever_comes_is_some_kind_of_no(body: object, status: int) -> None:
    said = read_error(body, status)
    assert isinstance(failure_of(said), ProvisioningError)
    assert str(said)
