"""The plan: the only place where anything is decided.

`plan()` is pure: no network, no clock, no cluster. The same workspace and the same catalog give the same plan, in
milliseconds, whether ``kaito plan``, ``kaito run`` or a controller asks. What it cannot plan at all (an unknown preset, a
configuration with errors) is a `UserError` with every problem at once; what it can plan but not place is a `Plan` whose
``refusal`` says the smallest change that would fit.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from kaito_core.planning import catalogue
from kaito_core.planning.choice import (
    By,
    cost_of,
    gib,
    in_order,
    is_free,
    is_model,
    mismatch,
    money,
    only_known,
    too_dear,
    unobtainable,
)
from kaito_core.plugins.guard import blamed_on
from kaito_core.plugins.types import DataFacts, Offer, Preset, Requirements, Tuner, TuningFit
from kaito_core.problems import Problem, UserError
from kaito_core.workloads.job import DataInput, Secrets, TuningJob
from kaito_core.workloads.workload import Workload

if TYPE_CHECKING:
    from kaito_core.api import Workspace

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
    """The machines that can be had, and those that are only known (without a provisioner). Of equal ones the first is taken."""
    config_maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """``data`` of the ConfigMaps that the workspace may name."""
    data: DataFacts | None = None
    """What is known of the training data; None when it is not at hand."""
    model_folders: Mapping[str, str] = field(default_factory=dict)
    """Folders on this machine that hold a preset's weights, by preset name."""
    installed: frozenset[str] = frozenset()
    """Names of the provisioners that are installed, whether they offer something here or not."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One machine and how the job would run there."""

    offer: Offer
    fit: TuningFit
    why: str
    """Why it is in the list: what the user named, or what the machine is."""
    rejected: str = ""
    """Why it is not taken; empty when it can be."""
    cost: float | None = None
    """US dollars for the job on all machines, an estimate: the training and ten minutes for what goes with it; None when the price
    or the time is not known."""


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
    by: By = "cost"
    """What makes a machine better than another."""

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
            "by": self.by,
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
        "steps": fit.steps,
        "tokens": fit.tokens,
        "seconds": fit.seconds,
        "notes": list(fit.notes),
        "estimates": ["memory", "steps", "tokens", "seconds", "cost"],
    }


