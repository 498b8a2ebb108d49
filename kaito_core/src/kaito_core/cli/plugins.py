"""``kaito plugins``: what is plugged in, and what is wrong with what does not work."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import click

from kaito_core.plugins.manager import PluginStatus, load_plugins
from kaito_core.problems import Problem

STYLES = {"active": "green", "disabled": "dim", "failed": "red", "incompatible": "red"}


@click.command("plugins", help="List the plugins that were found, and what is wrong with broken ones.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the tracebacks of broken plugins.")
def command(as_json: bool) -> None:
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
