"""The ConfigMaps that a Workspace names: those of the user's files, and else those that the cluster has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kaito_core.kube.kinds import CONFIG_MAPS

if TYPE_CHECKING:
    from kaito_core.cli.given import Given
    from kaito_core.kube.client import Client


def config_maps(given: Given, client: Client) -> dict[str, Mapping[str, str]]:
    """Their data by name. One that is in neither place is left out: planning says what that means."""
    workspace = given.workspace
    found = given.config_maps
    for part in (workspace.tuning, workspace.inference):
        name = part.config if part else ""
        if name and name not in found and (there := client.get(CONFIG_MAPS, name, workspace.namespace)):
            found[name] = there.get("data") or {}
    return found
