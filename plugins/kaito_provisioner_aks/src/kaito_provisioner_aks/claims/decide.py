"""What follows from a NodeClaim, its agent pool and its node. Pure; times are seconds since the epoch.

The conditions are Karpenter's: Launched, Registered and Initialized, and Ready over them. As gpu-provisioner does it, a claim is
launched when its machine is a node; what Azure refuses is said in the condition, tried again, and the claim is given up after five
minutes. What AKS has begun may take its time: a GPU pool takes up to ten minutes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from kaito_core.existing.node import quantity
from kaito_core.kube.kinds import Object
from kaito_core.plugins.types import ProvisioningError, Transient
from kaito_provisioner_aks import pool
from kaito_provisioner_aks.claims import claim as claims
from kaito_provisioner_aks.claims.claim import FINALIZER, is_claims
from kaito_provisioner_aks.errors import DONE, Kind, Said, failure_of, kind_of
from kaito_provisioner_aks.pool import Pool
from kaito_provisioner_aks.settings import Settings

LAUNCH_SECONDS: Final = 300.0
"""A claim for which AKS has not even begun is given up after so long (Karpenter's liveness)."""

JOIN_SECONDS: Final = 1800.0
"""And one whose pool does not become a node: AKS itself gives up earlier, nearly always."""

POLL: Final = 5.0
"""Seconds between two looks at what AKS works on (Karpenter's, while it deletes)."""

STEADY: Final = 120.0
"""Seconds between two looks at what is well (Karpenter's garbage collection)."""

REPEAT: Final = 30.0
"""Seconds until a PUT that was refused is tried again: AKS lets one through a minute, and twenty at once."""

LEAKED_AFTER: Final = 30.0
"""Seconds that a pool must be old before it can be without a claim (gpu-provisioner)."""

CUT: Final = 300
"""Characters of a message (Karpenter)."""

EPHEMERAL: Final = frozenset({
    "node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable", "node.cloudprovider.kubernetes.io/uninitialized",
})  # fmt: skip
"""Taints that are gone when a node has come up."""

Status = Literal["True", "False", "Unknown"]

Told = tuple[Status, str, str]
"""Status, reason and message of a condition."""


@dataclass(frozen=True)
class Observed:
    """What was seen."""

    now: float
    pool: Pool | None
    nodes: tuple[Mapping[str, Any], ...] = ()
    """Those of the pool."""
    why: Said | None = None
    """Why the pool failed, where it does not say so itself."""


@dataclass
class Decision:
    """What to do, in the order of the fields."""

    finalizer: bool | None = None
    put: Object | None = None
    etag: str | None = None
    """As for `kaito_provisioner_aks.arm.Edge.put`."""
    delete_pool: bool = False
    status: Object | None = None
    """As it shall be; None: as it is."""
    labels: dict[str, str] = field(default_factory=dict)
    """That the claim shall have."""
    node_labels: dict[str, dict[str, str]] = field(default_factory=dict)
    """That nodes shall have, by name."""
    events: list[tuple[str, str, str]] = field(default_factory=list)
    """(type, reason, message)."""
    delete_nodes: list[str] = field(default_factory=list)
    delete_claim: bool = False
    again_after: float | None = None
    """Seconds until it is looked at again; None: the next change will do."""


def decide(claim: Object, observed: Observed, settings: Settings) -> Decision:
    """What follows now."""
    if not claims.is_ours(claim):
        return Decision()
    has_finalizer = FINALIZER in (claim["metadata"].get("finalizers") or ())
    if claim["metadata"].get("deletionTimestamp"):
        return _leaving(observed) if has_finalizer else Decision()
    if not has_finalizer:
        # Before anything is bought: from here on, deleting the claim waits until it is given back.
        return Decision(finalizer=True, again_after=0.0)
    if wrong := claims.problem(claim):
        return _not_launched(claim, observed.now, "LaunchFailed", wrong)
    found = observed.pool
    if found is None:
        return _absent(claim, observed, settings)
    if not is_claims(found):
        return _not_launched(
            claim,
            observed.now,
            "LaunchFailed",
            f"there is already an agent pool {found.name}, and it is not of a NodeClaim",
        )
    if found.phase == "failed":
        return _failed(claim, observed, found, settings)
    if found.phase == "succeeded" and (observed.nodes or _is(claim, "Registered")):
        return _machine(claim, observed, found)
    decision = Decision(again_after=POLL)
    if observed.now - claims.created(claim) > JOIN_SECONDS:
        return _given_up(claim, decision, f"the agent pool did not become a node within {JOIN_SECONDS:.0f} s")
    words = (
        f"the agent pool {found.name} is {found.state}"
        if found.phase != "succeeded"
        else "fail to find the node object"
    )
    decision.status = _status(claim, observed.now, Launched=("Unknown", "AwaitingReconciliation", words))
    return decision


def refused(claim: Object, said: Said, now: float) -> Decision:
    """What follows when the PUT was refused."""
    kind = kind_of(said)
    if kind in ("busy", "changed", "deleting"):
        # Perhaps it was our own earlier PUT; the next look says so.
        return Decision(again_after=POLL)
    words = f'creating instance, agentPool.BeginCreateOrUpdate for "{claim["metadata"]["name"]}" failed: {said}'
    decision = _not_launched(claim, now, _reason(kind), words)
    if kind in _NONE_LEFT:
        decision.events.append(_insufficient(claim, said))
    decision.again_after = max(REPEAT, said.retry_after or 0.0)
    return decision


def leaked(pools: Iterable[Pool], names: set[str], now: float) -> list[str]:
    """The pools that were got for NodeClaims which are no more."""
    return sorted(
        p.name for p in pools
        if is_claims(p) and p.name not in names and p.phase != "deleting" and p.age(now) > LEAKED_AFTER
    )  # fmt: skip


# --- by what there is


def _leaving(observed: Observed) -> Decision:
    """The machine goes first (AKS drains it), then what is left of its Node object, and then the claim."""
    found = observed.pool
    if found is None or not is_claims(found):
        gone = [n["metadata"]["name"] for n in observed.nodes] if found is None else []
        return Decision(delete_nodes=gone, finalizer=False)
    return Decision(delete_pool=found.phase != "deleting", again_after=POLL)


def _absent(claim: Object, observed: Observed, settings: Settings) -> Decision:
    if _is(claim, "Launched"):
        # It was there, and is not any more. Another machine is for another claim.
        return _given_up(claim, Decision(), "its agent pool was deleted")
    if observed.now - claims.created(claim) > LAUNCH_SECONDS:
        return _given_up(claim, Decision(), f"it could not be launched within {LAUNCH_SECONDS:.0f} s")
    try:
        wanted = claims.body(claim, settings, observed.now)
    except ProvisioningError as e:
        return _not_launched(claim, observed.now, "LaunchFailed", str(e))
    return Decision(put=wanted, status=_status(claim, observed.now), again_after=POLL)


def _failed(claim: Object, observed: Observed, found: Pool, settings: Settings) -> Decision:
    said = found.error or observed.why or Said(DONE, "", "Azure does not say why")
    if isinstance(failure_of(said), Transient) and observed.now - claims.created(claim) < JOIN_SECONDS:
        # Another operation came in between: the same once more makes it whole.
        return Decision(put=claims.body(claim, settings, observed.now), etag=found.etag, again_after=POLL)
    kind = kind_of(said)
    words = f'creating instance, agentPool.BeginCreateOrUpdate for "{found.name}" failed: {said}'
    decision = Decision(status=_status(claim, observed.now, Launched=("Unknown", _reason(kind), words)))
    if kind in _NONE_LEFT:
        decision.events.append(_insufficient(claim, said))
    return _given_up(claim, decision, str(said))


def _machine(claim: Object, observed: Observed, found: Pool) -> Decision:
    """AKS is done: the machine is a node, or was one."""
    now, nodes = observed.now, observed.nodes
    if not nodes:
        return _given_up(claim, Decision(), "its node is gone")
    if len(nodes) > 1:
        many: Told = ("False", "MultipleNodesFound", "Invariant violated, matched multiple nodes")
        return Decision(status=_status(claim, now, Launched=_TRUE, Registered=many), again_after=STEADY)
    node = nodes[0]
    spec, told = node.get("spec") or {}, node.get("status") or {}
    if not spec.get("providerID"):
        waiting: Told = ("Unknown", "AwaitingReconciliation", "the node has no providerID yet")
        return Decision(status=_status(claim, now, Launched=waiting), again_after=POLL)
    initialized = _TRUE if _is(claim, "Initialized") else _initialized(claim, node)
    status = _status(claim, now, Launched=_TRUE, Registered=_TRUE, Initialized=initialized)
    status |= {"providerID": spec["providerID"], "nodeName": node["metadata"]["name"], "imageID": found.image}
    status |= {k: told[k] for k in ("capacity", "allocatable") if told.get(k)}
    has = node["metadata"].get("labels") or {}
    marks = {claims.REGISTERED: "true"} | ({claims.INITIALIZED: "true"} if initialized == _TRUE else {})
    lacking = {k: v for k, v in marks.items() if has.get(k) != v}
    resolved = {k: has[k] for k in (claims.INSTANCE_TYPE, claims.ZONE) if has.get(k)}
    resolved[claims.CAPACITY_TYPE] = "spot" if found.spot else "on-demand"
    own = claim["metadata"].get("labels") or {}
    return Decision(
        status=status,
        labels={k: v for k, v in resolved.items() if k not in own},
        node_labels={node["metadata"]["name"]: lacking} if lacking else {},
        again_after=STEADY if initialized == _TRUE else POLL,
    )


def _initialized(claim: Object, node: Mapping[str, Any]) -> Told:
    """Whether the node is all that was asked for (Karpenter's initialization)."""
    if not pool.is_ready(node):
        return "Unknown", "NodeNotReady", "Node status is NotReady"
    for told in (node.get("spec") or {}).get("taints") or ():
        if told["key"] in EPHEMERAL:
            return "Unknown", "KnownEphemeralTaintsExist", f'KnownEphemeralTaint "{claims.taint(told)}" still exists'
    there = (node.get("status") or {}).get("allocatable") or {}
    asked = ((claim["spec"].get("resources") or {}).get("requests")) or {}
    for name, amount in asked.items():
        # KAITO asks for the disk by a name that no node has.
        if name != "storage" and quantity(amount) > 0 and not quantity(there.get(name, 0)):
            return "Unknown", "ResourceNotRegistered", f'Resource "{name}" was requested but not registered'
    return _TRUE


# --- words and conditions

_TRUE: Final[Told] = ("True", "", "")
"""Its reason is the condition's own name."""

_NONE_LEFT: Final = frozenset({"capacity", "quota"})


def _reason(kind: Kind) -> str:
    return {"capacity": "InsufficientCapacity", "quota": "QuotaExceeded"}.get(kind, "LaunchFailed")


def _insufficient(claim: Object, said: Said) -> tuple[str, str, str]:
    """The event by which whoever made a claim learns that there is no machine: Karpenter's, with its words."""
    return (
        "Warning",
        "InsufficientCapacityError",
        _cut(f"NodeClaim {claim['metadata']['name']} event: insufficient capacity, {said}"),
    )


def _not_launched(claim: Object, now: float, reason: str, words: str) -> Decision:
    """What keeps it from being launched; it is given up when that has been so for too long."""
    decision = Decision(status=_status(claim, now, Launched=("Unknown", reason, words)), again_after=REPEAT)
    if now - claims.created(claim) > LAUNCH_SECONDS:
        return _given_up(claim, decision, words)
    return decision


def _given_up(claim: Object, decision: Decision, words: str) -> Decision:
    decision.delete_claim = True
    decision.events.append(
        ("Warning", "NodeClaimGivenUp", _cut(f"NodeClaim {claim['metadata']['name']} is deleted: {words}"))
    )
    return decision


def _cut(words: str) -> str:
    return words if len(words) <= CUT else f"{words[:CUT]}..."


def _is(claim: Object, kind: str) -> bool:
    told = (claim.get("status") or {}).get("conditions") or ()
    return any(c["type"] == kind and c["status"] == "True" for c in told)


def _status(claim: Object, now: float, **conditions: Told) -> Object:
    """The status with these conditions, those that were not named as they are, and what follows for Ready."""
    before: Object = claim.get("status") or {}
    old = {c["type"]: c for c in before.get("conditions") or ()}
    new: dict[str, Object] = {}
    for kind in ("Launched", "Registered", "Initialized"):
        if kind in conditions:
            status, reason, message = conditions[kind]
            new[kind] = _condition(claim, old.get(kind), now, kind, status, reason or kind, _cut(message))
        else:
            new[kind] = old.get(kind) or _condition(
                claim,
                None,
                claims.created(claim),
                kind,
                "Unknown",
                "AwaitingReconciliation",
                "object is awaiting reconciliation",
            )
    states = {k: c["status"] for k, c in new.items()}
    if all(s == "True" for s in states.values()):
        ready = ("True", "Ready", "")
    else:
        bad = "UnhealthyDependents" if "False" in states.values() else "ReconcilingDependents"
        ready = (
            "False" if "False" in states.values() else "Unknown",
            bad,
            ", ".join(f"{k}={s}" for k, s in states.items() if s != "True"),
        )
    new["Ready"] = _condition(claim, old.get("Ready"), now, "Ready", *ready)
    others = [c for kind, c in old.items() if kind not in new]
    return {**before, "conditions": [*new.values(), *others]}


def _condition(
    claim: Object, old: Object | None, now: float, kind: str, status: str, reason: str, message: str
) -> Object:
    when = old["lastTransitionTime"] if old and old["status"] == status else None
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": when or datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "observedGeneration": claim["metadata"].get("generation", 0),
    }
