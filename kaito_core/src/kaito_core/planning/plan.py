"""The plan: the only place where anything is decided.

`plan()` is pure: no network, no clock, no cluster. The same workspace and the same catalog give the same plan, in
milliseconds, whether ``kaito plan``, ``kaito run`` or a controller asks. What it cannot plan at all (an unknown preset, a
configuration with errors) is a `UserError` with every problem at once; what it can plan but not place is a `Plan` whose
``refusal`` says the smallest change that would fit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self

from kaito_core.planning import catalogue
from kaito_core.planning.choice import By
from kaito_core.planning.config_files import with_templates
from kaito_core.planning.images import Images
from kaito_core.planning.names import unknown
from kaito_core.planning.placement import Candidate, Task, against, candidates, refusal, same_fit
from kaito_core.plugins.guard import blamed_on
from kaito_core.plugins.types import DataFacts, InferenceRuntime, Offer, Preset, Requirements, Tuner, TuningFit
from kaito_core.problems import Problem, UserError, errors
from kaito_core.workloads.job import DataInput, Secrets, TuningJob
from kaito_core.workloads.serving import ServingJob
from kaito_core.workloads.workload import Workload

if TYPE_CHECKING:
    from kaito_core.api import Workspace

__all__ = ["Candidate", "Catalog", "Plan", "Registry", "TuningPlan", "plan", "requirements"]

BUILT_IN_CONFIGS = ("lora-params-template", "qlora-params-template")
"""KAITO's own ConfigMaps. Naming one asks for the method's defaults, which here are the tuner's."""

CONFIG_KEY = "training_config.yaml"
LOCAL_WEIGHTS = "kaito.sh/use-local-weights"


class Registry(Protocol):
    """What planning needs of the plugin manager: names to records, or a `UserError` that says what to install."""

    def preset(self, name: str) -> Preset: ...

    def tuner(self, method: str) -> Tuner: ...

    def runtimes(self) -> Mapping[str, InferenceRuntime]: ...


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything besides the workspace that a plan depends on: a snapshot, taken by whoever asks."""

    registry: Registry
    offers: tuple[Offer, ...]
    """The machines that can be had, and those that are only known (without a provisioner). Of equal ones the first is taken."""
    config_maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """``data`` of the ConfigMaps that the workspace may name."""
    data: DataFacts | None = None
    """What is known of the training data; None when it is not at hand."""
    model_folders: Mapping[str, str] = field(default_factory=dict)
    """Folders on this machine that hold a preset's weights, by preset name."""
    installed: frozenset[str] = frozenset()
    """Names of the provisioners that are installed, whether they offer something here or not."""
    images: Images = field(default_factory=Images)
    """Which GPUs the images that the plan is made for can compute on."""
    complete: bool = True
    """Whether every provisioner could say what it has. Else a name that no offer has may yet be one of theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(ABC):
    """What will be done, and on what. A `TuningPlan`, or a `ServingPlan` or `TemplatePlan` of `kaito_core.planning.serving`."""

    workspace: Workspace
    candidates: tuple[Candidate, ...]
    """Usable machines best first, then the rejected ones with the reason."""
    refusal: Problem | None = None
    """Why nothing can run it, and the smallest change that would help; None when a machine is chosen."""
    by: By = "cost"
    """What makes a machine better than another."""

    @property
    def chosen(self) -> Candidate | None:
        """The machine that it would run on."""
        return next((c for c in self.candidates if not c.rejected), None)

    def on(self, candidate: Candidate) -> Self:
        """The same plan on this machine: what is left when better ones could not be had."""
        return replace(self, candidates=(candidate, *(c for c in self.candidates if c is not candidate)))

    @property
    @abstractmethod
    def job(self) -> TuningJob | ServingJob:
        """What the chosen machine would run. UserError when there is no machine, or nothing of kaito's to run."""

    @property
    @abstractmethod
    def workload(self) -> Workload:
        """What will be run. UserError as for `job`."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, for ``--json``; bytes and seconds as numbers, all of them estimates."""

    def _machine(self) -> Candidate:
        if self.chosen is None:
            raise UserError(self.refusal or Problem("the plan has no machine to run on"))
        return self.chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningPlan(Plan):
    """How a model is tuned."""

    preset: Preset
    tuner: Tuner
    method: str
    config: Mapping[str, Any]
    """The tuner's complete configuration, the user's and the preset's wishes merged in."""
    data: DataFacts | None = None
    model_folder: str = ""

    @property
    def job(self) -> TuningJob:
        """The job that the chosen machine would run. UserError when there is none."""
        fit = self._machine().fit
        tuning = self.workspace.tuning
        if tuning is None or not isinstance(fit, TuningFit):  # plan() has refused it before
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
            configuration=fit.configuration,
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
            "task": "tuning",
            "model": model_json(self.preset),
            "method": self.method,
            "by": self.by,
            "config": self.config,
            "data": asdict(self.data) if self.data else None,
            "candidates": [self._candidate_json(c) for c in self.candidates],
            "refusal": self.refusal.to_json() if self.refusal else None,
        }

    def _candidate_json(self, candidate: Candidate) -> dict[str, Any]:
        fit = candidate.fit
        if not isinstance(fit, TuningFit):
            raise TypeError(f"a tuner gave {type(fit).__name__}, not a TuningFit")
        return {
            **candidate_json(candidate, chosen=candidate is self.chosen),
            "steps": fit.steps,
            "tokens": fit.tokens,
            "seconds": fit.seconds,
            "estimates": ["memory", "steps", "tokens", "seconds", "cost"],
        }


