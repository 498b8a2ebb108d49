"""Waiting for an endpoint that is asleep: how often it is asked for, by whose clock, and what is waited out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kaito_core.cli.cluster import waking
from kaito_core.cli.cluster.waking import Waking
from kaito_core.kube.errors import Forbidden, Unreachable
from kaito_core.kube.kinds import WORKSPACES, Kind, Object
from kaito_core.problems import Failure


def endpoint(phase: str, *, ready: bool = False, policy: str = "onDemand", **condition: str) -> Object:
    told = {"type": "InferenceReady", "status": "True" if ready else "False", "reason": "r", "observedGeneration": 1}
    return {
        "metadata": {"name": "small", "namespace": "team", "generation": 1, "annotations": {}},
        "inference": {"preset": {"name": "demo-phi-3"}, "policy": policy},
        "status": {"conditions": [{**told, **condition}], "serving": {"phase": phase, "since": "t"} if phase else {}},
    }


READY = endpoint("Ready", ready=True)


@dataclass
class Cluster:
    """Shows one state after another, and writes down when it was told that somebody waits."""

    states: list[Object | Exception]
    ahead: timedelta = timedelta()
    refusal: Exception | None = None
    asked: list[datetime] = field(default_factory=list)

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        assert (kind, name, namespace) == (WORKSPACES, "small", "team")
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return state

    def patch(self, kind: Kind, name: str, namespace: str, patch: Mapping[str, Any]) -> Object:
        if self.refusal:
            raise self.refusal
        self.asked.append(datetime.fromisoformat(patch["metadata"]["annotations"]["kaito.sh/wake"]))
        written = (datetime.now(UTC) + self.ahead).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"metadata": {"managedFields": [{"manager": "x"}, {"time": "2020-01-01T00:00:00Z"}, {"time": written}]}}


def wait(cluster: Cluster) -> tuple[Object, list[str]]:
    said: list[str] = []
    return Waking(cluster, "small", "team", said.append, look=0.0).until_ready(), said  # type: ignore[arg-type]


def test_one_that_answers_is_not_woken() -> None:
    cluster = Cluster([READY])
    assert wait(cluster) == (READY, [])
    assert cluster.asked == []


def test_it_is_said_again_that_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster([*[endpoint("Asleep", ready=True)] * 3, READY])
    wait(cluster)
    assert len(cluster.asked) == 1
    monkeypatch.setattr(waking, "AGAIN", 0.0)
    cluster = Cluster([*[endpoint("Asleep", ready=True)] * 3, READY])
    wait(cluster)
    assert len(cluster.asked) == 3


def test_what_is_served_always_is_waited_for_and_not_woken() -> None:
    cluster = Cluster([*[endpoint("Starting", policy="always", message="the pod starts")] * 3, READY])
    assert wait(cluster)[1] == ["team/small starts: the pod starts", "Ctrl-C stops waiting", "InferenceReady: yes"]
    assert cluster.asked == []


@pytest.mark.parametrize("ahead", [timedelta(hours=-3), timedelta(minutes=2)])
def test_the_clock_of_the_api_server_counts(ahead: timedelta) -> None:
    """A wish of three hours ago would be none, one of tomorrow would keep a machine until then."""
    cluster = Cluster([endpoint("Asleep", ready=True), READY], ahead)
    wait(cluster)
    assert len(cluster.asked) == 2
    assert abs(cluster.asked[-1] - (datetime.now(UTC) + ahead)) < timedelta(seconds=10)


def test_an_api_server_that_is_away_is_said_once_and_waited_for() -> None:
    away = Unreachable("refused")
    _, said = wait(Cluster([endpoint("Asleep", ready=True), away, away, READY]))
    assert said[2:] == ["refused; trying again"]


def test_one_that_starts_already_need_not_be_woken() -> None:
    no = Forbidden("no right", status=403)
    assert wait(Cluster([endpoint("Starting"), READY], refusal=no))[0] is READY
    with pytest.raises(Failure, match="these credentials may not wake it: no right"):
        wait(Cluster([endpoint("Asleep", ready=True)], refusal=no))


def test_nobody_who_reacts_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waking, "NOBODY", 0.0)
    _, said = wait(Cluster([*[endpoint("Asleep", ready=True)] * 4, READY]))
    assert sum("does a controller look after it?" in line for line in said) == 1
    with pytest.raises(Failure, match="nothing is served of team/small, and nobody says why"):
        wait(Cluster([endpoint("")]))
