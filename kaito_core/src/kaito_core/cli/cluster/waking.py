"""Waits until an endpoint in a cluster answers, and wakes it where it sleeps.

A request that arrives at its Service would do that by itself, but one through the API server's proxy does not arrive: the proxy knows
the pods of a Service and not the activator. So the Workspace is told when somebody wants it, with an annotation that counts for a
minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from kaito_core.api import conditions, labels
from kaito_core.cli.cluster.endpoint import refuse_unaskable, title
from kaito_core.cli.cluster.pod_log import passing
from kaito_core.cli.cluster.workspace import message, news, phase, policy, refusal
from kaito_core.kube.errors import ApiError, Forbidden, NotFound
from kaito_core.kube.kinds import WORKSPACES, Object
from kaito_core.problems import Failure

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

LOOK: Final = 1.0
"""Seconds between two looks at the Workspace."""

AGAIN: Final = 30.0
"""Seconds after which it is said again that somebody waits."""

SKEW: Final = 15.0
"""Seconds by which the clock here may differ from that of the API server; of more, the annotation would not count, or for too long."""

NOBODY: Final = 40.0
"""Seconds after which it is odd that nothing has happened: one that has failed is tried again half a minute after that."""


class Waking:
    """One endpoint that somebody here wants to ask."""

    def __init__(
        self,
        client: Client,
        name: str,
        namespace: str,
        say: Callable[[str], None],
        *,
        options: str = "",
        look: float = LOOK,
    ) -> None:
        """``say`` is told what happens, a line at a time; ``options`` are what other commands need to be told to find the cluster."""
        self._client = client
        self._name, self._namespace = name, namespace
        self._say = say
        self._options = options
        self._look = look
        self._ahead = timedelta()
        """By how much the API server's clock is ahead of ours."""

    def until_ready(self) -> Object:
        """The Workspace once its endpoint answers, at once when it does. `UserError` or `Failure` when it will not, in the words of
        whoever keeps it from that. KeyboardInterrupt leaves it to itself."""
        workspace = self._get()
        refuse_unaskable(workspace, self._options)
        if is_ready(workspace):
            return workspace
        _refuse(workspace, self._options, since=_since(workspace))
        said = message(workspace, conditions.INFERENCE_READY)
        how = {"Asleep": "is asleep: waking it", "Failed": f"failed: {said}; trying again"}
        self._say(f"{title(workspace)} {how.get(phase(workspace), f'starts: {said}' if said else 'starts')}")
        self._say("Ctrl-C stops waiting")
        try:
            return self._wait(workspace)
        except KeyboardInterrupt:
            self._say("no longer waited for; it starts nevertheless")
            raise

    def _wait(self, workspace: Object) -> Object:
        since = _since(workspace)
        began, told = time.monotonic(), -AGAIN
        seen, away, odd = workspace, False, False
        while True:
            now = time.monotonic()
            try:
                if policy(workspace) != "always" and now - told >= AGAIN:
                    self._wake(workspace)
                    told = now
                workspace = self._get()
            except ApiError as e:
                if not passing(e):
                    raise
                if not away:
                    self._say(f"{e.problems[0].message}; trying again")
                away = True
            else:
                away = False
                refuse_unaskable(workspace, self._options)
                for line in news(seen, workspace):
                    self._say(line)
                seen = workspace
                if is_ready(workspace):
                    return workspace
                _refuse(workspace, self._options, since=since)
                if not odd and now - began > NOBODY and _since(workspace) == since and phase(workspace) != "Starting":
                    if not phase(workspace):
                        raise _unserved(workspace)
                    self._say(
                        f"nothing has happened for {NOBODY:.0f} s; does a controller look after it? (kaito doctor)"
                    )
                    odd = True
            time.sleep(self._look)

    def _get(self) -> Object:
        found = self._client.get(WORKSPACES, self._name, self._namespace)
        if found is None:
            raise Failure(
                f"there is no Workspace {self._namespace}/{self._name} any more", "kaito status lists what there is"
            )
        return found

    def _wake(self, workspace: Object) -> None:
        try:
            patched = self._mark()
            ahead = _written(patched) - (datetime.now(UTC) + self._ahead)
            if abs(ahead.total_seconds()) > SKEW:
                self._ahead += ahead
                self._mark()
        except Forbidden as e:
            if phase(workspace) not in ("", "Asleep", "Failed"):
                return  # it is on its way
            raise Failure(
                f"{title(workspace)} is asleep, and these credentials may not wake it: {e.problems[0].message}",
                f"ask for the right to patch workspaces in the namespace {self._namespace}; a request from inside the cluster "
                f"(http://{self._name}.{self._namespace}) wakes it too",
            ) from None
        except NotFound:
            pass  # the next look says so

    def _mark(self) -> Object:
        wanted = (datetime.now(UTC) + self._ahead).strftime("%Y-%m-%dT%H:%M:%SZ")
        patch = {"metadata": {"annotations": {labels.WAKE: wanted}}}
        return self._client.patch(WORKSPACES, self._name, self._namespace, patch)


def is_ready(workspace: Object) -> bool:
    """Whether it answers now, in whatever form: one that is being changed goes on answering as it was."""
    told = {c["type"]: c.get("status") for c in workspace.get("status", {}).get("conditions", ())}
    return phase(workspace) == "Ready" and told.get(conditions.INFERENCE_READY) == "True"


def _since(workspace: Object) -> str:
    return str((workspace.get("status", {}).get("serving") or {}).get("since") or "")


def _refuse(workspace: Object, options: str, *, since: str) -> None:
    """`Failure` when it will not come. One on demand that has failed before, ``since`` then, is being tried again, because somebody asks;
    one that shall be there always is tried again in its controller's own time."""
    words = refusal(workspace)
    failed, always = phase(workspace) == "Failed", policy(workspace) == "always"
    if not words or (failed and not always and _since(workspace) == since):
        return
    then = "change the Workspace"
    if failed:
        then = "it is tried again every five minutes" if always else "ask again to try it again"
    there = f"{options}-n {workspace['metadata']['namespace']} {workspace['metadata']['name']}"
    raise Failure(f"{title(workspace)} cannot answer: {words}", f"{then}; more: kaito status {there}")


def _unserved(workspace: Object) -> Failure:
    """No controller has said anything of an endpoint."""
    return Failure(
        f"nothing is served of {title(workspace)}, and nobody says why",
        "a controller must run (kaito doctor); where its default is to serve nothing after a tuning, set the annotation "
        f"{labels.SERVE_AFTER_TUNING}: onDemand",
    )


def _written(workspace: Object) -> datetime:
    """When the API server wrote the object last, by its own clock; now, by ours, when it does not say."""
    times = []
    for entry in workspace["metadata"].get("managedFields", ()):
        with suppress(ValueError):
            times.append(datetime.fromisoformat(str(entry.get("time", ""))))
    return max(times, default=datetime.now(UTC))
