"""``kaito run`` in a cluster: plan with what can be had there, apply the documents, follow to the end.

The run belongs to the cluster: this command may be interrupted and typed again at any time."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from kaito_core.cli.cluster import standalone as alone
from kaito_core.cli.cluster.afterwards import afterwards
from kaito_core.cli.cluster.documents import Applicable, applicable, apply, served_after_tuning, try_out
from kaito_core.cli.cluster.endpoint import how_to_call, title
from kaito_core.cli.cluster.follow import failure, follow, where
from kaito_core.cli.cluster.workspace import (
    holds_machines,
    is_off,
    is_settled,
    is_trained,
    is_tuned,
    phase,
    policy,
    refusal,
    succeeded,
    tried,
)
from kaito_core.cli.follow import Follower, headline, made
from kaito_core.cli.given import Given, plan_of, read
from kaito_core.cli.run import at_terminal, refuse
from kaito_core.cli.show import duration
from kaito_core.cli.target import Target, connected, obstacle, readiness
from kaito_core.controller.configs import digest
from kaito_core.kube.kinds import CONFIG_MAPS, WORKSPACES, Object
from kaito_core.planning.choice import is_free, money
from kaito_core.planning.plan import Plan, TuningPlan
from kaito_core.plugins.manager import load_plugins
from kaito_core.problems import Failure, Problem, UserError

if TYPE_CHECKING:
    from kaito_core.api import Workspace
    from kaito_core.kube.client import Client
    from kaito_core.plugins.manager import PluginManager

MOMENT = 1.0
"""Seconds in which a controller has decided what becomes of a tuned model."""


def run_in_cluster(
    files: Sequence[str],
    target: Target,
    again: str,
    *,
    serve: bool = False,
    standalone: bool,
    tuner_image: str,
    yes: bool,
) -> int:
    """The exit code of ``kaito run``: 0 only when every Workspace has succeeded as it is written now, or is served so."""
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
    if serve:
        wanted = [served_after_tuning(one) for one in wanted]
    workspaces = [o for o in try_out(client, wanted) if o["kind"] == "Workspace"]
    run = _Run(client, workspaces, _settings(given), target.options, again, standalone)
    if all(run.is_applied(w) and run.is_over(w) and succeeded(w) for w in workspaces):
        for each in workspaces:
            run.say_done(each)
        return 0
    run.refuse_impossible()
    plugins = load_plugins()
    planned = [p for each in given for p in _planned(run, each, plugins)]
    refuse(planned)
    if not _confirmed(run, [p for _, p in planned], yes):
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


def _settings(given: Sequence[Given]) -> dict[str, Mapping[str, str]]:
    """The ConfigMaps of the files that endpoints of the files are configured with, by the title of their Workspace."""
    found = {}
    for each in given:
        named = each.workspace.inference.config if each.workspace.inference else ""
        if named in each.config_maps:
            found[f"{each.workspace.namespace}/{each.workspace.name}"] = each.config_maps[named]
    return found


# --- before anything is changed


def _planned(run: _Run, given: Given, plugins: PluginManager) -> list[tuple[Given, Plan]]:
    """What this run would begin, with its plans. What runs already has been planned and agreed to; its nodes may be taken by itself now."""
    there = run.of(given.workspace)
    new = not run.is_there(there) or bool(refusal(there))
    if not new and run.is_applied(there):
        return []
    first = plan_of(given, plugins, local=False, cluster=run.client)
    plans: list[Plan] = [first] if not is_tuned(there) or (new and not is_trained(there)) else []
    # Without a policy of its own, and without settings, only the controller knows whether it is served.
    served = policy(there) != "never" and (policy(there) != "" or given.workspace.inference is not None)
    if isinstance(first, TuningPlan) and served and first.candidates:
        plans.append(afterwards(given, first, plugins, run.client))
    return [(given, each) for each in plans]


def _install_definition(client: Client, yes: bool) -> None:
    from kaito_core.cli.cluster.standalone import install_definition

    question = f"{client.host} does not know Workspaces. Install their definition?"
    if not yes:
        if not at_terminal():
            raise UserError(f"nobody is there to be asked: {question}", "say --yes, or kaito crd | kubectl apply -f -")
        click.confirm(question, abort=True)
    install_definition(client)
    click.echo("the definition of Workspace is installed\n")


def _confirmed(run: _Run, plans: Sequence[Plan], yes: bool) -> bool:
    """Whether it may begin. UserError when it costs money and nobody can be asked."""
    begun = [(p, run.of(p.workspace)) for p in plans if p.chosen and not is_free(p.chosen.offer)]
    costs = [_cost(p, always=policy(w) == "always") for p, w in begun if not is_off(w)]
    for words in costs:
        click.echo(words)
    if yes:
        return True
    if at_terminal():
        return click.confirm("Run this?", default=True)
    if costs:
        raise UserError("this costs money, and nobody is there to be asked", "say --yes")
    return True


def _cost(plan: Plan, *, always: bool) -> str:
    """``small costs $0.90 an hour (Standard_NC6s_v3, azure-prices of 2026-01-01), about $0.30 in all (estimate)``."""
    assert plan.chosen is not None
    offer = plan.chosen.offer
    seconds = plan.chosen.seconds
    if offer.price is None:
        return f"{plan.workspace.name} gets a {offer.instance_type} of {offer.provisioner}; its price is not known"
    price, count = offer.price, plan.workspace.resource.count
    words = f"{plan.workspace.name} costs ${price.per_hour * count:.2f} an hour ({offer.instance_type}, {price.source} of {price.date})"
    if plan.chosen.cost is not None:
        words += (
            f", about {money(plan.chosen.cost)} for {duration(seconds)} of training and what goes with it (estimate)"
        )
    elif not isinstance(plan, TuningPlan):
        words += " while it is served" + (", which is until it is deleted" if always else "")
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
    settings: Mapping[str, Mapping[str, str]]
    """What the files say of how they are served, by their title."""
    options: str
    """What other commands need to be told to find this cluster."""
    again: str
    standalone: bool

    def of(self, workspace: Workspace) -> Object:
        """The object of a Workspace of the files."""
        name = f"{workspace.namespace}/{workspace.name}"
        return next(w for w in self.workspaces if title(w) == name)

    def is_there(self, workspace: Object) -> bool:
        """Whether the cluster asks for just that already."""
        before = self._before(workspace)
        return before is not None and before["metadata"]["generation"] == workspace["metadata"]["generation"]

    def is_applied(self, workspace: Object) -> bool:
        """The same, and its annotations and its settings are the same too."""
        before = self._before(workspace)
        return (
            before is not None
            and self.is_there(workspace)
            and (before["metadata"].get("annotations") or {}) == (workspace["metadata"].get("annotations") or {})
            and self._has_settings(workspace)
        )

    def _has_settings(self, workspace: Object) -> bool:
        """Whether the cluster's ConfigMap says what the file's does."""
        if title(workspace) not in self.settings:
            return True
        there = self.client.get(CONFIG_MAPS, workspace["inference"]["config"], workspace["metadata"]["namespace"])
        return there is not None and digest(there.get("data") or {}) == self._config(workspace)

    def _config(self, workspace: Object) -> str:
        return digest(self.settings.get(title(workspace)))

    def _before(self, workspace: Object) -> Object | None:
        metadata = workspace["metadata"]
        return self.client.get(WORKSPACES, metadata["name"], metadata["namespace"])

    def is_over(self, workspace: Object) -> bool:
        """Whether nothing is left to be done for it, by whoever looks after it in this run."""
        over = succeeded(workspace) is not None and is_settled(workspace, self._config(workspace))
        return over and not (self.standalone and holds_machines(workspace))

    def delete(self, workspace: Object) -> str:
        """The command that deletes it."""
        return f"kaito delete {'--standalone ' if self.standalone else ''}{where(workspace, self.options)}"

    def refuse_impossible(self) -> None:
        """UserError or Failure for those that would not run, for the state in which they are."""
        for each in self.workspaces:
            if "deletionTimestamp" in each["metadata"]:
                raise UserError(
                    f"{title(each)} is being deleted",
                    f"wait for its end with {self.delete(each)}, then run it again",
                )
            if self.standalone and not is_tuned(each) and policy(each) == "onDemand":
                raise UserError(
                    f"{title(each)} is served on demand, and --standalone holds no requests for what is asleep",
                    "write `policy: always`, or install the controller (kaito install)",
                    field="inference.policy",
                )
            if is_tuned(each) and succeeded(each) is False and self.is_over(each):
                error = failure(each, self.options)
                raise Failure(
                    f"just as it is now, it was tried before: {error.problems[0].message}",
                    f"change the Workspace, or {self.delete(each)}, to run it again",
                )

    def apply(self, wanted: Sequence[Applicable]) -> None:
        there = {title(w): self.is_applied(w) for w in self.workspaces}
        for one in wanted:
            apply(self.client, one)
            word = "going on with" if there.get(title(one.obj)) and one.kind.kind == "Workspace" else "applied"
            click.echo(f"  {word} {one}")

    def follow(self) -> int:
        """One after the other; the others go on meanwhile."""
        failed: list[Problem] = []
        for each in self.workspaces:
            if len(self.workspaces) > 1:
                click.echo(click.style(f"\n{title(each)}", bold=True))
            if is_off(each):
                self.say_done(each)
                continue
            ended = self._follow(each)
            if succeeded(ended):
                if not self.standalone:
                    self._result(ended)
            else:
                for number, line in enumerate(tried(ended)):
                    click.echo(("" if number else "\n  tried\n") + f"    {line}")
                failed.extend(failure(ended, self.options).problems)
        if failed:
            raise Failure(failed)
        return 0

    def _follow(self, workspace: Object) -> Object:
        name, namespace = workspace["metadata"]["name"], workspace["metadata"]["namespace"]
        with Follower(name) as follower:
            return follow(
                self.client,
                name,
                namespace,
                follower,
                until_released=self.standalone,
                config=self._config(workspace),
                refused="" if phase(workspace) == "Failed" or is_tuned(workspace) else refusal(workspace),
                reached=self._result if self.standalone else lambda _: None,
            )

    def say_done(self, workspace: Object) -> None:
        """What there is to say of one that is as it shall be."""
        if is_off(workspace):
            click.echo(f"{title(workspace)} is not served: its policy is never")
            return
        if is_tuned(workspace):
            click.echo(
                f"{title(workspace)} is done already; change the Workspace, or {self.delete(workspace)}, to run it again"
            )
        else:
            click.echo(f"{title(workspace)} is served already")
        self._result(workspace)

    def _result(self, workspace: Object) -> None:
        """What came of it, and how to call it."""
        if is_tuned(workspace):
            adapter = workspace.get("status", {}).get("adapter", {})
            headline(workspace["metadata"]["name"], adapter.get("evalLossBefore"), adapter.get("evalLossAfter"))
            made(adapter)
            workspace = self._until_served(workspace)
        if phase(workspace):
            click.echo("\n" + how_to_call(workspace, self.options))

    def _until_served(self, workspace: Object) -> Object:
        """Once it is tuned its controller decides in a moment whether it is served."""
        deadline = time.monotonic() + MOMENT
        while not phase(workspace) and policy(workspace) != "never" and time.monotonic() < deadline:
            time.sleep(0.2)
            workspace = self._before(workspace) or workspace
        return workspace

    def how_to_go_on(self) -> str:
        """What is to be known by whoever stops following."""
        names, first = ", ".join(map(title, self.workspaces)), self.workspaces[0]
        if self.standalone:
            return (
                f"\nnobody looks after {names} now: what runs goes on, but nothing gives its machines back.\n"
                f"    go on:    {self.again}\n    end it:   {self.delete(first)}"
            )
        return (
            f"\n{names} goes on in the cluster.\n"
            f"    follow:   {self.again}, or kaito logs -f {where(first, self.options)}\n"
            f"    stop it:  {self.delete(first)}"
        )
