"""What a command is given: the documents, the plugins, and the catalog that a plan is made from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kaito_core.addresses import private_addresses_allowed
from kaito_core.local.home import cache_folder, model_folders
from kaito_core.local.machine import images
from kaito_core.local.paths import anchored, local_folder
from kaito_core.planning import catalogue
from kaito_core.planning.names import unknown
from kaito_core.planning.plan import CONFIG_KEY, Catalog, Plan, TuningPlan, plan, requirements
from kaito_core.planning.serving import CONFIG_KEY as SERVING_KEY
from kaito_core.plugins.guard import blamed_on
from kaito_core.plugins.types import DataFacts, Offer, Preset, ProvisioningError, Requirements, TuningFit
from kaito_core.problems import KaitoError, Problem, UserError

if TYPE_CHECKING:
    from kaito_core.api import Document, Documents, Secret, Workspace
    from kaito_core.kube.client import Client
    from kaito_core.models.presets import WithModels
    from kaito_core.planning.choice import By
    from kaito_core.plugins.manager import PluginManager

AT_HAND = 64 << 20
"""Bytes of local training data that planning reads at once; more is left to the check."""


@dataclass(frozen=True, slots=True)
class Given:
    """One workspace, and what was found beside it."""

    workspace: Workspace
    document: Document
    documents: Documents

    @property
    def base(self) -> Path:
        """The folder of its file; relative paths belong to it."""
        return Path.cwd() if self.document.file == "<stdin>" else Path(self.document.file).absolute().parent

    @property
    def config_maps(self) -> dict[str, Mapping[str, str]]:
        """The ConfigMaps of its namespace by name."""
        return {c.name: c.data for c in self.documents.config_maps if c.namespace == self.workspace.namespace}

    @property
    def secrets(self) -> dict[str, Secret]:
        """The Secrets of its namespace by name."""
        return {s.name: s for s in self.documents.secrets if s.namespace == self.workspace.namespace}

    def locate(self, problem: Problem) -> Problem:
        """A problem that planning found, with its place in the file: in the workspace, or in its training configuration."""
        config = self.workspace.tuning.config if self.workspace.tuning else ""
        config_map = self.documents.config_map(config, self.workspace.namespace) if config else None
        if config_map and problem.field == "tuning.config" and problem.line:  # of its text, which is no YAML
            return self.documents.document(config_map).within(CONFIG_KEY, problem)
        if config_map and problem.field.startswith("training_config"):
            inner, _ = self.documents.document(config_map).embedded(CONFIG_KEY)
            return inner[0].locate(problem) if inner else problem
        inference = self.workspace.inference
        named = inference.config if inference else ""
        served = self.documents.config_map(named, self.workspace.namespace) if named else None
        if served and problem.field == "inference.config" and problem.line:
            return self.documents.document(served).within(SERVING_KEY, problem)
        if served and problem.field.startswith("inference_config."):
            inner, _ = self.documents.document(served).embedded(SERVING_KEY)
            inside = replace(problem, field=problem.field.removeprefix("inference_config."))
            return inner[0].locate(inside) if inner else problem
        return self.document.locate(problem)


def read(files: Sequence[str], *, placeholders_allowed: bool = False, namespace: str = "") -> list[Given]:
    """The workspaces in the files. UserError with every problem of every file; warnings are printed.

    With ``placeholders_allowed`` the unfilled blanks of an example are only warned about: enough is known for a plan.
    ``namespace`` is where documents belong that say nothing of it.
    """
    from kaito_core.api import PLACEHOLDER, Workspace, load_documents

    documents = _placed(load_documents(files, allow_private=private_addresses_allowed()), namespace)
    fatal = []
    for problem in documents.problems:
        if problem.severity == "error" and not (placeholders_allowed and problem.kind == PLACEHOLDER):
            fatal.append(problem)
        else:
            click.echo(str(replace(problem, severity="warning")), err=True)
    if fatal:
        raise UserError(fatal)
    found = [Given(d.resource, d, documents) for d in documents.documents if isinstance(d.resource, Workspace)]
    for inference_set in documents.inference_sets:
        problem = Problem(
            "an InferenceSet is left out here: this command takes Workspaces",
            "apply it with kubectl apply -f, and see kubectl get inferencesets",
            "kind",
            severity="warning" if found else "error",
        )
        problem = documents.document(inference_set).locate(problem)
        if not found:
            raise UserError([problem])
        click.echo(str(problem), err=True)
    if not found:
        raise UserError(
            f"there is no Workspace in {', '.join(files)}", "a Workspace begins with `apiVersion: kaito.sh/v1beta1`"
        )
    return found


def _placed(documents: Documents, namespace: str) -> Documents:
    """The same, with this namespace in what names none."""
    if not namespace:
        return documents

    def placed(document: Document) -> Document:
        resource = document.resource
        if resource is None or document.source.value["metadata"].get("namespace"):
            return document
        if isinstance(resource, ConfigMap | Secret):
            return replace(document, resource=replace(resource, namespace=namespace))
        metadata = resource.metadata.model_copy(update={"namespace": namespace})
        return replace(document, resource=resource.model_copy(update={"metadata": metadata}))

    from kaito_core.api import ConfigMap, Secret

    return replace(documents, documents=tuple(placed(d) for d in documents.documents))


def plan_of(
    given: Given, plugins: PluginManager, *, local: bool, cluster: Client | None = None, by: By = "cost"
) -> Plan:
    """The plan of one workspace; with ``local`` only this machine is considered, with ``cluster`` what can be had there, and
    without both also what is known and cannot be had from here.

    Raises `UserError` with every problem and its place in the file."""
    try:
        planned = (
            _for_cluster(given, plugins, cluster, by) if cluster else _from_here(given, plugins, local=local, by=by)
        )
        rules = plugins.validate(planned.workspace, planned)
        if any(p.severity == "error" for p in rules):
            raise UserError(rules)
    except UserError as e:
        raise UserError([given.locate(p) for p in e.problems]) from e
    for problem in rules:
        click.echo(str(problem), err=True)
    return planned


def registry_of(given: Given, plugins: PluginManager, *, cluster: bool = False) -> WithModels:
    """The plugins, and the models that the workspace names by ``org/name`` or folder: those are read, and remembered.

    Raises `UserError` when one of them cannot be used, or is a folder and meant for a cluster; `Failure` when a hub does not
    answer."""
    from kaito_core.models.presets import Reader, WithModels, named_models, with_models

    names = named_models(given.workspace)
    if not names:
        return WithModels(plugins)
    read = Reader(None if cluster else given.base, cache_folder() / "models", _hub_token(given))
    return with_models(plugins, names, read)


def _hub_token(given: Given) -> str:
    """The token of the Secret that the workspace names, if that is among the files; else ``$HF_TOKEN``."""
    workspace = given.workspace
    for task in (workspace.tuning, workspace.inference):
        options = task.preset.preset_options if task and task.preset else None
        secret = given.secrets.get(options.model_access_secret) if options else None
        if secret and (token := secret.data.get("HF_TOKEN", b"").decode("utf-8", "replace").strip()):
            return token
    return os.environ.get("HF_TOKEN", "").strip()


def _from_here(given: Given, plugins: PluginManager, *, local: bool, by: By) -> Plan:
    workspace = anchored(given.workspace, given.base)
    found, complete = _offers(workspace, plugins, local=local)
    offers = tuple(found)
    known = registry_of(given, plugins)
    # How the data is cut depends on the machine that will do it, so that one is planned for first.
    catalog = Catalog(
        registry=known,
        offers=tuple(o for o in offers if o.provisioner),
        config_maps=given.config_maps,
        model_folders={**model_folders(), **known.folders},
        installed=frozenset(plugins.provisioners()),
        images=images(offers),
        complete=complete,
    )
    _warn_of_names(given, offers, complete=complete)
    facts = _facts(plan(workspace, catalog, by))
    return plan(workspace, replace(catalog, offers=offers, data=facts), by)


def _for_cluster(given: Given, plugins: PluginManager, cluster: Client, by: By) -> Plan:
    """As the cluster's controller will plan it once the documents beside the workspace have been applied."""
    from kaito_core.api.pod_security import PodSecurity, forbidden
    from kaito_core.cli.cluster.config_maps import config_maps
    from kaito_core.cli.cluster.runtimes import as_the_controller
    from kaito_core.controller.planner import Planner, _not_in_a_cluster, cluster_offers, cluster_provisioners
    from kaito_core.controller.view import ClusterView

    workspace = given.workspace
    only_here = _not_in_a_cluster(workspace)
    if only_here:
        raise UserError(only_here)
    for problem in forbidden(
        workspace.to_object(), PodSecurity()
    ):  # what its platform has opened, only its controller knows
        click.echo(str(replace(given.locate(problem), severity="warning")), err=True)
    provisioners = cluster_provisioners(plugins)
    for provisioner in provisioners.values():
        provisioner.attach(ClusterView(cluster, {}))
    offered = cluster_offers(workspace, provisioners)
    for problem in offered.failed.values():
        click.echo(f"warning: {problem.message}", err=True)
    known, able = as_the_controller(registry_of(given, plugins, cluster=True), cluster)
    complete = not offered.failed
    _warn_of_names(given, offered.offers, complete=complete)
    maps = config_maps(given, cluster)
    planned = plan(workspace, Catalog(known, offered.offers, maps, images=able, complete=complete), by)
    if planned.refusal and all(c.offer.retired for c in planned.candidates):
        why = Planner(cluster, plugins, provisioners)._no_node(planned, planned.refusal)
        return replace(planned, refusal=why)
    return planned


