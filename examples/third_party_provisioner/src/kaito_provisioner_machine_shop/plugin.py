"""What this package plugs in: the node provisioner ``machine-shop``."""

from __future__ import annotations

from collections.abc import Iterator

from kaito_core.plugins import NodeProvisioner, hookimpl

KAITO_API_VERSION = "1.0"


@hookimpl
def kaito_node_provisioners() -> Iterator[NodeProvisioner]:
    """Called once; nothing is connected to before it is needed."""
    from kaito_provisioner_machine_shop.provisioner import MachineShop

    yield MachineShop()
