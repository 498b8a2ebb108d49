"""What the activator knows of one endpoint, and who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from kaito_core.serving.activator_http import Limits
from kaito_core.serving.errors import HttpError

if TYPE_CHECKING:
    from kaito_core.serving.activator_gate import Gate

Key = tuple[str, str]
"""Namespace and name."""

AGAIN: Final = 30
"""Seconds after which a client that got a 503 may try again: an endpoint takes minutes to come, and OpenAI's clients heed a
``Retry-After`` of up to a minute."""

SOON: Final = 10
"""The same where the reason passes sooner: a full queue, another leader."""


class Unserved(Exception):
    """The request is answered with an error of ours."""

    def __init__(self, status: int, message: str, code: str, again: int | None = None) -> None:
        super().__init__(message)
        self.status, self.again = status, again
        self.body: dict[str, Any] = HttpError(status, message, code=code).body()


class Waiter:
    """One request that waits."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.refusal: Unserved | None = None


class Endpoint:
    """What is known of one endpoint, and who waits for it. Belongs to the loop."""

    def __init__(self, key: Key, wake: Callable[[Key], None], gate: Gate, most: int, limits: Limits) -> None:
        self.key, self.gate = key, gate
        self.address = ""
        """Empty while it is not ready."""
        self.words = ""
        """What is being waited for."""
        self.refused = ""
        """Why it will not come."""
        self.closing = ""
        """Why no further request is taken on a connection."""
        self.waiters: set[Waiter] = set()
        self.connections = 0
        self._wake, self._most, self._limits = wake, most, limits
        self._loop = asyncio.get_running_loop()
        self._wake_at = 0.0
        """When the next request calls `wake`."""
        self._timer: asyncio.TimerHandle | None = None

    def __str__(self) -> str:
        return "/".join(self.key)

    def ready(self, address: str) -> None:
        self.address, self.refused = address, ""
        self._tell()

    def asleep(self, words: str) -> None:
        if self.address or self.refused:
            # Whatever was asked for before has happened; the next request asks anew.
            self._wake_at = 0.0
        self.address, self.refused, self.words = "", "", words
        self._tell()
        if self.waiters:
            self._call()

    def refuse(self, message: str) -> None:
        self.address, self.refused, self.words = "", message, ""
        self._dismiss(Unserved(503, f"the endpoint {self} does not come up: {message}", "endpoint_failed", AGAIN))

    def close(self, why: str, *, everyone: bool) -> None:
        """No more requests. Those that wait are sent away; if not ``everyone``, only where there is nowhere to send them to."""
        self.closing = why
        if everyone or not self.address:
            self._dismiss(Unserved(503, why, "endpoint_gone", SOON))
        if self._timer is not None:
            self._timer.cancel()

    def gone(self) -> Unserved | None:
        """Why a request that comes now is not even held, if so. What was refused is asked for again after a while."""
        if self.closing and not self.address:
            return Unserved(503, self.closing, "endpoint_gone", SOON)
        if self.refused and self._loop.time() < self._wake_at:
            left = max(1, round(self._wake_at - self._loop.time()))
            return Unserved(503, f"the endpoint {self} does not come up: {self.refused}", "endpoint_failed", left)
        return None

    def check_room(self) -> None:
        """Raises `Unserved` when too many wait."""
        if len(self.waiters) >= self._most:
            raise Unserved(
                429, f"{self._most} requests wait for the endpoint {self} already", "rate_limit_exceeded", SOON
            )

    @contextmanager
    def waiting(self, *, again: bool) -> Iterator[Waiter]:
        """While a request waits; ``again`` if it was let in before. Raises `Unserved` when too many wait."""
        if not again:
            self.check_room()
        waiter = Waiter()
        self.waiters.add(waiter)
        try:
            if self._loop.time() >= self._wake_at:
                self.refused = ""
                self._call()
            yield waiter
        finally:
            self.waiters.discard(waiter)

    def _call(self) -> None:
        """Call `wake`, unless that was done a moment ago, and again as long as requests wait."""
        now = self._loop.time()
        if self.closing or now < self._wake_at:
            return
        self._wake_at = now + self._limits.wake
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._wake_at, self._still)
        self._wake(self.key)

    def _still(self) -> None:
        if self.waiters:
            self._call()

    def _tell(self) -> None:
        for waiter in self.waiters:
            waiter.changed.set()

    def _dismiss(self, refusal: Unserved) -> None:
        for waiter in self.waiters:
            waiter.refusal = refusal
        self._tell()
