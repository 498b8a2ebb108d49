"""Planning for a cluster: what a Workspace needs besides itself is looked up, the rest is `kaito_core.planning.plan`.

The same function that ``kaito plan`` calls; here its catalog is what the cluster has."""

from __future__ import annotations

import base64
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kaito_core.api import InferenceSpec, TuningSpec, Workspace, labels, read_workspace
from kaito_core.controller.act import ask
from kaito_core.controller.configs import Configs
from kaito_core.controller.reconcile.decision import Ensure
from kaito_core.controller.reconcile.observed import Planned, Refusal
from kaito_core.kube.errors import Forbidden, Unreachable
from kaito_core.kube.kinds import SECRETS, Object
from kaito_core.models.presets import Reader, named_models, with_models
from kaito_core.planning import catalogue
from kaito_core.planning.images import Images
from kaito_core.planning.names import unknown
from kaito_core.planning.plan import BUILT_IN_CONFIGS, CONFIG_KEY, Catalog, Plan, Registry, plan, requirements
from kaito_core.planning.serving import BUILT_IN_CONFIGS as BUILT_IN_SERVING
from kaito_core.planning.serving import CONFIG_KEY as SERVING_KEY
from kaito_core.planning.serving import ServingPlan, TemplatePlan, serving_after
from kaito_core.plugins.guard import blamed_on
from kaito_core.plugins.types import (
    InferenceRuntime,
    NodeProvisioner,
    Offer,
    Preset,
    ProvisioningError,
    Requirements,
    Tuner,
)
from kaito_core.problems import KaitoError, Problem, UserError
from kaito_core.workloads.job import Secrets

if TYPE_CHECKING:
    from kaito_core.kube.client import Client
    from kaito_core.plugins.manager import PluginManager

LOCAL = "local"
"""The provisioner that is this machine: no part of a cluster."""

HUB_CACHE = Path(tempfile.gettempdir()) / "kaito-models"
"""What was read of a hub: small files, by commit."""

KEPT = 64
"""Plans that are remembered: as many Workspaces as may wait for machines at once. A plan is made in milliseconds."""

log = logging.getLogger("kaito_core.controller.planner")


def cluster_provisioners(plugins: PluginManager) -> dict[str, NodeProvisioner]:
    """Those that have to do with a cluster, by name."""
    return {n: p for n, p in plugins.provisioners().items() if n != LOCAL}


@dataclass(frozen=True)
class Offered:
    """What can be had in a cluster."""

    offers: tuple[Offer, ...]
    """An instance type that is named and that nobody offers is among them too, with the reason, so that a plan can say what became
    of it."""
    failed: Mapping[str, Problem]
    """The provisioners that could not say what they have, by name; it is not known then what they would have offered."""


def cluster_offers(workspace: Workspace, provisioners: Mapping[str, NodeProvisioner]) -> Offered:
    """Ask every provisioner. One that fails keeps nobody from the machines of the others. Raises `Unreachable`."""
    wanted = requirements(workspace)
    found: list[Offer] = []
    failed: dict[str, Problem] = {}
    for name, provisioner in provisioners.items():
        try:
            with blamed_on(f"the node provisioner {name!r}"):
                found.extend(provisioner.offers(wanted))
        except Unreachable:
            raise  # the cluster itself does not answer: nobody's fault, and nothing is known at all
        except ProvisioningError as e:
            failed[name] = Problem(f"the node provisioner {name!r} does not know what it has: {e}", field="resource")
        except KaitoError as e:
            failed[name] = e.problems[0]
    offered = {o.instance_type.lower() for o in found}
    found += [_unobtainable(n) for n in wanted.instance_types if n.lower() not in offered and not failed]
    return Offered(tuple(found), failed)


def _unobtainable(name: str) -> Offer:
    known = catalogue.instance_types().get(name.lower())
    if known is None:
        [problem] = unknown(Requirements(instance_types=(name,)), ())
        hint = f"; {problem.remedy}" if problem.remedy else ""
        return Offer(name, 0, 0, retired=f"no node of the cluster is one, and no catalogue knows it{hint}")
    package = catalogue.provisioner_package(known.cloud)
    how = f" (pip install {package} into the controller's image)" if package else ""
    retired = f"; {known.retired}" if known.retired else ""
    return replace(known, retired=f"no node of the cluster is one, and no installed provisioner gets one{how}{retired}")


