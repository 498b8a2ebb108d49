"""Follows a Workspace in a cluster to its end: what its conditions say, and what its pods print, as one run on a terminal.

It asks again and again instead of relying on events: what it shows follows from what is there, so an API server that
restarts, a pod that is replaced and a controller that changes are nothing special."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import click

from kaito_core.api import conditions
from kaito_core.cli.cluster.pod_log import Logs, NewestPod, passing
from kaito_core.cli.cluster.workspace import current_conditions, holds_machines, message, news, succeeded
from kaito_core.kube.errors import ApiError
from kaito_core.kube.kinds import WORKSPACES, Object
from kaito_core.problems import Failure
from kaito_core.progress import parse_log_line

if TYPE_CHECKING:
    from kaito_core.cli.follow import Follower

LOOK: Final = 1.0
"""Seconds between two looks at the Workspace; what pods print comes at once."""

NOBODY: Final = 20.0
"""Seconds after which it is odd that no controller has said anything."""

LAST_LINES: Final = 5.0
"""Seconds that the rest of the log may take after the end."""


def follow(
    cluster: Logs,
    name: str,
    namespace: str,
    follower: Follower,
    *,
    until_released: bool = False,
    look: float = LOOK,
    say: Callable[[str], None] | None = None,
) -> Object:
    """The Workspace as it is at its end, well or not; with ``until_released`` also after its machines were given back.

    Failure when it is deleted meanwhile. Trouble on the way to the API server is said and waited out."""
    tell = say or (lambda text: follower.say(f"  {click.style(text, dim=True)}"))
    log = NewestPod(cluster, pause=look)
    seen: Object | None = None
    away = False
    nobody = time.monotonic() + NOBODY
    try:
        while True:
            try:
                workspace = cluster.get(WORKSPACES, name, namespace)
                pod = log.look(workspace) if workspace else None
            except ApiError as e:
                if not passing(e):
                    raise
                if not away:
                    tell(f"{e.problems[0].message}; trying again")
                away = True
                _wait(log, follower, look, tell)
                continue
            if away:
                tell("the API server answers again")
            away = False
            if workspace is None or (seen and seen["metadata"]["uid"] != workspace["metadata"]["uid"]):
                raise Failure(f"the Workspace {namespace}/{name} was deleted while it was followed")
            for line in news(seen, workspace):
                tell(line)
            seen = workspace
            if pod is not None:
                tell(f"pod {pod['metadata']['name']}" + (", in place of the one before" if len(log.seen) > 1 else ""))
            if succeeded(workspace) is not None and not (until_released and holds_machines(workspace)):
                _show(log, follower, LAST_LINES, tell)
                return workspace
            if not current_conditions(workspace) and time.monotonic() > nobody:
                tell(f"no controller has looked at it yet; does one watch the namespace {namespace}? (kaito doctor)")
                nobody = float("inf")
            _wait(log, follower, look, tell)
    finally:
        log.close()


def _show(log: NewestPod, follower: Follower, seconds: float, tell: Callable[[str], None]) -> None:
    """Show what is printed within that time; no longer than there is something to come."""
    try:
        for _, line in log.lines(seconds):
            event = parse_log_line(line)
            if event is not None:
                follower.on_event(event)
    except ApiError as e:
        tell(f"{e.problems[0].message}; what follows is only what the controller says")


def _wait(log: NewestPod, follower: Follower, seconds: float, tell: Callable[[str], None]) -> None:
    """Let that time pass, and show meanwhile what is printed."""
    until = time.monotonic() + seconds
    _show(log, follower, seconds, tell)
    time.sleep(max(0.0, until - time.monotonic()))


def where(workspace: Object, options: str = "") -> str:
    """The Workspace as other commands want it named: ``-n team-a small``."""
    return f"{options}-n {workspace['metadata']['namespace']} {workspace['metadata']['name']}"


def failure(workspace: Object, options: str = "") -> Failure:
    """Why the Workspace failed, in the words of its conditions."""
    metadata = workspace["metadata"]
    words = message(workspace) or message(workspace, conditions.ACCEPTED) or "no reason is known"
    named = where(workspace, options)
    return Failure(
        f"{metadata['namespace']}/{metadata['name']} failed: {words}",
        f"more: kaito status {named}; kaito logs {named}",
    )
