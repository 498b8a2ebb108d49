"""What Karpenter and the clouds behind it say no with, as typed failures. Their words are kept; the type is what kaito goes by.

The words are from the sources of Karpenter's core, of its providers for Azure and AWS, and of gpu-provisioner, whose errors
are ARM's. A condition's message is cut at 300 characters, so that a code at its beginning counts as much as a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from kaito_core.plugins.types import (
    InsufficientCapacity,
    NotAuthorized,
    ProvisioningError,
    QuotaExceeded,
    Transient,
    Unsupported,
)

_TYPES: Final[tuple[tuple[type[ProvisioningError], str], ...]] = (
    # Throttled or busy: nothing is wrong with the wish. "RequestLimitExceeded" must not read as a quota.
    (
        Transient,
        r"RequestLimitExceeded|TooManyRequests|Throttl|request limit has been exceeded"
        r"|[Aa]nother (agentpool )?operation|NodeClassReadinessUnknown|NodeClassRef not ready",
    ),
    (
        QuotaExceeded,
        r"[Qq]uota|VcpuLimitExceeded|VCPULimitExceeded|vCPU limit|vCPU capacity than your current"
        r"|MaxSpotInstanceCountExceeded|Max spot instance count|MaxFleetCountExceeded|exceeding approved",
    ),
    (
        NotAuthorized,
        r"Unauthorized|AuthorizationFail|AccessDenied|[Nn]ot authorized|does not have authorization|AuthFailure"
        r"|AuthCheckFailed|InvalidAuthenticationToken|ExpiredAuthenticationToken|RequestDisallowedByPolicy"
        r"|SpotSLRCreationFailed|AccountPendingVerification|PendingVerification|InvalidClientSecret|AADSTS",
    ),
    (
        Unsupported,
        r"not allowed in your subscription|VMSizeNotSupported|AvailabilityZoneNotSupported|is not supported"
        r"|Unsupported:|agentpool name\(|should be more than 0|no requirement for instance type"
        r"|instance type not found|InstanceTypeResolutionFailed",
    ),
    (
        InsufficientCapacity,
        r"[Ii]nsufficient ?[Cc]apacity|InsufficientInstanceCapacity|sufficient \S* ?capacity|AllocationFail"
        r"|Overconstrained\w*Allocation|UnfulfillableCapacity|SkuNotAvailable|SKUNotAvailable"
        r"|requested instance types were unavailable|ReservationCapacityExceeded|InsufficientFreeAddressesInSubnet",
    ),
)
_PATTERNS: Final = tuple((kind, re.compile(pattern)) for kind, pattern in _TYPES)

RANK: Final = (NotAuthorized, QuotaExceeded, Unsupported, InsufficientCapacity, Transient)
"""Of several reasons the one that tells most: after a first failure a provider says only that nothing is available."""


def failure_of(reason: str, message: str) -> ProvisioningError:
    """The failure that a condition's or an event's words stand for; `Transient` when nothing in them is known."""
    words = f"{reason}: {message}" if reason else message
    for kind, pattern in _PATTERNS:
        if pattern.search(words):
            return kind(message or reason)
    return Transient(message or reason)


def worst(failures: Iterable[ProvisioningError]) -> ProvisioningError | None:
    """The one of them that tells most; None when there is none."""
    return min(failures, key=lambda f: next(i for i, k in enumerate(RANK) if isinstance(f, k)), default=None)
