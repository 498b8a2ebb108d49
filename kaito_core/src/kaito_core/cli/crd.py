"""``kaito crd``: the definitions that teach a Kubernetes cluster what a Workspace and an InferenceSet are."""

from __future__ import annotations

import click


@click.command("crd")
def command() -> None:
    """Print the CustomResourceDefinitions of the Workspace and the InferenceSet.

    For a cluster: kaito crd | kubectl apply -f -
    """
    from kaito_core.api.crd import crd, crd_yaml, inference_set_crd

    click.echo("---\n".join(crd_yaml(d) for d in (crd(), inference_set_crd())), nl=False)
