"""``kaito uninstall``: the controller out of a cluster. Workspaces and their machines are never left to nobody unasked."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from kaito_core.api import labels
from kaito_core.cli.install import installed, is_ready, refuse_helm, until
from kaito_core.install import OURS, definitions
from kaito_core.kube.kinds import CRDS, DEPLOYMENTS, INFERENCE_SETS, LEASES, WORKSPACES, Kind, Object
from kaito_core.problems import Failure, UserError

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

PATIENCE = 900.0
"""Seconds that the controller may take to give all machines back: clouds are slow at it."""

DEFINITION_PATIENCE = 60.0
"""Seconds that the API server may take to take a definition out of service, which it does a moment after it was told."""


@click.command("uninstall")
@click.option("--keep-workspaces", is_flag=True, help="Leave Workspaces, their jobs and their machines as they are.")
@click.option(
    "--all", "everything", is_flag=True, help="Delete all Workspaces, InferenceSets and their definitions as well."
)
@click.option("--context", default="", help="A context of your kubeconfig; the current one when left out.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def command(keep_workspaces: bool, everything: bool, context: str, yes: bool) -> None:
    """Remove from a cluster what kaito install made.

    The definitions of Workspace and InferenceSet stay, and so do all of these; --all deletes them too, and waits until their machines
    have been given back.
    """
    if keep_workspaces and everything:
        raise UserError("--keep-workspaces and --all contradict each other", "give one of them")
    from kaito_core.kube.client import connect

    client = connect(context)
    refuse_helm(client)
    found = _workspaces(client)
    held = [w for w in found if labels.FINALIZER in w["metadata"].get("finalizers", ())]
    if held and not (keep_workspaces or everything):
        raise UserError(
            f"{_count(held)} would be left to nobody, with their jobs and machines: {_names(held)}",
            "delete them first; or say --all to delete all Workspaces, or --keep-workspaces to leave them as they are "
            "until kaito is installed again",
        )
    _ask(client, found if everything else [], yes)
    if everything:
        _delete_workspaces(client, found, bool(held))
    made = installed(client)
    for kind, obj in reversed(made):
        client.delete(kind, obj["metadata"]["name"], obj["metadata"].get("namespace", ""))
        if kind is DEPLOYMENTS:  # the Lease of its leader has its name
            client.delete(LEASES, obj["metadata"]["name"], obj["metadata"]["namespace"])
        click.echo(f"  removed  {kind}/{obj['metadata']['name']}")
    if everything:
        _delete_definitions(client)
    click.echo("its namespace stays, as other things may be in it" if made else "no controller was installed here")


def _workspaces(client: Client) -> list[Object]:
    """All of them; none where the definition is not even there."""
    return _all(client, WORKSPACES)


def _all(client: Client, kind: Kind) -> list[Object]:
    return client.list(kind)[0] if client.get(CRDS, str(kind)) is not None else []


def _ask(client: Client, doomed: list[Object], yes: bool) -> None:
    if yes:
        return
    what = f"Remove kaito from {client.host}" + (f" and delete {_count(doomed)} ({_names(doomed)})" if doomed else "")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError(f"nobody is there to be asked: {what}?", "say --yes")
    click.confirm(f"{what}?", abort=True)


def _delete_workspaces(client: Client, found: list[Object], held: bool) -> None:
    """Delete them, and wait until the controller has given their machines back and let them go."""
    if held and not any(is_ready(d) for d in client.list(DEPLOYMENTS, labels=OURS)[0]):
        raise UserError(
            f"the controller is not running, and nobody else can give back the machines of {_names(found)}",
            "run kaito install first, so that it can; or give them back by hand and remove the finalizer "
            f"{labels.FINALIZER} from each Workspace",
        )
    for each in _all(client, INFERENCE_SETS):  # first: they would make their Workspaces anew
        client.delete(INFERENCE_SETS, each["metadata"]["name"], each["metadata"]["namespace"])
    for each in found:
        client.delete(WORKSPACES, each["metadata"]["name"], each["metadata"]["namespace"])
    if found:
        click.echo(f"waiting until the machines of {_count(found)} have been given back")
    until(lambda: not _workspaces(client), PATIENCE, lambda: _stuck(client))


def _delete_definitions(client: Client) -> None:
    """Delete them, and wait until they are gone: whoever installs again at once would meet one that is just going."""
    names = [d["metadata"]["name"] for d in definitions()]
    for name in names:
        client.delete(CRDS, name)
    for name in names:
        until(
            lambda name=name: client.get(CRDS, name) is None,  # type: ignore[misc]
            DEFINITION_PATIENCE,
            lambda name=name: Failure(  # type: ignore[misc]
                f"{CRDS}/{name} is not gone after {DEFINITION_PATIENCE:.0f} s", f"see: kubectl describe crd {name}"
            ),
        )
        click.echo(f"  removed  {CRDS}/{name}")


def _stuck(client: Client) -> Failure:
    left = _workspaces(client)
    said = [
        f"{w['metadata']['namespace']}/{w['metadata']['name']}: {c['message']}"
        for w in left
        for c in w.get("status", {}).get("conditions", ())
        if c["type"] == "WorkspaceDeleting" and c.get("message")
    ]
    return Failure(
        f"{_count(left)} are not gone after {PATIENCE:.0f} s: {'; '.join(said) or _names(left)}",
        "the controller goes on trying and was left in place; run the same command again later",
    )


def _names(workspaces: list[Object]) -> str:
    names = [f"{w['metadata']['namespace']}/{w['metadata']['name']}" for w in workspaces]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _count(workspaces: list[Object]) -> str:
    return "1 Workspace" if len(workspaces) == 1 else f"{len(workspaces)} Workspaces"
