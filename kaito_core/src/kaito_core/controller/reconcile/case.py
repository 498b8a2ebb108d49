"""One Workspace while it is being decided about: what it is, what is known, and what has been decided so far.

The phases (`accept`, `nodes`, `workload`, `outcome`, `cleanup`) read and fill a `Case`; nothing in here leaves the process.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal

from kaito_core.api import conditions, labels
from kaito_core.api.conditions import State
from kaito_core.api.inference import IDLE_SECONDS
from kaito_core.api.resource import seconds_of
from kaito_core.controller.reconcile.decision import Decision, Deletion, Endpoint, Ensure, Note, Observe, Release
from kaito_core.controller.reconcile.observed import Observed, World
from kaito_core.controller.reconcile.ownership import REMOVED_SECONDS, are_removed, in_the_way, needed, own, refused
from kaito_core.controller.reconcile.revisions import History, history
from kaito_core.kube.kinds import CONFIG_MAPS, Kind, Object
from kaito_core.problems import KaitoError

ConditionStatus = Literal["True", "False", "Unknown"]

SHOWN = 1024
"""Characters of a condition's message: enough for a cause and a remedy, little enough for ``kubectl describe``."""

KEPT_ATTEMPTS = 50
"""Attempts that ``status.attempts`` holds, the newest ones: half of what the CRD takes. Only the last one can hold a machine."""


