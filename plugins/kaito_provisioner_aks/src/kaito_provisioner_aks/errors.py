"""What Azure says no with, and what kind of no it is. Pure functions.

AKS answers flat, ARM's front door and Compute answer inside ``error``; an operation that failed later wraps the cause once or
twice, in ``details`` or as text inside the message. So every code and every word is looked at, wherever it is.

The codes and texts are those of Microsoft's troubleshooting pages (SupportArticles-docs, ``support/azure/azure-kubernetes``), of
``azure-sdk-for-go-extensions`` and of logs that users have posted; docs/aks.md says what follows from each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from kaito_core.plugins.types import (
    InsufficientCapacity,
    NotAuthorized,
    ProvisioningError,
    QuotaExceeded,
    Transient,
    Unsupported,
)

SHOWN: Final = 800
"""Characters of a message: Azure lists every size of a region in some."""

DONE: Final = 200
"""The status of the answer in which an operation says that it failed."""


@dataclass(frozen=True)
class Said:
    """An answer that is no."""

    status: int = 0
    """The HTTP status; 0 when there was no answer."""
    code: str = ""
    """The outermost one."""
    message: str = ""
    """Every message in it, the outermost first."""
    codes: frozenset[str] = frozenset()
    """Every code in it, in lower case."""
    retry_after: float | None = None
    """Seconds that Azure asks to wait."""

    def __str__(self) -> str:
        words = self.message if len(self.message) <= SHOWN else f"{self.message[:SHOWN]}…"
        return ": ".join(w for w in (self.code, words) if w) or f"HTTP {self.status}"


class Refused(Exception):
    """Azure, or the way to it, says no."""

    def __init__(self, said: Said) -> None:
        super().__init__(str(said))
        self.said = said


Kind = Literal[
    "throttled", "not-authorized", "quota", "capacity", "unsupported", "broken", "deleting", "preempted", "changed", "busy",
    "absent", "no-cluster", "passing", "unknown",
]  # fmt: skip
"""``broken``: machines came up, and did not become nodes. ``changed``: there is another version of the pool than was thought.
``passing``: the way to Azure, or Azure itself, is out of order."""


@dataclass(frozen=True)
class _Rule:
    kind: Kind
    codes: frozenset[str] = frozenset()
    words: re.Pattern[str] | None = None
    statuses: frozenset[int] = frozenset()

    def fits(self, said: Said) -> bool:
        return bool(
            self.codes & said.codes
            or (self.words is not None and self.words.search(said.message))
            or said.status in self.statuses
        )


def _rule(kind: Kind, codes: str = "", words: str = "", *statuses: int) -> _Rule:
    pattern = re.compile(words, re.IGNORECASE) if words else None
    return _Rule(kind, frozenset(codes.lower().split()), pattern, frozenset(statuses))


_RULES: Final = (
    _rule("throttled", "Throttled SubscriptionRequestsThrottled TooManyRequests", "", 429),
    # A token that ran out on the way is made anew with the next request.
    _rule("passing", "ExpiredAuthenticationToken"),
    _rule("not-authorized", "AuthorizationFailed LinkedAuthorizationFailed InvalidAuthenticationToken AuthenticationFailed"),
    # Before "busy": the code OperationNotAllowed stands for both.
    _rule("quota", "ErrCode_InsufficientVCPUQuota InsufficientVCPUQuota QuotaExceeded",
          r"insufficient (regional )?vcpu quota|exceeding approved .{0,80}quota|family cores quota|lowprioritycores quota"),
    _rule("unsupported", "AzureSpotIsNotSupportedForThisVMSize AvailabilityZoneNotSupported VMSizeNotSupported "
          "RequestDisallowedByPolicy MissingSubscriptionRegistration",
          r"is not allowed in your subscription in location|is not supported for subscription|"
          r"the zone\(s\) .{1,80} is not supported"),
    _rule("capacity", "AllocationFailed ZonalAllocationFailed OverconstrainedAllocationRequest SkuNotAvailable "
          "OverconstrainedZonalAllocationRequest SpotPriceGreaterThanProvidedMaxPrice InsufficientSubnetSize SubnetIsFull",
          r"allocation failed|do not have sufficient capacity|is currently not available in location"),
    _rule("broken", "VMExtensionProvisioningError VMExtensionProvisioningTimeout K8SAPIServerConnFailVMExtensionError "
          "OutboundConnFailVMExtensionError NodesNotReady", "vmssCSE"),
    _rule("deleting", "AKSOperationPreemptedByDelete",
          r"deletion was issued|only allowed operation is deletion|preempted by deleting operation"),
    _rule("preempted", "AKSOperationPreempted OriginalEtagNotExpect Canceled",
          r"preempted by another operation|overr?iden and canceled by a later operation"),
    _rule("changed", "PreconditionFailed", "", 412),
    _rule("busy", "OperationNotAllowed", r"another( agentpool)? operation .{0,80}is in progress|"
          r"there's an in progress .{0,40} operation|aka\.ms/aks-pending-operation"),
    _rule("not-authorized", "", "", 401, 403),
    # Not by the status: a cluster that is not there is 404 too.
    _rule("absent", "", r"agent ?pool not found|could not find the agent ?pool|/agentPools/.{1,80} (was )?not found"),
    _rule("no-cluster", "ResourceGroupNotFound SubscriptionNotFound ResourceNotFound ParentResourceNotFound"),
    _rule("absent", "NotFound AgentPoolNotFound"),
    _rule("passing", "", "", 0, 408, 409, 500, 502, 503, 504),
)  # fmt: skip
"""The first that fits counts."""

_FAILURES: Final[Mapping[Kind, type[ProvisioningError]]] = {
    "not-authorized": NotAuthorized,
    "quota": QuotaExceeded,
    "capacity": InsufficientCapacity,
    "unsupported": Unsupported,
    "broken": Unsupported,
    "no-cluster": Unsupported,
    "absent": Unsupported,
    "unknown": Unsupported,
}
"""All others may work in a moment."""


def kind_of(said: Said) -> Kind:
    """Which kind of no it is."""
    return next((r.kind for r in _RULES if r.fits(said)), "unknown")


def failure_of(said: Said) -> ProvisioningError:
    """The failure that the answer stands for, in Azure's own words."""
    failure = _FAILURES.get(kind_of(said), Transient)
    return Transient(str(said), said.retry_after) if failure is Transient else failure(str(said))