def model_json(preset: Preset) -> dict[str, Any]:
    """What is said of a model in ``--json``."""
    return {
        "preset": preset.name,
        "source": str(preset.source),
        "licence": preset.licence,
        "gated": preset.gated,
        "parameters": preset.architecture.parameters or None,
    }


def candidate_json(candidate: Candidate, *, chosen: bool) -> dict[str, Any]:
    """What is said of any machine in ``--json``."""
    offer, fit = candidate.offer, candidate.fit
    return {
        "chosen": chosen,
        "instanceType": offer.instance_type,
        "provisioner": offer.provisioner or None,
        "cloud": offer.cloud,
        "region": offer.region or None,
        "zone": offer.zone or None,
        "capacityType": offer.capacity_type,
        "gpu": {"model": offer.gpu.model, "count": offer.gpus, "memory": offer.gpu.memory} if offer.gpu else None,
        "cpus": offer.cpus,
        "pricePerHour": offer.price.per_hour if offer.price else None,
        "price": asdict(offer.price) if offer.price else None,
        "cost": candidate.cost,
        "why": candidate.why,
        "rejected": candidate.rejected or None,
        "configuration": asdict(fit.configuration),
        "memory": {
            "estimate": fit.memory.total,
            "capacity": fit.capacity,
            "items": [asdict(item) for item in fit.memory.items],
        },
        "notes": list(fit.notes),
    }


def requirements(workspace: Workspace) -> Requirements:
    """What the workspace asks of a machine."""
    resource = workspace.resource
    gpu = resource.gpu
    return Requirements(
        instance_types=resource.wanted_types,
        labels=resource.label_selector.labels if resource.label_selector else {},
        count=resource.count,
        gpu_model=gpu.model if gpu else "",
        gpus=(gpu.count or 0) if gpu else 0,
        gpu_memory=gpu.memory_bytes if gpu else 0,
        capacity_types=resource.capacity_types,
        regions=resource.regions,
        zones=resource.zones,
        max_price_per_hour=resource.max_price_per_hour,
    )


def plan(workspace: Workspace, catalog: Catalog, by: By = "cost") -> Plan:
    """What will be done for this workspace, on the cheapest machine or, ``by`` time, on the fastest: its tuning where it has one
    (`kaito_core.planning.serving.serving_after` plans what comes after), else its inference.

    Raises `UserError` with every problem at once when there is nothing to plan: an unknown preset or method, a model that
    cannot be tuned or served so, a configuration with errors.
    """
    if workspace.tuning is not None:
        return _plan_tuning(workspace, catalog, by)
    from kaito_core.planning.serving import plan_inference

    return plan_inference(workspace, catalog, by)


def _plan_tuning(workspace: Workspace, catalog: Catalog, by: By) -> TuningPlan:
    tuning = workspace.tuning
    assert tuning is not None
    found: list[Problem] = []
    preset, tuner, user = collect(
        found,
        lambda: catalog.registry.preset(tuning.preset.name),
        lambda: catalog.registry.tuner(tuning.method),
        lambda: _training_config(tuning.config, catalog),
    )
    wanted, limit = requirements(workspace), workspace.resource.max_cost
    if preset is None or tuner is None or found:
        raise UserError([*found, *misnamed(wanted, catalog)])
    method = tuning.method
    with blamed_on(f"the tuner {tuner.name!r}"):
        config = tuner.resolve(preset, method, user)
        task = _Training(preset, tuner, method, config, catalog.data, catalog.images)
        considered, refused = place(task, wanted, limit, catalog, by)
    return TuningPlan(
        workspace=workspace,
        candidates=considered,
        refusal=refused,
        by=by,
        preset=preset,
        tuner=tuner,
        method=method,
        config=config,
        data=catalog.data,
        model_folder=model_folder(workspace, preset, catalog),
    )


def misnamed(wanted: Requirements, catalog: Catalog, task: Task | None = None) -> list[Problem]:
    """The names in ``resource`` that are slips of the pen. With a task, what it cannot use is not proposed."""
    if task is None:
        return errors(unknown(wanted, catalog.offers, complete=catalog.complete))
    return errors(unknown(wanted, catalog.offers, partial(against, task), complete=catalog.complete))


