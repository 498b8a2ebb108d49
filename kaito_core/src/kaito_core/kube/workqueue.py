"""The work queue of a controller, with the semantics of client-go's: each key is worked on by one worker at a time, however
often it is added; a key that is added while it is worked on is worked on once more; failures back off, each key by itself."""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

Key = tuple[str, str]
"""Namespace and name."""

FIRST_DELAY, LONGEST_DELAY = 0.005, 60.0
"""Seconds of the exponential back-off (client-go begins with 5 ms too; its longest is 1,000 s, too long for a person)."""


class QueueMetrics(Protocol):
    """Told what goes on in a queue; all times in seconds."""

    def depth(self, queue: str, depth: int) -> None: ...

    def added(self, queue: str) -> None: ...

    def retried(self, queue: str) -> None: ...

    def waited(self, queue: str, seconds: float) -> None: ...

    def worked(self, queue: str, seconds: float) -> None: ...


class WorkQueue:
    """Keys to be worked on. Safe between threads."""

    def __init__(
        self, name: str, *, metrics: QueueMetrics | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self._metrics = metrics
        self._clock = clock
        self._ready: deque[Key] = deque()
        self._dirty: dict[Key, float] = {}
        """Wants work, since when."""
        self._processing: dict[Key, float] = {}
        """Is being worked on, since when."""
        self._later: list[tuple[float, Key]] = []
        self._due: dict[Key, float] = {}
        """The earliest time of each key in `_later`; other entries of the heap are stale."""
        self._failures: dict[Key, int] = {}
        self._closed = False
        self._changed = threading.Condition()

    def add(self, key: Key) -> None:
        """This key wants work, now."""
        with self._changed:
            self._add(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """This key wants work then; an earlier time that was given before stays."""
        if seconds <= 0:
            self.add(key)
            return
        with self._changed:
            due = self._clock() + seconds
            if self._closed or self._due.get(key, due + 1) <= due:
                return
            self._due[key] = due
            heapq.heappush(self._later, (due, key))
            # All of them: whichever worker is free then has to know when to wake up.
            self._changed.notify_all()

    def add_rate_limited(self, key: Key) -> None:
        """This key failed: again, later each time."""
        with self._changed:
            failures = self._failures.get(key, 0)
            self._failures[key] = failures + 1
        if self._metrics:
            self._metrics.retried(self.name)
        self.add_after(key, min(FIRST_DELAY * 2 ** min(failures, 30), LONGEST_DELAY))

    def forget(self, key: Key) -> None:
        """This key worked: its back-off begins anew."""
        with self._changed:
            self._failures.pop(key, None)

    def failures(self, key: Key) -> int:
        """How often it failed in a row."""
        return self._failures.get(key, 0)

    def get(self, timeout: float | None = None) -> Key | None:
        """The next key, which must be given back with `done`; None when the queue is closed, or time is up."""
        end = None if timeout is None else self._clock() + timeout
        with self._changed:
            while True:
                self._ripen()
                if self._ready:
                    key = self._ready.popleft()
                    now = self._clock()
                    if self._metrics:
                        self._metrics.waited(self.name, now - self._dirty[key])
                        self._metrics.depth(self.name, len(self._ready))
                    self._processing[key] = now
                    del self._dirty[key]
                    return key
                if self._closed or (end is not None and self._clock() >= end):
                    return None
                waits = [t - self._clock() for t in (end, self._later[0][0] if self._later else None) if t is not None]
                self._changed.wait(max(0.0, min(waits)) if waits else None)

    def done(self, key: Key) -> None:
        """The worker has ended with it; if it was added in between, it is up again."""
        with self._changed:
            began = self._processing.pop(key, None)
            if self._metrics and began is not None:
                self._metrics.worked(self.name, self._clock() - began)
            if key in self._dirty:
                self._ready.append(key)
                if self._metrics:
                    self._metrics.depth(self.name, len(self._ready))
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more is taken, also of what waits: whoever comes after us looks at everything anyway. What is being worked on
        ends in peace; see `drained`."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._dirty.clear()
            self._later.clear()
            self._due.clear()
            if self._metrics:
                self._metrics.depth(self.name, 0)
            self._changed.notify_all()

    def drained(self, timeout: float) -> bool:
        """Wait until nobody works on anything any more; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._processing, timeout)

    def __len__(self) -> int:
        return len(self._ready)

    def _add(self, key: Key) -> None:
        if self._closed or key in self._dirty:
            return
        self._dirty[key] = self._clock()
        if self._metrics:
            self._metrics.added(self.name)
        if key not in self._processing:
            self._ready.append(key)
            self._changed.notify()
        if self._metrics:
            self._metrics.depth(self.name, len(self._ready))

    def _ripen(self) -> None:
        while self._later and self._later[0][0] <= self._clock():
            due, key = heapq.heappop(self._later)
            if self._due.get(key) == due:
                del self._due[key]
                self._add(key)
