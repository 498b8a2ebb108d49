"""``kaito delete NAME``: a Workspace of a cluster with its machines, or the folder of a run on this machine."""

from __future__ import annotations

import shutil
from contextlib import ExitStack

import click

from kaito_core.cli.named import Remote, Where, named, where_options
from kaito_core.local.state import RunFolder
from kaito_core.problems import UserError


@click.command("delete")
@click.argument("name")
@where_options
@click.option("--no-wait", is_flag=True, help="Do not wait until the machines of a Workspace have been given back.")
@click.option("--standalone", is_flag=True, help="In a cluster without a controller: give the machines back from here.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before the folder of a run is removed.")
def command(
    name: str,
    local: bool,
    context: str,
    kubeconfig: str,
    namespace: str,
    no_wait: bool,
    standalone: bool,
    yes: bool,
) -> None:
    """Delete a Workspace and wait until its machines have been given back; or remove a run of this machine.

    What was pushed to a registry stays.
    """
    if standalone and no_wait:
        raise UserError("--standalone does the waiting itself", "leave --no-wait out")
    found = named(name, Where(local, context, kubeconfig, namespace))
    if isinstance(found, RunFolder):
        if standalone:
            raise UserError(f"{name!r} is a run on this machine", "leave --standalone out", field="--standalone")
        _remove(found, yes)
    elif standalone:
        _from_here(found)
    else:
        from kaito_core.cli.cluster.delete import delete

        delete(found.client, found.workspace, wait=not no_wait)


def _remove(folder: RunFolder, yes: bool) -> None:
    from kaito_core.cli.run import at_terminal

    with ExitStack() as stack:
        for each in folder.both:
            stack.enter_context(each.lock())  # says so when it is running
        question = f"Remove {folder.path} with the logs, checkpoints and adapter in it?"
        if not yes:
            if not at_terminal():
                raise UserError(f"nobody is there to be asked: {question}", "say --yes")
            click.confirm(question, abort=True)
        shutil.rmtree(folder.path)
    click.echo(f"removed {folder.path}")


def _from_here(found: Remote) -> None:
    from kaito_core.cli.cluster import standalone
    from kaito_core.cli.cluster.delete import ask_and_wait
    from kaito_core.cli.target import Target, obstacle, readiness
    from kaito_core.plugins.manager import load_plugins

    problem = obstacle(Target("", found.client.context), readiness(found.client), standalone=True)
    if problem:
        raise UserError(problem)
    # Nothing is run for what is being deleted.
    settings = standalone.settings("not-needed")
    with standalone.looking_after(found.client, load_plugins(), settings, found.namespace, [found.name]):
        ask_and_wait(found.client, found.workspace, wait=True)
