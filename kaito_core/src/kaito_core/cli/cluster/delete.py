"""Deletes a Workspace, and waits until everything that was got for it has been given back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import click

from kaito_core.api import conditions, labels
from kaito_core.cli.cluster.pod_log import passing
from kaito_core.cli.cluster.workspace import current_conditions, words
from kaito_core.cli.target import readiness
from kaito_core.kube.errors import ApiError
from kaito_core.kube.kinds import WORKSPACES, Object
from kaito_core.problems import UserError

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

LOOK: Final = 1.0
SHOWN: Final = (conditions.WORKSPACE_DELETING, conditions.NODES_READY)


def delete(client: Client, workspace: Object, *, wait: bool) -> None:
    """Ask for it; with ``wait`` until it is gone. UserError when nobody would ever let it go."""
    metadata = workspace["metadata"]
    name, namespace = metadata["name"], metadata["namespace"]
    if wait and labels.FINALIZER in metadata.get("finalizers", ()) and readiness(client).controller is False:
        raise UserError(
            f"no controller runs, so nobody would give back the machines of {namespace}/{name}",
            f"let this command do it: kaito delete --standalone -n {namespace} {name}; or start the controller again",
        )
    ask_and_wait(client, workspace, wait=wait)


def ask_and_wait(client: Client, workspace: Object, *, wait: bool, look: float = LOOK) -> None:
    """Delete it and show what it waits for."""
    metadata = workspace["metadata"]
    name, namespace, uid = metadata["name"], metadata["namespace"], metadata["uid"]
    held = metadata.get("finalizers", ())
    client.delete(WORKSPACES, name, namespace, uid=uid)
    if not wait:
        click.echo(f"{namespace}/{name} is being deleted")
        return
    said = ""
    while True:
        try:
            now = client.get(WORKSPACES, name, namespace)
        except ApiError as e:
            if not passing(e):
                raise
            waiting = f"{e.problems[0].message}; trying again"
        else:
            if now is None or now["metadata"]["uid"] != uid:
                released = ", and its machines have been given back" if labels.FINALIZER in held else ""
                click.echo(f"{namespace}/{name} is gone{released}")
                return
            waiting = _waiting(now)
        if waiting != said:
            click.echo(f"  waiting: {waiting}")
            said = waiting
        time.sleep(look)


def _waiting(workspace: Object) -> str:
    """What it waits for, in the words of whoever holds it."""
    found = [
        words(c)
        for c in current_conditions(workspace)
        if c["type"] in SHOWN and c["status"] != "False" and c.get("message")
    ]
    finalizers = ", ".join(workspace["metadata"].get("finalizers", ()))
    return "; ".join(dict.fromkeys(found)) or f"the finalizers {finalizers}"
