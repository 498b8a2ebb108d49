"""The fake cloud keeps the contract of a node provisioner, and goes wrong exactly as it is told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.existing.node import read_node
from kaito_core.kube.client import connect
from kaito_core.kube.kinds import NODES
from kaito_core.plugins.types import (
    Gpu,
    InsufficientCapacity,
    NodeRequest,
    Offer,
    Price,
    QuotaExceeded,
    Requirements,
    Transient,
)
from kaito_core.testing.cluster import running_cluster, why_no_cluster
from kaito_core.testing.provisioner import Crash, FakeProvisioner, Fault, FileLog, Log
from kaito_core.testing.provisioner_plugin import CloudFolder

GIB = 1 << 30
SMALL = Offer("small", 4, 16 * GIB, Gpu("T4", 15 * GIB, (7, 5)), 1, price=Price(0.5, "test", "2026-01-01"))
LARGE = Offer("large", 8, 64 * GIB, Gpu("MI300X", 190 * GIB, None, "amd"), 8)


def request(name: str = "ws1", offer: Offer = SMALL, count: int = 1) -> NodeRequest:
    return NodeRequest(name, offer, Requirements(labels={"app": "tune"}, count=count), {"kaito.sh/workspace": "one"})


def cloud(**behaviour: object) -> FakeProvisioner:
    return FakeProvisioner([SMALL, LARGE], **behaviour)  # type: ignore[arg-type]


def test_offers_are_its_own() -> None:
    assert [(o.instance_type, o.provisioner) for o in cloud().offers(Requirements())] == [("small", "fake"), ("large", "fake")]  # fmt: skip
    assert [o.instance_type for o in cloud().offers(Requirements(("LARGE",)))] == ["large"]


def test_asking_twice_buys_once() -> None:
    fake = cloud(ready_after=2)
    assert [fake.ensure(request()).phase for _ in range(4)] == ["pending", "pending", "ready", "ready"]
    assert fake.observe("ws1").selector == fake.ensure(request()).selector != {}
    assert fake.bought == ["small"]
    assert fake.observe("ws2").phase == "absent"


def test_a_request_for_two_machines_buys_two() -> None:
    fake = cloud()
    assert len(set(fake.ensure(request(count=2)).nodes)) == 2
    assert fake.bought == ["small", "small"]


def test_released_is_gone_when_it_says_so() -> None:
    fake = cloud(gone_after=1)
    fake.ensure(request())
    assert fake.leaks() == ["ws1: 1×small"]
    assert fake.release("ws1").phase == "releasing"
    assert fake.observe("ws1").phase == fake.ensure(request()).phase == "releasing"
    assert not fake.leaks()
    assert fake.machines
    assert fake.release("ws1").phase == fake.release("ws1").phase == "absent"
    assert not fake.machines
    fake.ensure(request())
    assert (fake.bought, fake.most) == (["small", "small"], 1)


def test_what_is_refused_is_not_bought() -> None:
    fake = cloud()
    fake.fail(InsufficientCapacity("none left in zone 1"), offer="small", times=2)
    for _ in range(2):
        with pytest.raises(InsufficientCapacity, match="none left in zone 1"):
            fake.ensure(request())
    assert not fake.bought
    assert fake.ensure(request("ws2", LARGE)).phase == "ready"
    assert fake.ensure(request()).phase == "ready"


def test_a_machine_that_comes_to_nothing_is_held_until_it_is_released() -> None:
    fake = cloud()
    fake.break_machine(QuotaExceeded("8 of 8 GPUs are used"))
    status = fake.ensure(request())
    assert (status.phase, type(status.failure), status.message) == ("failed", QuotaExceeded, "8 of 8 GPUs are used")
    assert fake.observe("ws1").phase == "failed"
    assert fake.leaks()
    assert fake.release("ws1").phase == "absent"


def test_a_lost_answer_is_of_a_call_that_was_carried_out() -> None:
    fake = cloud()
    fake.lose_answer()
    with pytest.raises(Transient):
        fake.ensure(request())
    assert fake.bought == ["small"]
    assert fake.ensure(request()).phase == "ready"
    fake.lose_answer(call="release")
    with pytest.raises(Transient):
        fake.release("ws1")
    assert not fake.machines


def test_a_crash_passes_whatever_forgives_a_broken_plugin() -> None:
    fake = cloud()
    fake.crash()
    with pytest.raises(Crash):
        fake.ensure(request())
    assert not issubclass(Crash, Exception)
    assert fake.ensure(request()).phase == "ready"
    assert fake.bought == ["small"]


def test_a_call_that_hangs_holds_up_no_other() -> None:
    fake = cloud()
    fake.hang(60, offer="small")
    threading.Thread(target=fake.ensure, args=(request(),), daemon=True).start()
    while not fake.calls():
        pass
    assert fake.ensure(request("ws2", LARGE)).phase == "ready"
    assert fake.bought == ["large"]


@given(st.lists(st.tuples(st.sampled_from(["ensure", "release", "observe", "restart"]), st.sampled_from(["a", "b"]))))
def test_whoever_opens_the_log_sees_the_same_cloud(calls: list[tuple[str, str]]) -> None:
    """However often the controller is restarted: no request holds two machines, and what was bought is held or was given back."""
    log = Log()
    fake = cloud(log=log, ready_after=1, gone_after=1)
    for call, name in calls:
        if call == "restart":
            again = cloud(log=log, ready_after=1, gone_after=1)
            assert again.machines == fake.machines
            fake = again
        elif call == "ensure":
            fake.ensure(request(name))
        else:
            getattr(fake, call)(name)
    released = sum(e["event"] == "released" for e in fake.events)
    assert len(fake.bought) == released + len(fake.machines)


# --- in a process of its own


def test_the_cloud_outlives_a_controller_that_is_killed(tmp_path: Path) -> None:
    folder = CloudFolder(tmp_path, [SMALL, LARGE], ready_after=1, faults=[Fault("crash", offer="small")])
    controller = textwrap.dedent("""
        import json, sys
        from kaito_core.plugins.manager import load_plugins
        from kaito_core.plugins.types import NodeRequest, Requirements
        fake = load_plugins().provisioners()["fake"]
        offer = next(o for o in fake.offers(Requirements()) if o.instance_type == "small")
        assert (offer.gpu.compute_capability, offer.price.per_hour) == ((7, 5), 0.5)
        status = fake.ensure(NodeRequest("ws1", offer, Requirements()))
        print(status.phase)
    """)

    def run() -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **folder.environment}
        return subprocess.run([sys.executable, "-c", controller], env=env, capture_output=True, text=True, check=False)

    assert run().returncode == -9
    assert folder.provisioner().leaks() == ["ws1: 1×small"]
    assert run().stdout == "ready\n"
    assert folder.provisioner().bought == ["small"]
    folder.change(faults=[Fault("refused", error="InsufficientCapacity", message="none left")])
    assert "InsufficientCapacity: none left" in run().stderr


def test_the_log_is_lines_of_json(tmp_path: Path) -> None:
    fake = cloud(log=FileLog(tmp_path / "log.jsonl"))
    fake.ensure(request())
    fake.release("ws1")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [(e["event"], e["id"]) for e in lines if e["event"] in ("bought", "released")] == [("bought", "ws1"), ("released", "ws1")]  # fmt: skip


def test_a_misspelt_error_is_refused() -> None:
    with pytest.raises(ValueError, match="'OutOfLuck' is no ProvisioningError"):
        _ = Fault("refused", error="OutOfLuck").exception


# --- a real API server


@pytest.mark.skipif(bool(why_no_cluster()), reason=why_no_cluster())
def test_a_machine_is_a_node_until_it_is_gone() -> None:
    with running_cluster() as cluster:
        kube = connect(kubeconfig=str(cluster.kubeconfig))
        fake = cloud(kube=kube, ready_after=1)
        wanted = request(count=2)
        fake.ensure(wanted)
        assert kube.list(NODES)[0] == []
        status = fake.ensure(wanted)
        nodes = [read_node(n) for n in kube.list(NODES)[0]]
        assert {n.name for n in nodes} == set(status.nodes)
        assert all(n.usable and (n.offer.instance_type, n.offer.gpus) == ("small", 1) for n in nodes)
        assert all(status.selector.items() <= n.labels.items() for n in nodes)
        assert all((n.labels["app"], n.labels["kaito.sh/workspace"]) == ("tune", "one") for n in nodes)
        assert fake.release("ws1").phase == "absent"
        assert kube.list(NODES)[0] == []
