"""``kaito run FILE``: validate, plan, confirm, run, and say what came of it; an endpoint is served until it is ended."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import click

from kaito_core.cli.afterwards import afterwards
from kaito_core.cli.endpoint import how_to_call
from kaito_core.cli.follow import Follower, result
from kaito_core.cli.given import Given, plan_of, read
from kaito_core.cli.show import show
from kaito_core.cli.target import cluster_options, target_of
from kaito_core.local.run import Stopped, is_done, run
from kaito_core.local.state import RunFolder, Served
from kaito_core.planning.plan import Plan, TuningPlan
from kaito_core.planning.serving import ServingPlan
from kaito_core.plugins.manager import PluginManager, load_plugins
from kaito_core.problems import Problem, UserError

Planned = tuple[Given, Plan]


@click.command("run", help="Plan the workspaces in FILE and run them. '-' reads standard input.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@cluster_options
@click.option("--serve", is_flag=True, help="Serve what has been tuned: on this machine whatever its policy says, in a cluster "
              "where the Workspace has none.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=None, metavar="PORT",
              help="On this machine: the port of the endpoint; 0 takes any that is free.  [default: 5000]")  # fmt: skip
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
    serve: bool,
    port: int | None,
    standalone: bool,
    tuner_image: str,
    yes: bool,
) -> int:
    target = target_of(local, context, kubeconfig)
    if target.in_cluster:
        from kaito_core.cli.cluster.run import run_in_cluster

        _only_here(port)
        return run_in_cluster(
            files, target, again(), serve=serve, standalone=standalone, tuner_image=tuner_image, yes=yes
        )
    if standalone:
        raise UserError(
            f"--standalone needs a cluster, and the target is {target}", "name one with --context", field="--standalone"
        )
    plugins = load_plugins()
    planned: list[Planned] = [(given, plan_of(_no_template(given), plugins, local=True)) for given in read(files)]
    # Before anything is trained: what cannot be served afterwards is said now.
    endpoints: list[Planned] = [p for p in planned if not isinstance(p[1], TuningPlan)]
    endpoints += [(g, afterwards(g, p, plugins, here=True)) for g, p in planned if _is_served(p, serve)]
    _one_endpoint(endpoints, serve)
    tunings = [(given, each) for given, each in planned if isinstance(each, TuningPlan)]
    click.echo(f"target: {target}\n")
    refuse([*tunings, *endpoints])
    _can_run_here([each for _, each in (*tunings, *endpoints)])
    if not yes and at_terminal() and not click.confirm("Run this?", default=True):
        return 1
    for given, tuning in tunings:
        _tune(given, tuning, plugins)
    for given, served in endpoints:
        _serve(given, served, plugins, port)
    return 0


def _only_here(port: int | None) -> None:
    if port is not None:
        raise UserError("--port is for this machine", "in a cluster the endpoint has a Service", field="--port")


def _is_served(each: Plan, serve: bool) -> TypeGuard[TuningPlan]:
    """Whether what this plan tunes is served afterwards, here. On demand means when somebody asks for it: ``--serve``."""
    return isinstance(each, TuningPlan) and (serve or each.workspace.serving_policy() == "always")


def _no_template(given: Given) -> Given:
    """UserError for a pod template: there is nobody here to run one."""
    inference = given.workspace.inference
    if inference is None or inference.template is None:
        return given
    problem = Problem(
        "a pod template is run in a cluster, and nowhere else",
        "give inference.preset in place of it, or name a cluster with --context",
        "inference.template",
    )
    raise UserError(given.locate(problem))


def _one_endpoint(endpoints: list[Planned], serve: bool) -> None:
    for given, each in endpoints:
        if each.workspace.serving_policy() == "never" and not serve:
            never = Problem("the policy is to serve it never", "change it, or say --serve", "inference.policy")
            raise UserError(given.locate(never))
    if len(endpoints) > 1:
        names = " and ".join(each.workspace.name for _, each in endpoints)
        raise UserError(
            f"{names} would be served, and one command serves one model", "run each in a terminal of its own"
        )


def _can_run_here(plans: list[Plan]) -> None:
    for each in plans:
        if isinstance(each, TuningPlan) and (needs := each.tuner.missing()):
            raise UserError(f"this machine cannot train with {each.method} yet: packages are missing", needs)
        if isinstance(each, ServingPlan) and (needs := each.runtime.missing()):
            raise UserError(f"this machine cannot serve with {each.runtime.name} yet: packages are missing", needs)


def refuse(planned: Sequence[tuple[Given, Plan]]) -> None:
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


def _tune(given: Given, plan: TuningPlan, plugins: PluginManager) -> None:
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
    if plan.workspace.serving_policy() == "onDemand" and plugins.runtimes():
        click.echo(f"  serve it       the same command with --serve, then kaito chat {folder.path.name}")


def _serve(given: Given, plan: Plan, plugins: PluginManager, port: int | None) -> None:
    """Serve until somebody ends it, which is how an endpoint ends well."""
    if not isinstance(plan, ServingPlan):
        return
    job = plan.job
    workload = plugins.workload(plan.workspace, plan.workload)
    folder = RunFolder.of(job.name, job.namespace)
    name = folder.path.name
    folder = folder.serving if plan.workspace.tuning is not None else folder
    with Follower(job.name) as follower:

        def on_event(event: dict[str, Any]) -> None:
            if event["event"] == "answers" and "url" in event:
                click.echo(
                    "\n" + how_to_call(name, Served(event["url"], event["base"], event["model"], event["adapters"]))
                )
                click.echo("  Ctrl-C ends it")
            elif event["event"] == "stopping":
                click.echo("\nending; what has been begun is answered first. Ctrl-C again: at once", err=True)
            else:
                follower.on_event(event)
            plugins.notify(event)

        try:
            run(folder, workload, job, given.secrets, on_event, port)
        except Stopped:
            click.echo("served until it was ended", err=True)


def again() -> str:
    """The command that was typed."""
    return " ".join(["kaito", *sys.argv[1:]]) if Path(sys.argv[0]).name.startswith("kaito") else "kaito run"
