"""One leader among several controllers, by a Lease (coordination.k8s.io).

As client-go does it: times are measured by one's own clock from when a change was *seen*, so clocks need not agree. Of the
official client's LeaseLock nothing is used, because it cannot give the Lease back."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from kaito_core.kube.errors import AlreadyExists, ApiError, Conflict
from kaito_core.kube.kinds import LEASES, Object

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15.0, 10.0, 2.0
"""Others wait so long for a silent leader; a leader gives up after so long without renewal; the time between two tries
(controller-runtime's defaults)."""

log = logging.getLogger("kaito_core.kube.leader")


class Election:
    """Takes part until stopped. ``started`` is called once, when this one leads, and must return at once: the Lease is not
    renewed meanwhile. ``lost`` is called when it leads no longer, unless it was stopped.

    Whoever has lost must end its process: a reconcile may still be going on, and somebody else has begun. ``renew`` must be
    shorter than ``lease`` by more than clocks can drift apart in that time."""

    def __init__(
        self,
        client: Client,
        name: str,
        namespace: str,
        identity: str,
        *,
        started: Callable[[], None],
        lost: Callable[[], None],
        lease: float = LEASE_SECONDS,
        renew: float = RENEW_SECONDS,
        retry: float = RETRY_SECONDS,
    ) -> None:
        self.leads = False
        self._client = client
        self._name = name
        self._namespace = namespace
        self._identity = identity
        self._started = started
        self._lost = lost
        self._lease, self._renew, self._retry = lease, renew, retry
        self._renewed = 0.0
        """When the last renewal that worked was *sent*: nobody can have seen it earlier."""
        self._seen: tuple[str, str] = ("", "")
        """The holder and the renewal that were seen last, …"""
        self._seen_at = 0.0
        """… and when that was new."""
        self._stop = threading.Event()
        self._changing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="leader-election", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Leave the election; a leader gives the Lease back, so that the next one need not wait for it to run out."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self._renew)
        with self._changing:
            led, self.leads = self.leads, False
        if led:
            try:
                self._give_back()
            except ApiError as e:
                log.warning("the lease could not be given back: %s", e.problems[0].message)

    def _run(self) -> None:
        while not self._stop.is_set():
            asked = time.monotonic()
            held = self._try()
            if held and time.monotonic() - asked < self._renew:  # later, it may have run out already
                self._renewed = asked
                if not self.leads:
                    self._lead()
            elif held is False and self.leads:
                self._lose("somebody else holds the lease")
                return
            self._stop.wait(self._retry * (1 if self.leads else random.uniform(1.0, 1.2)))  # noqa: S311 – jitter

    def _lead(self) -> None:
        with self._changing:
            if self._stop.is_set():
                return
            self.leads = True
        log.info("%s leads", self._identity)
        threading.Thread(target=self._guard, name="leader-deadline", daemon=True).start()
        self._started()

    def _guard(self) -> None:
        """The deadline holds even while a request hangs for longer than the lease lasts."""
        while (left := self._renewed + self._renew - time.monotonic()) > 0:
            if self._stop.wait(left):
                return
        self._lose(f"the lease could not be renewed for {self._renew:g} s")

    def _lose(self, why: str) -> None:
        with self._changing:
            if self._stop.is_set() or not self.leads:
                return
            self._stop.set()
            self.leads = False
        log.error("%s leads no longer: %s", self._identity, why)
        self._lost()

    def _try(self) -> bool | None:
        """Take or renew the Lease: whether it is ours; None when that is not known."""
        try:
            held = self._client.get(LEASES, self._name, self._namespace)
            if held is None:
                self._client.create(LEASES, self._new())
                return True
            spec = held.get("spec") or {}
            holder = spec.get("holderIdentity") or ""
            seen = (holder, str(spec.get("renewTime")))
            if seen != self._seen:
                self._seen, self._seen_at = seen, time.monotonic()
            ours = holder == self._identity
            runs_for = float(spec.get("leaseDurationSeconds") or self._lease)
            if holder and not ours and time.monotonic() - self._seen_at < runs_for:
                return False
            self._client.replace(LEASES, self._taken(held, ours=ours))
            return True
        except (AlreadyExists, Conflict):
            return None  # somebody was faster; the next look says who
        except ApiError as e:
            log.warning("the lease cannot be had: %s", e.problems[0].message)
            return None
        except Exception:
            # Without this thread nobody would ever lead here again, and nobody would know.
            log.exception("taking part in the election failed; trying again")
            return None

    def _give_back(self) -> None:
        held = self._client.get(LEASES, self._name, self._namespace)
        if held is not None and held["spec"].get("holderIdentity") == self._identity:
            held["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
            self._client.replace(LEASES, held)

    def _new(self) -> Object:
        return {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(1, round(self._lease)),
                "acquireTime": _now(),
                "renewTime": _now(),
                "leaseTransitions": 0,
            },
        }

    def _taken(self, held: Object, *, ours: bool) -> Object:
        """The Lease as ours. Its resource version stays in it: of two that take it at once, one gets a conflict."""
        before = held.get("spec") or {}
        spec = {**before, "holderIdentity": self._identity, "renewTime": _now()}
        spec["leaseDurationSeconds"] = max(1, round(self._lease))
        if not ours:
            spec["acquireTime"] = _now()
            spec["leaseTransitions"] = int(before.get("leaseTransitions") or 0) + 1
        return {**held, "spec": spec}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
