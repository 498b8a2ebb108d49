"""The workers of a controller: take a key, reconcile it, and decide when to look at it again.

What follows from a result is controller-runtime's contract: an error is tried again with a growing delay, a terminal one
is not, a wish to be called later starts afresh, success waits for the next change."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kaito_core.controller.json_log import about
from kaito_core.kube.workqueue import Key, WorkQueue
from kaito_core.problems import KaitoError

log = logging.getLogger("kaito_core.controller.loop")


@dataclass(frozen=True)
class Result:
    """How a reconcile ended."""

    requeue_after: float | None = None
    """Seconds; None: the next change of anything will do."""


class TerminalError(Exception):
    """Trying again would not help."""


class LoopMetrics(Protocol):
    """Told how reconciles go; ``result`` is ``success``, ``error`` or ``requeue_after``."""

    def started(self, controller: str, workers: int) -> None: ...

    def active(self, controller: str, workers: int) -> None: ...

    def reconciled(self, controller: str, result: str, seconds: float) -> None: ...

    def failed(self, controller: str, *, terminal: bool, panic: bool) -> None: ...


class Controller:
    """Some threads that work on one queue. ``name`` is what a key names (``workspace``): so the log calls it."""

    def __init__(
        self,
        name: str,
        queue: WorkQueue,
        reconcile: Callable[[str, str], Result],
        workers: int,
        *,
        metrics: LoopMetrics | None = None,
    ) -> None:
        self._name = name
        self._queue = queue
        self._reconcile = reconcile
        self._workers = workers
        self._metrics = metrics
        self._active = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        if self._metrics:
            self._metrics.started(self._name, self._workers)
        for number in range(self._workers):
            threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True).start()

    def stop(self, timeout: float = 30.0) -> bool:
        """Take nothing more, and wait for what is going on; whether all of it ended in time."""
        self._queue.close()
        return self._queue.drained(timeout)

    def _work(self) -> None:
        while (key := self._queue.get()) is not None:
            self._count(1)
            began = time.monotonic()
            with about(namespace=key[0], **{self._name: key[1]}, reconcileID=uuid.uuid4().hex[:12]):
                outcome = self._one(key)
            self._count(-1)
            if self._metrics:
                self._metrics.reconciled(self._name, outcome, time.monotonic() - began)
            self._queue.done(key)

    def _one(self, key: Key) -> str:
        """Reconcile one key and queue it again as its result asks for; never raises."""
        try:
            after = self._reconcile(*key).requeue_after
        except TerminalError as e:
            log.error("given up: %s", e)
            self._queue.forget(key)
            self._failed(terminal=True)
            return "error"
        except KaitoError as e:
            log.warning("failed, trying again: %s", "; ".join(p.message for p in e.problems))
            self._failed()
        except BaseException:
            # One Workspace that breaks us, and be it that a plugin calls sys.exit(), shall not stop the others.
            log.exception("broke, trying again")
            self._failed(panic=True)
        else:
            self._queue.forget(key)
            if after is None:
                return "success"
            self._queue.add_after(key, after)
            return "requeue_after"
        self._queue.add_rate_limited(key)
        return "error"

    def _failed(self, *, terminal: bool = False, panic: bool = False) -> None:
        if self._metrics:
            self._metrics.failed(self._name, terminal=terminal, panic=panic)

    def _count(self, change: int) -> None:
        with self._lock:
            self._active += change
            if self._metrics:
                self._metrics.active(self._name, self._active)
