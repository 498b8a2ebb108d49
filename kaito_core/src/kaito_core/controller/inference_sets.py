"""The InferenceSet controller: what it watches, and one reconcile from look to deed.

caches ──> decide ──> nothing to make or remove: the status
           (pure) └─> else: the API server itself ──> decide ──> act

A decision that makes or removes Workspaces never rests on caches: a replica too many costs money, and one too few is an outage.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kaito_core.api import labels
from kaito_core.controller.configs import Configs
from kaito_core.controller.decide_set import (
    ObservedSet,
    SetDecision,
    decide_set,
    merge_patch,
)
from kaito_core.controller.loop import Controller, Result
from kaito_core.controller.reconcile.case import error_patch
from kaito_core.controller.seen import Seen
from kaito_core.kube.errors import AlreadyExists, ApiError, Conflict
from kaito_core.kube.events import Recorder
from kaito_core.kube.kinds import INFERENCE_SETS, SERVICES, WORKSPACES, Object
from kaito_core.kube.reflector import Reflector
from kaito_core.kube.workqueue import WorkQueue

if TYPE_CHECKING:
    from kaito_core.controller.metrics import Metrics
    from kaito_core.kube.client import Client

SOON = 0.1
"""Seconds until a reconcile is tried again that met another state than it had seen."""

log = logging.getLogger("kaito_core.controller.inference_sets")


class InferenceSetController:
    """Reconciles the InferenceSets of a namespace, or of all."""

    def __init__(
        self,
        client: Client,
        *,
        namespace: str = "",
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._clock = clock
        self._metrics = metrics
        self.queue = WorkQueue("inferenceset", metrics=metrics)
        self._sets = Reflector(client, INFERENCE_SETS, namespace, on_change=self._set_changed)
        ours: dict[str, Any] = {
            "labels": labels.INFERENCE_SET,
            "index": labels.INFERENCE_SET,
            "on_change": self._child_changed,
        }
        self._workspaces = Reflector(client, WORKSPACES, namespace, **ours)
        self._services = Reflector(client, SERVICES, namespace, **ours)
        self.reflectors = [self._services, self._workspaces, self._sets]
        self._seen = Seen({INFERENCE_SETS: self._sets})
        self._configs = Configs(client)
        self._recorder = Recorder(client, "kaito-controller")
        self._loop: Controller | None = None

    # --- running

    def start_watching(self) -> None:
        """Fill the caches. A stand-by does this too, so that it can take over at once."""
        for reflector in self.reflectors:
            reflector.start()

    def start_workers(self, workers: int) -> None:
        """Begin to reconcile, once every cache is complete."""
        self._loop = Controller("inferenceset", self.queue, self.reconcile, workers, metrics=self._metrics)
        threading.Thread(target=self._begin, args=(self._loop,), name="begin-sets", daemon=True).start()

    def _begin(self, loop: Controller) -> None:
        while not all(r.has_synced for r in self.reflectors):
            time.sleep(0.05)
        for inference_set in self._sets.list():
            self._set_changed(None, inference_set)
        loop.start()

    def stop(self, timeout: float = 30.0) -> None:
        """End what is being done, and do nothing more."""
        if self._loop is not None:
            self._loop.stop(timeout)
        for reflector in self.reflectors:
            reflector.stop()

    # --- what changed

    def _set_changed(self, old: Object | None, new: Object | None) -> None:
        changed = new or old
        if changed is not None:
            self.queue.add((changed["metadata"]["namespace"], changed["metadata"]["name"]))

    def _child_changed(self, old: Object | None, new: Object | None) -> None:
        child = new or old
        if child is not None:
            metadata = child["metadata"]
            self.queue.add((metadata["namespace"], metadata["labels"].get(labels.INFERENCE_SET, "")))

    # --- one InferenceSet

    def reconcile(self, namespace: str, name: str) -> Result:
        """Bring one InferenceSet a step further; see the module."""
        inference_set = self._seen.get(INFERENCE_SETS, name, namespace)
        if inference_set is None:
            return Result()
        try:
            decision = decide_set(inference_set, self._cached(inference_set))
            if decision.acts:
                now = self._client.get(INFERENCE_SETS, name, namespace)
                if now is None:
                    return Result()
                inference_set = now
                decision = decide_set(inference_set, self._live(inference_set))
            self._act(inference_set, decision)
            return Result(decision.look_again_after)
        except (Conflict, AlreadyExists):
            return Result(SOON)
        except Exception as e:
            self._write_error(inference_set, e)
            raise

    def _cached(self, inference_set: Object) -> ObservedSet:
        namespace, name = inference_set["metadata"]["namespace"], inference_set["metadata"]["name"]
        workspaces = self._workspaces.indexed(namespace, name)
        return self._observed(inference_set, workspaces, self._services.get(name, namespace))

    def _live(self, inference_set: Object) -> ObservedSet:
        """All Workspaces of the namespace: one of ours may have lost its label, and somebody else's may have our name."""
        namespace, name = inference_set["metadata"]["namespace"], inference_set["metadata"]["name"]
        workspaces, _ = self._client.list(WORKSPACES, namespace)
        return self._observed(inference_set, workspaces, self._client.get(SERVICES, name, namespace))

    def _observed(self, inference_set: Object, workspaces: Iterable[Object], service: Object | None) -> ObservedSet:
        inference = ((inference_set.get("spec") or {}).get("template") or {}).get("inference") or {}
        named = inference.get("config")
        config = self._configs.digest(named, inference_set["metadata"]["namespace"]) if named else ""
        return ObservedSet(self._clock(), tuple(workspaces), service, config)

    def _act(self, inference_set: Object, decision: SetDecision) -> None:
        namespace = inference_set["metadata"]["namespace"]
        for kind, obj in decision.create:
            self._client.create(kind, obj)
            log.info("created %s %s", kind, obj["metadata"]["name"])
        for change in decision.change:
            self._client.patch(WORKSPACES, change.name, namespace, change.patch)
            log.info("changed %s %s", WORKSPACES, change.name)
        for deletion in decision.delete:
            self._client.delete(deletion.kind, deletion.name, namespace, uid=deletion.uid)
            log.info("deleted %s %s", deletion.kind, deletion.name)
        if decision.status is not None:
            inference_set = self._status(inference_set, decision.status)
        for note in decision.notes:
            self._recorder.event(inference_set, note.type, note.reason, note.message)

    def _write_error(self, inference_set: Object, error: Exception) -> None:
        """Say in a condition of its own what failed: the user looks there, and not into our log. What has been reached stays as it
        is."""
        name, namespace = inference_set["metadata"]["name"], inference_set["metadata"]["namespace"]
        newest = self._seen.get(INFERENCE_SETS, name, namespace) or inference_set
        patch = error_patch(newest, error, self._clock())
        try:
            written = self._client.patch(INFERENCE_SETS, name, namespace, patch, subresource="status")
            self._seen.wrote(INFERENCE_SETS, written)
        except ApiError as e:
            log.warning("the status of %s cannot be written either: %s", name, e)

    def _status(self, inference_set: Object, status: Mapping[str, Any]) -> Object:
        metadata = inference_set["metadata"]
        patch = merge_patch(inference_set.get("status") or {}, status)
        if not patch:
            return inference_set
        written = self._client.patch(
            INFERENCE_SETS, metadata["name"], metadata["namespace"], {"status": patch}, subresource="status"
        )
        self._seen.wrote(INFERENCE_SETS, written)
        return written