def read_error(body: object, status: int = DONE, retry_after: float | None = None) -> Said:
    """What the body of an answer, or the error of an operation or of a pool, says; whatever its form."""
    parts = list(_parts(body))
    code = next((c for c, _ in parts if c), "")
    # The words are worth more than their number: a wrapper repeats what it wraps.
    messages = list(dict.fromkeys(m for _, m in parts if m))
    codes = frozenset(c.lower() for c, _ in parts if c) | {c.lower() for m in messages for c in _CODE.findall(m)}
    return Said(status, code, "; ".join(messages), codes, retry_after)


_CODE: Final = re.compile(r"""["']?\bcode\b["']?\s*[=:]\s*\\*["']([A-Za-z0-9_]+)\\*["']""", re.IGNORECASE)
"""As messages quote what they wrap: ``Code="AllocationFailed" Message="…"``, or JSON."""

_DEEP: Final = 6
"""Layers that are looked into; more than three have not been seen."""


def _parts(said: object, depth: int = 0) -> Iterator[tuple[str, str]]:
    """(code, message) of every layer, the outermost first."""
    if depth > _DEEP:
        return
    if isinstance(said, str):
        with_json = _json(said)
        if with_json is None:
            yield "", said.strip()
        else:
            yield from _parts(with_json, depth + 1)
        return
    if isinstance(said, list):
        for one in said:
            yield from _parts(one, depth + 1)
        return
    if not isinstance(said, Mapping):
        return
    if isinstance(said.get("error"), Mapping | str):
        yield from _parts(said["error"], depth + 1)
        return
    code, message = _text(said.get("code")), _text(said.get("message"))
    inner = _json(message)
    yield code, "" if inner is not None else message
    if inner is not None:
        yield from _parts(inner, depth + 1)
    if _text(said.get("subcode")):
        yield _text(said["subcode"]), ""
    for key in ("details", "innererror", "innerError"):
        yield from _parts(said.get(key), depth + 1)


def _text(said: object) -> str:
    return said.strip() if isinstance(said, str) else ""


def _json(text: str) -> dict[str, Any] | None:
    """The object that a text is as a whole."""
    if not text.startswith("{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
