"""What a NodeClaim and its Node say of how far a machine is. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from kaito_core.existing.node import GPU_RESOURCES, quantity
from kaito_core.plugins.types import InsufficientCapacity, ProvisioningError, Transient
from kaito_provisioner_karpenter.claim import GPUS
from kaito_provisioner_karpenter.failures import failure_of, worst

UNSEEN: Final = 60.0
"""Seconds after which a claim that no controller has looked at is worth a word: it usually takes one."""

GAVE_UP: Final = frozenset(
    {"InsufficientCapacityError", "NodeClassResolutionError", "AsyncProvisioningError", "NodeClassNotReady"}
)
"""Reasons of events after which Karpenter deletes the claim."""


@dataclass(frozen=True)
class Reading:
    """How far one claim is."""

    name: str
    phase: Literal["pending", "ready", "leaving", "failed"]
    registered: bool = False
    """Whether there has been a node."""
    node: str = ""
    message: str = ""
    failure: ProvisioningError | None = None
    said: tuple[str, str] = ("", "")
    """Reason and message of why it is not launched, in Karpenter's words."""


def read_claim(claim: Mapping[str, Any], node: Mapping[str, Any] | None, now: float) -> Reading:
    """A claim and its Node, if there is one; ``now`` in seconds since 1970."""
    metadata, status = claim["metadata"], claim.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    launched, registered = _is(conditions, "Launched"), _is(conditions, "Registered")
    name, node_name = metadata["name"], status.get("nodeName", "")
    said = _said(conditions.get("Launched"))
    if "deletionTimestamp" in metadata:
        why = _draining(conditions)
        return Reading(name, "leaving", registered, node_name, f"{name} is being taken away{why}", said=said)
    if not launched:
        failure = failure_of(*said) if said[1] else None
        if failure is not None:
            return Reading(name, "failed", registered, message=said[1], failure=failure, said=said)
        words = "waiting for Karpenter to get it"
        if not conditions and now - _time(metadata.get("creationTimestamp")) > UNSEEN:
            words = "no controller has looked at the NodeClaim: is Karpenter running, and is the node class its own?"
        return Reading(name, "pending", message=f"{name}: {words}")
    if not registered:
        words = _words(conditions.get("Registered")) or "its node has not joined yet"
        return Reading(name, "pending", message=f"{name}: the machine is launched; {words}")
    trouble = _not_initialized(conditions.get("Initialized")) or _not_ready(node, int(_gpus(claim)))
    if trouble:
        return Reading(name, "pending", True, node_name, f"{node_name or name}: {trouble}")
    return Reading(name, "ready", True, node_name)


def evidence(events: Iterable[Mapping[str, Any]], name: str) -> ProvisioningError | None:
    """Why Karpenter has given a claim of this name up, from the cluster's events; None when no event says that it has.

    Request ids are never used again, so that an event of that name is about that very claim."""
    found = []
    for event in events:
        about = event.get("involvedObject") or {}
        if about.get("kind") == "NodeClaim" and about.get("name") == name and event.get("reason") in GAVE_UP:
            message = str(event.get("message", ""))
            message = message.removeprefix(f"NodeClaim {name} event: ")
            failure = failure_of("", message)
            if isinstance(failure, Transient) and event["reason"] not in ("NodeClassNotReady",):
                failure = InsufficientCapacity(message)
            found.append(failure)
    return worst(found)


def gone_without_word(reason: str, message: str) -> ProvisioningError:
    """A claim that went before there was a node, and no event says why: its timers (5 minutes until launched, 15 until the node
    has joined), or somebody deleted it. What it said last tells more than that."""
    last = failure_of(reason, message) if message else None
    if last is not None and not isinstance(last, Transient):
        return last
    words = "Karpenter gave the claim up before there was a node"
    return InsufficientCapacity(f"{words}; it last said: {message}" if message else f"{words}, and no event says why")


def age(claim: Mapping[str, Any], now: float) -> float:
    """Seconds since the object was made."""
    return max(0.0, now - _time(claim["metadata"].get("creationTimestamp")))


def _time(text: object) -> float:
    return datetime.fromisoformat(str(text)).timestamp() if text else 0.0


def _is(conditions: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    return bool(conditions.get(name, {}).get("status") == "True")


def _said(launched: Mapping[str, Any] | None) -> tuple[str, str]:
    """Karpenter's words of why it is not launched; empty as long as it has not tried."""
    if launched is None or launched.get("status") == "True" or launched.get("reason") == "AwaitingReconciliation":
        return "", ""
    return str(launched.get("reason", "")), str(launched.get("message", ""))


def _words(condition: Mapping[str, Any] | None) -> str:
    if condition is None or condition.get("reason") in ("AwaitingReconciliation", "NodeNotFound"):
        return ""
    return str(condition.get("message") or condition.get("reason") or "")


def _not_initialized(condition: Mapping[str, Any] | None) -> str:
    if condition is not None and condition.get("status") == "True":
        return ""
    words = _words(condition) or "the node is being set up"
    if condition is not None and condition.get("reason") == "ResourceNotRegistered":
        return f"{words}: is the GPU's device plugin running there?"
    return words


def _not_ready(node: Mapping[str, Any] | None, gpus: int) -> str:
    """What is missing at a node that Karpenter has done with."""
    if node is None:
        return "the node is not seen yet"
    if "deletionTimestamp" in node["metadata"]:
        return "the node is being taken away"
    status = node.get("status") or {}
    ready = next((c for c in status.get("conditions") or () if c.get("type") == "Ready"), None)
    if ready is None or ready.get("status") != "True":
        return f"the node is not ready: {(ready or {}).get('message') or 'it has not said so yet'}"
    has = max((quantity((status.get("allocatable") or {}).get(r, 0)) for r in GPU_RESOURCES), default=0)
    if has < gpus:
        return f"the node shows {has:.0f} of {gpus} GPUs: is the GPU's device plugin running there?"
    return ""


def _gpus(claim: Mapping[str, Any]) -> str:
    text = str((claim["metadata"].get("annotations") or {}).get(GPUS, "0"))
    return text if text.isdigit() else "0"


def _draining(conditions: Mapping[str, Mapping[str, Any]]) -> str:
    drained = conditions.get("Drained")
    return f" ({drained.get('reason', '')})" if drained and drained.get("status") != "True" else ""
