"""Follows a Workspace in a cluster to its end: what its conditions say, and what its pods print, as one run on a terminal.

It asks again and again instead of relying on events: what it shows follows from what is there, so an API server that
restarts, a pod that is replaced and a controller that changes are nothing special."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import click

from kaito_core.api import conditions
from kaito_core.cli.cluster.pod_log import Logs, NewestPod, answering, passing, pods_of
from kaito_core.cli.cluster.workspace import (
    current_conditions,
    holds_machines,
    is_settled,
    is_tuned,
    message,
    news,
    policy,
    refusal,
    succeeded,
)
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

LOOKS_AGAIN: Final = 75.0
"""Seconds until the controller has looked at a refused endpoint once more, as it does every minute."""


def follow(
    cluster: Logs,
    name: str,
    namespace: str,
    follower: Follower,
    *,
    until_released: bool = False,
    refused: str = "",
    config: str = "",
    reached: Callable[[Object], None] = lambda workspace: None,
    look: float = LOOK,
    say: Callable[[str], None] | None = None,
) -> Object:
    """The Workspace as it is at its end, well or not: what is only served is at its end once it answers, or sleeps until somebody asks.

    With ``until_released`` it goes on until its machines were given back, and for what is served all the time until somebody ends this;
    ``reached`` is told when it is as far as it shall be. ``refused`` is why it was refused before this: that is no end until the controller
    has looked again; ``config`` is the digest of the settings that it shall be served with. Failure when it is deleted meanwhile. Trouble
    on the way to the API server is said and waited out."""
    tell = say or (lambda text: follower.say(f"  {click.style(text, dim=True)}"))
    log: NewestPod | None = None
    seen: Object | None = None
    away, told = False, False
    nobody = time.monotonic() + NOBODY
    looked = time.monotonic() + LOOKS_AGAIN
    if refused:
        tell(f"it was refused before: {refused}; the controller looks again within a minute")
    try:
        while True:
            try:
                workspace = cluster.get(WORKSPACES, name, namespace)
                if workspace and log is None:
                    log = NewestPod(cluster, pods=pods_of if is_tuned(workspace) else answering, pause=look)
                pod = log.look(workspace) if workspace and log else None
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
            if pod is not None and log is not None:
                tell(f"pod {pod['metadata']['name']}" + (", in place of the one before" if len(log.seen) > 1 else ""))
            end = succeeded(workspace)
            if end and not is_settled(workspace, config):
                end = None
            if end is False and refused and refusal(workspace) == refused and time.monotonic() < looked:
                end = None
            if end and not told:
                reached(workspace)
                told = True
            if end is not None and not (until_released and _is_looked_after(workspace, well=end)):
                _show(log, follower, LAST_LINES if is_tuned(workspace) else 0.0, tell)
                return workspace
            if not current_conditions(workspace) and time.monotonic() > nobody:
                tell(f"no controller has looked at it yet; does one watch the namespace {namespace}? (kaito doctor)")
                nobody = float("inf")
            _wait(log, follower, look, tell)
    finally:
        if log is not None:
            log.close()


def _is_looked_after(workspace: Object, *, well: bool) -> bool:
    """Whether it still needs somebody: its machines have not been given back, or shall not be."""
    return holds_machines(workspace) or (well and policy(workspace) == "always")


def _show(log: NewestPod | None, follower: Follower, seconds: float, tell: Callable[[str], None]) -> None:
    """Show what is printed within that time; no longer than there is something to come."""
    if log is None:
        return
    try:
        for _, line in log.lines(seconds):
            event = parse_log_line(line)
            if event is not None:
                follower.on_event(event)
    except ApiError as e:
        tell(f"{e.problems[0].message}; what follows is only what the controller says")


def _wait(log: NewestPod | None, follower: Follower, seconds: float, tell: Callable[[str], None]) -> None:
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
    words = "" if is_tuned(workspace) else refusal(workspace)
    words = words or message(workspace) or message(workspace, conditions.ACCEPTED) or "no reason is known"
    named = where(workspace, options)
    return Failure(
        f"{metadata['namespace']}/{metadata['name']} failed: {words}",
        f"more: kaito status {named}; kaito logs {named}",
    )
