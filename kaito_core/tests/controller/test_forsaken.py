"""Whoever deletes a Workspace in the moment in which it gets its finalizer leaves no machine behind."""

from __future__ import annotations

from kaito_core.controller.forsaken import Forsaken
from kaito_core.controller.reconcile.decision import Ensure, Release
from kaito_core.plugins.types import NodeRequest, NodeStatus, Offer, Requirements
from kaito_core.testing.provisioner import FakeProvisioner

SMALL = Offer("small", 4, 16 << 30)
KEY = ("team", "mine")


class World:
    def __init__(self) -> None:
        self.cloud = FakeProvisioner([SMALL], gone_after=1)
        self.released = 0
        self.forsaken = Forsaken(self._release)

    def _release(self, question: Release) -> NodeStatus:
        self.released += 1
        return self.cloud.release(question.request_id)

    def ask(self, uid: str, request: str) -> None:
        wish = NodeRequest(request, SMALL, Requirements(), {})
        self.forsaken.asked(KEY, uid, Ensure("fake", wish))
        self.cloud.ensure(wish)


def test_what_was_asked_for_is_given_back_until_it_is_gone() -> None:
    world = World()
    world.ask("one", "ws1")
    assert not world.forsaken.given_back(KEY)
    assert world.cloud.machines
    assert world.forsaken.given_back(KEY)
    assert not world.cloud.machines
    assert world.forsaken.given_back(KEY)
    assert world.released == 2, "what is gone is not asked for again"


def test_a_workspace_that_is_there_or_was_let_go_keeps_everybody_away() -> None:
    world = World()
    world.ask("one", "ws1")
    assert world.forsaken.given_back(KEY, "one")
    world.forsaken.let_go(KEY, "one")
    assert world.forsaken.given_back(KEY)
    assert world.released == 0


def test_another_workspace_of_the_same_name_keeps_its_own() -> None:
    world = World()
    world.ask("one", "ws1")
    assert not world.forsaken.given_back(KEY, "two")
    world.ask("two", "ws2")
    assert world.forsaken.given_back(KEY, "two")
    assert set(world.cloud.machines) == {"ws2"}


def test_of_several_requests_of_a_workspace_the_last_one_counts() -> None:
    """Those before it were given back before it was made."""
    world = World()
    world.ask("one", "ws1")
    world.cloud.release("ws1"), world.cloud.release("ws1")
    world.ask("one", "ws2")
    world.forsaken.given_back(KEY)
    assert world.forsaken.given_back(KEY)
    assert not world.cloud.machines
