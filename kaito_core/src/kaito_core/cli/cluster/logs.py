"""What a Workspace's pods printed, stage by stage: messages and plain output, without the events that programs read."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from kaito_core.api import conditions
from kaito_core.cli.cluster.pod_log import NewestPod, answering, container_lines, passing, pods_of, servers_of
from kaito_core.cli.cluster.workspace import is_tuned, message, phase, succeeded
from kaito_core.kube.errors import ApiError
from kaito_core.kube.kinds import WORKSPACES, Object
from kaito_core.problems import Failure, UserError
from kaito_core.progress import parse_log_line

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

LOOK = 1.0
"""Seconds between two looks for a newer pod."""

FIRST = ("fetch", "check")
"""Stages that have a container of their own, of that name."""
SERVE = "serve"


class Printer:
    """Prints lines of a pod's log as they come, a heading where another stage begins."""

    def __init__(self, only: str = "", main: str = "") -> None:
        """``only`` is the stage to print, ``main`` the one whose lines come first in a pod's main container, where that is known."""
        self._only = only
        self._main = main
        self._stage = ""
        self._heading = ""
        self.stages: list[str] = []
        """That had something to say, in the order in which they did."""

    def pod(self, name: str) -> None:
        """What comes now is of this pod."""
        click.echo(click.style(f"--- pod {name}", dim=True))
        self._stage = self._heading = ""

    def line(self, container: str, line: str) -> None:
        event = parse_log_line(line)
        if event is not None:
            self._stage = str(event["stage"])
        elif container in FIRST:
            self._stage = container
        elif self._main and self._stage in ("", *FIRST):
            self._stage = self._main
        elif not self._stage:
            self._stage = container
        if self._stage not in self.stages:
            self.stages.append(self._stage)
        if event is not None and event["event"] != "message":
            return
        if self._only and self._stage != self._only:
            return
        if self._stage != self._heading:
            self._heading = self._stage
            click.echo(click.style(f"--- {self._stage}", bold=True))
        click.echo(event["text"] if event else line)


def show_logs(client: Client, workspace: Object, *, stage: str = "", follow: bool = False) -> None:
    """Print what the pods of its endpoint have printed, if it has any, else those of its job: the oldest pod first. A ``stage`` of a
    tuning is in the job's. With ``follow`` go on until the job has ended, or as long as there is an endpoint."""
    serving = not is_tuned(workspace) or stage == SERVE
    pods = servers_of(client, workspace) if serving or not stage else []
    if pods:
        serving = True
    elif not serving:
        pods = pods_of(client, workspace)
    printer = Printer(stage, SERVE if serving else "")
    if not pods and not follow:
        raise _no_pod(workspace, serving=serving)
    last = [p for p in pods if p["metadata"]["name"].endswith("-0")][-1:] if serving else pods[-1:]
    for pod in [p for p in pods if p not in last] if follow else pods:
        if len(pods) > 1:
            printer.pod(pod["metadata"]["name"])
        try:
            for container, line in container_lines(client, pod, follow=False):
                printer.line(container, line)
        except ApiError as e:
            click.echo(f"warning: {e.problems[0].message}", err=True)
    if follow:
        _follow(client, workspace, printer, several=len(pods) > 1, serving=serving)
    elif not printer.stages:
        click.echo(f"nothing has been printed yet: {_why_not(workspace, serving=serving)}", err=True)
    if stage and printer.stages and stage not in printer.stages:
        raise UserError(
            f"no stage {stage!r} has begun", f"stages that have: {', '.join(printer.stages)}", field="--stage"
        )


def _no_pod(workspace: Object, *, serving: bool) -> Failure:
    name = workspace["metadata"]["name"]
    return Failure(
        f"there is no pod of {name}: {_why_not(workspace, serving=serving)}", f"kaito status {name} says more"
    )


def _why_not(workspace: Object, *, serving: bool) -> str:
    reason = message(workspace, conditions.INFERENCE_READY) if serving else ""
    return reason or message(workspace) or "no reason is known"


def _follow(client: Client, workspace: Object, printer: Printer, *, several: bool, serving: bool) -> None:
    metadata = workspace["metadata"]
    log = NewestPod(client, pods=answering if serving else pods_of)
    asleep = False
    try:
        while True:
            try:
                now = client.get(WORKSPACES, metadata["name"], metadata["namespace"])
                pod = log.look(now) if now else None
            except ApiError as e:
                if not passing(e):
                    raise
                now, pod = workspace, None
            if pod is not None and (several or len(log.seen) > 1):
                printer.pod(pod["metadata"]["name"])
            ended = now is None or (not serving and succeeded(now) is not None)
            for container, line in log.lines(10 * LOOK if ended else LOOK):
                printer.line(container, line)
            if ended:
                return
            if serving and now is not None and asleep != (asleep := phase(now) == "Asleep") and asleep:
                click.echo(click.style(f"--- {message(now, conditions.INFERENCE_READY) or 'asleep'}", dim=True))
            if log.at_end:
                # Nothing more can come from this pod; wait for another one, or for the end.
                time.sleep(LOOK)
    finally:
        log.close()
