"""What the kubelet and Prometheus are told, over HTTP."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from kaito_core.controller.health import SILENT, Page, address, healthz, metrics_page, readyz, serve
from kaito_core.controller.metrics import Metrics
from kaito_core.kube.kinds import JOBS, WORKSPACES, Kind
from kaito_core.kube.reflector import Reflector
from kaito_core.problems import UserError


@dataclass
class Watch:
    """What the pages look at in a reflector."""

    kind: Kind
    ended: bool = False
    last_heard: float = 0.0
    has_synced: bool = True


@contextmanager
def served(**pages: Page) -> Iterator[Any]:
    server = serve(("127.0.0.1", 0), {f"/{name}": page for name, page in pages.items()})

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    try:
        yield get
    finally:
        server.shutdown()
        server.server_close()


def test_alive_is_who_hears_of_the_api_server() -> None:
    now = time.monotonic()
    jobs, workspaces = Watch(JOBS, last_heard=now), Watch(WORKSPACES, last_heard=now)
    with served(healthz=healthz([jobs, workspaces])) as get:  # type: ignore[list-item]
        assert get("/healthz") == (200, "ok\n")
        jobs.last_heard = now - SILENT - 30
        status, said = get("/healthz")
        assert status == 503
        assert said.startswith("nothing heard of jobs.batch for 93")
        workspaces.ended = True
        assert "the watch of workspaces.kaito.sh has ended" in get("/healthz")[1]


def test_a_watch_that_has_not_begun_yet_is_not_dead() -> None:
    """While the API server is away at the start, the kubelet must not kill who waits for it."""
    with served(healthz=healthz([Reflector(None, JOBS)])) as get:  # type: ignore[arg-type]
        assert get("/healthz") == (200, "ok\n")


def test_ready_is_who_has_seen_everything_leader_or_not() -> None:
    jobs, workspaces = Watch(JOBS, has_synced=False), Watch(WORKSPACES)
    with served(readyz=readyz([jobs, workspaces])) as get:  # type: ignore[list-item]
        assert get("/readyz") == (503, "the cache of jobs.batch is not complete yet\n")
        jobs.has_synced = True
        assert get("/readyz?verbose") == (200, "ok\n")


def test_metrics_have_the_names_of_controller_runtime() -> None:
    """So its dashboards and alerts work; and what has not happened yet is there as 0, or an alert would miss the first time."""
    metrics = Metrics()
    metrics.started("workspace", 4)
    metrics.depth("workspace", 2)
    metrics.leads("kaito-controller", False)
    metrics.requested(200, "GET", "https://10.0.0.1")
    metrics.called("azure", "ensure", "InsufficientCapacity", 1.5)
    metrics.count_workspaces(lambda: {"Pending": 2, "Running": 1})
    with served(metrics=metrics_page(metrics)) as get:
        status, said = get("/metrics")
    assert status == 200
    for line in (
        'controller_runtime_reconcile_total{controller="workspace",result="error"} 0.0',
        'controller_runtime_reconcile_errors_total{controller="workspace"} 0.0',
        'controller_runtime_terminal_reconcile_errors_total{controller="workspace"} 0.0',
        'controller_runtime_reconcile_panics_total{controller="workspace"} 0.0',
        'controller_runtime_active_workers{controller="workspace"} 0.0',
        'controller_runtime_max_concurrent_reconciles{controller="workspace"} 4.0',
        'workqueue_depth{name="workspace"} 2.0',
        'leader_election_master_status{name="kaito-controller"} 0.0',
        'rest_client_requests_total{code="200",host="https://10.0.0.1",method="GET"} 1.0',
        'kaito_provisioner_calls_total{method="ensure",provisioner="azure",result="InsufficientCapacity"} 1.0',
        'kaito_provisioner_call_seconds_sum{method="ensure",provisioner="azure",result="InsufficientCapacity"} 1.5',
        'kaito_workspace_count{phase="pending"} 2.0',
        'kaito_workspace_count{phase="running"} 1.0',
    ):
        assert line in said.splitlines()


def test_two_controllers_in_one_process_count_apart() -> None:
    one, two = Metrics(), Metrics()
    one.added("workspace")
    assert one.registry.get_sample_value("workqueue_adds_total", {"name": "workspace"}) == 1
    assert two.registry.get_sample_value("workqueue_adds_total", {"name": "workspace"}) is None


def test_a_page_that_fails_is_an_answer_too(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> tuple[int, str, bytes]:
        raise ZeroDivisionError("a bug")

    with served(metrics=broken) as get:
        assert get("/metrics")[0] == 500
        assert get("/elsewhere")[0] == 404
    assert "a bug" in caplog.text


@pytest.mark.parametrize(
    ("text", "meant"), [(":8081", ("", 8081)), ("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:80", ("::1", 80))]
)
def test_addresses(text: str, meant: tuple[str, int]) -> None:
    assert address(text, "--health-address") == meant


@pytest.mark.parametrize("text", ["", "here", ":http", "127.0.0.1:", ":70000", ":-1"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(UserError, match="--health-address"):
        address(text, "--health-address")


def test_an_address_that_is_taken_is_said_so() -> None:
    server = serve(("", 0), {})
    try:
        with pytest.raises(UserError, match="cannot be listened on: Address already in use"):
            serve(("", server.server_port), {})
    finally:
        server.shutdown()
        server.server_close()
