"""``kaito run`` in a cluster: plan with what can be had there, apply the documents, follow to the end.

The run belongs to the cluster: this command may be interrupted and typed again at any time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from kaito_core.cli.cluster import standalone as alone
from kaito_core.cli.cluster.documents import Applicable, applicable, apply, try_out
from kaito_core.cli.cluster.follow import failure, follow, where
from kaito_core.cli.cluster.workspace import holds_machines, succeeded, tried
from kaito_core.cli.follow import Follower, headline, made
from kaito_core.cli.given import Given, plan_of, read
from kaito_core.cli.run import at_terminal, refuse
from kaito_core.cli.show import duration
from kaito_core.cli.target import Target, connected, obstacle, readiness
from kaito_core.kube.kinds import WORKSPACES, Object
from kaito_core.planning.choice import is_free, money
from kaito_core.planning.plan import Plan
from kaito_core.plugins.manager import load_plugins
from kaito_core.plugins.types import TuningFit
from kaito_core.problems import Failure, Problem, UserError

if TYPE_CHECKING:
    from kaito_core.kube.client import Client


def run_in_cluster(
    files: Sequence[str], target: Target, again: str, *, standalone: bool, tuner_image: str, yes: bool
) -> int:
    """The exit code of ``kaito run``: 0 only when every Workspace has succeeded as it is written now."""
    settings = alone.settings(tuner_image) if standalone else None
    client = connected(target)
    given = read(files, namespace=client.namespace)
    names = _names(given, standalone=standalone)
    found = readiness(client)
    click.echo(f"target: {target}\n")
    problem = obstacle(target, found, standalone=standalone)
    if problem:
        raise UserError(problem)
    if not found.knows_workspaces:
        _install_definition(client, yes)
    wanted = applicable(given[0].documents.documents)
    workspaces = [o for o in try_out(client, wanted) if o["kind"] == "Workspace"]
    run = _Run(client, workspaces, target.options, again, standalone)
    if all(succeeded(w) and run.is_over(w) for w in workspaces):
        for each in workspaces:
            click.echo(f"{_name(each)} is done already; change the Workspace, or {run.delete(each)}, to run it again")
            _result(each)
        return 0
    run.refuse_impossible()
    plugins = load_plugins()
    # What runs already has been planned and agreed to; its nodes may be taken by itself now.
    new = {(w["metadata"]["namespace"], w["metadata"]["name"]) for w in workspaces if not run.is_there(w)}
    planned = [
        (each, plan_of(each, plugins, local=False, cluster=client))
        for each in given
        if (each.workspace.namespace, each.workspace.name) in new
    ]
    refuse(planned)
    if not _confirmed([p for _, p in planned], yes):
        return 1
    with ExitStack() as stack:
        try:
            run.apply(wanted)
            if settings:
                namespace = workspaces[0]["metadata"]["namespace"]
                stack.enter_context(alone.looking_after(client, plugins, settings, namespace, names))
            return run.follow()
        except KeyboardInterrupt:
            stack.close()  # a controller in this process ends what it is doing before anything is said of it
            click.echo(run.how_to_go_on(), err=True)
            sys.exit(130)


def _names(given: Sequence[Given], *, standalone: bool) -> list[str]:
    namespaces = sorted({g.workspace.namespace for g in given})
    if standalone and len(namespaces) > 1:
        raise UserError(
            f"--standalone looks after one namespace, and the Workspaces are in {' and '.join(namespaces)}",
            "run them one after the other",
            field="--standalone",
        )
    return [g.workspace.name for g in given]


def _name(workspace: Object) -> str:
    return f"{workspace['metadata']['namespace']}/{workspace['metadata']['name']}"


# --- before anything is changed


def _install_definition(client: Client, yes: bool) -> None:
    from kaito_core.cli.cluster.standalone import install_definition

    question = f"{client.host} does not know Workspaces. Install their definition?"
    if not yes:
        if not at_terminal():
            raise UserError(f"nobody is there to be asked: {question}", "say --yes, or kaito crd | kubectl apply -f -")
        click.confirm(question, abort=True)
    install_definition(client)
    click.echo("the definition of Workspace is installed\n")


def _confirmed(plans: Sequence[Plan], yes: bool) -> bool:
    """Whether it may begin. UserError when it costs money and nobody can be asked."""
    costs = [_cost(p) for p in plans if p.chosen and not is_free(p.chosen.offer)]
    for words in costs:
        click.echo(words)
    if yes:
        return True
    if at_terminal():
        return click.confirm("Run this?", default=True)
    if costs:
        raise UserError("this costs money, and nobody is there to be asked", "say --yes")
    return True


def _cost(plan: Plan) -> str:
    """``small costs $0.90 an hour (Standard_NC6s_v3, azure-prices of 2026-01-01), about $0.30 in all (estimate)``."""
    assert plan.chosen is not None
    offer = plan.chosen.offer
    seconds = plan.chosen.fit.seconds if isinstance(plan.chosen.fit, TuningFit) else None
    if offer.price is None:
        return f"{plan.workspace.name} gets a {offer.instance_type} of {offer.provisioner}; its price is not known"
    price, count = offer.price, plan.workspace.resource.count
    words = f"{plan.workspace.name} costs ${price.per_hour * count:.2f} an hour ({offer.instance_type}, {price.source} of {price.date})"
    if plan.chosen.cost is not None:
        words += (
            f", about {money(plan.chosen.cost)} for {duration(seconds)} of training and what goes with it (estimate)"
        )
    others = [c.offer.price.per_hour * count for c in plan.candidates if not c.rejected and c.offer.price is not None]
    if max(others) > price.per_hour * count:
        words += f"; up to ${max(others):.2f} an hour where that cannot be had"
    return words


# --- the run


@dataclass(frozen=True)
class _Run:
    """The Workspaces of one command, as the server would have them."""

    client: Client
    workspaces: Sequence[Object]
    options: str
    """What other commands need to be told to find this cluster."""
    again: str
    standalone: bool

    def is_there(self, workspace: Object) -> bool:
        """Whether the cluster has it just so."""
        metadata = workspace["metadata"]
        before = self.client.get(WORKSPACES, metadata["name"], metadata["namespace"])
        return before is not None and before["metadata"]["generation"] == metadata["generation"]

    def is_over(self, workspace: Object) -> bool:
        """Whether nothing is left to be done for it, by whoever looks after it in this run."""
        return succeeded(workspace) is not None and not (self.standalone and holds_machines(workspace))

    def delete(self, workspace: Object) -> str:
        """The command that deletes it."""
        return f"kaito delete {'--standalone ' if self.standalone else ''}{where(workspace, self.options)}"

    def refuse_impossible(self) -> None:
        """UserError or Failure for those that would not run, for the state in which they are."""
        for each in self.workspaces:
            if "deletionTimestamp" in each["metadata"]:
                raise UserError(
                    f"{_name(each)} is being deleted",
                    f"wait for its end with {self.delete(each)}, then run it again",
                )
            if succeeded(each) is False and self.is_over(each):
                error = failure(each, self.options)
                raise Failure(
                    f"just as it is now, it was tried before: {error.problems[0].message}",
                    f"change the Workspace, or {self.delete(each)}, to run it again",
                )

    def apply(self, wanted: Sequence[Applicable]) -> None:
        there = {_name(w): self.is_there(w) for w in self.workspaces}
        for one in wanted:
            apply(self.client, one)
            word = "going on with" if there.get(_name(one.obj)) and one.kind.kind == "Workspace" else "applied"
            click.echo(f"  {word} {one}")

    def follow(self) -> int:
        """One after the other; the others go on meanwhile."""
        failed: list[Problem] = []
        for each in self.workspaces:
            name, namespace = each["metadata"]["name"], each["metadata"]["namespace"]
            if len(self.workspaces) > 1:
                click.echo(click.style(f"\n{_name(each)}", bold=True))
            with Follower(name) as follower:
                ended = follow(self.client, name, namespace, follower, until_released=self.standalone)
            if succeeded(ended):
                _result(ended)
            else:
                for number, line in enumerate(tried(ended)):
                    click.echo(("" if number else "\n  tried\n") + f"    {line}")
                failed.extend(failure(ended, self.options).problems)
        if failed:
            raise Failure(failed)
        return 0

    def how_to_go_on(self) -> str:
        """What is to be known by whoever stops following."""
        names, first = ", ".join(map(_name, self.workspaces)), self.workspaces[0]
        if self.standalone:
            return (
                f"\nnobody looks after {names} now: jobs that run go on, but nothing gives their machines back.\n"
                f"    go on:    {self.again}\n    end it:   {self.delete(first)}"
            )
        return (
            f"\n{names} goes on in the cluster.\n"
            f"    follow:   {self.again}, or kaito logs -f {where(first, self.options)}\n"
            f"    stop it:  {self.delete(first)}"
        )


def _result(workspace: Object) -> None:
    adapter = workspace.get("status", {}).get("adapter", {})
    headline(workspace["metadata"]["name"], adapter.get("evalLossBefore"), adapter.get("evalLossAfter"))
    made(adapter)
