"""What is wrong with a pod, in the words of whoever failed: the stage itself, the kubelet, the scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kaito_core import foreign_json
from kaito_core.kube.kinds import Object

PULL = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"})
START = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError",
                   "ContainerCannotRun", "PreCreateHookError", "PostStartHookError"})  # fmt: skip


WRONG_INPUT = 2
"""The exit code of a stage whose input is wrong."""

MOST_RESTARTS = 5
"""So often the kubelet may start a container of an endpoint again, some five minutes in all, before its machine is given back."""


@dataclass(frozen=True)
class Trouble:
    """Why a pod does not run, or no longer."""

    reason: str
    """As KAITO calls it (`kaito_core.api.conditions`), else one word of our own."""
    message: str
    stuck: bool = False
    """Nothing will change by itself, though the pod has not ended."""
    final: bool = False
    """Trying again would only find the same out again: the input is wrong."""


def latest(pods: Iterable[Object]) -> Object | None:
    """The pod that was made last."""
    return max(pods, key=lambda p: (p["metadata"].get("creationTimestamp", ""), p["metadata"]["name"]), default=None)


def trouble(pod: Object) -> Trouble | None:
    """What is wrong with this pod; None when nothing is."""
    status = pod.get("status", {})
    evicted = _evicted(status)
    for container in containers(status):
        found = _ended(container) or _waiting(container)
        # A stage that lost its node was interrupted: the eviction is the cause, and has the better words.
        if found is not None:
            return evicted if evicted and found.reason in ("Interrupted", "ContainerFailed") else found
    return evicted or _unschedulable(status)


def containers(status: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The statuses of all containers, in the order in which they run."""
    yield from status.get("initContainerStatuses", ())
    yield from status.get("containerStatuses", ())


def started(pod: Object) -> bool:
    """Whether any container of it has begun."""
    states = [c.get("state", {}) for c in containers(pod.get("status", {}))]
    return any("running" in s or "terminated" in s for s in states)


def is_running(pod: Object) -> bool:
    """Whether any container of it runs now."""
    return any("running" in c.get("state", {}) for c in containers(pod.get("status", {})))


def is_alive(pod: Object) -> bool:
    """Whether it has not ended, and is not asked to."""
    ended = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
    return not ended and "deletionTimestamp" not in pod["metadata"]


def stage(pod: Object) -> str:
    """The container that runs now: a stage by name, or the main one's; empty when none does."""
    return next((str(c["name"]) for c in containers(pod.get("status", {})) if "running" in c.get("state", {})), "")


def last_words(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the stages wrote to the termination message; empty when there is nothing that reads so."""
    text = container.get("state", {}).get("terminated", {}).get("message", "")
    try:
        said = foreign_json.loads(text)
    except (TypeError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _ended(container: Mapping[str, Any]) -> Trouble | None:
    ended = container.get("state", {}).get("terminated")
    if ended is None or ended.get("exitCode") == 0:
        return None
    name, said = container["name"], last_words(container)
    if ended.get("reason") == "OOMKilled":
        stage = f" in the stage {said['stage']!r}" if said.get("stage") else ""
        return Trouble("ContainerOOMKilled", f"the container {name!r} ran out of memory{stage} and was killed")
    if said.get("event") == "failed":
        remedy = f" – {said['remedy']}" if said.get("remedy") else ""
        words = f"the stage {said.get('stage')!r} failed: {said.get('message')}{remedy}"
        return Trouble("StageFailed", words, final=ended.get("exitCode") == WRONG_INPUT)
    if said.get("event") == "interrupted":
        return Trouble("Interrupted", f"the stage {said.get('stage')!r} was interrupted; what it did is kept")
    how = f"ended with exit code {ended.get('exitCode')}"
    words = ": ".join(w for w in (ended.get("reason"), ended.get("message")) if w and w != "Error")
    reason = "ContainerStartError" if ended.get("reason") in START else "ContainerFailed"
    return Trouble(reason, f"the container {name!r} {how}" + (f" ({words})" if words else ""))


def _waiting(container: Mapping[str, Any]) -> Trouble | None:
    waiting = container.get("state", {}).get("waiting", {})
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in PULL:
        words = f"the image {container.get('image')!r} cannot be pulled: {message or reason}"
        return Trouble("ImagePullError", words, stuck=True)
    if reason in START:
        return Trouble(
            "ContainerStartError", f"the container {container['name']!r} cannot start: {message or reason}", stuck=True
        )
    if reason == "CrashLoopBackOff":
        before = _ended({**container, "state": container.get("lastState", {})})
        tried = int(container.get("restartCount", 0))
        words = before.message if before else str(message)
        final = tried >= MOST_RESTARTS or (before is not None and before.final)
        return Trouble("ContainerCrashLoopBackOff", f"{words} (tried {tried + 1} times)", final=final)
    return None


def _evicted(status: Mapping[str, Any]) -> Trouble | None:
    if status.get("reason") == "Evicted":
        message = str(status.get("message", ""))
        low = message.lower()
        reason = (
            "NodeMemoryPressure"
            if "memory" in low
            else "NodeDiskPressure"
            if "ephemeral" in low or "disk" in low
            else ""
        )
        return Trouble(reason or "PodEvicted", f"the node threw the pod out: {message}")
    for condition in status.get("conditions", ()):
        if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True":
            words = condition.get("message") or condition.get("reason")
            return Trouble("PodEvicted", f"the pod was stopped from outside: {words}")
    return None


def _unschedulable(status: Mapping[str, Any]) -> Trouble | None:
    for condition in status.get("conditions", ()):
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return Trouble("Unschedulable", f"no node takes the pod: {condition.get('message', '')}")
    return None
