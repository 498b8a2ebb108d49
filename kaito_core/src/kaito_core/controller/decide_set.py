"""`decide_set`: from one InferenceSet and its Workspaces to what shall be done. Pure: no clock, no network, no cluster.

Nothing is remembered but what is written on the objects. A replica's name is the set's and a number, the lowest that is free, so
that making it twice is making it once. What keeps the number of machines down and that of ready replicas up:

* A Workspace on its way out holds its machine still, and keeps its place until it has gone: the next one is made then.
* A replica that serves is only touched for a changed template while no more than ``maxUnavailable`` do not serve.
* Fewer replicas: those go first that do not serve, then those of an earlier template, then the newest.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from pydantic import ValidationError

from kaito_core.api import Workspace, check_update, conditions, labels, read_inference_set
from kaito_core.api.inference_set import CONFIG, DELETING, READY, TEMPLATE, InferenceSet
from kaito_core.controller.reconcile.decision import Deletion, Note
from kaito_core.controller.reconcile.revisions import served_by
from kaito_core.controller.reconcile.serving import CONFIG_CHECK
from kaito_core.kube.kinds import SERVICES, WORKSPACES, Kind, Object, owner_reference
from kaito_core.kube.ownership import NameTaken, is_controlled_by
from kaito_core.problems import Problem, errors
from kaito_core.workloads.serving import PORT

BURST: Final = 10
"""Workspaces that one decision makes at most; the next follows when they are seen."""

TAKEN: Final = 60.0
"""Seconds until it is looked again whether a name that somebody else has, whom nobody watches, is free."""

SHOWN: Final = 1024
"""Characters of a condition's message."""


@dataclass(frozen=True)
class ObservedSet:
    """One InferenceSet's world at one moment."""

    now: float
    """Seconds since the epoch."""
    workspaces: tuple[Object, ...] = ()
    """Of its namespace: all of the set, and any others."""
    service: Object | None = None
    """The Service of the set's name, whosesoever it is."""
    config: str = ""
    """Digest of the settings in the ConfigMap that the template names (`kaito_core.controller.configs.digest`)."""


@dataclass(frozen=True)
class Change:
    """A Workspace that is brought to the present template; a merge patch, of the very state that was seen."""

    name: str
    patch: Mapping[str, Any]


@dataclass(frozen=True)
class SetDecision:
    """Carried out in the order of the fields. Every step may be the last one before a crash."""

    create: tuple[tuple[Kind, Object], ...] = ()
    change: tuple[Change, ...] = ()
    delete: tuple[Deletion, ...] = ()
    status: Mapping[str, Any] | None = None
    """The whole status; written only when it differs."""
    notes: tuple[Note, ...] = ()
    look_again_after: float | None = None
    """Seconds; None: the next change of anything will do."""

    @property
    def acts(self) -> bool:
        """Whether anything but the status is to be written. Such a decision should not rest on caches."""
        return bool(self.create or self.change or self.delete)


def decide_set(inference_set: Object, observed: ObservedSet) -> SetDecision:
    """What to do about ``inference_set`` now."""
    case = _Case(inference_set, observed)
    if "deletionTimestamp" in inference_set["metadata"]:
        # Its Workspaces belong to it, and go with it; or stay, where whoever deleted it said so.
        case.condition(DELETING, "True", "inferencesetDeleted", "its Workspaces go with it")
        return case.decision()
    read, problems = read_inference_set(inference_set, allow_private=True)
    if read is None or errors(problems):
        case.not_ready("InvalidInferenceSet", _words(errors(problems)))
        return case.decision()
    _replicas(case, read)
    return case.decision()


def _replicas(case: _Case, wanted: InferenceSet) -> None:
    replicas, template = wanted.allowed_replicas, _template_of(wanted, case.observed.config)
    if wanted.spec.template.inference.config:
        case.look_again_after = CONFIG_CHECK
    leaving = [w for w in case.ours if _leaving(w)]
    kept, surplus = _keep([w for w in case.ours if not _leaving(w)], replicas, template)
    for workspace in surplus:
        case.remove(workspace)
    if surplus:
        case.note("WorkspaceRemoved", f"{_names(surplus)} removed: fewer replicas are wanted")
    _service(case)
    made = _make(case, wanted, max(0, replicas - len(kept) - len(leaving)), template)
    changed, replaced = _roll(case, wanted, kept, template)
    left = [w for w in kept if w not in replaced]
    ready = [w for w in left if w not in changed and serves(w)]
    current = sum(1 for w in left if w in changed or _template(w) == template)
    case.status |= {
        "replicas": len(left) + made,
        "readyReplicas": len(ready),
        "updatedReplicas": current + made,
    }
    _say(case, wanted, [w for w in left if w not in ready], [*leaving, *surplus, *replaced])


