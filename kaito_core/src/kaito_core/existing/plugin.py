"""What the core plugs in for clusters: their own nodes, as one more source of machines."""

from __future__ import annotations

from collections.abc import Iterable

from kaito_core.plugins import NodeProvisioner, hookimpl


@hookimpl
def kaito_node_provisioners() -> Iterable[NodeProvisioner]:
    from kaito_core.existing.provisioner import ExistingNodes

    yield ExistingNodes()