def _warn_of_names(given: Given, offers: Sequence[Offer], *, complete: bool) -> None:
    """Say which names of machines and regions are not known. Those that are slips of the pen are errors of the plan."""
    for problem in unknown(requirements(given.workspace), offers, complete=complete):
        if problem.severity == "warning":
            click.echo(str(given.locate(problem)), err=True)


def _offers(workspace: Workspace, plugins: PluginManager, *, local: bool) -> tuple[list[Offer], bool]:
    """What can be had, and, unless only this machine is asked for, what the catalogue knows besides; and whether every provisioner could
    say what it has. One that fails is warned of; the others are still asked."""
    wanted = Requirements() if local else requirements(workspace)
    found: list[Offer] = []
    complete = True
    for provisioner in plugins.provisioners().values():
        if not local or provisioner.name == "local":
            try:
                with blamed_on(f"the node provisioner {provisioner.name!r}"):
                    found.extend(provisioner.offers(wanted))
            except ProvisioningError as e:
                complete = False
                click.echo(
                    f"warning: the node provisioner {provisioner.name!r} does not know what it has: {e}", err=True
                )
            except KaitoError as e:
                complete = False
                for problem in e.problems:
                    click.echo(str(replace(problem, severity="warning")), err=True)
    return (found if local else [*found, *_known(wanted, found)]), complete


