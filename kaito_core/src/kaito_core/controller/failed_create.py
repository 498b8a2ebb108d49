"""Why a Job or a StatefulSet has no pods, in the words of the API server: Kubernetes leaves them in Events, and nowhere else."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from kaito_core.controller.reconcile.starting import FAILED_CREATE
from kaito_core.kube.errors import ApiError
from kaito_core.kube.kinds import EVENTS, Object

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

log = logging.getLogger("kaito_core.controller")


def failed_create(client: Client, owner: Object) -> str:
    """The newest ``FailedCreate`` among the Events of this object; empty when there is none, or they cannot be read. Asked for only
    while pods are missing: the Events of a cluster are too many to be watched."""
    metadata = owner["metadata"]
    about = f"involvedObject.uid={metadata['uid']},reason={FAILED_CREATE}"
    try:
        events, _ = client.list(EVENTS, metadata["namespace"], fields=about)
    except ApiError as e:
        log.warning("why %s has no pods is not known: %s", metadata["name"], e)
        return ""
    newest = max(events, key=_last_time, default=None)
    message = str((newest or {}).get("message") or "")
    # A Job's pods have random names. With them, the same words would be news at each try.
    return re.sub(rf'"{re.escape(metadata["name"])}-[a-z0-9]{{5}}"', f'"{metadata["name"]}-…"', message)


def _last_time(event: Object) -> str:
    series = event.get("series") or {}
    times = (
        series.get("lastObservedTime"),
        event.get("lastTimestamp"),
        event.get("eventTime"),
        event["metadata"].get("creationTimestamp"),
    )
    return max(str(t) for t in times if t)
