"""Who may use the model."""

from __future__ import annotations

import asyncio
import random

import pytest

from kaito_runtime_transformers.turns import PATIENCE, Turns


class Model:
    """Notices when it is used as two things at once."""

    def __init__(self) -> None:
        self.kind = ""
        self.inside = 0
        self.switches = 0
        self.now = 0.0

    async def switch(self, kind: str) -> None:
        assert self.inside == 0
        self.switches += 1
        await asyncio.sleep(0)
        if kind == "broken":
            raise RuntimeError("no such adapter")
        self.kind = kind

    async def use(self, turns: Turns[str], kind: str, seconds: float) -> None:
        async with turns(kind):
            self.inside += 1
            try:
                assert self.kind == kind
                await asyncio.sleep(seconds)
                assert self.kind == kind
            finally:
                self.inside -= 1


def test_a_thousand_requests_of_three_kinds_some_of_which_give_up() -> None:
    async def day() -> Model:
        model = Model()
        turns = Turns(model.switch)
        dice = random.Random(1)
        tasks = []
        for _ in range(1000):
            tasks.append(asyncio.ensure_future(model.use(turns, dice.choice("abc"), dice.random() * 0.002)))
            if dice.random() < 0.3:
                await asyncio.sleep(0.0001)
                dice.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(t.cancelled() or t.exception() is None for t in tasks)
        await model.use(turns, "a", 0)  # nobody is left inside
        return model

    model = asyncio.run(day())
    assert model.switches < 500


def test_nobody_waits_for_ever() -> None:
    async def day() -> None:
        model = Model()
        turns = Turns(model.switch, clock=lambda: model.now)
        first = asyncio.ensure_future(model.use(turns, "a", 0.05))
        await asyncio.sleep(0.01)
        other = asyncio.ensure_future(model.use(turns, "b", 0.01))
        await asyncio.sleep(0)
        same = asyncio.ensure_future(model.use(turns, "a", 0.01))  # goes in: the other has not waited long
        await same
        assert not other.done()
        model.now += PATIENCE
        late = asyncio.ensure_future(model.use(turns, "a", 0.01))
        await first
        await other
        assert not late.done()
        await late

    asyncio.run(day())


def test_a_kind_that_cannot_be_put_in_fails_alone() -> None:
    async def day() -> None:
        model = Model()
        turns = Turns(model.switch)
        good = asyncio.ensure_future(model.use(turns, "a", 0.01))
        bad = asyncio.ensure_future(model.use(turns, "broken", 0.01))
        with pytest.raises(RuntimeError, match="no such adapter"):
            await bad
        await good
        await model.use(turns, "a", 0)

    asyncio.run(day())