def requirements(workspace: Workspace) -> Requirements:
    """What the workspace asks of a machine."""
    resource = workspace.resource
    gpu = resource.gpu
    return Requirements(
        instance_types=resource.wanted_types,
        labels=resource.label_selector.match_labels if resource.label_selector else {},
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
    """What will be done for this workspace, on the cheapest machine or, ``by`` time, on the fastest.

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
        job = _Job(preset, tuner, method, config, catalog.data)
        wanted, limit = requirements(workspace), workspace.resource.max_cost
        candidates = _candidates(job, wanted, limit, catalog, by)
        if all(c.rejected for c in candidates):
            refusal = _refusal(job, wanted, candidates)
    folder = catalog.model_folders.get(preset.name, "")
    if not folder and workspace.metadata.annotations.get(LOCAL_WEIGHTS, "").lower() == "true":
        folder = f"/opt/kaito/models/{preset.name}"  # KAITO's place for them, 1.3 of its annotations
    return Plan(workspace, preset, tuner, method, config, candidates, catalog.data, folder, refusal, by)


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


class _Job:
    """What is to be run, and how it fits machines. A fit depends on what is in a machine, not on where it stands and what it
    costs: the same one in fifty regions is looked at once."""

    def __init__(
        self, preset: Preset, tuner: Tuner, method: str, config: Mapping[str, Any], data: DataFacts | None
    ) -> None:
        self.preset, self.tuner, self.method, self.config, self.data = preset, tuner, method, config, data
        self._fits: dict[Any, TuningFit] = {}

    def fit(self, offer: Offer) -> TuningFit:
        gpu = offer.gpu
        # Not the record itself: it would be hashed anew for every machine.
        key = (
            gpu and (gpu.model, gpu.memory, gpu.compute_capability, gpu.vendor),
            offer.gpus,
            offer.cpus,
            offer.memory,
        )
        known = self._fits.get(key)
        if known is None:
            known = self.tuner.fit(self.preset, self.method, self.config, offer, self.data)
            part = catalogue.share(gpu) if gpu and offer.gpus else 1.0
            if known.seconds is not None and part < 1:
                # A slice of a GPU has its share of the memory and of the speed; tuners know whole ones.
                note = f"a slice of a {gpu.model if gpu else 'GPU'}: the time is that of the whole one by its share"
                known = replace(known, seconds=known.seconds / part, notes=(*known.notes, note))
            self._fits[key] = known
        return known

    def smaller(self) -> Iterable[tuple[str, _Job]]:
        """The same with less memory, the least painful change first."""
        for change in self.tuner.smaller(self.preset, self.method, self.config):
            yield change.description, _Job(self.preset, self.tuner, change.method, change.config, self.data)


def _candidates(
    job: _Job, wanted: Requirements, max_cost: float | None, catalog: Catalog, by: By
) -> tuple[Candidate, ...]:
    named = {t.lower() for t in wanted.instance_types}
    instead = functools.cache(lambda cloud: _replacement(job, wanted, max_cost, cloud))
    considered = []
    for offer in catalog.offers:
        fit = job.fit(offer)
        cost = cost_of(offer, wanted.count, fit.seconds)
        if offer.is_local:
            why = "it is here, and costs nothing more"
        elif offer.instance_type.lower() in named:
            why = f"named in resource.instanceType{'s' if len(named) > 1 else ''}"
        else:
            why = "it can be had"
        rejected = _rejection(offer, fit, wanted, max_cost, cost) or unobtainable(offer, catalog.installed)
        if (
            rejected
            and offer.instance_type.lower() in named
            and _is_retired(offer)
            and (better := instead(offer.cloud))
        ):
            rejected += f"; the cheapest that fits instead is {better}"
        considered.append(Candidate(offer, fit, why, rejected, cost))
    return tuple(in_order(considered, wanted, by))


def _rejection(offer: Offer, fit: TuningFit, wanted: Requirements, max_cost: float | None, cost: float | None) -> str:
    reason = offer.retired or catalogue.obstacle(offer) or mismatch(offer, wanted)
    if not reason and not fit.fits:
        reason = f"needs {gib(fit.memory.total)}, has {gib(fit.capacity)}"
    return reason or too_dear(offer, wanted, max_cost, cost)


def _is_retired(offer: Offer) -> bool:
    """Whether its cloud gives it up. One that is there already goes on being used."""
    known = catalogue.instance_types().get(offer.instance_type.lower())
    return not is_free(offer) and known is not None and bool(known.retired)


def _replacement(job: _Job, wanted: Requirements, max_cost: float | None, cloud: str) -> str:
    """The cheapest machine of that cloud that could take the job in place of one that can no longer be had."""
    anything = replace(wanted, instance_types=())
    found = []
    for offer in catalogue.offers(cloud, wanted.regions, wanted.capacity_types):
        fit = job.fit(offer)
        cost = cost_of(offer, wanted.count, fit.seconds)
        if offer.price and not _rejection(offer, fit, anything, max_cost, cost):
            found.append(Candidate(offer, fit, "", "", cost))
    if not found:
        return ""
    return _priced(in_order(found, anything, "cost")[0].offer)


def _priced(offer: Offer) -> str:
    """``Standard_NC4as_T4_v3 (1×T4, $0.53 an hour in eastus)``."""
    if offer.price is None:
        return str(offer)
    where = f" in {offer.region}" if offer.region else ""
    spot = " as spot" if offer.capacity_type == "spot" else ""
    return f"{str(offer).removesuffix(')')}, {money(offer.price.per_hour)} an hour{where}{spot})"


SHOWN = 5
"""Reasons in a refusal; the rest is counted."""


def _refusal(job: _Job, wanted: Requirements, candidates: Iterable[Candidate]) -> Problem:
    """Says that nothing fits, why, and the least that would have to change."""
    tried = list(candidates)
    odd = _unheard_of(wanted)
    if not tried:
        return Problem(
            "no machine is known that could run this",
            odd or "name an instance type in resource.instanceType, or use --local",
            field="resource.instanceType",
        )
    # What is only in the catalogue was not asked for, unless it was named.
    named = {t.lower() for t in wanted.instance_types}
    told = [c for c in tried if c.offer.provisioner or c.offer.instance_type.lower() in named] or tried
    reasons = "; ".join(dict.fromkeys(f"{c.offer}: {c.rejected}" for c in told[:SHOWN]))
    if len(told) > SHOWN:
        reasons += f"; and {len(told) - SHOWN} more"
    known = next((c for c in tried if only_known(c.rejected)), None)
    dear = next((c.offer for c in tried if c.fit.fits and c.offer.price and _only_dear(c, wanted)), None)
    smaller = _smallest_change(job, wanted, tried)
    fits_somewhere = any(c.fit.fits and c.offer.provisioner for c in tried)
    larger = "" if fits_somewhere or dear else _smallest_machine(job, tried[0].offer.cloud)
    remedies = [
        odd,
        f"it fits {smaller}" if smaller else "",
        f"the cheapest that fits is {_priced(dear)}" if dear else "",
        f"as it stands, the smallest machine is {larger}" if larger else "",
        f"{_priced(known.offer)} would do: {known.rejected}" if known else "",
    ]
    remedy = "; ".join(r for r in remedies if r) or "no known machine is large enough"
    if fits_somewhere and not any(remedies):
        remedy = "ask for less in resource, or install a plugin that gets such a machine"
    return Problem(reasons, remedy, field="resource.instanceType")


def _unheard_of(wanted: Requirements) -> str:
    """A GPU or a region that is asked for and that no cloud has, as far as is known; most likely a slip of the pen."""
    models = {o.gpu.model: o.gpu for o in catalogue.instance_types().values() if o.gpu}
    if wanted.gpu_model and not any(is_model(gpu, wanted.gpu_model) for gpu in models.values()):
        close = difflib.get_close_matches(wanted.gpu_model.upper(), models, n=2, cutoff=0.4)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        return f"no known GPU is called {wanted.gpu_model}{meant} (kaito catalog lists them)"
    for region in wanted.regions:
        if not any(catalogue.is_region(cloud, region) for cloud in catalogue.CLOUDS):
            close = difflib.get_close_matches(region, catalogue.known_regions(), n=2)
            meant = f"; did you mean {' or '.join(close)}?" if close else ""
            return f"no known region is called {region}{meant}"
    return ""


def _only_dear(candidate: Candidate, wanted: Requirements) -> bool:
    """Whether a limit of cost is all that keeps the machine from being taken."""
    offer = candidate.offer
    return not (offer.retired or not offer.provisioner or catalogue.obstacle(offer) or mismatch(offer, wanted))


def _smallest_change(job: _Job, wanted: Requirements, tried: Iterable[Candidate]) -> str:
    """The least painful change with which the job fits one of the machines that were considered and are too small."""
    here = [
        c.offer
        for c in tried
        if c.offer.provisioner and not c.offer.retired and not c.fit.fits and not mismatch(c.offer, wanted)
    ]
    for description, changed in job.smaller() if here else ():
        for offer in here:
            fit = changed.fit(offer)
            if fit.fits:
                needs = f"needs {gib(fit.memory.total)} of {gib(fit.capacity)}"
                return f"{offer.instance_type} with {description} ({needs})"
    return ""


def _smallest_machine(job: _Job, cloud: str) -> str:
    """The known machine with the least GPU memory that fits, of the same cloud where one is known."""
    known = [
        m.offer
        for m in catalogue.machines().values()
        if not m.offer.retired and not m.obstacle and (not cloud or m.offer.cloud == cloud)
    ]
    for offer in sorted(known, key=lambda o: (o.gpus * o.device_memory, o.cpus, o.instance_type)):
        fit = job.fit(offer)
        if fit.fits:
            return f"{offer} (needs {gib(fit.memory.total)} of {gib(fit.capacity)})"
    return ""
