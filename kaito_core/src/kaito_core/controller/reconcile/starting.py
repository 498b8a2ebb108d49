"""Machines that wait for pods. A pod may never be made (a quota, an admission webhook, a suspended Job), may never start and may never
answer, while its machine is paid for. So each wait has a limit, and its clock starts at something that is there without the pod: the
Job or the StatefulSet, and the conditions of the Workspace.

what is waited for                          limit                   then
a pod that is not made                      ``NO_POD_SECONDS``      the machine is given back, and got again later
a pod in which no container runs            ``NOT_STARTED_SECONDS`` the same
a server that runs and is never ready       ``NOT_READY_SECONDS``   the same
a pod that cannot start by itself           ``outcome.PATIENCE``    the end: the same would only be found out again
a machine that does not join                the provisioner's own   the next offer
objects that the API server refuses         ``NO_POD_SECONDS``      the machine is given back, and got again later
pods that do not end                        ``machines.GONE``       the machine is given back

What keeps pods from being made may pass, so it is no end of the Workspace: a machine is got again, later each time. A suspended Job
waits without a machine until it is resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

from kaito_core.api import conditions
from kaito_core.controller.reconcile.case import Case, find, seconds_or_never, time_of
from kaito_core.controller.reconcile.diagnosis import containers, is_alive, is_running
from kaito_core.kube.kinds import Object

NO_POD_SECONDS: Final = 600.0
"""Longer than the Job controller waits between two tries (320 s before the last one), and than a pod may take to end (120 s)."""

NOT_STARTED_SECONDS: Final = 1800.0
"""Within which an image of 20 GB is pulled even at 100 Mbit/s."""

NOT_READY_SECONDS: Final = 4 * 3600.0
"""Within which the largest models are fetched and loaded; on one machine, a probe ends a server that hangs long before."""

FIRST_RETRY_SECONDS: Final = 600.0
LONGEST_RETRY_SECONDS: Final = 6 * 3600.0
"""From giving a machine back until another one is got for the same: the first time, and at most; doubled each time."""

FAILED_CREATE: Final = "FailedCreate"
"""Kubernetes' own word, in the Events of a Job or a StatefulSet."""
SUSPENDED: Final = "JobSuspended"
POD_MISSING: Final = "PodMissing"
POD_NOT_STARTED: Final = "PodNotStarted"
POD_NOT_READY: Final = "PodNotReady"

RETRIED: Final = frozenset({FAILED_CREATE, SUSPENDED, POD_MISSING, POD_NOT_STARTED, POD_NOT_READY})
"""How an attempt ends whose machine waited in vain: the same is tried again, later each time."""

NEVER_HELD: Final = frozenset({"InsufficientCapacity", "QuotaExceeded", "Unsupported"})
"""How an attempt ends that came to no machine: it does not count, and does not end a row of attempts that do."""

REFUSED: Final = (
    "mend what refuses it (a ResourceQuota, a LimitRange, an admission webhook); it is tried again by itself"
)


@dataclass(frozen=True)
class Wait:
    """What a machine waits for."""

    reason: str
    message: str
    since: float
    """Seconds since the epoch."""
    limit: float
    """Seconds."""

    def is_over(self, now: float) -> bool:
        return now - self.since > self.limit

    @property
    def last_words(self) -> str:
        """Why the machine is given back."""
        return f"{self.message}; the machine was given back after {self.limit / 60:.0f} minutes"


def waiting_for(case: Case, runs: Object, pods: Sequence[Object], wanted: int, condition: str) -> Wait | None:
    """What the machines of a Job or a StatefulSet wait for; None when as many of its pods run as are wanted. ``condition`` is the one
    that says so, with the time of its last change."""
    alive = [p for p in pods if is_alive(p)]
    missing = wanted - len(alive)
    if suspended(runs) or missing > 0:
        since = _since(case, runs, condition, pods)
        return Wait(
            *_why_missing(case, runs, f"{missing} of {wanted} pods" if wanted > 1 else "the pod"), since, NO_POD_SECONDS
        )
    idle = [p for p in alive if not is_running(p)]
    if idle:
        name = idle[0]["metadata"]["name"]
        message = f"no container of the pod runs yet: `kubectl describe pod {name}` may say why"
        since = _since(case, runs, condition, idle)
        return Wait(POD_NOT_STARTED, message, since, NOT_STARTED_SECONDS)
    return None


def _why_missing(case: Case, runs: Object, what: str) -> tuple[str, str]:
    """The reason in one word, and in many."""
    if suspended(runs):
        held = "by a queue such as Kueue or by a person: it goes on when it is resumed"
        return SUSPENDED, f"the Job is suspended (spec.suspend), {held}"
    if case.observed.failed_create:
        return FAILED_CREATE, f"{what} cannot be made: {case.observed.failed_create} – {REFUSED}"
    kind = "statefulset" if case.serving else "job"
    return POD_MISSING, f"{what} was not made yet: `kubectl describe {kind} {case.name}` may say why"


