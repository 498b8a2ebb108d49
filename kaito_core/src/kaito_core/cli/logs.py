"""``kaito logs NAME``: what the stages of a run or the server of an endpoint printed, on this machine or in a cluster."""

from __future__ import annotations

import sys
import time

import click

from kaito_core.cli.named import Remote, Where, named, where_options
from kaito_core.local.state import RunFolder


@click.command(
    "logs", help="Show what a run printed, stage by stage; in a cluster what the endpoint prints, if there is one."
)
@click.argument("name")
@click.option("--stage", help="Only this stage: fetch, check, train, verify, push or serve.")
@click.option("-f", "--follow", is_flag=True, help="Go on as long as the run does.")
@where_options
def command(
    name: str, stage: str | None, follow: bool, local: bool, context: str, kubeconfig: str, namespace: str
) -> None:
    found = named(name, Where(local, context, kubeconfig, namespace))
    if isinstance(found, Remote):
        from kaito_core.cli.cluster.logs import show_logs

        show_logs(found.client, found.workspace, stage=stage or "", follow=follow)
    else:
        _here(found, name, stage, follow)


def _here(folder: RunFolder, name: str, stage: str | None, follow: bool) -> None:
    # What is tuned and what serves it are one Workspace, each with stages of its own.
    logs = [(f, each) for f in folder.both if (state := f.read()) for each in state.order]
    if stage:
        there = list(dict.fromkeys(each for _, each in logs))
        logs = [(f, each) for f, each in logs if each == stage]
        if there and not logs:
            raise click.BadParameter(f"{stage!r} is not a stage of {name}: {', '.join(there)}", param_hint="--stage")
    paths = [f.log(each) for f, each in logs]
    offsets = dict.fromkeys(paths, 0)
    while True:
        # Looked at before reading, so that the last lines are not missed.
        alive = any(f.is_running() for f in folder.both)
        for path in paths:
            if path.is_file():
                with path.open("rb") as f:
                    f.seek(offsets[path])
                    text = f.read()
                offsets[path] += len(text)
                sys.stdout.write(text.decode("utf-8", errors="replace"))
        sys.stdout.flush()
        if not (follow and alive):
            return
        time.sleep(0.3)
