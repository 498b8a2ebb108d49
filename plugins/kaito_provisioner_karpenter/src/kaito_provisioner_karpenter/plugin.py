"""Hands the provisioner over; everything else is loaded when somebody asks for it."""

from __future__ import annotations

from collections.abc import Iterable

from kaito_core.plugins import NodeProvisioner, hookimpl

KAITO_API_VERSION = "1.0"


@hookimpl
def kaito_node_provisioners() -> Iterable[NodeProvisioner]:
    """One provisioner, whichever cloud Karpenter works for: the cluster says which."""
    from kaito_provisioner_karpenter.provisioner import KarpenterNodes

    yield KarpenterNodes()