@dataclass(frozen=True)
class WithImages:
    """A registry whose runtimes are those that a pod can run."""

    registry: Registry
    images: Collection[str]

    def preset(self, name: str) -> Preset:
        return self.registry.preset(name)

    def tuner(self, method: str) -> Tuner:
        return self.registry.tuner(method)

    def runtimes(self) -> Mapping[str, InferenceRuntime]:
        return {n: r for n, r in self.registry.runtimes().items() if n in self.images}


class Planner:
    """Plans Workspaces of one cluster, and remembers the plans of those that wait."""

    def __init__(
        self,
        client: Client,
        plugins: PluginManager,
        provisioners: Mapping[str, NodeProvisioner],
        runtimes: Collection[str] | None = None,
        configs: Configs | None = None,
        images: Images | None = None,
    ) -> None:
        """``runtimes`` are those that there is an image for; None: all of them. ``images``: which GPUs the images can compute on."""
        self._client = client
        self._configs = configs or Configs(client)
        self._plugins = plugins
        self._registry: Registry = plugins if runtimes is None else WithImages(plugins, runtimes)
        self._images = images or Images()
        self._provisioners = provisioners
        self._known: OrderedDict[Any, Planned] = OrderedDict()
        self._not_allowed: set[str] = set()

    def __call__(self, obj: Object, *, serving: bool = False) -> Planned:
        """The plan of this object, or why there is none: of its tuning, or with ``serving`` of its endpoint. Reads the ConfigMap that
        it names, and looks for its Secrets."""
        workspace, problems = read_workspace(obj)
        warnings = tuple(p for p in problems if p.severity != "error")
        problems = [p for p in problems if p.severity == "error"] + _not_in_a_cluster(workspace)
        if workspace is None or problems:
            return _refused("InvalidWorkspace", problems)
        config_maps, version = {}, ""
        part: TuningSpec | InferenceSpec | None = workspace.inference if serving else workspace.tuning
        named = part.config if part else ""
        if named:
            found = self._configs.fresh(named, workspace.namespace)
            if found is None and named not in (*BUILT_IN_CONFIGS, *BUILT_IN_SERVING):
                return _refused("ConfigMapMissing", [_no_config_map(named, workspace.namespace, serving=serving)])
            if found is not None:
                config_maps, version = {named: found.get("data") or {}}, found["metadata"]["resourceVersion"]
        offered = cluster_offers(workspace, self._provisioners)
        # Others write annotations as often as they like: what is none of ours plans nothing anew.
        said = (obj["metadata"].get("annotations") or {}).items()
        passing = (labels.ASKED, labels.WAKE)
        annotations = tuple(sorted((k, v) for k, v in said if k.startswith("kaito.sh/") and k not in passing))
        key = (obj["metadata"]["uid"], obj["metadata"].get("generation"), annotations, serving, version, offered.offers)
        planned = self._known.get(key)
        if planned is None:
            catalog = Catalog(
                registry=self._registry,
                offers=offered.offers,
                config_maps=config_maps,
                images=self._images,
                complete=not offered.failed,
            )
            for problem in unknown(requirements(workspace), offered.offers, complete=catalog.complete):
                if problem.severity == "warning":
                    log.warning("%s: %s", workspace.name, problem)
            planned = self._plan(workspace, catalog, serving=serving)
            self._known[key] = planned
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        if planned.plan is not None:
            missing = self._missing_secrets(planned.plan)
            if missing:
                return _refused("SecretMissing", missing)
            planned = replace(planned, problems=warnings)
        if not offered.failed:
            return planned
        for problem in offered.failed.values():
            log.warning("%s", problem.message)
        if planned.refusal in ("NoNode", "DoesNotFit"):  # it may be that one of them has what is needed
            return _refused("NoNode", (*offered.failed.values(), *planned.problems))
        return replace(planned, failed=frozenset(offered.failed))

    def _plan(self, workspace: Workspace, catalog: Catalog, *, serving: bool) -> Planned:
        try:
            if names := named_models(workspace):
                registry = with_models(self._registry, names, Reader(None, HUB_CACHE, self._hub_token(workspace)))
                catalog = replace(catalog, registry=registry)
            made = serving_after(workspace, catalog) if serving and workspace.tuning else plan(workspace, catalog)
            rules = self._plugins.validate(workspace, made)
        except UserError as e:
            return _refused("PlanRefused", e.problems)
        except KaitoError as e:  # a hub that does not answer may in a moment
            return _refused("NoNode" if named_models(workspace) else "PlanRefused", e.problems)
        for problem in rules:
            if problem.severity != "error":  # among them what a rule says that is broken itself
                log.warning("%s", problem.message)
        if broken := [p for p in rules if p.severity == "error"]:
            return _refused("PolicyRefused", broken)
        if made.refusal is None:
            return Planned(made)
        fitting = [c for c in made.candidates if not c.offer.retired]
        if fitting:
            return _refused("DoesNotFit", [made.refusal])
        return _refused("NoNode", [self._no_node(made, made.refusal)])

    def _no_node(self, made: Plan, refusal: Problem) -> Problem:
        """Nothing is offered. Whoever looks after nodes that exist already knows best why none of them will do."""
        from kaito_core.plugins.types import NodeRequest

        existing = self._provisioners.get("existing")
        if existing is None:
            return refusal
        wanted = requirements(made.workspace)
        named = wanted.instance_types[0] if wanted.instance_types else ""
        request = NodeRequest("why", Offer(named, 0, 0, provisioner="existing"), wanted)
        status = ask(dict(self._provisioners), Ensure("existing", request))
        if status.phase == "ready" or not status.message:
            return refusal
        reasons = "; ".join(c.rejected for c in made.candidates)
        message = "; ".join(dict.fromkeys(w for w in (status.message, reasons) if w))
        return Problem(
            message, refusal.remedy if made.candidates else "add such a node, or label one that is there", "resource"
        )

    def _hub_token(self, workspace: Workspace) -> str:
        """The token for a gated model, where the controller may look at the Secret; its shape is asked for without one else."""
        presets = [p.preset for p in (workspace.tuning, workspace.inference) if p is not None and p.preset is not None]
        names = [p.preset_options.model_access_secret for p in presets if p.preset_options]
        try:
            found = [self._client.get(SECRETS, n, workspace.namespace) for n in names if n]
        except Forbidden:
            return ""
        texts = [((f or {}).get("data") or {}).get("HF_TOKEN", "") for f in found]
        try:
            return next((base64.b64decode(t).decode().strip() for t in texts if t), "")
        except ValueError:
            return ""

    def _missing_secrets(self, made: Plan) -> list[Problem]:
        """Secrets that are certainly not there. Where the controller may not look, the stage ``check`` will say it."""
        namespace = made.workspace.namespace
        secrets = Secrets() if isinstance(made, TemplatePlan) else made.job.secrets
        key = (
            made.workspace.metadata.annotations.get(labels.API_KEY_SECRET, "") if isinstance(made, ServingPlan) else ""
        )
        missing = []
        for name in (*secrets.registry, secrets.hub, key):
            if not name or namespace in self._not_allowed:
                continue
            try:
                if self._client.get(SECRETS, name, namespace) is None:
                    kind, field = "docker-registry", "tuning.output.imagePushSecret"
                    if name == secrets.hub:
                        kind, field = "generic", "tuning.preset.presetOptions"
                    elif name == key:
                        kind, field = "generic", f"metadata.annotations[{labels.API_KEY_SECRET}]"
                    message = f"the Secret {name!r} is not in the namespace {namespace!r}"
                    missing.append(
                        Problem(message, f"make it: kubectl create secret {kind} {name} -n {namespace} …", field)
                    )
            except Forbidden:
                # Asked for per namespace in the chart; without it, not asked again.
                self._not_allowed.add(namespace)
                log.info("secrets of %s cannot be looked for: not permitted; the jobs say what is missing", namespace)
        return missing


def _refused(refusal: Refusal, problems: Iterable[Problem]) -> Planned:
    return Planned(None, refusal, tuple(problems))


def _no_config_map(name: str, namespace: str, *, serving: bool) -> Problem:
    key, field = (SERVING_KEY, "inference.config") if serving else (CONFIG_KEY, "tuning.config")
    message = f"the ConfigMap {name!r} is not in the namespace {namespace!r}"
    return Problem(message, f"apply it; its data needs `{key}: |`", field)


def _not_in_a_cluster(workspace: Workspace | None) -> list[Problem]:
    """What only means something on the machine of the one who wrote it."""
    urls = workspace.tuning.input.urls if workspace and workspace.tuning else ()
    return [
        Problem(
            f"a cluster cannot read {url!r}",
            "give an https:// or hf:// URL, a volume or an image; or run it with `kaito run --local`",
            f"tuning.input.urls[{i}]",
        )
        for i, url in enumerate(urls)
        if not url.lower().startswith(("http://", "https://", "hf://"))
    ]