def place(
    task: Task, wanted: Requirements, max_cost: float | None, catalog: Catalog, by: By
) -> tuple[tuple[Candidate, ...], Problem | None]:
    """Where the task can run, and why it can run nowhere. UserError when a machine or a region is asked for that does not exist."""
    if wrong := misnamed(wanted, catalog, task):
        raise UserError(wrong)
    considered = candidates(task, wanted, max_cost, catalog.offers, catalog.installed, by)
    refused = all(c.rejected for c in considered)
    return considered, refusal(task, wanted, max_cost, considered, catalog.installed) if refused else None


def model_folder(workspace: Workspace, preset: Preset, catalog: Catalog) -> str:
    """The folder with the model's weights on the machine that runs it; empty when they are fetched."""
    folder = catalog.model_folders.get(preset.name, "")
    if not folder and workspace.metadata.annotations.get(LOCAL_WEIGHTS, "").lower() == "true":
        folder = f"/opt/kaito/models/{preset.name}"  # KAITO's place for them, 1.3 of its annotations
    return folder


def collect(found: list[Problem], *questions: Callable[[], Any]) -> list[Any]:
    """Ask everything before giving up, so that a person sees all that is wrong: the answers, None for those with a problem."""
    answers = []
    for ask in questions:
        try:
            answers.append(ask())
        except UserError as e:
            found.extend(e.problems)
            answers.append(None)
    return answers


def is_default(name: str, built_in: Iterable[str], catalog: Catalog) -> bool:
    """Whether this name of a ConfigMap asks for the defaults: none at all, or one of KAITO's own that nobody has replaced."""
    return not name or (name in built_in and name not in catalog.config_maps)


def read_config(name: str, key: str, field: str, catalog: Catalog) -> Any:
    """The YAML below ``key`` of the named ConfigMap. UserError with ``field``, and the lines of the text, when it cannot be had."""
    if name not in catalog.config_maps:
        raise UserError(
            f"the ConfigMap {name!r} is not there",
            f"put it into the same file as another document (kind: ConfigMap), or leave `{field}` out for the defaults",
            field=field,
        )
    from kaito_core.api.yaml_source import parse_settings

    text = catalog.config_maps[name].get(key)
    if text is None:
        raise UserError(f"the ConfigMap {name!r} has no key {key!r}", f"its data needs `{key}: |`", field=field)
    value, problems = parse_settings(text)
    if problems:
        raise UserError([replace(p, message=_in_config_map(key, name, p), field=field) for p in problems])
    return value


def _in_config_map(key: str, name: str, problem: Problem) -> str:
    """What is wrong with the text in a ConfigMap, and where in the text."""
    where = f"line {problem.line}, column {problem.column}" if problem.line else ""
    place = ", ".join(w for w in (where, problem.field[:80]) if w)
    return f"{key} of the ConfigMap {name!r}" + (f" ({place})" if place else "") + f" {problem.message}"


def _training_config(name: str, catalog: Catalog) -> Mapping[str, Any] | None:
    """The ``training_config`` sections of the named ConfigMap; None for the defaults."""
    if is_default(name, BUILT_IN_CONFIGS, catalog):
        return None
    parsed = read_config(name, CONFIG_KEY, "tuning.config", catalog)
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
    return with_templates(parsed["training_config"], catalog.config_maps[name], "training_config")


class _Training:
    """A tuning and how it fits machines, as a `kaito_core.planning.placement.Task`."""

    def __init__(
        self,
        preset: Preset,
        tuner: Tuner,
        method: str,
        config: Mapping[str, Any],
        data: DataFacts | None,
        images: Images,
    ) -> None:
        self.preset, self.tuner, self.method, self.config, self.data = preset, tuner, method, config, data
        self.images = images
        self._fits: dict[Any, TuningFit] = {}

    def obstacle(self, offer: Offer) -> str:
        return self.images.tuning(offer).obstacle(offer)

    def fit(self, offer: Offer) -> TuningFit:
        gpu, key = offer.gpu, (*same_fit(offer), offer.is_local)
        known = self._fits.get(key)
        if known is None:
            known = self.tuner.fit(self.preset, self.method, self.config, offer, self.data)
            part = catalogue.share(gpu) if gpu and offer.gpus else 1.0
            if known.seconds is not None and part < 1:
                # A slice of a GPU has its share of the memory and of the speed; tuners know whole ones.
                note = f"a slice of a {gpu.model if gpu else 'GPU'}: the time is that of the whole one by its share"
                known = replace(known, seconds=known.seconds / part, notes=(*known.notes, note))
            if doubt := self.images.tuning(offer).doubt(offer):
                known = replace(known, notes=(*known.notes, doubt))
            self._fits[key] = known
        return known

    def smaller(self) -> Iterable[tuple[str, _Training]]:
        for change in self.tuner.smaller(self.preset, self.method, self.config):
            yield (
                change.description,
                _Training(self.preset, self.tuner, change.method, change.config, self.data, self.images),
            )
