"""What this package plugs in: the node provisioner ``aks``, and the command ``kaito aks-provisioner``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from kaito_core.plugins import Command, NodeProvisioner, hookimpl

KAITO_API_VERSION = "1.0"


@hookimpl
def kaito_node_provisioners() -> Iterable[NodeProvisioner]:
    from kaito_provisioner_aks.provisioner import AksNodes

    yield AksNodes()


@hookimpl
def kaito_commands() -> Iterable[Command]:
    yield Command(
        "aks-provisioner",
        "Fulfil NodeClaims with AKS agent pools.",
        load=lambda: importlib.import_module("kaito_provisioner_aks.command").command,
    )
