"""``kaito run FILE``: validate, plan, confirm, run, and say what came of it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kaito_core.cli.follow import Follower, result
from kaito_core.cli.given import Given, plan_of, read
from kaito_core.cli.show import show
from kaito_core.cli.target import cluster_options, target_of
from kaito_core.local.run import Stopped, is_done, run
from kaito_core.local.state import RunFolder
from kaito_core.planning.plan import Plan
from kaito_core.plugins.manager import PluginManager, load_plugins
from kaito_core.problems import UserError


@click.command("run", help="Plan the workspaces in FILE and run them. '-' reads standard input.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@cluster_options
@click.option(
    "--standalone", is_flag=True, help="In a cluster without a controller: look after the run from here until its end."
)
@click.option("--tuner-image", default="", envvar="KAITO_TUNER_IMAGE", help="With --standalone: the image that tunes.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def command(
    files: tuple[str, ...],
    local: bool,
    context: str,
    kubeconfig: str,
    standalone: bool,
    tuner_image: str,
    yes: bool,
) -> int:
    target = target_of(local, context, kubeconfig)
    if target.in_cluster:
        from kaito_core.cli.cluster.run import run_in_cluster

        return run_in_cluster(files, target, again(), standalone=standalone, tuner_image=tuner_image, yes=yes)
    if standalone:
        raise UserError(
            f"--standalone needs a cluster, and the target is {target}", "name one with --context", field="--standalone"
        )
    plugins = load_plugins()
    planned = [(given, plan_of(given, plugins, local=True)) for given in read(files)]
    click.echo(f"target: {target}\n")
    refuse(planned)
    for _, each in planned:
        needs = each.tuner.missing()
        if needs:
            raise UserError(f"this machine cannot train with {each.method} yet: packages are missing", needs)
    if not yes and at_terminal() and not click.confirm("Run this?", default=True):
        return 1
    for given, each in planned:
        _run_one(given, each, plugins)
    return 0


def refuse(planned: list[tuple[Given, Plan]]) -> None:
    """Show the plans. UserError when one of them has no machine."""
    for _, each in planned:
        show(each)
        click.echo()
    refused = [p.refusal for _, p in planned if p.refusal]
    if refused:
        raise UserError(refused)


def at_terminal() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _run_one(given: Given, plan: Plan, plugins: PluginManager) -> None:
    job = plan.job
    workload = plugins.workload(plan.workspace, plan.workload)
    folder = RunFolder.of(job.name, job.namespace)
    if is_done(folder, workload):
        click.echo(
            f"{job.name} is done already; change the workspace, or kaito delete {folder.path.name}, to run it again"
        )
    else:
        with Follower(job.name) as follower:

            def on_event(event: dict[str, object]) -> None:
                follower.on_event(event)
                plugins.notify(event)

            try:
                run(folder, workload, job, given.secrets, on_event)
            except Stopped:
                follower.close()
                click.echo(f"stopped; what was done is kept. Go on with the same command: {again()}", err=True)
                sys.exit(130)
    state = folder.read()
    if state:
        result(folder, state)


def again() -> str:
    """The command that was typed."""
    return " ".join(["kaito", *sys.argv[1:]]) if Path(sys.argv[0]).name.startswith("kaito") else "kaito run"