def _keep(alive: Sequence[Object], replicas: int, template: str) -> tuple[list[Object], list[Object]]:
    """Those that stay, by number, and those that are too many."""
    newest = sorted(alive, key=lambda w: (w["metadata"].get("creationTimestamp", ""), _number(w)), reverse=True)
    order = sorted(newest, key=lambda w: (serves(w), _template(w) == template))
    surplus = order[: max(0, len(alive) - replicas)]
    return sorted((w for w in alive if w not in surplus), key=_number), surplus


def _make(case: _Case, wanted: InferenceSet, missing: int, template: str) -> int:
    """Make what is missing; how many that were."""
    taken = {_name(w) for w in case.ours}
    foreign = {n: w for w in case.observed.workspaces if (n := _name(w)) not in taken}
    names = [n for i in range(len(taken) + missing) if (n := f"{case.name}-{i}") not in taken][:missing]
    for name in names:
        if name in foreign:
            case.taken(WORKSPACES, foreign[name])
    making = [n for n in names if n not in foreign][:BURST]
    case.create += [(WORKSPACES, case.workspace(wanted, name, template)) for name in making]
    if making:
        case.note("WorkspaceCreated", f"{', '.join(making)} made")
    return len(making)


def _roll(
    case: _Case, wanted: InferenceSet, kept: Sequence[Object], template: str
) -> tuple[list[Object], list[Object]]:
    """Bring Workspaces to the present template, as many as may be away: those that are changed, and those that are made anew."""
    changed: list[Object] = []
    replaced: list[Object] = []
    if wanted.spec.update_strategy.type == "OnDelete":
        return changed, replaced
    outdated = [w for w in kept if _template(w) != template]
    # What does not serve anyhow need not wait: so a template that never worked can be mended.
    idle = [w for w in outdated if not serves(w)]
    replicas = wanted.allowed_replicas
    may_go = sum(1 for w in kept if serves(w)) - (replicas - wanted.max_unavailable(replicas))
    serving = [w for w in outdated if serves(w)][: max(0, may_go)]
    for workspace in (*idle, *serving):
        name = _name(workspace)
        if _fits(workspace, wanted):
            changed.append(workspace)
            case.change.append(Change(name, _patch(workspace, case.workspace(wanted, name, template))))
            case.note("WorkspaceChanged", f"{name} gets the present template")
        else:
            replaced.append(workspace)
            case.remove(workspace)
            case.note("WorkspaceReplaced", f"{name} is made anew: what the template changes cannot be changed in place")
    return changed, replaced


def _fits(workspace: Object, wanted: InferenceSet) -> bool:
    """Whether this Workspace may become what is wanted, and keep its machine."""
    try:
        old = Workspace.model_validate({k: v for k, v in workspace.items() if k != "status"})
    except ValidationError:  # of a version that knew other fields
        return False
    return not check_update(old, wanted.replica(_name(workspace)))


def _patch(old: Object, new: Object) -> dict[str, Any]:
    """What of a Workspace changes; labels and annotations that others put there stay."""
    before = _last(old)
    metadata = {"resourceVersion": old["metadata"]["resourceVersion"]} | {
        part: {**{k: None for k in before.get(part, {}) if k not in new["metadata"][part]}, **new["metadata"][part]}
        for part in ("labels", "annotations")
    }
    parts = {part: merge_patch(old.get(part) or {}, new[part]) for part in ("resource", "inference")}
    return {"metadata": metadata, **parts}


