"""What a Workspace object of a cluster says, in the words that a terminal shows. Pure functions of plain dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from kaito_core.api import conditions, labels
from kaito_core.controller.reconcile.observed import WAITING
from kaito_core.controller.reconcile.revisions import hash_of, served_by
from kaito_core.kube.kinds import Object

SHOWN: Final = (
    conditions.ACCEPTED,
    conditions.NODE_CLAIM_READY,
    conditions.NODES_READY,
    conditions.RESOURCE_READY,
    conditions.JOB_STARTED,
    conditions.INFERENCE_READY,
    conditions.WORKSPACE_DELETING,
    conditions.RECONCILED,
)
"""The conditions on the way; the last one, ``WorkspaceSucceeded``, repeats them until it is the end."""

_FINAL: Final = frozenset({"workspaceFailed", "BenchmarkFailed"})
_YES: Final = {"True": "yes", "False": "no"}


def is_current(workspace: Object, condition: Mapping[str, Any]) -> bool:
    """Whether the condition is about what the Workspace asks for now, and not about an earlier state of it."""
    return bool(condition.get("observedGeneration") == workspace["metadata"].get("generation"))


def current_conditions(workspace: Object | None) -> list[Mapping[str, Any]]:
    """Those that are about the Workspace as it is now."""
    if workspace is None:
        return []
    return [c for c in workspace.get("status", {}).get("conditions", ()) if is_current(workspace, c)]


def succeeded(workspace: Object) -> bool | None:
    """How it ended; None as long as it goes on. An endpoint has come out well once it answers, or sleeps until somebody asks."""
    if not is_tuned(workspace) and refusal(workspace):
        return False
    for condition in workspace.get("status", {}).get("conditions", ()):
        if condition["type"] == conditions.WORKSPACE_SUCCEEDED and (
            is_current(workspace, condition) or is_trained(workspace)
        ):
            if condition["status"] == "True":
                return True
            return False if condition.get("reason") in _FINAL else None
    return None


def is_settled(workspace: Object, config: str = "") -> bool:
    """Whether what it says of its endpoint is about its present annotations, and about the settings of this
    `kaito_core.controller.configs.digest` (empty: any). While nothing runs, neither matters."""
    serving = workspace.get("status", {}).get("serving") or {}
    if phase(workspace) not in ("Starting", "Ready"):
        return True
    return serving.get("annotations", "") == served_by(workspace) and config in ("", serving.get("config", ""))


def is_tuned(workspace: Object) -> bool:
    """Whether it asks for a tuning; else it is an endpoint and nothing else."""
    return bool(workspace.get("tuning"))


def is_trained(workspace: Object) -> bool:
    """Whether the tuning that it asks for now has come to its end. What is served of it may change without training anew."""
    done = workspace.get("status", {}).get("finishedRevision")
    return is_tuned(workspace) and bool(done) and done == hash_of(workspace)


def phase(workspace: Object) -> str:
    """How its endpoint is: ``Asleep``, ``Starting``, ``Ready`` or ``Failed``; empty when it has none."""
    return str((workspace.get("status", {}).get("serving") or {}).get("phase") or "")


def policy(workspace: Object) -> str:
    """When it is served: ``always``, ``onDemand`` or ``never``; empty where only its controller knows, since a tuned one says nothing."""
    said = (workspace.get("inference") or {}).get("policy")
    if said or not is_tuned(workspace):
        return str(said or "always")
    annotation = (workspace["metadata"].get("annotations") or {}).get(labels.SERVE_AFTER_TUNING, "")
    return str(annotation) if annotation in labels.ANNOTATION_VALUES[labels.SERVE_AFTER_TUNING] else ""


def is_off(workspace: Object) -> bool:
    """Whether it is an endpoint that shall not be there."""
    return not is_tuned(workspace) and policy(workspace) == "never"


def refusal(workspace: Object) -> str:
    """Why its endpoint will not be there as long as nobody changes something; empty when it may."""
    known = {c["type"]: c for c in current_conditions(workspace)}
    accepted, ready = known.get(conditions.ACCEPTED, {}), known.get(conditions.INFERENCE_READY, {})
    if accepted.get("status") == "False" and accepted.get("reason") not in WAITING:
        return words(accepted)
    failed = phase(workspace) == "Failed" or ready.get("reason") == "NoActivator"
    return words(ready) if ready.get("status") == "False" and failed else ""


def message(workspace: Object, kind: str = conditions.WORKSPACE_SUCCEEDED) -> str:
    """The words of a condition; empty when it has none."""
    return next((words(c) for c in current_conditions(workspace) if c["type"] == kind), "")


def words(condition: Mapping[str, Any]) -> str:
    return str(condition.get("message") or condition.get("reason") or "")


def attempts(workspace: Object | None) -> list[Mapping[str, Any]]:
    """The tries to get machines, the oldest first."""
    return list((workspace or {}).get("status", {}).get("attempts", ()))


def holds_machines(workspace: Object) -> bool:
    """Whether an attempt goes on: its machines have not been given back."""
    tried = attempts(workspace)
    return bool(tried) and not tried[-1].get("ended")


def tried(workspace: Object) -> list[str]:
    """A table of the attempts that came to nothing, for the revision that was run last: machine, reason, the cloud's words."""
    ended = [a for a in attempts(workspace) if a.get("ended") and a.get("message")]
    last = ended[-1].get("revision") if ended else None
    rows = [(attempt_words(a), str(a.get("reason", "")), str(a["message"])) for a in ended if a.get("revision") == last]
    widths = [max((len(r[i]) for r in rows), default=0) for i in (0, 1)]
    return [f"{what:{widths[0]}}  {reason:{widths[1]}}  {said}" for what, reason, said in rows]


