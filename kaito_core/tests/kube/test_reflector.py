"""The cache of one kind: the same life on a server that fails on command and on a real one; then every failure by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kaito_core.kube.client import connect
from kaito_core.kube.errors import ApiError, Gone
from kaito_core.kube.kinds import CONFIG_MAPS, Object
from kaito_core.kube.reflector import Reflector

from .proxy import Proxy
from .servers import RealServer, ScriptedServer

Change = tuple[str, str | None, str | None]
"""The name, and what was in it before and after."""


class Watched:
    """A reflector and what it said."""

    def __init__(self, server: Any, **given: Any) -> None:
        self.changes: list[Change] = []
        given = {"on_change": self._changed, **given}
        self.reflector = Reflector(server.client, CONFIG_MAPS, server.namespace, **given)

    def _changed(self, old: Object | None, new: Object | None) -> None:
        name = (new or old or {})["metadata"]["name"]
        if name != "kube-root-ca.crt":  # Kubernetes puts that one into every namespace
            self.changes.append((name, content(old), content(new)))

    def names(self) -> set[str]:
        return {o["metadata"]["name"] for o in self.reflector.list()} - {"kube-root-ca.crt"}

    def __enter__(self) -> Watched:
        self.reflector.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.reflector.stop()
        assert self.reflector.ended


def content(obj: Object | None) -> str | None:
    return None if obj is None else obj["data"]["x"]


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


@pytest.fixture
def scripted() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RealServer]:
    cluster = request.getfixturevalue("cluster")
    with Proxy(Path(cluster.kubeconfig), tmp_path) as proxy:
        yield RealServer(connect(kubeconfig=str(cluster.kubeconfig)), proxy)


@pytest.fixture(params=["scripted", "real"])
def server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


# --- on both


def test_it_lists_what_is_there_and_follows_what_happens(server: Any) -> None:
    server.put("one", "1")
    with Watched(server) as watched:
        until(lambda: watched.reflector.has_synced)
        assert watched.names() == {"one"}
        server.put("two", "2")
        server.put("one", "1b")
        server.delete("two")
        until(lambda: len(watched.changes) == 4)
    assert watched.changes == [("one", None, "1"), ("two", None, "2"), ("one", "1", "1b"), ("two", "2", None)]
    assert watched.names() == {"one"}


def test_objects_are_found_by_name_label_and_workspace(server: Any) -> None:
    server.put("a", **{"kaito.sh/workspace": "w", "kind": "x"})
    server.put("b", **{"kaito.sh/workspace": "w"})
    server.put("c", **{"kind": "x"})
    with Watched(server) as watched:
        reflector, here = watched.reflector, server.namespace
        until(lambda: reflector.has_synced)
        server.put("b", **{"kaito.sh/workspace": "other"})
        server.delete("a")
        server.put("d", **{"kaito.sh/workspace": "w"})
        until(lambda: reflector.get("d", here))

        def names(found: list[Object]) -> list[str]:
            return sorted(o["metadata"]["name"] for o in found)

        assert names(reflector.indexed(here, "w")) == ["d"]
        assert names(reflector.indexed(here, "other")) == ["b"]
        assert names(reflector.indexed("elsewhere", "w")) == []
        assert names(reflector.list(here, {"kind": "x"})) == names(reflector.list(labels={"kind": "x"})) == ["c"]
        assert reflector.list("elsewhere") == []
        assert reflector.get("c") is None  # without its namespace it is another


def test_a_dropped_watch_goes_on_where_it_was(server: Any) -> None:
    """Nothing is lost and nothing is told twice, also what happened meanwhile."""
    server.put("one", "1")
    with Watched(server) as watched:
        until(lambda: watched.reflector.has_synced)
        for number in range(3):
            server.put("one", f"2.{number}")
            until(lambda number=number: watched.changes[-1][2] == f"2.{number}")
            server.cut()
            server.put(f"during-{number}")
            until(lambda number=number: f"during-{number}" in watched.names())
    assert len(watched.changes) == len(set(watched.changes)) == 7


def test_managed_fields_are_not_kept(server: Any) -> None:
    server.put("one")
    with Watched(server) as watched:
        until(lambda: watched.reflector.has_synced)
        server.put("two")
        until(lambda: "two" in watched.names())
        assert all("managedFields" not in o["metadata"] for o in watched.reflector.list())


# --- on the real one only


def test_a_server_that_was_away_is_found_again(real: RealServer) -> None:
    with Watched(real) as watched:
        until(lambda: watched.reflector.has_synced)
        real.proxy.refuse()
        real.put("meanwhile")
        asked = real.proxy.connections
        time.sleep(2.0)
        assert real.proxy.connections - asked <= 4  # at 0, 0.4, 1.2 and 2.8 s at the earliest
        real.proxy.refuse(False)
        until(lambda: "meanwhile" in watched.names())


def test_only_what_has_the_labels(real: RealServer) -> None:
    real.put("in", ours="yes")
    real.put("out")
    with Watched(real, labels="ours=yes") as watched:
        until(lambda: watched.reflector.has_synced)
        assert watched.names() == {"in"}
        real.put("out", ours="yes")
        real.put("in", ours="no")
        until(lambda: watched.names() == {"out"})


# --- failures, one by one


def test_a_dropped_watch_lists_nothing_again(scripted: ScriptedServer) -> None:
    with Watched(scripted) as watched:
        until(lambda: watched.reflector.has_synced)
        scripted.put("one")
        scripted.bookmark()
        until(lambda: watched.reflector.resource_version == scripted.version)
        scripted.cut()
        until(lambda: len(scripted.requests) == 3)
    assert scripted.requests == ["list", "watch from 10", "watch from 12"]


@pytest.mark.parametrize("how", ["when it asks", "in the stream"])
def test_what_the_server_has_forgotten_is_listed_anew(scripted: ScriptedServer, how: str) -> None:
    scripted.put("stays", "s")
    scripted.put("goes", "g")
    scripted.put("changes", "1")
    with Watched(scripted) as watched:
        until(lambda: len(watched.changes) == 3)
        scripted.refuses["watch"] = Gone("watch: too old resource version", status=410)
        scripted.cut(Gone("watch: too old resource version", status=410) if how == "in the stream" else None)
        until(lambda: len(scripted.requests) > 2)
        scripted.delete("goes")
        scripted.put("changes", "2")
        scripted.put("comes", "c")
        scripted.forget()
        del scripted.refuses["watch"]
        until(lambda: "comes" in watched.names())
        until(lambda: len(watched.changes) == 6)
    assert set(watched.changes[3:]) == {("goes", "g", None), ("changes", "1", "2"), ("comes", None, "c")}
    assert watched.names() == {"stays", "changes", "comes"}


def test_after_any_other_refusal_the_cache_is_not_trusted(scripted: ScriptedServer) -> None:
    """A watch that is refused for a reason that we do not know might be refused for ever."""
    with Watched(scripted) as watched:
        until(lambda: watched.reflector.has_synced)
        scripted.cut(ApiError("watch: etcd is confused", status=500))
        until(lambda: scripted.requests.count("list") == 2)


@pytest.mark.parametrize("failing", ["list", "watch"])
def test_a_server_that_only_says_no_is_left_in_peace(scripted: ScriptedServer, failing: str) -> None:
    """kubernetes.informer asked such a server 91 times in 4 s."""
    scripted.refuses[failing] = ApiError(f"{failing}: no", status=500)
    with Watched(scripted) as watched:
        time.sleep(3.0)
        assert (
            1 < sum(r.startswith(failing) for r in scripted.requests) <= 4
        )  # at 0, 0.4, 1.2 and 2.8 s at the earliest
        assert watched.reflector.has_synced == (failing == "watch")
        del scripted.refuses[failing]
        scripted.put("one")
        until(lambda: watched.names() == {"one"})


def test_a_watch_that_ends_at_once_counts_as_an_error(scripted: ScriptedServer) -> None:
    scripted.ends_watches_at_once = True
    with Watched(scripted):
        time.sleep(1.0)
    assert sum(r.startswith("watch") for r in scripted.requests) <= 2
    assert scripted.requests.count("list") == 1


def test_it_has_synced_only_after_the_whole_list(scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted.put("one")
    may_answer, listing = threading.Event(), scripted.list
    monkeypatch.setattr(scripted, "list", lambda *a, **k: (may_answer.wait(), listing(*a, **k))[1])
    with Watched(scripted) as watched:
        time.sleep(0.1)
        assert not watched.reflector.has_synced
        assert watched.reflector.resource_version == 0
        may_answer.set()
        until(lambda: watched.reflector.has_synced)
        assert watched.names() == {"one"}


def test_bookmarks_are_a_sign_of_life(scripted: ScriptedServer) -> None:
    with Watched(scripted) as watched:
        until(lambda: "watch from 10" in scripted.requests)
        before = watched.reflector.last_heard
        scripted.bookmark()
        until(lambda: watched.reflector.last_heard > before)
        assert watched.changes == []


def test_what_follows_from_a_change_may_fail(scripted: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    def fail(old: Object | None, new: Object | None) -> None:
        raise ValueError("nobody expected that")

    with Watched(scripted, on_change=fail) as watched:
        until(lambda: watched.reflector.has_synced)
        scripted.put("one")
        scripted.put("two")
        until(lambda: watched.names() == {"one", "two"})
    assert "nobody expected that" in caplog.text
    assert scripted.requests == ["list", "watch from 10"]
