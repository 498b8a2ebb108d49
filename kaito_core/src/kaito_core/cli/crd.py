"""``kaito crd``: the definition that teaches a Kubernetes cluster what a Workspace is."""

from __future__ import annotations

import click


@click.command("crd")
def command() -> None:
    """Print the CustomResourceDefinition of the Workspace.

    For a cluster: kaito crd | kubectl apply -f -
    """
    from kaito_core.api.crd import crd_yaml

    click.echo(crd_yaml(), nl=False)