def news(before: Object | None, now: Object) -> list[str]:
    """What happened between two looks, a line each."""
    return list(dict.fromkeys([*_tried(before, now), *_nodes(before, now), *_conditions(before, now)]))


def _conditions(before: Object | None, now: Object) -> Iterable[str]:
    known = {c["type"]: c for c in current_conditions(before)}
    for condition in current_conditions(now):
        old = known.get(condition["type"], {})
        if condition["type"] in SHOWN and any(old.get(k) != condition.get(k) for k in ("status", "reason", "message")):
            yield condition_line(condition)


def condition_line(condition: Mapping[str, Any]) -> str:
    """``ResourceReady: no – waiting for Standard_NC6s_v3``."""
    answer = _YES.get(condition["status"], "unknown")
    # Of what is well the reason says nothing that the name does not.
    more = condition.get("message", "") if condition["status"] == "True" else words(condition)
    return f"{condition['type']}: {answer}" + (f" – {more}" if more else "")


def _tried(before: Object | None, now: Object) -> Iterable[str]:
    known = {_which(a): a for a in attempts(before)}
    for attempt in attempts(now):
        old = known.get(_which(attempt))
        if old is None and not attempt.get("ended"):
            yield f"asking {attempt_words(attempt)}"
        if attempt.get("ended") and (old is None or not old.get("ended")) and attempt.get("message"):
            yield f"{attempt_words(attempt)}: {attempt.get('reason', '')}: {attempt['message']}"


def _which(attempt: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(
        attempt.get(k) for k in ("started", "provisioner", "instanceType", "region", "capacityType", "revision")
    )


def attempt_words(attempt: Mapping[str, Any]) -> str:
    """``karpenter for Standard_NC6s_v3, spot in westeurope, $0.90 an hour``."""
    price = attempt.get("pricePerHour")
    kind = attempt.get("capacityType", "")
    where = " in ".join(p for p in (kind if kind == "spot" else "", attempt.get("region", "")) if p)
    parts = [attempt.get("instanceType", ""), where, f"${price:.2f} an hour" if price is not None else ""]
    return f"{attempt.get('provisioner', '')} for {', '.join(p for p in parts if p)}"


def _nodes(before: Object | None, now: Object) -> Iterable[str]:
    known = (before or {}).get("status", {}).get("workerNodes", ())
    new = [n for n in now.get("status", {}).get("workerNodes", ()) if n not in known]
    if new:
        yield f"on {', '.join(new)}"
