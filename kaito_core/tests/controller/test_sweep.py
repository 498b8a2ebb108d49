"""Machines that nobody wants are found and given back, and no others."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, ClassVar

import pytest

from kaito_core.controller.reconcile.case import request_id
from kaito_core.controller.sweep import SETTLED, Sweep
from kaito_core.kube.kinds import Object
from kaito_core.plugins.types import Held, NodeProvisioner, NodeRequest, NodeStatus, NotAuthorized, Offer, Requirements

OLD = SETTLED + 1
ENDED = {"started": "2026-01-01T00:00:00Z", "ended": "2026-01-01T01:00:00Z", "reason": "Succeeded"}
OPEN = {"started": "2026-01-01T02:00:00Z"}


class Cloud(NodeProvisioner):
    name: ClassVar[str] = "cloud"

    def __init__(self, *held: Held) -> None:
        self._held = held
        self.released: list[str] = []

    def offers(self, requirements: Requirements) -> Iterable[Offer]:
        return ()

    def ensure(self, request: NodeRequest) -> NodeStatus:
        raise AssertionError("a sweep buys nothing")

    def observe(self, request_id: str) -> NodeStatus:
        return NodeStatus(request_id, "ready")

    def release(self, request_id: str) -> NodeStatus:
        self.released.append(request_id)
        return NodeStatus(request_id, "releasing")

    def held(self) -> Iterable[Held]:
        return self._held


class Broken(Cloud):
    def held(self) -> Iterable[Held]:
        raise RuntimeError("no answer")


def held(request: str, age: float = OLD, name: str = "one", namespace: str = "team") -> Held:
    return Held(request, {"kaito.sh/workspace": name, "kaito.sh/workspacenamespace": namespace}, age)


def workspace(*attempts: dict[str, Any]) -> Object:
    return {"metadata": {"name": "one", "namespace": "team", "uid": "u-1"}, "status": {"attempts": list(attempts)}}


def sweep(cloud: NodeProvisioner, there: Object | None, namespace: str = "", *others: NodeProvisioner) -> list[str]:
    said: list[str] = []
    provisioners = {str(n): p for n, p in enumerate((*others, cloud))}
    Sweep(provisioners, lambda *_: there, lambda name, h: said.append(h.request_id), namespace).once()
    return said


def test_what_is_only_written_down_beside_the_finalizer_is_wanted() -> None:
    """The controller died right after it had asked, and was away for long: its machine has come, and is the one that is wanted."""
    asked = {"provisioner": "cloud", "started": "2026-01-01T00:00:00Z"}
    there = workspace()
    there["metadata"]["annotations"] = {"kaito.sh/asked": json.dumps(asked)}
    assert sweep(Cloud(held(request_id("u-1", []))), there) == []
    there["metadata"]["annotations"] = {"kaito.sh/asked": "nonsense"}
    assert sweep(Cloud(held(request_id("u-1", []))), there) == [request_id("u-1", [])]


@pytest.mark.parametrize(
    ("there", "kept"),
    [
        (None, False),
        (workspace(), False),
        (workspace(ENDED), False),
        (workspace(OPEN), True),
        (workspace(ENDED, OPEN), False),  # that one is the request of the first attempt
    ],
)
def test_what_is_kept_is_what_the_present_attempt_is_for(there: Object | None, kept: bool) -> None:
    first = request_id("u-1", [])
    cloud = Cloud(held(first))
    assert sweep(cloud, there) == ([] if kept else [first])
    assert cloud.released == ([] if kept else [first])


def test_the_second_attempt_is_for_a_request_of_its_own() -> None:
    second = request_id("u-1", [ENDED])
    cloud = Cloud(held(second))
    assert sweep(cloud, workspace(ENDED, OPEN)) == []


def test_what_is_quite_new_is_left_alone() -> None:
    assert sweep(Cloud(held("x", age=SETTLED - 1)), None) == []


def test_what_is_somebody_else_s_is_left_alone() -> None:
    cloud = Cloud(held("x", namespace="others"), Held("mine", {}, OLD))
    assert sweep(cloud, None, "team") == []


def test_what_it_may_not_do_is_said_in_its_words_and_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    class Shut(Cloud):
        def held(self) -> Iterable[Held]:
            raise NotAuthorized("list nodeclaims.karpenter.sh: forbidden")

    assert sweep(Cloud(held("left-over")), None, "", Shut()) == ["left-over"]
    [record] = [r for r in caplog.records if "forbidden" in r.getMessage()]
    assert record.exc_info is None


def test_one_that_does_not_answer_keeps_nobody_from_looking_at_the_others() -> None:
    cloud = Cloud(held("x"))
    assert sweep(cloud, None, "", Broken()) == ["x"]
