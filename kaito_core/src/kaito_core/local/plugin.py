"""What the core itself plugs in: this machine, as one more source of machines."""

from __future__ import annotations

from collections.abc import Iterable

from kaito_core.plugins import NodeProvisioner, hookimpl


@hookimpl
def kaito_node_provisioners() -> Iterable[NodeProvisioner]:
    from kaito_core.local.machine import ThisMachine

    yield ThisMachine()
