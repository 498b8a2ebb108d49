"""What is served once it has been tuned, planned on the machines that the tuning was planned on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kaito_core.cli.given import Given, registry_of
from kaito_core.local.home import model_folders
from kaito_core.local.machine import images
from kaito_core.local.paths import anchored
from kaito_core.local.state import RunFolder
from kaito_core.planning.plan import Catalog, TuningPlan
from kaito_core.planning.serving import ServingPlan, serving_after, tuned_adapter
from kaito_core.problems import UserError

if TYPE_CHECKING:
    from kaito_core.plugins.manager import PluginManager


def afterwards(given: Given, tuning: TuningPlan, plugins: PluginManager, *, here: bool) -> ServingPlan:
    """How the result of this tuning is served. ``here``: on this machine, from the folder of the run; else from where it is pushed.

    Raises `UserError` with every problem and its place in the file."""
    workspace, adapter = given.workspace, None
    if here:
        workspace = anchored(workspace, given.base)
        results = RunFolder.of(workspace.name, workspace.namespace).results
        adapter = replace(tuned_adapter(workspace), image="", volume={"hostPath": {"path": str(results / "adapter")}})
    known = registry_of(given, plugins, cluster=not here)
    catalog = Catalog(
        registry=known,
        offers=tuple(c.offer for c in tuning.candidates),
        config_maps=given.config_maps,
        model_folders={**model_folders(), **known.folders} if here else {},
        installed=frozenset(plugins.provisioners()),
        images=images(c.offer for c in tuning.candidates),
    )
    try:
        planned = serving_after(workspace, catalog, adapter, tuning.by)
        wrong = [p for p in plugins.validate(workspace, planned) if p.severity == "error"]
        if wrong:
            raise UserError(wrong)
    except UserError as e:
        raise UserError([given.locate(p) for p in e.problems]) from e
    return planned
