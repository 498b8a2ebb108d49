"""Looks at NodeClaims, decides, and does what was decided."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kaito_core.controller.loop import Controller, Result
from kaito_core.controller.seen import Seen
from kaito_core.kube.errors import Conflict, NotFound
from kaito_core.kube.events import Recorder
from kaito_core.kube.kinds import NODES, Object
from kaito_core.kube.reflector import Reflector, without_managed_fields
from kaito_core.kube.workqueue import Key, WorkQueue
from kaito_provisioner_aks import pool
from kaito_provisioner_aks.arm import Edge
from kaito_provisioner_aks.claims.claim import FINALIZER, NODE_CLAIMS, is_ours
from kaito_provisioner_aks.claims.decide import STEADY, Decision, Observed, decide, leaked, refused
from kaito_provisioner_aks.errors import Refused, kind_of
from kaito_provisioner_aks.settings import Settings

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

SWEEP: Key = ("", "")
"""The key that stands for looking for pools without a claim."""

SOON = 0.1
"""Seconds until a reconcile is tried again that met a newer version of the claim."""

AWAY = 20.0
"""Seconds until Azure is asked again that did not answer, or asked to wait."""

log = logging.getLogger("kaito_provisioner_aks.claims")


class ClaimController:
    """Fulfils the NodeClaims of one cluster."""

    def __init__(
        self, client: Client, edge: Edge, settings: Settings, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._client = client
        self._edge = edge
        self._settings = settings
        self._clock = clock
        self.queue = WorkQueue("nodeclaim")
        self._claims = Reflector(client, NODE_CLAIMS, on_change=self._claim_changed)
        self._nodes = Reflector(
            client,
            NODES,
            labels=pool.OLD_AGENT_POOL,
            transform=_small,
            on_change=self._node_changed,
            index=pool.OLD_AGENT_POOL,
        )
        self.reflectors = [self._claims, self._nodes]
        self._seen = Seen({NODE_CLAIMS: self._claims})
        self._recorder = Recorder(client, "kaito-aks-provisioner")
        self._loop: Controller | None = None

    # --- running

    def start_watching(self) -> None:
        for reflector in self.reflectors:
            reflector.start()

    def start_workers(self, workers: int) -> None:
        """Begin, once every cache is complete: a claim without its node would look like one whose node is gone."""
        self._loop = Controller("nodeclaim", self.queue, self.reconcile, workers)
        threading.Thread(target=self._begin, args=(self._loop,), name="begin", daemon=True).start()

    def _begin(self, loop: Controller) -> None:
        while not all(r.has_synced for r in self.reflectors):
            time.sleep(0.05)
        for claim in self._claims.list():
            self._claim_changed(None, claim)
        self.queue.add_after(SWEEP, STEADY)
        loop.start()

    def stop(self, timeout: float = 30.0) -> None:
        if self._loop is not None:
            self._loop.stop(timeout)
        for reflector in self.reflectors:
            reflector.stop()

    # --- what changed

    def _claim_changed(self, old: Object | None, new: Object | None) -> None:
        changed = new or old
        if changed is not None and is_ours(changed):
            self.queue.add(("", changed["metadata"]["name"]))

    def _node_changed(self, old: Object | None, new: Object | None) -> None:
        if old is not None and new is not None and _without_heartbeat(old) == _without_heartbeat(new):
            return
        name = ((new or old or {})["metadata"].get("labels") or {}).get(pool.OLD_AGENT_POOL, "")
        if self._claims.get(name) is not None:
            self.queue.add(("", name))

    # --- one claim

    def reconcile(self, _: str, name: str) -> Result:
        """Bring one claim a step further."""
        if not name:
            return self._sweep()
        claim = self._seen.get(NODE_CLAIMS, name)
        if claim is None or not is_ours(claim):
            return Result()
        try:
            return self._step(claim)
        except Conflict:
            return Result(SOON)
        except NotFound:
            return Result()  # it went away in between
        except Refused as e:
            log.warning("%s: Azure: %s", name, e)
            return Result(e.said.retry_after or AWAY)

    def _step(self, claim: Object) -> Result:
        name = claim["metadata"]["name"]
        decision = decide(claim, self._observe(name), self._settings)
        if decision.put is not None:
            try:
                self._edge.put(name, decision.put, decision.etag)
                log.info("%s: asked for an agent pool", name)
            except Refused as e:
                log.warning("%s: %s", name, e)
                decision = refused(claim, e.said, self._clock())
        claim = self._act(claim, decision)
        return Result(decision.again_after)

    def _observe(self, name: str) -> Observed:
        found = None if pool.name_problem(name) else self._edge.pool(name)
        seen = pool.read(found) if found is not None else None
        why = None
        if seen is not None and seen.phase == "failed" and seen.error is None:
            why = self._edge.why_failed(name)
        return Observed(self._clock(), seen, tuple(self._nodes.indexed("", name)), why)

    def _act(self, claim: Object, decision: Decision) -> Object:
        name = claim["metadata"]["name"]
        finalizers = list(claim["metadata"].get("finalizers") or ())
        if decision.finalizer is True:
            claim = self._finalizers(claim, [*finalizers, FINALIZER])
        if decision.delete_pool:
            self._delete_pool(name)
        claim = self._write(claim, decision)
        for node, labels in decision.node_labels.items():
            self._client.patch(NODES, node, "", {"metadata": {"labels": labels}})
        for kind, reason, message in decision.events:
            self._recorder.event(claim, kind, reason, message)
            log.info("%s: %s", reason, message)
        for node in decision.delete_nodes:
            self._client.delete(NODES, node)
        if decision.delete_claim:
            self._client.delete(NODE_CLAIMS, name, uid=claim["metadata"]["uid"])
        if decision.finalizer is False:
            claim = self._finalizers(claim, [f for f in finalizers if f != FINALIZER])
        return claim

    def _delete_pool(self, name: str) -> None:
        try:
            self._edge.delete(name)
            log.info("%s: asked AKS to delete the agent pool", name)
        except Refused as e:
            if kind_of(e.said) != "deleting":
                raise

    def _finalizers(self, claim: Object, finalizers: list[str]) -> Object:
        metadata = claim["metadata"]
        # The list is replaced as a whole: the version makes sure that nobody else's finalizer is lost.
        patch = {"metadata": {"finalizers": finalizers, "resourceVersion": metadata["resourceVersion"]}}
        return self._wrote(self._client.patch(NODE_CLAIMS, metadata["name"], "", patch))

    def _write(self, claim: Object, decision: Decision) -> Object:
        name = claim["metadata"]["name"]
        if decision.labels:
            claim = self._wrote(self._client.patch(NODE_CLAIMS, name, "", {"metadata": {"labels": decision.labels}}))
        if decision.status is None or decision.status == (claim.get("status") or {}):
            return claim
        version = claim["metadata"]["resourceVersion"]
        patch = {"metadata": {"resourceVersion": version}, "status": decision.status}
        return self._wrote(self._client.patch(NODE_CLAIMS, name, "", patch, subresource="status"))

    def _wrote(self, claim: Object) -> Object:
        self._seen.wrote(NODE_CLAIMS, claim)
        return claim

    # --- pools without a claim

    def _sweep(self) -> Result:
        """Claims can be deleted by force, finalizer and all; the machine would be paid for ever."""
        try:
            pools = [pool.read(p) for p in self._edge.pools()]
            names = {c["metadata"]["name"] for c in self._claims.list()}
            for name in leaked(pools, names, self._clock()):
                if self._client.get(NODE_CLAIMS, name) is None:  # the cache may be late
                    log.warning("the agent pool %s has no NodeClaim any more", name)
                    self._delete_pool(name)
        except Refused as e:
            log.warning("agent pools without a NodeClaim cannot be looked for: %s", e)
        return Result(STEADY)


def _small(node: Object) -> Object:
    """What is kept of a node: a cluster has many."""
    status = {k: v for k, v in (node.get("status") or {}).items() if k in ("capacity", "allocatable", "conditions")}
    spec = {k: v for k, v in (node.get("spec") or {}).items() if k in ("taints", "unschedulable", "providerID")}
    return {**without_managed_fields(node), "spec": spec, "status": status}


def _without_heartbeat(node: Object) -> Object:
    """What a node is, apart from when it last said so."""
    told: list[Any] = [{k: c.get(k) for k in ("type", "status")} for c in node["status"].get("conditions") or ()]
    labels = node["metadata"].get("labels")
    return {"labels": labels, "spec": node["spec"], "status": {**node["status"], "conditions": told}}
