"""``kaito plugins``: what is plugged in, and what is wrong with what does not work; ``kaito plugins check``: the conformance kit."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from kaito_core.plugins.manager import PluginStatus, load_plugins
from kaito_core.problems import Problem

if TYPE_CHECKING:
    from kaito_core.testing.conformance.check import Report

STYLES = {"active": "green", "disabled": "dim", "failed": "red", "incompatible": "red"}


@click.group("plugins", invoke_without_command=True, help="List the plugins that were found; check one of them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the tracebacks of broken plugins.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    if ctx.invoked_subcommand is not None:
        return
    # What is broken is part of the answer here; the warning line that other commands get would say it twice.
    logging.getLogger("kaito_core.plugins").setLevel(logging.ERROR)
    found = load_plugins()
    statuses = found.statuses()
    problems = found.problems()
    if as_json:
        click.echo(
            json.dumps(
                {"plugins": [asdict(s) for s in statuses], "problems": [p.to_json() for p in problems]}, indent=2
            )
        )
    else:
        _show(statuses, problems)


plugins = command


@command.command("check")
@click.argument("plugin", metavar="DIST|MODULE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--slow", is_flag=True, help="Also tune and serve small copies of the models, where torch is installed: minutes."
)
@click.pass_context
def check(ctx: click.Context, plugin: str, as_json: bool, slow: bool) -> int:
    """Run kaito's conformance kit on an installed plugin, without a test file.

    DIST is an installed distribution or the name of a plugin, MODULE what an entry point names. What needs the author's help
    (a cloud to buy machines from, a model's files) is skipped, and said so. The exit code is 0 when nothing failed."""
    from kaito_core.testing.conformance import check as kit

    as_json = as_json or bool(ctx.parent and ctx.parent.params.get("as_json"))
    kit.ready()
    targets = kit.targets(plugin)
    report = kit.run(targets, slow=slow)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        _tell(report, slow=slow)
    return 0 if report.passed else 1


def _tell(report: Report, *, slow: bool) -> None:
    for target in report.targets:
        who = f"{target.distribution} {target.version}, " if target.distribution else ""
        click.secho(f"{who}{target.module}", bold=True)
    why: dict[str, int] = {}
    for (_, kind, name), checks in report.objects().items():
        failed = [c for c in checks if c.outcome == "failed"]
        skipped = [c for c in checks if c.outcome == "skipped"]
        counts = [f"{len(checks) - len(failed) - len(skipped)} ok"]
        counts += [f"{len(c)} {word}" for c, word in ((failed, "failed"), (skipped, "skipped")) if c]
        click.secho("  ✗ " if failed else "  ✓ ", fg="red" if failed else "green", nl=False)
        click.echo(f"{kind} {name}: {', '.join(counts)}" if name else f"{kind}: {', '.join(counts)}")
        for each in failed:
            click.secho(f"      {each.check}", fg="red")
            for line in each.reason.splitlines():
                click.echo(f"        {line}")
        for each in skipped:
            why[each.reason] = why.get(each.reason, 0) + 1
    if why:
        click.echo("\nnot checked:")
        for reason, times in why.items():
            click.echo(f"  {times}× {reason.splitlines()[0] if reason else ''}")
    if not slow:
        click.echo("  what takes minutes: --slow tunes and serves small copies of the models")
    counted = [f"{report.count('ok')} ok", f"{report.count('failed')} failed", f"{report.count('skipped')} skipped"]
    click.secho(f"\n{', '.join(counted)}", fg="green" if report.passed else "red")


def _show(statuses: Sequence[PluginStatus], problems: Sequence[Problem]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, pad_edge=False)
    for heading in ("PLUGIN", "DISTRIBUTION", "STATE", "PROVIDES"):
        table.add_column(heading, no_wrap=heading != "PROVIDES")
    for s in statuses:
        table.add_row(
            Text(s.name),
            Text(f"{s.distribution} {s.version}"),
            Text(s.state, STYLES[s.state]),
            Text(_provides(s.provides)),
        )
    console.print(table)
    for problem in problems:
        click.echo()
        click.echo(str(problem))


def _provides(provides: Mapping[str, Sequence[str]]) -> str:
    return "\n".join(f"{kind}: {', '.join(names)}" for kind, names in provides.items()) or "–"
