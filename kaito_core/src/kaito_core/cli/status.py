"""``kaito status [NAME]``: the runs on this machine."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from kaito_core.local.run import summary
from kaito_core.local.state import RunFolder, RunState, all_runs


@click.command("status", help="Show the runs on this machine, or one of them in full.")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> None:
    folders = [RunFolder.existing(name)] if name else all_runs()
    found = [(f, s) for f in folders if (s := f.read()) is not None]
    if as_json:
        click.echo(
            json.dumps([{**summary(s), "phase": _phase(f, s), "folder": str(f.path)} for f, s in found], indent=2)
        )
    elif not found:
        click.echo("no runs on this machine yet; start one with `kaito run workspace.yaml`")
    elif name:
        _full(*found[0])
    else:
        width = max(len(f.path.name) for f, _ in found)
        click.echo(f"{'NAME':{width}}  {'STATE':9}  {'STAGE':7}  PRESET")
        for folder, state in found:
            click.echo(
                f"{folder.path.name:{width}}  {_phase(folder, state):9}  {_stage(state):7}  {state.preset} ({state.method})"
            )


def _phase(folder: RunFolder, state: RunState) -> str:
    return "Running" if folder.is_running() else state.phase


def _stage(state: RunState) -> str:
    return next((n for n in state.order if n not in state.stages or state.stages[n].status != "done"), "-")


def _full(folder: RunFolder, state: RunState) -> None:
    click.echo(f"{state.name}: {_phase(folder, state)}, {state.method} of {state.preset}")
    for name in state.order:
        stage = state.stages.get(name)
        if stage is None:
            click.echo(f"  {name:7} –")
            continue
        took = f"{(stage.ended or time.time()) - stage.started:.0f} s"
        click.echo(f"  {name:7} {stage.status}, {took}{_detail(stage.result)}")
        if stage.message and stage.status != "done":
            click.echo(f"          {stage.message}")
    click.echo(f"  folder  {folder.path}")


def _detail(result: dict[str, Any]) -> str:
    """The figures of a stage and what it pushed; paths are all below the folder that is shown."""
    told = {k: v for k, v in result.items() if isinstance(v, int | float) or k in ("image", "digest")}
    told.pop("exit_code", None)
    return "".join(f", {k} {v:.4g}" if isinstance(v, float) else f", {k} {v}" for k, v in told.items())
