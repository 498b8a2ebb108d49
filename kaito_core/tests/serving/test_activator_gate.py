"""Whoever has no API key wakes nobody: the activator asks for it in the place of the pod that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from kaito_core.problems import Failure
from kaito_core.serving import activator_gate
from kaito_core.serving.activator import Activator
from kaito_core.serving.activator_gate import Lock

from .activator_world import KEY, Asking, Pod, Wakes, activating, until

LOCKED = Lock(closed=True, key=b"s3cret")


def post(activator: Activator, *, key: str = "", scheme: str = "Bearer", path: str = "/chat") -> httpx.Response:
    headers = {"Authorization": f"{scheme} {key}"} if key else {}
    where = f"http://127.0.0.1:{activator.listen(KEY)}{path}"
    return httpx.post(where, content=b"hello", headers=headers, timeout=20, trust_env=False)


@pytest.fixture
def looks() -> list[Any]:
    """What is seen when the lock is looked at, one after the other; the last one again and again."""
    return [LOCKED]


@pytest.fixture
def locked(looks: list[Any]) -> Iterator[tuple[Activator, Wakes]]:
    def look(key: tuple[str, str]) -> Lock:
        seen = looks.pop(0) if len(looks) > 1 else looks[0]
        if isinstance(seen, Exception):
            raise seen
        assert isinstance(seen, Lock)
        return seen

    wakes = Wakes()
    with activating(wakes, lock=look) as activator:
        yield activator, wakes


@pytest.mark.parametrize("bring", [{}, {"key": "another"}, {"key": "s3cret", "scheme": "Basic"}])
def test_without_the_key_nobody_is_woken(locked: tuple[Activator, Wakes], bring: dict[str, str]) -> None:
    activator, wakes = locked
    answer = post(activator, **bring)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert wakes.keys == []


def test_with_the_key_it_waits_and_is_answered(locked: tuple[Activator, Wakes]) -> None:
    activator, wakes = locked
    with Pod() as pod:
        asking = Asking(lambda: post(activator, key="s3cret"))
        until(lambda: wakes.keys == [KEY])
        activator.ready(KEY, pod.address)
        assert asking.result().content == b"hello"


def test_where_there_is_a_pod_the_pod_asks_for_the_key(locked: tuple[Activator, Wakes]) -> None:
    activator, _ = locked
    with Pod() as pod:
        activator.ready(KEY, pod.address)
        assert post(activator).content == b"hello"


def test_a_pod_that_has_just_gone_opens_no_door(locked: tuple[Activator, Wakes]) -> None:
    activator, wakes = locked
    with Pod() as pod:
        address = pod.address
    activator.ready(KEY, address)
    assert post(activator).status_code == 401
    assert wakes.keys == []


@pytest.mark.parametrize("looks", [[Lock(closed=True)]])
def test_a_key_that_may_not_be_looked_at_keeps_out_who_brings_none(locked: tuple[Activator, Wakes]) -> None:
    activator, wakes = locked
    assert post(activator).status_code == 401
    with Pod() as pod:
        asking = Asking(lambda: post(activator, key="anything: the pod will say"))
        until(lambda: wakes.keys == [KEY])
        activator.ready(KEY, pod.address)
        assert asking.result().status_code == 200


@pytest.mark.parametrize("looks", [[Failure("no answer from the API server")]])
def test_a_lock_that_cannot_be_looked_at_is_not_open(locked: tuple[Activator, Wakes]) -> None:
    activator, wakes = locked
    answer = post(activator, key="s3cret")
    assert (answer.status_code, wakes.keys) == (503, [])
    assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize("looks", [[LOCKED, Failure("no answer"), Lock(closed=True, key=b"another")]])
def test_a_changed_key_is_used_and_the_last_one_until_it_can_be_read(
    locked: tuple[Activator, Wakes], monkeypatch: pytest.MonkeyPatch
) -> None:
    activator, _ = locked
    monkeypatch.setattr(activator_gate, "LOOK_EVERY", 0.0)
    assert post(activator, key="another").status_code == 401  # s3cret
    assert post(activator, key="another").status_code == 401  # no answer: still s3cret
    with Pod() as pod:
        asking = Asking(lambda: post(activator, key="another"))
        until(lambda: activator.waiting(KEY) == 1)
        activator.ready(KEY, pod.address)
        assert asking.result().status_code == 200


def test_a_flood_without_a_key_is_one_look() -> None:
    looked: list[object] = []

    def look(key: tuple[str, str]) -> Lock:
        looked.append(key)
        return LOCKED

    with activating(lock=look) as activator:
        answers: list[Callable[[], httpx.Response]] = [Asking(lambda: post(activator)).result for _ in range(50)]
        assert {a().status_code for a in answers} == {401}
    assert looked == [KEY]


def test_probes_need_no_key(locked: tuple[Activator, Wakes]) -> None:
    activator, _ = locked
    assert httpx.get(f"http://127.0.0.1:{activator.listen(KEY)}/health", trust_env=False).status_code == 200


def test_the_key_is_in_no_repr() -> None:
    assert "s3cret" not in repr(LOCKED)
