"""What a cluster serves once it has been tuned there, as its controller will plan it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kaito_core.cli.cluster.config_maps import config_maps
from kaito_core.cli.cluster.runtimes import as_the_controller
from kaito_core.cli.given import Given, registry_of
from kaito_core.planning.plan import Catalog, TuningPlan
from kaito_core.planning.serving import ServingPlan, serving_after
from kaito_core.problems import UserError

if TYPE_CHECKING:
    from kaito_core.kube.client import Client
    from kaito_core.plugins.manager import PluginManager


def afterwards(given: Given, tuning: TuningPlan, plugins: PluginManager, client: Client) -> ServingPlan:
    """How the result of this tuning is served, on the machines that the tuning was planned on.

    Raises `UserError` with every problem and its place in the file."""
    offers = tuple(c.offer for c in tuning.candidates)
    known, images = as_the_controller(registry_of(given, plugins, cluster=True), client)
    catalog = Catalog(known, offers, config_maps(given, client), images=images)
    try:
        planned = serving_after(given.workspace, catalog, by=tuning.by)
        wrong = [p for p in plugins.validate(given.workspace, planned) if p.severity == "error"]
        if wrong:
            raise UserError(wrong)
    except UserError as e:
        raise UserError([given.locate(p) for p in e.problems]) from e
    return planned
