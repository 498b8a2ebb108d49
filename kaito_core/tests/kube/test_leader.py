"""Leader election on a real API server: always at most one, also when a connection hangs or a process is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from kaito_core.kube.client import Client, connect
from kaito_core.kube.kinds import LEASES
from kaito_core.kube.leader import Election

from .proxy import Proxy
from .test_reflector import until

LEASE, RENEW, RETRY = 3.0, 1.5, 0.2


class Candidate:
    """Takes part in an election, with a connection of its own, and remembers from when to when it led."""

    def __init__(self, proxy: Proxy, lease_name: str, **given: float) -> None:
        self.proxy = proxy
        self.began = self.ended = 0.0
        self.name = uuid4().hex[:8]
        times = {"lease": LEASE, "renew": RENEW, "retry": RETRY, **given}
        self.election = Election(
            proxy.client(), lease_name, "default", self.name, started=self._started, lost=self._lost, **times
        )
        self.election.start()

    @property
    def leads(self) -> bool:
        return self.election.leads

    def _started(self) -> None:
        self.began = time.monotonic()

    def _lost(self) -> None:
        self.ended = time.monotonic()


class Contest:
    """Candidates for one Lease."""

    def __init__(self, kubeconfig: Path, folder: Path, stack: ExitStack) -> None:
        self.kubeconfig = kubeconfig
        self.client: Client = connect(kubeconfig=str(kubeconfig))
        self.lease_name = f"lease-{uuid4().hex[:8]}"
        self._folder = folder
        self._stack = stack

    def candidate(self, **given: float) -> Candidate:
        folder = self._folder / uuid4().hex
        folder.mkdir()
        proxy = self._stack.enter_context(Proxy(self.kubeconfig, folder))
        candidate = Candidate(proxy, self.lease_name, **given)
        self._stack.callback(candidate.election.stop)
        return candidate

    def leader(self) -> Candidate:
        candidate = self.candidate()
        until(lambda: candidate.leads)
        return candidate

    @property
    def spec(self) -> dict[str, Any]:
        found = self.client.get(LEASES, self.lease_name, "default")
        assert found is not None
        return dict(found["spec"])


@pytest.fixture
def contest(cluster: Any, tmp_path: Path) -> Iterator[Contest]:
    with ExitStack() as stack:
        yield Contest(Path(cluster.kubeconfig), tmp_path, stack)


def test_of_several_one_leads(contest: Contest) -> None:
    candidates = [contest.candidate() for _ in range(3)]
    until(lambda: any(c.began for c in candidates))
    until(lambda: time.monotonic() > max(c.began for c in candidates) + LEASE)  # long enough for all to have tried
    (leader,) = [c for c in candidates if c.leads]
    assert contest.spec["holderIdentity"] == leader.name
    assert [bool(c.began) for c in candidates].count(True) == 1


def test_who_stops_hands_over_at_once(contest: Contest) -> None:
    first = contest.candidate(lease=3600.0)
    until(lambda: first.leads)
    second = contest.candidate(lease=3600.0)
    first.election.stop()
    assert contest.spec["holderIdentity"] in ("", second.name)
    until(lambda: second.leads)
    assert first.ended == 0.0  # it left; it did not lose
    assert contest.spec["leaseTransitions"] == 1


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_a_leader_that_is_cut_off_gives_up_before_the_next_one_begins(contest: Contest, how: str) -> None:
    """A request may hang for longer than the lease lasts; the deadline holds all the same."""
    first = contest.leader()
    second = contest.candidate()
    if how == "refuses":
        first.proxy.refuse()
    else:
        first.proxy.hang()
    until(lambda: second.began)
    assert 0.0 < first.ended < second.began
    assert not first.leads


def test_a_leader_that_is_killed_is_followed_when_its_lease_has_run_out(contest: Contest) -> None:
    code = (
        "import sys, threading; from kaito_core.kube.client import connect; from kaito_core.kube.leader import Election\n"
        "Election(connect(kubeconfig=sys.argv[1]), sys.argv[2], 'default', 'victim', lost=lambda: None,\n"
        "  started=lambda: print('leads', flush=True), lease=3.0, renew=1.5, retry=0.2).start(); threading.Event().wait()"
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", code, str(contest.kubeconfig), contest.lease_name], stdout=subprocess.PIPE, text=True
    )
    assert victim.stdout is not None
    with victim, victim.stdout:
        assert victim.stdout.readline() == "leads\n"
        heir = contest.candidate()
        time.sleep(2 * RETRY)
        assert not heir.leads
        victim.kill()
        killed = time.monotonic()
    until(lambda: heir.began)
    assert heir.began - killed > LEASE - 2 * RETRY - 0.5  # not before; the last renewal was a little before its death


def test_whose_lease_was_taken_leads_no_longer(contest: Contest) -> None:
    leader = contest.leader()
    contest.client.patch(LEASES, contest.lease_name, "default", {"spec": {"holderIdentity": "somebody"}})
    until(lambda: leader.ended)
    assert contest.spec["holderIdentity"] == "somebody"


@pytest.mark.parametrize("renewed", ["2001-01-01T00:00:00.000000Z", "2101-01-01T00:00:00.000000Z"])
def test_clocks_need_not_agree(contest: Contest, renewed: str) -> None:
    """A holder is given its time from when it was first seen, whatever its own clock says."""
    spec = {"holderIdentity": "ghost", "leaseDurationSeconds": 2, "renewTime": renewed}
    lease = {"apiVersion": LEASES.api_version, "kind": "Lease", "metadata": {"name": contest.lease_name}, "spec": spec}
    contest.client.create(LEASES, {**lease, "metadata": {**lease["metadata"], "namespace": "default"}})
    began = time.monotonic()
    candidate = contest.candidate()
    until(lambda: candidate.began)
    assert candidate.began - began >= 2.0


def test_an_empty_lease_is_taken(contest: Contest) -> None:
    metadata = {"name": contest.lease_name, "namespace": "default"}
    contest.client.create(LEASES, {"apiVersion": LEASES.api_version, "kind": "Lease", "metadata": metadata})
    assert contest.leader().name == contest.spec["holderIdentity"]
