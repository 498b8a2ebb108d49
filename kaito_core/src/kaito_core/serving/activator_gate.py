"""Who may wake an endpoint that asks for an API key: the pod that would ask for it is not there."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from kaito_core.problems import KaitoError
from kaito_core.serving.activator_endpoint import SOON, Unserved
from kaito_core.serving.api_key import CODE, REFUSAL, bearer

LOOK_EVERY: Final = 10.0
"""Seconds that a lock is remembered, however many requests come: each look is a question to the API server."""

log = logging.getLogger("kaito_core.serving.activator")


@dataclass(frozen=True)
class Lock:
    """What an endpoint asks for. By default for nothing."""

    closed: bool = False
    key: bytes = field(default=b"", repr=False)
    """Empty where it may not be looked at. Then whoever brings any key may wake the endpoint, and the pod says whether it is the one."""

    def opens(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether these headers hold what is asked for."""
        brought = bearer(headers)
        return not self.closed or (hmac.compare_digest(brought, self.key) if self.key else bool(brought))


class Gate:
    """The lock of one endpoint, looked at when somebody comes. Belongs to the loop; ``look`` is called in a thread, and may raise
    `KaitoError`: what was seen before holds then."""

    def __init__(self, look: Callable[[], Lock]) -> None:
        self._look = look
        self._lock: Lock | None = None
        self._until = 0.0
        self._looking = asyncio.Lock()

    async def let_in(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises `Unserved` for a request that may not wake the endpoint."""
        async with self._looking:
            now = asyncio.get_running_loop().time()
            if self._lock is None or now >= self._until:
                try:
                    self._lock = await asyncio.to_thread(self._look)
                except KaitoError as e:
                    log.warning("the API key of an endpoint cannot be looked at: %s", e)
                self._until = now + LOOK_EVERY
        if self._lock is None:
            raise Unserved(503, "whether an API key is needed cannot be found out now", "endpoint_failed", SOON)
        if not self._lock.opens(headers):
            raise Unserved(401, REFUSAL, CODE)
