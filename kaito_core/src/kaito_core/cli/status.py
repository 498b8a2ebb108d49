"""``kaito status [NAME]``: the runs on this machine, and the Workspaces of the cluster."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from kaito_core.cli.endpoint import how_to_call, options_of
from kaito_core.cli.named import Remote, Where, ask_for, cluster, named, warn, where_options
from kaito_core.local.run import summary
from kaito_core.local.state import RunFolder, RunState, Served, all_runs
from kaito_core.problems import KaitoError

if TYPE_CHECKING:
    from kaito_core.kube.client import Client
    from kaito_core.kube.kinds import Object


@click.command("status", help="Show the runs on this machine and in the cluster, or one of them in full.")
@click.argument("name", required=False)
@where_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, local: bool, context: str, kubeconfig: str, namespace: str, as_json: bool) -> None:
    where = Where(local, context, kubeconfig, namespace)
    if name:
        found = named(name, where)
        if isinstance(found, Remote):
            runs, client, workspaces = [], found.client, [found.workspace]
        else:
            runs, client, workspaces = [found], None, []
    else:
        runs = [] if where.must_be_cluster else all_runs()
        client, workspaces = _workspaces(where)
    states = [(f, s) for run in runs for f in run.both if (s := f.read()) is not None]
    if as_json:
        _json(states, client, workspaces)
    elif name:
        _full(states, client, workspaces, where)
    else:
        _tables(states, client, workspaces, where)


def _workspaces(where: Where) -> tuple[Client | None, list[Object]]:
    """The cluster, if there is one that answers, and its Workspaces of one namespace."""
    try:
        client = cluster(where)
        if client is None:
            return None, []
        from kaito_core.kube.errors import NotFound
        from kaito_core.kube.kinds import WORKSPACES

        try:
            return client, ask_for(
                client, where, lambda: client.list(WORKSPACES, where.namespace or client.namespace)[0]
            )
        except NotFound:
            return client, []  # it does not know Workspaces
    except KaitoError as e:
        if where.must_be_cluster:
            raise
        warn(e)
        return None, []


def _json(states: list[tuple[RunFolder, RunState]], client: Client | None, workspaces: list[Object]) -> None:
    rows = [
        {
            **summary(s),
            "phase": _phase(f, s),
            "folder": str(f.path),
            "served": asdict(e) if (e := _served(f, s)) else None,
        }
        for f, s in states
    ]
    if client is not None:
        from kaito_core.cli.cluster import show

        rows += [show.summary(client, w) for w in workspaces]
    click.echo(json.dumps(rows, indent=2))


def _full(
    states: list[tuple[RunFolder, RunState]], client: Client | None, workspaces: list[Object], where: Where
) -> None:
    for folder, state in states:
        _run(folder, state)
    if client is not None:
        from kaito_core.cli.cluster import show

        for each in workspaces:
            show.full(client, each, options_of(where))


def _tables(
    states: list[tuple[RunFolder, RunState]], client: Client | None, workspaces: list[Object], where: Where
) -> None:
    if states:
        if client is not None:
            click.echo("runs on this machine")
        width = max(len(f.name) for f, _ in states)
        click.echo(f"{'NAME':{width}}  {'STATE':9}  {'STAGE':7}  PRESET")
        for folder, state in states:
            click.echo(
                f"{folder.name:{width}}  {_phase(folder, state):9}  {_stage(state):7}  {state.preset} ({state.method})"
                + (f"  {served.url}" if (served := _served(folder, state)) else "")
            )
    if client is not None and workspaces:
        from kaito_core.cli.cluster import show

        if states:
            click.echo()
        show.table(client, where.namespace or client.namespace, workspaces)
    if not states and not workspaces:
        also = (
            f", and no Workspace in the namespace {where.namespace or client.namespace} of {client.context}"
            if client
            else ""
        )
        start = "start one with `kaito run workspace.yaml`"
        click.echo(f"no Workspace{also.partition('no Workspace')[2]}; {start}" if where.must_be_cluster
                   else f"no runs on this machine yet{also}; {start}")  # fmt: skip


def _phase(folder: RunFolder, state: RunState) -> str:
    if not folder.is_running():
        return state.phase
    if state.task != "inference":
        return "Running"
    return "Serving" if state.served else "Starting"


def _served(folder: RunFolder, state: RunState) -> Served | None:
    """Where it answers now."""
    return state.served if state.served is not None and folder.is_running() else None


def _stage(state: RunState) -> str:
    return next((n for n in state.order if n not in state.stages or state.stages[n].status != "done"), "-")


def _run(folder: RunFolder, state: RunState) -> None:
    what = (
        f"{state.preset} served with {state.method}"
        if state.task == "inference"
        else f"{state.method} of {state.preset}"
    )
    click.echo(f"{state.name}: {_phase(folder, state)}, {what}")
    for name in state.order:
        stage = state.stages.get(name)
        if stage is None:
            click.echo(f"  {name:7} –")
            continue
        took = f"{(stage.ended or time.time()) - stage.started:.0f} s"
        click.echo(f"  {name:7} {stage.status}, {took}{_detail(stage.result)}")
        if stage.message and stage.status != "done":
            click.echo(f"          {stage.message}")
    if served := _served(folder, state):
        click.echo(how_to_call(folder.name, served))
    click.echo(f"  folder  {folder.path}")


def _detail(result: dict[str, Any]) -> str:
    """The figures of a stage and what it pushed; paths are all below the folder that is shown."""
    told = {k: v for k, v in result.items() if isinstance(v, int | float) or k in ("image", "digest")}
    told.pop("exit_code", None)
    return "".join(f", {k} {v:.4g}" if isinstance(v, float) else f", {k} {v}" for k, v in told.items())
