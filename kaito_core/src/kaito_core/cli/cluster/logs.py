"""What a Workspace's pods printed, stage by stage: messages and plain output, without the events that programs read."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from kaito_core.cli.cluster.pod_log import NewestPod, container_lines, passing, pods_of
from kaito_core.cli.cluster.workspace import message, succeeded
from kaito_core.kube.errors import ApiError
from kaito_core.kube.kinds import WORKSPACES, Object
from kaito_core.problems import Failure, UserError
from kaito_core.progress import parse_log_line

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

LOOK = 1.0
"""Seconds between two looks for a newer pod."""


class Printer:
    """Prints lines of a pod's log as they come, a heading where another stage begins."""

    def __init__(self, only: str = "") -> None:
        self._only = only
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
        elif not self._stage or container in ("fetch", "check"):
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
    """Print what there is, the oldest pod first; with ``follow`` go on until the Workspace has ended."""
    printer = Printer(stage)
    pods = pods_of(client, workspace)
    if not pods and not follow:
        reason = message(workspace) or "no reason is known"
        raise Failure(
            f"there is no pod of {workspace['metadata']['name']}: {reason}",
            f"kaito status {workspace['metadata']['name']} says more",
        )
    for pod in pods[:-1] if follow else pods:
        if len(pods) > 1:
            printer.pod(pod["metadata"]["name"])
        try:
            for container, line in container_lines(client, pod, follow=False):
                printer.line(container, line)
        except ApiError as e:
            click.echo(f"warning: {e.problems[0].message}", err=True)
    if follow:
        _follow(client, workspace, printer, several=len(pods) > 1)
    if stage and printer.stages and stage not in printer.stages:
        raise UserError(
            f"no stage {stage!r} has begun", f"stages that have: {', '.join(printer.stages)}", field="--stage"
        )


def _follow(client: Client, workspace: Object, printer: Printer, *, several: bool) -> None:
    metadata = workspace["metadata"]
    log = NewestPod(client)
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
            ended = now is None or succeeded(now) is not None
            for container, line in log.lines(10 * LOOK if ended else LOOK):
                printer.line(container, line)
            if ended:
                return
            if log.at_end:
                # Nothing more can come from this pod; wait for another one, or for the end.
                time.sleep(LOOK)
    finally:
        log.close()
