"""Carries a `Decision` out: the thin edge. Everything may be repeated; nothing is done twice."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from kaito_core.api import labels
from kaito_core.controller.reconcile.decision import Decision, Endpoint, Ensure, Observe, Release
from kaito_core.kube.kinds import WORKSPACES, Object
from kaito_core.plugins.calls import words
from kaito_core.plugins.types import (
    InsufficientCapacity,
    NodeProvisioner,
    NodeStatus,
    NotAuthorized,
    ProvisioningError,
    QuotaExceeded,
    Transient,
    Unsupported,
)
from kaito_core.problems import KaitoError

if TYPE_CHECKING:
    from kaito_core.controller.owned_objects import OwnedObjects
    from kaito_core.controller.seen import Seen
    from kaito_core.kube.client import Client
    from kaito_core.kube.events import Recorder

log = logging.getLogger("kaito_core.controller")


class Actor:
    """Writes to one cluster."""

    def __init__(
        self,
        client: Client,
        seen: Seen,
        owned: OwnedObjects,
        recorder: Recorder,
        tell: Callable[[tuple[str, str], Endpoint | None], None] = lambda key, endpoint: None,
    ) -> None:
        self._client = client
        self._seen = seen
        self._owned = owned
        self._recorder = recorder
        self._tell = tell

    def act(self, workspace: Object, decision: Decision) -> Object:
        """Do it, in the order of the fields; the Workspace as it is then. Raises `ApiError`, and `NameTaken` before the status is written
        when an object of another owner stands where one of the Workspace's belongs."""
        name, namespace = workspace["metadata"]["name"], workspace["metadata"]["namespace"]
        if decision.finalizer is True:
            kept = workspace["metadata"].get("finalizers", ())
            workspace = self._finalizers(workspace, [*kept, labels.FINALIZER], decision.annotations)
        for kind, obj in decision.create:
            self._owned.create(workspace, kind, obj)
        for kind, obj in decision.apply:
            self._owned.apply(workspace, kind, obj)
        for deletion in decision.delete:
            self._owned.delete(workspace, deletion)
        workspace = self._status(workspace, decision)
        self._tell((namespace, name), decision.endpoint)
        for note in decision.notes:
            self._recorder.event(workspace, note.type, note.reason, note.message)
            log.info("%s: %s", note.reason, note.message, extra={"workspace": name, "namespace": namespace})
        if decision.finalizer is False:
            kept = [f for f in workspace["metadata"].get("finalizers", ()) if f != labels.FINALIZER]
            workspace = self._finalizers(workspace, kept)
        return workspace

    def _finalizers(
        self, workspace: Object, finalizers: list[str], annotations: Mapping[str, str] | None = None
    ) -> Object:
        metadata = workspace["metadata"]
        # The list is replaced as a whole: the version makes sure that nobody else's finalizer is lost.
        written: dict[str, Any] = {"finalizers": finalizers, "resourceVersion": metadata["resourceVersion"]}
        if annotations:
            written["annotations"] = dict(annotations)
        patch = {"metadata": written}
        return self._wrote(self._client.patch(WORKSPACES, metadata["name"], metadata["namespace"], patch))

    def _status(self, workspace: Object, decision: Decision) -> Object:
        old: dict[str, Any] = workspace.get("status") or {}
        if decision.status is None or decision.status == old:
            return workspace
        gone = {k: None for k in old if k not in decision.status}
        changed = {k: v for k, v in decision.status.items() if old.get(k) != v}
        metadata = workspace["metadata"]
        patch = {"status": {**_nulls(old, changed), **gone}}
        return self._wrote(
            self._client.patch(WORKSPACES, metadata["name"], metadata["namespace"], patch, subresource="status")
        )

    def _wrote(self, workspace: Object) -> Object:
        self._seen.wrote(WORKSPACES, workspace)
        return workspace


def _nulls(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A merge patch removes only what it says is null, also inside objects."""
    patch: dict[str, Any] = {}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            patch[key] = {**_nulls(before, value), **{k: None for k in before if k not in value}}
        else:
            patch[key] = value
    return patch


class CallMetrics(Protocol):
    """Told how calls of node provisioners went; ``result`` is a phase, or the name of a failure."""

    def called(self, provisioner: str, method: str, result: str, seconds: float) -> None: ...


def ask(
    provisioners: dict[str, NodeProvisioner], question: Ensure | Observe | Release, metrics: CallMetrics | None = None
) -> NodeStatus:
    """A provisioner's answer. What it raises becomes a failed answer: one broken plugin fails only what depends on it."""
    began = time.monotonic()
    provisioner = provisioners.get(question.provisioner)
    answer = _answer(provisioner, question) if provisioner else _nobody(question)
    if metrics:
        method = type(question).__name__.lower()
        result = type(answer.failure).__name__ if answer.failure else answer.phase
        metrics.called(question.provisioner, method, result, time.monotonic() - began)
    return answer


def _answer(provisioner: NodeProvisioner, question: Ensure | Observe | Release) -> NodeStatus:
    request_id = question.request.id if isinstance(question, Ensure) else question.request_id
    # What failed in another way than saying no is asked again.
    phases: dict[str, Literal["failed", "pending", "releasing"]] = {"Ensure": "failed", "Observe": "pending"}
    phase = phases.get(type(question).__name__, "releasing")
    try:
        return _understood(_asked(provisioner, question))
    except ProvisioningError as e:
        return NodeStatus(request_id, phase, message=str(e), failure=_known(e))
    except KaitoError as e:  # a plugin's fault in the words of its guard, or a cluster that does not answer
        log.warning("%s", e.problems[0].message, exc_info=e)
        message = e.problems[0].message
    except BaseException as e:  # sys.exit() too; nobody presses Ctrl-C in a worker's thread
        log.exception("the node provisioner %s broke", question.provisioner)
        message = f"the node provisioner {question.provisioner!r} broke: {words(e)}"
    return NodeStatus(request_id, phase, message=message, failure=Transient(message))


def _nobody(question: Ensure | Observe | Release) -> NodeStatus:
    """What was asked for may be held still: nothing is said of it, and it is asked again."""
    request_id = question.request.id if isinstance(question, Ensure) else question.request_id
    message = f"the node provisioner {question.provisioner!r} is not installed (any more)"
    phase: Literal["failed", "releasing"] = "releasing" if isinstance(question, Release) else "failed"
    return NodeStatus(request_id, phase, message=message, failure=Transient(message))


def _asked(provisioner: NodeProvisioner, question: Ensure | Observe | Release) -> NodeStatus:
    if isinstance(question, Ensure):
        return provisioner.ensure(question.request)
    if isinstance(question, Observe):
        return provisioner.observe(question.request_id)
    return provisioner.release(question.request_id)


KINDS = (InsufficientCapacity, QuotaExceeded, NotAuthorized, Unsupported, Transient)
"""What a decision goes by. A plugin may have kinds of its own below these."""


def _understood(answer: NodeStatus) -> NodeStatus:
    return answer if answer.failure is None else replace(answer, failure=_known(answer.failure))


def _known(failure: ProvisioningError) -> ProvisioningError:
    """The same failure as one of the kinds of the contract. One that is none of them says no more than that this machine cannot be
    had: the next offer is tried, as for `Unsupported`."""
    if type(failure) in KINDS and not isinstance(failure, Transient):
        return failure
    kind = next((k for k in KINDS if isinstance(failure, k)), Unsupported)
    if kind is not Transient:
        return kind(str(failure))
    after = getattr(failure, "retry_after", None)
    usable = isinstance(after, int | float) and math.isfinite(after)
    return Transient(str(failure), float(after) if usable and after is not None else None)
