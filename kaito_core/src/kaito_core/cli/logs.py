"""``kaito logs NAME``: what the stages of a run printed, on this machine or in a cluster."""

from __future__ import annotations

import sys
import time

import click

from kaito_core.cli.named import Remote, Where, named, where_options
from kaito_core.local.state import RunFolder


@click.command("logs", help="Show what a run printed, stage by stage.")
@click.argument("name")
@click.option("--stage", help="Only this stage: fetch, check, train, verify or push.")
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
    state = folder.read()
    stages = [stage] if stage else (state.order if state else [])
    if stage and state and stage not in state.order:
        raise click.BadParameter(f"{stage!r} is not a stage of {name}: {', '.join(state.order)}", param_hint="--stage")
    offsets = dict.fromkeys(stages, 0)
    while True:
        alive = folder.is_running()  # looked at before reading, so that the last lines are not missed
        for each in stages:
            path = folder.log(each)
            if path.is_file():
                with path.open("rb") as f:
                    f.seek(offsets[each])
                    text = f.read()
                offsets[each] += len(text)
                sys.stdout.write(text.decode("utf-8", errors="replace"))
        sys.stdout.flush()
        if not (follow and alive):
            return
        time.sleep(0.3)
