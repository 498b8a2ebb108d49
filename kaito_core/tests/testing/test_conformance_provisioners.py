"""The kit for node provisioners: the fake cloud passes it, and provisioners with one fault each do not."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import ClassVar

import pytest

from kaito_core.plugins.types import (
    Gpu,
    Held,
    NodeProvisioner,
    NodeRequest,
    NodeStatus,
    Offer,
    Price,
    ProvisioningError,
    Requirements,
    Transient,
)
from kaito_core.testing.conformance import NodeProvisionerTests, contract
from kaito_core.testing.conformance.provisioners import FAILURES
from kaito_core.testing.provisioner import FakeProvisioner, Fault, Log

GIB = 1 << 30
OFFERS = (
    Offer("small", 4, 16 * GIB, Gpu("T4", 15 * GIB, (7, 5)), 1, price=Price(0.5, "test", "2026-01-01")),
    Offer("large", 8, 64 * GIB, Gpu("MI300X", 190 * GIB, None, "amd"), 8),
)


class FakeCloud:
    """The fake cloud of the core, as the kit asks for it."""

    def __init__(self, kind: type[FakeProvisioner] = FakeProvisioner) -> None:
        self.kind, self.log, self.faults = kind, Log(), list[Fault]()
        self.look = FakeProvisioner(OFFERS, log=self.log)

    def make(self) -> NodeProvisioner:
        made = self.kind(OFFERS, ready_after=1, gone_after=1, log=self.log)
        made.faults = self.faults  # of the cloud, not of whoever asks it
        return made

    def fail_next(self, failure: ProvisioningError) -> None:
        self.faults.append(Fault("refused", "ensure", error=type(failure).__name__, message=str(failure)))

    def lose_answer_next(self) -> None:
        self.faults.append(Fault("answer-lost", "ensure", message="the connection was cut"))

    def machines(self) -> Collection[str]:
        return [n for m in self.look.machines.values() for n in m.nodes]

    def advance(self) -> None:
        """It goes on whenever it is asked."""


DECLARED = {"several": True, "lost_answers": True, **dict.fromkeys(FAILURES, True)}


class TestFake(NodeProvisionerTests):
    plugin = "kaito_core.testing.provisioner_plugin"
    capabilities: ClassVar = DECLARED

    @pytest.fixture
    def cloud(self) -> FakeCloud:
        return FakeCloud()

    @pytest.mark.xfail(reason="it is loaded by tests alone, which name it in the environment")
    def test_it_loads(self) -> None:
        super().test_it_loads()

    @pytest.mark.xfail(reason="no distribution has it: tests put it beside the others")
    def test_kaito_finds_it(self) -> None:
        super().test_kaito_finds_it()


# --- what the kit finds


class BuysTwice(FakeProvisioner):
    """A request id of its own for each object: after a crash it buys again."""

    def ensure(self, request: NodeRequest) -> NodeStatus:
        return super().ensure(replace(request, id=f"{request.id}-{id(self)}"))

    def observe(self, request_id: str) -> NodeStatus:
        return super().observe(f"{request_id}-{id(self)}")

    def release(self, request_id: str) -> NodeStatus:
        return super().release(f"{request_id}-{id(self)}")


class Forgets(FakeProvisioner):
    """Says that it holds nothing."""

    def held(self) -> Iterable[Held]:
        return ()


class GoneTooSoon(FakeProvisioner):
    """Says absent while the machine is on its way out."""

    def release(self, request_id: str) -> NodeStatus:
        super().release(request_id)
        return NodeStatus(request_id, "absent")


class SaysNothing(FakeProvisioner):
    """Fails, and does not say of what."""

    def ensure(self, request: NodeRequest) -> NodeStatus:
        try:
            return super().ensure(request)
        except ProvisioningError:
            return NodeStatus(request.id, "failed")


def broken(kind: type[FakeProvisioner], examples: int = 60) -> None:
    cloud = FakeCloud(kind)
    failures = (Transient("try again"),)
    waiting: list[str] = []
    contract.run(
        lambda: contract.Contract(
            cloud, OFFERS[0], Requirements(), failures, lost_answers=True, count=1, steps=20, waiting=waiting
        ),
        examples,
        20,
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (BuysTwice, "machines were asked for|are left after everything|says nothing"),
        (Forgets, "held\\(\\) says nothing"),
        (GoneTooSoon, "machines were asked for|are left|says nothing"),
        (SaysNothing, "a failed request says of what"),
    ],
)  # fmt: skip
def test_a_fault_is_found_by_trying_orders(kind: type[FakeProvisioner], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        broken(kind)