def _service(case: _Case) -> None:
    """One address for all replicas."""
    there = case.observed.service
    if there is not None and not case.owns(there):
        case.taken(SERVICES, there)
    if there is not None:
        return
    pods = {labels.INFERENCE_SET: case.name}
    made = {
        "apiVersion": SERVICES.api_version,
        "kind": SERVICES.kind,
        "metadata": {
            "name": case.name,
            "namespace": case.namespace,
            "labels": pods,
            "ownerReferences": [owner_reference(case.inference_set)],
        },
        "spec": {"ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": PORT}], "selector": pods},
    }
    case.create.append((SERVICES, made))


def _say(case: _Case, wanted: InferenceSet, waits: Sequence[Object], leaving: Sequence[Object]) -> None:
    replicas, allowed = wanted.spec.replicas, wanted.allowed_replicas
    there, ready, current = (case.status[f] for f in ("replicas", "readyReplicas", "updatedReplicas"))
    outdated = current < there and wanted.spec.update_strategy.type == "RollingUpdate"
    said = [*case.names_taken, f"{ready} of {replicas} replicas are ready"]
    if outdated:
        said.append(f"{current} of {there} have the present template")
    if allowed < replicas:
        said.append(
            f"nodeCountLimit {wanted.spec.node_count_limit} allows {allowed}, of {wanted.spec.template.resource.count} each"
        )
    if waits:
        said.append(f"{_name(waits[0])}: {_trouble(waits[0])}")
    if leaving:
        said.append(f"on the way out: {_names(leaving)}")
    message = "; ".join(said)
    if case.names_taken:
        case.not_ready("NameTaken", message)
        case.look_again_after = min(TAKEN, case.look_again_after or TAKEN)
    elif allowed < replicas:
        case.not_ready("NodeCountLimit", message)
    elif ready < replicas or outdated:
        case.not_ready("inferencesetNotReady", message)
    else:
        case.condition(READY, "True", "inferencesetReady", message)


def _trouble(workspace: Object) -> str:
    """Why this Workspace does not serve, in its own words."""
    found = {c["type"]: c for c in _conditions(workspace)}
    for kind in (conditions.ACCEPTED, conditions.RESOURCE_READY, conditions.INFERENCE_READY):
        condition = found.get(kind, {})
        if condition.get("status") == "False":
            return ": ".join(w for w in (condition.get("reason"), condition.get("message")) if w)
    return "waiting for its controller"


