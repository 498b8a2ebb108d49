"""Who may use the model: requests of one kind at a time, as many of them as come.

Adapters are switched for the whole model, so requests for two of them cannot be computed together. Requests for the kind that is being
served go in at once; one of another kind waits until the model is free, and after `PATIENCE` seconds of its waiting nobody is let in
before it, so that nobody waits for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Final, Generic, TypeVar

Kind = TypeVar("Kind", bound=Hashable)

PATIENCE: Final = 1.0
"""Seconds. A switch costs milliseconds, what it interrupts is the filling of batches."""


class Turns(Generic[Kind]):
    """``async with turns(kind):`` – the model is set to this kind, and stays so until the block is left."""

    def __init__(self, switch: Callable[[Kind], Awaitable[None]], clock: Callable[[], float] = time.monotonic) -> None:
        self._switch = switch
        self._clock = clock
        self._kind: Kind | None = None
        self._inside = 0
        self._switching = False
        self._waiting: list[tuple[Kind, float, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def __call__(self, kind: Kind) -> AsyncIterator[None]:
        await self._enter(kind)
        try:
            yield
        finally:
            self._inside -= 1
            self._next()

    async def _enter(self, kind: Kind) -> None:
        if self._kind == kind and not self._switching and not self._somebody_is_due():
            self._inside += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (kind, self._clock(), turn)
        self._waiting.append(entry)
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:  # let in, and gone at that moment
                self._inside -= 1
            self._next()
            raise

    def _somebody_is_due(self) -> bool:
        return bool(self._waiting) and self._clock() - self._waiting[0][1] >= PATIENCE

    def _next(self) -> None:
        """Lets in whoever waits first and all of its kind, once the model is free."""
        if self._inside or self._switching or not self._waiting:
            return
        kind = self._waiting[0][0]
        if kind == self._kind:
            self._let_in(kind)
        else:
            self._switching = True
            task = asyncio.ensure_future(self._change(kind))
            task.add_done_callback(lambda _: None)
            self._task = task  # the loop itself keeps none

    async def _change(self, kind: Kind) -> None:
        try:
            await self._switch(kind)
        except Exception as e:
            self._kind, self._switching = None, False
            for entry in [w for w in self._waiting if w[0] == kind]:
                self._waiting.remove(entry)
                if not entry[2].done():
                    entry[2].set_exception(e)
            self._next()
            return
        self._kind, self._switching = kind, False
        self._let_in(kind)
        self._next()

    def _let_in(self, kind: Kind) -> None:
        for entry in [w for w in self._waiting if w[0] == kind]:
            self._waiting.remove(entry)
            if not entry[2].done():
                self._inside += 1
                entry[2].set_result(None)