EVENTS_AFTER_SECONDS: Final = 5.0
"""Seconds that a Job or a StatefulSet must be there before its Events are read: as a rule its pods come at once."""


def lacks_pods(case: Case) -> Object | None:
    """The Job or the StatefulSet that has been there for a while without all of its pods, and of which its Events may say why."""
    if case.deleting:
        return None
    runs, pods, wanted = case.job, case.observed.pods, 1
    if case.serves:
        runs, pods = case.observed.stateful_set, case.observed.servers
        wanted = int(((runs or {}).get("spec") or {}).get("replicas") or 1)
    elif case.finished or not case.job_is_current or suspended(runs or {}):
        return None
    if (
        runs is None
        or case.observed.now - seconds_or_never(runs["metadata"].get("creationTimestamp")) < EVENTS_AFTER_SECONDS
    ):
        return None
    return runs if sum(map(is_alive, pods)) < wanted else None


def not_ready(case: Case, runs: Object, condition: str) -> Wait:
    """The wait for a server that runs."""
    message = "the pod runs and is not ready: see its log"
    return Wait(POD_NOT_READY, message, _since(case, runs, condition, ()), NOT_READY_SECONDS)


def suspended(runs: Object) -> bool:
    """Whether a Job makes no pods because its spec.suspend says so."""
    return bool((runs.get("spec") or {}).get("suspend"))


def refused_for_too_long(case: Case) -> str:
    """What the API server says to the objects that would run on the present machine, once it has said no for too long; else empty."""
    if case.attempt is None or case.job is not None or case.observed.stateful_set is not None:
        return ""
    said = find((case.workspace.get("status") or {}).get("conditions"), conditions.RECONCILED)
    if said is None:
        return ""
    since = max(seconds_or_never(said.get("lastTransitionTime")), seconds_or_never(case.attempt.get("started")))
    if case.observed.now - since <= NO_POD_SECONDS:
        return ""
    return f"{said.get('message', '')}; the machine was given back after {NO_POD_SECONDS / 60:.0f} minutes"


def _since(case: Case, runs: Object, condition: str, pods: Sequence[Object]) -> float:
    """When everything was there that these pods need, the one before them had ended, and it was said that none runs."""
    times = [seconds_or_never(runs["metadata"].get("creationTimestamp")), *map(_end_of, pods)]
    for kind, status in ((condition, "False"), (conditions.RESOURCE_READY, "True")):
        said = find(case.status.get("conditions"), kind) or {}
        if said.get("status") == status:
            times.append(seconds_or_never(said.get("lastTransitionTime")))
        elif kind == condition and (case.serving or suspended(runs) or not pods):
            times.append(case.observed.now)  # it is said in this very decision
    return max(times)


def _end_of(pod: Object) -> float:
    """When the pod, or the container of it that ran last, ended: from then on, the next one is waited for."""
    ended = [c.get("state", {}).get("terminated") or {} for c in containers(pod.get("status", {}))]
    times = [pod["metadata"].get("deletionTimestamp"), *(e.get("finishedAt") for e in ended)]
    return max(map(seconds_or_never, times))


# --- and again, later


def retry_in(case: Case) -> float:
    """Seconds until a machine may be got again after others have waited in vain; not positive when it may be now."""
    spent = _in_vain(case)
    if not spent:
        return 0.0
    delay = min(FIRST_RETRY_SECONDS * float(1 << min(len(spent) - 1, 30)), LONGEST_RETRY_SECONDS)
    return seconds_or_never(spent[0].get("ended") or case.time) + delay - case.observed.now


def retry_words(case: Case) -> str:
    """Why none is got now, and when."""
    spent = _in_vain(case)
    last = spent[0].get("message", "") if spent else ""
    at = time_of(case.observed.now + retry_in(case))
    return f"a machine is got again at {at} (tried {len(spent)} time{'s' if len(spent) > 1 else ''} in vain): {last}"


def in_vain(case: Case) -> Mapping[str, Any] | None:
    """The last attempt, when its machine has waited in vain, given back by now or not."""
    last = case.attempts[-1] if case.attempts else None
    return last if last and last.get("reason") in RETRIED else None


def _in_vain(case: Case) -> list[dict[str, Any]]:
    """The last attempts whose machines waited in vain, the newest first. An endpoint with the policy "always" tries all its offers
    again in a while: a machine that never joins counts there too."""
    counted = RETRIED | ({"TimedOut"} if case.serving else frozenset())
    row = takewhile(lambda a: a.get("reason") in counted | NEVER_HELD, reversed(case.attempts))
    revision = case.history.current.number
    return [a for a in row if a["reason"] in counted and (case.serving or a.get("revision") == revision)]
