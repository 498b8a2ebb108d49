"""The command line, one file per command.

A command's module is imported when the command is used, so that ``kaito --help`` costs neither pydantic nor httpx. Errors
end here: a `KaitoError` is printed and becomes its exit code, a bug says where to look.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from kaito_core import __version__
from kaito_core.cli.encoding import escape_what_is_missing
from kaito_core.problems import KaitoError

COMMANDS = {
    "run": "Plan a workspace and run it: tune a model, or serve one.",
    "chat": "Talk to an endpoint, with and without its adapters.",
    "plan": "Show what a run would do, whether it fits, and on what.",
    "validate": "Check workspace files; print every problem with its line.",
    "catalog": "List the machines with GPUs and their prices; fetch newer prices.",
    "data": "Look at training data before anything is spent on it.",
    "status": "Show the runs on this machine, and the Workspaces of the cluster.",
    "logs": "Show what a run printed.",
    "delete": "Delete a Workspace and give its machines back, or remove a run of this machine.",
    "push": "Push a finished adapter, or finish a push that failed.",
    "model": "Push a model's files as a container image; show what is in one.",
    "plugins": "List the plugins that were found, and what is wrong with broken ones.",
    "new": "Write a package of a plugin: a preset, a provisioner, a tuner or a runtime.",
    "install": "Install or upgrade the controller in a cluster, without Helm.",
    "uninstall": "Remove the controller from a cluster; Workspaces stay unless you say otherwise.",
    "doctor": "Say what a cluster lacks to run Workspaces.",
    "controller": "Reconcile the Workspaces of a cluster.",
    "crd": "Print the CustomResourceDefinition of Workspace.",
}
"""Built-in commands and their one-line help: what ``--help`` shows without importing them."""


class Commands(click.Group):
    """A group that imports a command's module when the command is used, and lets plugins add more."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *sorted(set(_plugin_commands()) - set(COMMANDS))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            command = importlib.import_module(f"kaito_core.cli.{cmd_name}").command
            return command if isinstance(command, click.Command) else None
        added = _plugin_commands().get(cmd_name)
        return added.load() if added else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        added = {n: c.help for n, c in _plugin_commands().items() if n not in COMMANDS}
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items(), *sorted(added.items())])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as e:
            import difflib

            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not close:
                raise
            raise click.UsageError(f"{e.message} Did you mean {close[0]!r}?", ctx) from None


def _plugin_commands() -> dict[str, Any]:
    from kaito_core.plugins.manager import load_plugins

    return dict(load_plugins().commands())


def _without_plugins(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        os.environ["KAITO_PLUGINS"] = ""


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kaito")
@click.option(
    "--no-plugins",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_without_plugins,
    help="Leave every plugin out that is not part of kaito-core.",
)
def cli() -> None:
    """Tune or serve an open model, from one workspace.yaml, on this machine or on GPUs you do not yet have."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The program ``kaito``. Exit codes: 0 done, 1 something failed, 2 the input is wrong, 130 interrupted."""
    escape_what_is_missing()
    try:
        result = cli.main(
            args=list(arguments) if arguments is not None else None, prog_name="kaito", standalone_mode=False
        )
        code = result if isinstance(result, int) else 0
    except KaitoError as e:
        for problem in e.problems:
            click.echo(str(problem), err=True)
        code = e.exit_code
    except click.ClickException as e:
        e.show()
        code = 2
    except BrokenPipeError:
        # Whoever read our output has gone (`kaito plan | head`): nothing more to say, and nothing to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 141
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        click.echo(
            f"error: {where}{e.strerror or e}\n    mend that and run the same command again; nothing is lost", err=True
        )
        code = 1
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    sys.exit(code)
