"""Kubernetes Events: what happened to an object, where ``kubectl describe`` shows it.

An event that repeats itself is counted up instead of made anew, and nobody can flood the API server with them."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kaito_core.kube.errors import ApiError
from kaito_core.kube.kinds import EVENTS, Object

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

QUIET = 60.0
"""Seconds within which the same event of the same object is not written again (karpenter: two minutes)."""

REMEMBERED = 1024
MESSAGE = 1024
"""Characters that the API server accepts."""

log = logging.getLogger("kaito_core.kube.events")


class Recorder:
    """Writes Events for one component. Never raises: an event is a courtesy."""

    def __init__(self, client: Client, component: str, clock: Callable[[], float] = time.time) -> None:
        self._client = client
        self._component = component
        self._clock = clock
        self._said: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._lock = threading.Lock()

    def event(self, about: Object, kind: str, reason: str, message: str) -> None:
        """Say it; ``kind`` is ``Normal`` or ``Warning``."""
        metadata, now = about["metadata"], self._clock()
        # The same words about the same object have the same name, so that a restarted controller counts on, too.
        words = "\0".join((metadata.get("uid", ""), kind, reason, message))
        name = f"{metadata['name'][:200]}.{hashlib.sha256(words.encode()).hexdigest()[:16]}"
        with self._lock:
            last, count = self._said.get(name, (-QUIET, 0))
            if now - last < QUIET:
                return
            self._said[name] = (now, count + 1)
            self._said.move_to_end(name)
            while len(self._said) > REMEMBERED:
                self._said.popitem(last=False)
        try:
            self._write(about, name, kind, reason, message[:MESSAGE], count, now)
        except ApiError as e:
            log.debug("the event %s could not be written: %s", reason, e)

    def _write(self, about: Object, name: str, kind: str, reason: str, message: str, count: int, now: float) -> None:
        metadata = about["metadata"]
        namespace = metadata.get("namespace") or "default"
        time_text = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if count:
            self._client.patch(EVENTS, name, namespace, {"count": count + 1, "lastTimestamp": time_text})
            return
        self._client.create(
            EVENTS,
            {
                "apiVersion": EVENTS.api_version,
                "kind": EVENTS.kind,
                "metadata": {"name": name, "namespace": namespace},
                "involvedObject": {
                    "apiVersion": about["apiVersion"],
                    "kind": about["kind"],
                    "name": metadata["name"],
                    "namespace": metadata.get("namespace", ""),
                    "uid": metadata.get("uid", ""),
                    "resourceVersion": metadata.get("resourceVersion", ""),
                },
                "type": kind,
                "reason": reason,
                "message": message,
                "count": 1,
                "firstTimestamp": time_text,
                "lastTimestamp": time_text,
                "source": {"component": self._component},
                "reportingComponent": self._component,
            },
        )
