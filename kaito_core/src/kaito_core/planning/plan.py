"""The plan: the only place where anything is decided.

`plan()` is pure: no network, no clock, no cluster. The same workspace and the same catalog give the same plan, in
milliseconds, whether ``kaito plan``, ``kaito run`` or a controller asks. What it cannot plan at all (an unknown preset, a
configuration with errors) is a `UserError` with every problem at once; what it can plan but not place is a `Plan` whose
``refusal`` says the smallest change that would fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from kaito_core.planning import catalogue
from kaito_core.plugins.guard import blamed_on
from kaito_core.plugins.types import DataFacts, Offer, Preset, Requirements, Tuner, TuningFit
from kaito_core.problems import Problem, UserError
from kaito_core.workloads.job import DataInput, Secrets, TuningJob
from kaito_core.workloads.workload import Workload

if TYPE_CHECKING:
    from kaito_core.api import Workspace

GIB = 1 << 30

BUILT_IN_CONFIGS = ("lora-params-template", "qlora-params-template")
"""KAITO's own ConfigMaps. Naming one asks for the method's defaults, which here are the tuner's."""

CONFIG_KEY = "training_config.yaml"
LOCAL_WEIGHTS = "kaito.sh/use-local-weights"


class Registry(Protocol):
    """What planning needs of the plugin manager: names to records, or a `UserError` that says what to install."""

    def preset(self, name: str) -> Preset: ...

    def tuner(self, method: str) -> Tuner: ...


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything besides the workspace that a plan depends on: a snapshot, taken by whoever asks."""

    registry: Registry
    offers: tuple[Offer, ...]
    """The machines that can be had, best first."""
    config_maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """``data`` of the ConfigMaps that the workspace may name."""
    data: DataFacts | None = None
    """What is known of the training data; None when it is not at hand."""
    model_folders: Mapping[str, str] = field(default_factory=dict)
    """Folders on this machine that hold a preset's weights, by preset name."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One machine and how the job would run there."""

    offer: Offer
    fit: TuningFit
    why: str
    """Why it is in the list: what the user named, or what the machine is."""
    rejected: str = ""
    """Why it is not taken; empty when it can be."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done, and on what."""

    workspace: Workspace
    preset: Preset
    tuner: Tuner
    method: str
    config: Mapping[str, Any]
    """The tuner's complete configuration, the user's and the preset's wishes merged in."""
    candidates: tuple[Candidate, ...]
    """Usable machines best first, then the rejected ones with the reason."""
    data: DataFacts | None = None
    model_folder: str = ""
    refusal: Problem | None = None
    """Why nothing can run it, and the smallest change that would help; None when a machine is chosen."""

    @property
    def chosen(self) -> Candidate | None:
        """The machine that the job would run on."""
        usable = [c for c in self.candidates if not c.rejected]
        return usable[0] if usable else None

    def on(self, candidate: Candidate) -> Plan:
        """The same plan on this machine: what is left when better ones could not be had."""
        return replace(self, candidates=(candidate, *(c for c in self.candidates if c is not candidate)))

    @property
    def job(self) -> TuningJob:
        """The job that the chosen machine would run. UserError when there is none."""
        if self.chosen is None:
            raise UserError(self.refusal or Problem("the plan has no machine to run on"))
        tuning = self.workspace.tuning
        if tuning is None:  # plan() has refused it before
            raise UserError("the workspace has nothing to tune", field="tuning")
        options = tuning.preset.preset_options
        pull = (*tuning.input.image_pull_secrets, *(options.image_pull_secrets if options else ()))
        secrets = (*pull, tuning.output.image_push_secret)
        return TuningJob(
            name=self.workspace.metadata.name,
            namespace=self.workspace.metadata.namespace,
            preset=self.preset,
            method=self.method,
            config=self.config,
            configuration=self.chosen.fit.configuration,
            data=DataInput(tuning.input.urls, tuning.input.volume_source, tuning.input.image),
            output_image=tuning.output.image,
            output_volume=tuning.output.volume_source,
            model_image=options.image if options else "",
            model_folder=self.model_folder,
            data_digest=self.data.digest if self.data and not self.data.estimated else "",
            secrets=Secrets(
                tuple(dict.fromkeys(s for s in secrets if s)), options.model_access_secret if options else ""
            ),
        )

    @property
    def workload(self) -> Workload:
        """What will be run."""
        with blamed_on(f"the tuner {self.tuner.name!r}"):
            return self.tuner.workload(self.job)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, for ``--json``; bytes and seconds as numbers, all of them estimates."""
        return {
            "workspace": self.workspace.metadata.name,
            "model": {
                "preset": self.preset.name,
                "source": str(self.preset.source),
                "licence": self.preset.licence,
                "parameters": self.preset.architecture.parameters,
            },
            "method": self.method,
            "config": self.config,
            "data": asdict(self.data) if self.data else None,
            "candidates": [_candidate_json(c, chosen=c is self.chosen) for c in self.candidates],
            "refusal": self.refusal.to_json() if self.refusal else None,
        }


def _candidate_json(candidate: Candidate, *, chosen: bool) -> dict[str, Any]:
    offer, fit = candidate.offer, candidate.fit
    return {
        "chosen": chosen,
        "instanceType": offer.instance_type,
        "cloud": offer.cloud,
        "gpu": {"model": offer.gpu.model, "count": offer.gpus, "memory": offer.gpu.memory} if offer.gpu else None,
        "cpus": offer.cpus,
        "pricePerHour": offer.price.per_hour if offer.price else None,
        "why": candidate.why,
        "rejected": candidate.rejected or None,
        "configuration": asdict(fit.configuration),
        "memory": {
            "estimate": fit.memory.total,
            "capacity": fit.capacity,
            "items": [asdict(item) for item in fit.memory.items],
        },
        "steps": fit.steps,
        "tokens": fit.tokens,
        "seconds": fit.seconds,
        "notes": list(fit.notes),
    }


def requirements(workspace: Workspace) -> Requirements:
    """What the workspace asks of a machine."""
    resource = workspace.resource
    named = (resource.instance_type,) if resource.instance_type else ()
    labels = resource.label_selector.match_labels if resource.label_selector else {}
    return Requirements(instance_types=named, labels=labels, count=resource.count)


def plan(workspace: Workspace, catalog: Catalog) -> Plan:
    """What will be done for this workspace.

    Raises `UserError` with every problem at once when there is nothing to plan: an unknown preset or method, a model that
    cannot be tuned so, a configuration with errors.
    """
    tuning = workspace.tuning
    if tuning is None:
        raise UserError(
            "this workspace serves a model, and no installed plugin serves one"
            if workspace.inference
            else "there is nothing to plan: neither tuning nor inference is asked for",
            "this version of kaito tunes models: give `tuning` with a preset, a method, input and output",
            field="inference" if workspace.inference else "tuning",
        )
    found: list[Problem] = []
    preset, tuner = _collect(
        found, lambda: catalog.registry.preset(tuning.preset.name), lambda: catalog.registry.tuner(tuning.method)
    )
    user = _collect(found, lambda: _user_config(tuning.config, catalog))[0]
    if preset is None or tuner is None or found:
        raise UserError(found)
    method = tuning.method
    refusal = None
    with blamed_on(f"the tuner {tuner.name!r}"):
        config = tuner.resolve(preset, method, user)
        candidates = _candidates(workspace, preset, tuner, method, config, catalog)
        if all(c.rejected for c in candidates):
            refusal = _refusal(preset, tuner, method, config, candidates, catalog.data)
    folder = catalog.model_folders.get(preset.name, "")
    if not folder and workspace.metadata.annotations.get(LOCAL_WEIGHTS, "").lower() == "true":
        folder = f"/opt/kaito/models/{preset.name}"  # KAITO's place for them, 1.3 of its annotations
    return Plan(workspace, preset, tuner, method, config, candidates, catalog.data, folder, refusal)


def _collect(found: list[Problem], *questions: Any) -> list[Any]:
    """Ask everything before giving up, so that a person sees all that is wrong."""
    answers = []
    for ask in questions:
        try:
            answers.append(ask())
        except UserError as e:
            found.extend(e.problems)
            answers.append(None)
    return answers


def _user_config(name: str, catalog: Catalog) -> Mapping[str, Any] | None:
    """The ``training_config`` sections of the named ConfigMap; None for the defaults."""
    if not name:
        return None
    if name not in catalog.config_maps:
        if name in BUILT_IN_CONFIGS:
            return None
        raise UserError(
            f"the ConfigMap {name!r} is not there",
            "put it into the same file as another document (kind: ConfigMap), or leave `tuning.config` out for the defaults",
            field="tuning.config",
        )
    import yaml

    text = catalog.config_maps[name].get(CONFIG_KEY)
    if text is None:
        raise UserError(
            f"the ConfigMap {name!r} has no key {CONFIG_KEY!r}",
            f"its data needs `{CONFIG_KEY}: |`",
            field="tuning.config",
        )
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"{CONFIG_KEY} of the ConfigMap {name!r} is not YAML: {e}", field="tuning.config") from e
    if (
        not isinstance(parsed, dict)
        or set(parsed) != {"training_config"}
        or not isinstance(parsed["training_config"], dict)
    ):
        raise UserError(
            f"{CONFIG_KEY} of the ConfigMap {name!r} must have the one top-level key `training_config`",
            "with the sections ModelConfig, QuantizationConfig, LoraConfig, TrainingArguments, DataCollator, DatasetConfig",
            field="tuning.config",
        )
    return dict(parsed["training_config"])


def _candidates(
    workspace: Workspace, preset: Preset, tuner: Tuner, method: str, config: Mapping[str, Any], catalog: Catalog
) -> tuple[Candidate, ...]:
    named = {t.lower() for t in requirements(workspace).instance_types}
    considered = []
    for offer in catalog.offers:
        fit = tuner.fit(preset, method, config, offer, catalog.data)
        if offer.is_local:
            why = "it is here, and costs nothing more"
        elif offer.instance_type.lower() in named:
            why = "named in resource.instanceType"
        else:
            why = "it can be had"
        considered.append(Candidate(offer, fit, why, _rejection(offer, fit)))
    # Stable: among the usable ones, and among the rejected ones, the order of the offers is kept.
    return tuple(sorted(considered, key=lambda c: bool(c.rejected)))


def _rejection(offer: Offer, fit: TuningFit) -> str:
    if offer.retired:
        return offer.retired
    if not fit.fits:
        return f"needs {gib(fit.memory.total)}, has {gib(fit.capacity)}"
    return ""


def _refusal(
    preset: Preset,
    tuner: Tuner,
    method: str,
    config: Mapping[str, Any],
    candidates: Iterable[Candidate],
    data: DataFacts | None,
) -> Problem:
    """Says that nothing fits, why, and the least that would have to change."""
    tried = list(candidates)
    if not tried:
        return Problem(
            "no machine is known that could run this",
            "name an instance type in resource.instanceType, or use --local",
            field="resource.instanceType",
        )
    reasons = "; ".join(f"{c.offer}: {c.rejected}" for c in tried)
    smaller = _smallest_change(preset, tuner, method, config, tried, data)
    larger = _smallest_machine(preset, tuner, method, config, data, tried[0].offer.cloud)
    remedies = [
        f"it fits {smaller}" if smaller else "",
        f"as it stands, the smallest machine is {larger}" if larger else "",
    ]
    remedy = "; ".join(r for r in remedies if r) or "no known machine is large enough"
    return Problem(reasons, remedy, field="resource.instanceType")


def _smallest_change(
    preset: Preset,
    tuner: Tuner,
    method: str,
    config: Mapping[str, Any],
    tried: Iterable[Candidate],
    data: DataFacts | None,
) -> str:
    """The least painful change with which the job fits one of the machines that were considered."""
    here = [c.offer for c in tried if not c.offer.retired]
    for change in tuner.smaller(preset, method, config):
        for offer in here:
            fit = tuner.fit(preset, change.method, change.config, offer, data)
            if fit.fits:
                needs = f"needs {gib(fit.memory.total)} of {gib(fit.capacity)}"
                return f"{offer.instance_type} with {change.description} ({needs})"
    return ""


def _smallest_machine(
    preset: Preset, tuner: Tuner, method: str, config: Mapping[str, Any], data: DataFacts | None, cloud: str
) -> str:
    """The known machine with the least GPU memory that fits, of the same cloud where one is known."""
    known = [o for o in catalogue.instance_types().values() if not o.retired and (not cloud or o.cloud == cloud)]
    for offer in sorted(known, key=lambda o: (o.gpus * o.device_memory, o.cpus, o.instance_type)):
        fit = tuner.fit(preset, method, config, offer, data)
        if fit.fits:
            return f"{offer} (needs {gib(fit.memory.total)} of {gib(fit.capacity)})"
    return ""


def gib(size: float) -> str:
    """Bytes as people read them: ``4.6 GiB``, ``312 MiB``."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (1 << 20):.0f} MiB"
