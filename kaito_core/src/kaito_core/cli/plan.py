"""``kaito plan FILE``: what a run would do. Touches nothing and buys nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from kaito_core.cli.afterwards import afterwards
from kaito_core.cli.given import plan_of, read
from kaito_core.cli.show import show, show_sum, sum_of
from kaito_core.cli.target import cluster_options, connected, target_of, way_out
from kaito_core.planning.plan import Plan, TuningPlan
from kaito_core.planning.serving import ServingPlan
from kaito_core.problems import Problem, UserError

if TYPE_CHECKING:
    from kaito_core.planning.choice import By


@click.command("plan", help="Show what a run of FILE would do, whether it fits, and on what. '-' reads standard input.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@cluster_options
@click.option("--by", type=click.Choice(["cost", "time"]), default="cost", show_default=True,
              help="What makes a machine better: a cheaper job, or an earlier end.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every machine.")
def command(files: tuple[str, ...], local: bool, context: str, kubeconfig: str, by: By, as_json: bool) -> int:
    from kaito_core.cli.cluster.afterwards import afterwards as afterwards_in_cluster
    from kaito_core.plugins.manager import load_plugins

    target = target_of(local, context, kubeconfig)
    cluster = connected(target) if target.in_cluster else None
    given_ones = read(files, placeholders_allowed=True, namespace=cluster.namespace if cluster else "")
    if not as_json:
        click.echo(f"target: {target}\n")
    plugins = load_plugins()
    plans: list[Plan] = []
    served: dict[int, ServingPlan] = {}
    """What comes after a tuning, by the number of its plan."""
    problems: list[Problem] = []
    with way_out():
        for given in given_ones:
            try:
                each = plan_of(given, plugins, local=local, cluster=cluster, by=by)
                plans.append(each)
                settings, never = given.workspace.inference, given.workspace.serving_policy() == "never"
                if isinstance(each, TuningPlan) and settings is not None and not never:
                    served[len(plans) - 1] = (
                        afterwards_in_cluster(given, each, plugins, cluster)
                        if cluster
                        else afterwards(given, each, plugins, here=True)
                    )
            except UserError as e:
                problems.extend(e.problems)
    if as_json:
        report = {
            "plans": [
                p.to_json() | ({"serving": served[number].to_json()} if number in served else {})
                for number, p in enumerate(plans)
            ],
            "sum": sum_of(plans).to_json(),
            "problems": [p.to_json() for p in problems],
        }
        click.echo(json.dumps(report, indent=2))
    else:
        for number, each in enumerate(plans):
            if number:
                click.echo()
            show(each)
            if number in served:
                click.echo("\nand then\n")
                show(served[number])
        if len(plans) > 1:
            show_sum(plans)
    if problems and not as_json:
        raise UserError(problems)
    return 2 if problems or any(p.refusal for p in (*plans, *served.values())) else 0