def serves(workspace: Object) -> bool:
    """Whether a Workspace serves what it asks for now: a condition about an earlier generation, or about other annotations, says
    nothing."""
    generation = workspace["metadata"].get("generation")
    about = (workspace.get("status") or {}).get("serving") or {}
    return (
        not _leaving(workspace)
        and about.get("annotations", "") == served_by(workspace)
        and any(
            c["type"] == conditions.INFERENCE_READY
            and c["status"] == "True"
            and c.get("observedGeneration") in (None, generation)
            for c in _conditions(workspace)
        )
    )


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON merge patch (RFC 7386) that makes ``new`` of ``old``."""
    patch: dict[str, Any] = {k: None for k in old if k not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping):
            if not isinstance(before, Mapping):
                patch[key] = value
            elif inner := merge_patch(before, value):
                patch[key] = inner
        elif value != before:
            patch[key] = value
    return patch


# --- one InferenceSet while it is being decided about


class _Case:
    """What it is, and what has been decided so far. ``status`` starts as it was last written and ends as it shall be."""

    def __init__(self, inference_set: Object, observed: ObservedSet) -> None:
        self.inference_set = inference_set
        self.observed = observed
        self.name = str(inference_set["metadata"]["name"])
        self.namespace = str(inference_set["metadata"]["namespace"])
        self.ours = [w for w in observed.workspaces if self.owns(w)]
        self.status: dict[str, Any] = copy.deepcopy(inference_set.get("status") or {})
        self.status["observedGeneration"] = inference_set["metadata"].get("generation")
        self.status["selector"] = f"{labels.INFERENCE_SET}={self.name}"
        self.create: list[tuple[Kind, Object]] = []
        self.change: list[Change] = []
        self.delete: list[Deletion] = []
        self.notes: list[Note] = []
        self.names_taken: list[str] = []
        self.look_again_after: float | None = None

    def owns(self, obj: Object) -> bool:
        """By the controller's uid only: neither a name nor a label makes something ours."""
        return is_controlled_by(obj, self.inference_set)

    def workspace(self, wanted: InferenceSet, name: str, template: str) -> Object:
        """One replica, to be made."""
        given = wanted.spec.template.metadata
        replica = wanted.replica(name).to_object()
        return {
            "apiVersion": WORKSPACES.api_version,
            "kind": WORKSPACES.kind,
            "metadata": {
                "name": name,
                "namespace": self.namespace,
                "labels": {**given.labels, labels.INFERENCE_SET: self.name},
                "annotations": {**given.annotations, TEMPLATE: template},
                "ownerReferences": [owner_reference(self.inference_set)],
            },
            "resource": replica.get("resource", {}),
            "inference": replica["inference"],
        }

    def remove(self, workspace: Object) -> None:
        self.delete.append(Deletion(WORKSPACES, _name(workspace), workspace["metadata"]["uid"]))

    def taken(self, kind: Kind, there: Object) -> None:
        (problem,) = NameTaken(kind, there, self.inference_set).problems
        self.names_taken.append(f"{problem.message} – {problem.remedy}")

    def not_ready(self, reason: str, message: str) -> None:
        if self.condition(READY, "False", reason, message) and reason != "inferencesetNotReady":
            self.note(reason, message, "Warning")

    def condition(self, kind: str, status: Literal["True", "False"], reason: str, message: str) -> bool:
        """Set a condition; whether its status or reason is another one than before."""
        found: list[dict[str, Any]] = self.status.setdefault("conditions", [])
        old = next((c for c in found if c["type"] == kind), {})
        now = datetime.fromtimestamp(self.observed.now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        new = {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": message if len(message) <= SHOWN else message[: SHOWN - 1] + "…",
            "lastTransitionTime": old["lastTransitionTime"] if old.get("status") == status else now,
            "observedGeneration": self.status["observedGeneration"],
        }
        self.status["conditions"] = [*(c for c in found if c["type"] != kind), new]
        return (old.get("status"), old.get("reason")) != (status, reason)

    def note(self, reason: str, message: str, kind: Literal["Normal", "Warning"] = "Normal") -> None:
        self.notes.append(Note(kind, reason, message))

    def decision(self) -> SetDecision:
        # Written when everything else has been done: what failed before has worked now.
        kept = [c for c in self.status.get("conditions", ()) if c["type"] != conditions.RECONCILED]
        if kept:
            self.status["conditions"] = kept
        else:
            self.status.pop("conditions", None)
        return SetDecision(
            tuple(self.create),
            tuple(self.change),
            tuple(self.delete),
            self.status,
            tuple(self.notes),
            self.look_again_after,
        )


# --- a Workspace of the set


def _name(workspace: Object) -> str:
    return str(workspace["metadata"]["name"])


def _names(workspaces: Iterable[Object]) -> str:
    return ", ".join(sorted(map(_name, workspaces)))


def _number(workspace: Object) -> int:
    number = _name(workspace).rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _leaving(workspace: Object) -> bool:
    return "deletionTimestamp" in workspace["metadata"]


def _template_of(wanted: InferenceSet, config: str) -> str:
    """What a Workspace of the present template has in the annotation `TEMPLATE`. Fields at their defaults are not in it: a
    default that a later version adds changes nothing."""
    replica = wanted.replica("").to_object()
    parts = {
        "resource": replica.get("resource", {}),
        "inference": replica["inference"],
        **({CONFIG: config} if config else {}),
    }
    return json.dumps({**wanted.spec.template.metadata.to_object(), **parts}, sort_keys=True, separators=(",", ":"))


def _template(workspace: Object) -> str:
    return str((workspace["metadata"].get("annotations") or {}).get(TEMPLATE, ""))


def _last(workspace: Object) -> Mapping[str, Mapping[str, Any]]:
    """The template it was last made from. Anybody may have written something else there."""
    try:
        found = json.loads(_template(workspace))
    except (ValueError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, Mapping)} if isinstance(found, Mapping) else {}


def _conditions(workspace: Object) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = (workspace.get("status") or {}).get("conditions") or ()
    return found


def _words(problems: Iterable[Problem]) -> str:
    """Problems as one text: cause and remedy of each."""
    return "; ".join(f"{p.field}: {p.message}" + (f" – {p.remedy}" if p.remedy else "") for p in problems)