def _known(wanted: Requirements, offered: Sequence[Offer]) -> list[Offer]:
    """The machines of the catalogue that nobody offers; only those that the workspace names, if it names some."""
    named = {name.lower() for name in wanted.instance_types}
    have = {(o.instance_type.lower(), o.region, o.capacity_type) for o in offered}
    return [
        offer
        for cloud in catalogue.CLOUDS
        for offer in catalogue.offers(cloud, wanted.regions, wanted.capacity_types)
        if (not named or offer.instance_type.lower() in named)
        and (offer.instance_type.lower(), offer.region, offer.capacity_type) not in have
    ]


def _facts(planned: Plan) -> DataFacts | None:
    """What the data doctor says of data that lies on this machine; None when the data or the tokenizer is elsewhere.

    The doctor's complaints are not planning's business: the check makes them, in full.
    """
    if not isinstance(planned, TuningPlan):
        return None
    tokenizer = tokenizer_folder(planned.preset, planned.model_folder)
    files = _local_files(planned)
    if tokenizer is None or not files:
        return None
    try:
        from kaito_core.data.prepare import prepare

        fit = planned.chosen.fit if planned.chosen else None
        sequence = fit.configuration.sequence if isinstance(fit, TuningFit) else None
        return prepare(files, planned.preset, tokenizer, planned.config, None, sequence=sequence).facts
    except (KaitoError, ImportError):
        return None


def _local_files(planned: Plan) -> list[Path]:
    tuning = planned.workspace.tuning
    if tuning is None:
        return []
    try:
        if tuning.input.volume_source is not None:
            from kaito_core.data.prepare import data_files

            files = data_files(local_folder("data", tuning.input.volume_source, Path("/nonexistent")))
        else:
            files = [Path(u.removeprefix("file://")) for u in tuning.input.urls]
        small = all(f.is_file() for f in files) and sum(f.stat().st_size for f in files) <= AT_HAND
    except (KaitoError, OSError, ImportError):
        return []
    return files if small else []


def tokenizer_folder(preset: Preset, model_folder: str) -> Path | None:
    """A folder on this machine with the model's tokenizer; None when it is on the hub."""
    import importlib.resources

    if model_folder:
        folder = Path(model_folder)
    elif preset.source.folder:
        folder = Path(preset.source.folder)
    elif preset.source.package:
        folder = Path(str(importlib.resources.files(preset.source.package).joinpath(preset.source.path)))
    else:
        return None
    return folder if (folder / "tokenizer.json").is_file() else None