class Case:
    """See the module. ``status`` starts as it was last written and ends as it shall be."""

    def __init__(self, workspace: Object, observed: Observed, world: World) -> None:
        self.workspace = workspace
        self.observed = own(workspace, observed)
        self.world = world
        self.status: dict[str, Any] = copy.deepcopy(workspace.get("status") or {})
        self.status["attempts"] = attempts_of(self.workspace, self.status)
        self.history: History = history(workspace, self.observed.revisions)
        self.finalizer: bool | None = None
        self.annotations: dict[str, str] = {}
        self.silent = False
        """Write no status this time."""
        self.ask: Ensure | Observe | Release | None = None
        self.create: list[tuple[Kind, Object]] = []
        self.apply: list[tuple[Kind, Object]] = []
        self.endpoint: Endpoint | None = None
        self.serving = False
        """Whether it is decided about the endpoint, and not about a job."""
        self.delete: list[Deletion] = []
        self.notes: list[Note] = []
        self.again = False
        self.look_again_after: float | None = None
        self.name_conflicts = in_the_way(self.observed.name_conflicts, self.needs)
        """Objects of other owners that keep the Workspace from being run."""
        if self.name_conflicts:
            self.observed = replace(self.observed, planned=refused(workspace, self.name_conflicts))

    # --- what is

    @property
    def name(self) -> str:
        return str(self.workspace["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.workspace["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        return str(self.workspace["metadata"]["uid"])

    @property
    def generation(self) -> int:
        return int(self.workspace["metadata"].get("generation", 0))

    @property
    def deleting(self) -> bool:
        return "deletionTimestamp" in self.workspace["metadata"]

    @property
    def has_finalizer(self) -> bool:
        return labels.FINALIZER in self.workspace["metadata"].get("finalizers", ())

    @property
    def finished(self) -> bool:
        """Whether this very revision has come to its end, well or not."""
        return bool(self.status.get("finishedRevision") == self.history.current.hash)

    @property
    def job(self) -> Object | None:
        return self.observed.job

    @property
    def job_is_current(self) -> bool:
        """Whether the job is this revision's, and to stay."""
        if self.job is None or "deletionTimestamp" in self.job["metadata"]:
            return False
        annotations = self.job["metadata"].get("annotations", {})
        return bool(annotations.get(labels.REVISION_HASH) == self.history.current.hash)

    @property
    def tunes(self) -> bool:
        return bool(self.workspace.get("tuning"))

    @property
    def policy(self) -> str:
        """When the model is served: ``onDemand``, ``always`` or ``never`` (`kaito_core.api.workspace.Workspace.serving_policy`)."""
        said = (self.workspace.get("inference") or {}).get("policy")
        if said or not self.tunes:
            return str(said or "always")
        annotation = (self.workspace["metadata"].get("annotations") or {}).get(labels.SERVE_AFTER_TUNING)
        known = annotation in labels.ANNOTATION_VALUES[labels.SERVE_AFTER_TUNING]
        return str(annotation if known else self.world.settings.serve_after_tuning)

    @property
    def serves(self) -> bool:
        """Whether there is something to serve, and it shall be. On demand, somebody must be there to hold the first request."""
        there = bool(self.workspace.get("inference")) if not self.tunes else self.finished and "adapter" in self.status
        policy = self.policy
        return (
            there
            and not self.deleting
            and (policy == "always" or (policy == "onDemand" and self.observed.activator is not None))
        )

    @property
    def idle_after(self) -> float:
        """Seconds without a request after which an endpoint on demand goes to sleep."""
        return seconds_of(str((self.workspace.get("inference") or {}).get("idleAfter", ""))) or IDLE_SECONDS

    @property
    def needs(self) -> list[tuple[Kind, str]]:
        """The objects that it is run with (`kaito_core.controller.reconcile.ownership.needed`)."""
        if not (self.serves or self.tunes):
            return []
        given = ((self.workspace.get("tuning") or {}).get("checkpoints") or {}).get("volumeSource")
        claim = not given and bool(self.world.settings.checkpoint_storage_class)
        return list(needed(self.workspace, serving=self.serves, claim=claim))

    # --- attempts to get machines

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """All that are remembered, the oldest first."""
        found: list[dict[str, Any]] = self.status.setdefault("attempts", [])
        return found

    @property
    def attempt(self) -> dict[str, Any] | None:
        """The one that is going on."""
        return self.attempts[-1] if self.attempts and not self.attempts[-1].get("ended") else None

    @property
    def request_id(self) -> str:
        """The name of the present wish for machines: the same until its attempt has ended, whatever crashes in between."""
        return request_id(self.uid, self.attempts)

    def begin_attempt(self, attempt: Mapping[str, Any]) -> None:
        """Add an attempt; the oldest ones, which all have ended, make room. Its number is counted on, and not by what is left."""
        number = next_number(self.attempts)
        begun = {"started": self.time, "revision": self.history.current.number}
        self.attempts.append({**attempt, **begun, **({"number": number} if number else {})})
        del self.attempts[:-KEPT_ATTEMPTS]

    def end_attempt(self, reason: str, message: str) -> None:
        if self.attempt is not None:
            self.attempt.update(ended=self.time, reason=reason, message=message[:SHOWN])

    # --- what is decided

    def end(self, kind: Kind, runs: Object, *, foreground: bool = False) -> None:
        """Take away a job or an endpoint, and the ConfigMap that is its own."""
        metadata = runs["metadata"]
        config = (metadata.get("annotations") or {}).get(labels.CONFIG)
        if config:  # first, since its name stands nowhere once the other has gone
            self.delete.append(Deletion(CONFIG_MAPS, config))
        self.delete.append(Deletion(kind, metadata["name"], metadata["uid"], foreground=foreground))

    @property
    def time(self) -> str:
        """Now, as Kubernetes writes it."""
        return time_of(self.observed.now)

    def set(self, kind: str, status: ConditionStatus, reason: str, message: str = "") -> bool:
        """Set a condition; whether its status or reason is another one than before."""
        found: list[dict[str, Any]] = self.status.setdefault("conditions", [])
        new: dict[str, Any] = {"type": kind, "status": status, "reason": reason, "message": _short(message)}
        return set_condition(found, new, self.time, self.generation)

    def stays_accepted(self) -> None:
        """Say that the plan which runs is the accepted one: its warnings stay, and what was refused meanwhile has been taken back."""
        old = find(self.status.get("conditions"), conditions.ACCEPTED) or {}
        message = old.get("message", "") if old.get("status") == "True" else ""
        self.set(conditions.ACCEPTED, "True", "Planned", message)

    def unset(self, *kinds: str) -> None:
        """Forget conditions that mean nothing any more."""
        found = [c for c in self.status.get("conditions", []) if c["type"] not in kinds]
        self.status["conditions"] = found

    def state(self, state: State) -> None:
        self.status["state"] = state

    def note(self, kind: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        self.notes.append(Note(kind, reason, _short(message)))

    def failed(self, message: str, *, note: str = "WorkspaceFailed") -> None:
        """The end of this revision: it did not work, and will not be tried again before something is changed. An endpoint is tried
        again at the next request, or after a while."""
        if self.serving:
            self.waiting(message)
            self.endpoint = Endpoint(words=message, refused=True)
            self.status["serving"] = {"phase": "Failed", "since": self.time}
            return
        if self.set(conditions.WORKSPACE_SUCCEEDED, "False", "workspaceFailed", message):
            self.note("Warning", note, message)
        self.state("Failed")
        self.status.pop("adapter", None)  # of an earlier revision: it is not what was asked for now
        self.status["finishedRevision"] = self.history.current.hash

    def pending(self, message: str) -> None:
        """It is on its way, and this is what is being waited for."""
        self.set(conditions.RESOURCE_READY, "False", "workspaceResourceStatusNotReady", message)
        self.waiting(message)

    def waiting(self, message: str, reason: str = "") -> bool:
        """Neither running nor serving yet, for this reason; whether it is another one than before."""
        if not self.serving:
            self.state("Pending")
            return self.set(conditions.WORKSPACE_SUCCEEDED, "False", "workspacePending", message)
        self.endpoint = Endpoint(words=message)
        if not self.tunes:
            self.set(conditions.WORKSPACE_SUCCEEDED, "False", "workspacePending", message)
            self.state("NotReady")
        return self.set(conditions.INFERENCE_READY, "False", reason or "WorkspaceInferenceStatusPending", message)

    def look_for_names(self) -> None:
        """Come back soon where what is in the way goes by itself."""
        if are_removed(self.workspace, self.name_conflicts):
            self.look_again(REMOVED_SECONDS)

    def look_again(self, seconds: float) -> None:
        """Come back, at the latest, after so many seconds."""
        self.look_again_after = min(seconds, self.look_again_after or seconds)

    def decision(self) -> Decision:
        if self.ask is None and not self.again:  # the last one of a reconcile: it is written when all of it has worked
            self.unset(conditions.RECONCILED)
        status = {k: v for k, v in self.status.items() if v not in (None, "", [], {})}
        theirs = {(kind, obj["metadata"]["name"]) for kind, obj in self.observed.name_conflicts}
        return Decision(
            finalizer=self.finalizer,
            annotations=self.annotations,
            ask=self.ask,
            create=tuple(made for made in self.create if _place(made) not in theirs),
            apply=tuple(made for made in self.apply if _place(made) not in theirs),
            endpoint=self.endpoint,
            delete=tuple(self.delete),
            status=None if self.silent else status,
            notes=tuple(self.notes),
            again=self.again or self.ask is not None,
            look_again_after=self.look_again_after,
        )


def _place(made: tuple[Kind, Object]) -> tuple[Kind, str]:
    return made[0], made[1]["metadata"]["name"]


def attempts_of(workspace: Object, status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All attempts that are known, the oldest first; the first one may be written down with the finalizer alone."""
    first = first_attempt(workspace)
    return list(status.get("attempts") or ([first] if first else []))


def first_attempt(workspace: Object) -> dict[str, Any] | None:
    """The attempt that was written down with the finalizer. Anybody may have written something else there."""
    try:
        found = json.loads(workspace["metadata"].get("annotations", {}).get(labels.ASKED, ""))
        seconds(found["started"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    kinds: dict[str, Any] = {"revision": int, "pricePerHour": (int, float)}
    known = {"provisioner", "instanceType", "region", "capacityType", "started", *kinds}
    return (
        found
        if found.get("provisioner") and all(k in known and isinstance(v, kinds.get(k, str)) for k, v in found.items())
        else None
    )


def request_id(uid: str, attempts: Sequence[Mapping[str, Any]]) -> str:
    """The name of the wish for machines that comes after the attempts that have ended.

    Eleven characters, a letter first: the form that agent pools of AKS are limited to."""
    going_on = bool(attempts) and not attempts[-1].get("ended")
    number = number_of(attempts) if going_on else next_number(attempts)
    return "ws" + hashlib.sha256(f"{uid}/{number}".encode()).hexdigest()[:9]


def number_of(attempts: Sequence[Mapping[str, Any]]) -> int:
    """Which attempt of its Workspace the last one is, counted from 0. One without a number is older than numbers, or the first:
    until then, nothing was dropped from the list."""
    number = attempts[-1].get("number")
    return number if isinstance(number, int) else len(attempts) - 1


def next_number(attempts: Sequence[Mapping[str, Any]]) -> int:
    """Which one the next attempt will be. It only ever grows: a request id names one machine, for ever."""
    return number_of(attempts) + 1 if attempts else 0


def _short(message: str) -> str:
    return message if len(message) <= SHOWN else message[: SHOWN - 1] + "…"


def set_condition(found: list[dict[str, Any]], new: dict[str, Any], now: str, generation: int) -> bool:
    """Put a condition in the place of the one of its type; whether its status or reason is another one than before."""
    old = next((c for c in found if c["type"] == new["type"]), None)
    changed = old is None or (old["status"], old.get("reason")) != (new["status"], new["reason"])
    moved = old is None or old["status"] != new["status"]
    new["lastTransitionTime"] = now if moved or old is None else old.get("lastTransitionTime", now)
    new["observedGeneration"] = generation
    if old is None:
        found.append(new)
    else:
        old.clear()
        old.update(new)
    return changed


def error_patch(obj: Object, error: Exception, now: float) -> Object:
    """The merge patch of the status that says what failed, and nothing else; refused when the object is not the one that is known."""
    metadata = obj["metadata"]
    found = copy.deepcopy((obj.get("status") or {}).get("conditions") or [])
    said = (
        words(error.problems)
        if isinstance(error, KaitoError)
        else f"the controller broke: {type(error).__name__}: {error}"
    )
    message = _short(f"{said}; trying again")
    new = {"type": conditions.RECONCILED, "status": "False", "reason": "ReconcileError", "message": message}
    set_condition(found, new, time_of(now), int(metadata.get("generation", 0)))
    return {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": {"conditions": found}}


def time_of(seconds: float) -> str:
    """A time in seconds since the epoch, as Kubernetes writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(time: str) -> float:
    """A time as Kubernetes writes it, in seconds since the epoch."""
    return datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp()


def seconds_or_never(time: object) -> float:
    """The same of what anybody may have written; minus infinity when it is no time."""
    try:
        return seconds(str(time))
    except ValueError:
        return -math.inf


def words(problems: Any) -> str:
    """Problems as one text for a condition: cause and remedy of each."""
    return "; ".join(_problem(p) for p in problems)


def _problem(problem: Any) -> str:
    where = f"{problem.field}: " if problem.field else ""
    return f"{where}{problem.message}" + (f" – {problem.remedy}" if problem.remedy else "")


def find(found: list[Mapping[str, Any]] | None, kind: str) -> Mapping[str, Any] | None:
    """The condition of this type in an object's list."""
    return next((c for c in found or () if c.get("type") == kind), None)
