"""Planning an endpoint: which runtime serves the model, with which adapters, on which machine.

Machines are ranked and refused as for a tuning (`kaito_core.planning.placement`). An endpoint has no end, so there is neither a time nor
a cost of the job; the price of an hour decides.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kaito_core.planning.choice import By
from kaito_core.planning.config_files import with_templates
from kaito_core.planning.images import Images
from kaito_core.planning.placement import Candidate, same_fit, why_not
from kaito_core.planning.plan import (
    Catalog,
    Plan,
    candidate_json,
    collect,
    is_default,
    misnamed,
    model_folder,
    model_json,
    place,
    read_config,
    requirements,
)
from kaito_core.plugins.guard import blamed_on
from kaito_core.plugins.known import KNOWN, knows
from kaito_core.plugins.types import (
    InferenceRuntime,
    MemoryEstimate,
    MemoryItem,
    Offer,
    Preset,
    ServedAdapter,
    ServingConfiguration,
    ServingFit,
)
from kaito_core.problems import Problem, UserError
from kaito_core.workloads.job import Secrets, TuningJob
from kaito_core.workloads.serving import ServingJob
from kaito_core.workloads.workload import Workload

if TYPE_CHECKING:
    from kaito_core.api import AdapterSpec, InferenceSpec, PresetSpec, Workspace

CONFIG_KEY = "inference_config.yaml"
BUILT_IN_CONFIGS = ("inference-params-template",)
"""KAITO's own ConfigMap. Naming it asks for the runtime's defaults."""

RUNTIME_FIELD = "metadata.annotations.kaito.sh/runtime"
PRESET_FIELD = "inference.preset.name"
ADAPTERS_FIELD = "inference.adapters"
CONFIG_FIELD = "inference_config"
"""How the fields of problems in the ConfigMap's ``inference_config.yaml`` begin, as ``training_config`` does for a tuning."""


@dataclass(frozen=True, slots=True)
class Configured:
    """A runtime that can serve the model, and its complete configuration."""

    runtime: InferenceRuntime
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan(Plan):
    """How a model is served. Which of the runtimes serves it may differ from machine to machine (`Candidate.runtime`)."""

    preset: Preset
    runtimes: tuple[Configured, ...]
    """Those that can serve it, the preferred one first."""
    left_out: Mapping[str, str]
    """Installed runtimes that cannot serve it, by name, with the reason."""
    named: bool = False
    """Whether the workspace names its runtime."""
    adapters: tuple[ServedAdapter, ...] = ()
    model_image: str = ""
    model_folder: str = ""
    secrets: Secrets = field(default_factory=Secrets)

    @property
    def runtime(self) -> InferenceRuntime:
        """Who serves the model on the chosen machine; without one, who is preferred."""
        return self._configured.runtime

    @property
    def config(self) -> Mapping[str, Any]:
        """The complete configuration of `runtime`, the user's and the preset's wishes merged in."""
        return self._configured.config

    @property
    def _configured(self) -> Configured:
        first = self.chosen or (self.candidates[0] if self.candidates else None)
        return next((c for c in self.runtimes if first and c.runtime.name == first.runtime), self.runtimes[0])

    @property
    def why_runtime(self) -> str:
        """Why `runtime` serves it, in words."""
        if self.named:
            return "named by the annotation kaito.sh/runtime"
        reasons = [f"{name} cannot: {reason}" for name, reason in self.left_out.items()]
        others = [c.runtime.name for c in self.runtimes if c.runtime is not self.runtime]
        if not others:
            return "; ".join(["the only one that can", *reasons]) if reasons else "the only one installed"
        first = self.runtimes[0].runtime
        if self.runtime is first:
            return "; ".join([f"preferred to {', '.join(others)}", *reasons])
        return "; ".join([f"{first.name} is preferred where it fits", *reasons])

    @property
    def job(self) -> ServingJob:
        """The endpoint on the chosen machine. UserError when there is none."""
        machine = self._machine()
        if not isinstance(machine.fit, ServingFit):
            raise TypeError(f"a runtime gave {type(machine.fit).__name__}, not a ServingFit")
        return ServingJob(
            name=self.workspace.metadata.name,
            namespace=self.workspace.metadata.namespace,
            preset=self.preset,
            runtime=self.runtime.name,
            config=self.config,
            configuration=machine.fit.configuration,
            machines=machines(self.workspace, machine.offer),
            adapters=self.adapters,
            model_image=self.model_image,
            model_folder=self.model_folder,
            secrets=self.secrets,
        )

    @property
    def workload(self) -> Workload:
        """What will be run."""
        with blamed_on(f"the runtime {self.runtime.name!r}"):
            return self.runtime.workload(self.job)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, for ``--json``; bytes as numbers, all of them estimates."""
        inference = self.workspace.inference
        return {
            "workspace": self.workspace.metadata.name,
            "task": "inference",
            "model": model_json(self.preset),
            "runtime": {"name": self.runtime.name, "why": self.why_runtime, "leftOut": dict(self.left_out)},
            "config": self.config,
            "adapters": [asdict(a) for a in self.adapters],
            "policy": self.workspace.serving_policy(),
            "idleAfter": _spec().idle_seconds if inference is None else inference.idle_seconds,
            "by": self.by,
            "candidates": [self._candidate_json(c) for c in self.candidates],
            "refusal": self.refusal.to_json() if self.refusal else None,
        }

    def _candidate_json(self, candidate: Candidate) -> dict[str, Any]:
        fit = candidate.fit
        return {
            **candidate_json(candidate, chosen=candidate is self.chosen),
            "runtime": candidate.runtime,
            "machines": machines(self.workspace, candidate.offer),
            "cacheTokens": fit.cache_tokens if isinstance(fit, ServingFit) else None,
            "estimates": ["memory", "cacheTokens"],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplatePlan(Plan):
    """Machines for a pod template of the user's own. What it needs of their memory is not known."""

    @property
    def job(self) -> TuningJob | ServingJob:
        raise UserError("a pod template has no job of kaito's", field="inference.template")

    @property
    def workload(self) -> Workload:
        raise UserError(
            "a pod template is run in a cluster, and nowhere else",
            "give inference.preset in place of it, or name a cluster with --context",
            field="inference.template",
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, for ``--json``."""
        return {
            "workspace": self.workspace.metadata.name,
            "task": "inference",
            "model": None,
            "by": self.by,
            "candidates": [candidate_json(c, chosen=c is self.chosen) for c in self.candidates],
            "refusal": self.refusal.to_json() if self.refusal else None,
        }


def plan_inference(workspace: Workspace, catalog: Catalog, by: By = "cost") -> ServingPlan | TemplatePlan:
    """How the ``inference`` of this workspace is served. Raises `UserError` with every problem at once."""
    inference = workspace.inference
    if inference is None:
        raise UserError(
            "there is nothing to plan: neither tuning nor inference is asked for",
            "give `tuning` with a preset, a method, input and output, or `inference` with a preset",
            field="tuning",
        )
    if inference.template is not None:
        return _plan_template(workspace, inference.template, catalog, by)
    if inference.preset is None:
        raise UserError("has neither preset nor template", "add 'preset:' with the name of a model", field="inference")
    return _plan_serving(workspace, inference, inference.preset, (), catalog, by)


def serving_after(
    workspace: Workspace, catalog: Catalog, adapter: ServedAdapter | None = None, by: By = "cost"
) -> ServingPlan:
    """How the model that this workspace tunes is served afterwards: with ``adapter`` (when None: the output of the tuning), which
    answers first, and those of ``inference.adapters``. Raises `UserError` with every problem at once."""
    tuning = workspace.tuning
    if tuning is None:
        raise UserError("nothing is tuned that could be served", field="tuning")
    inference = workspace.inference or _spec()
    if inference.preset is not None:
        served, tuned = (catalog.registry.preset(p.name).name for p in (inference.preset, tuning.preset))
        if served != tuned:
            raise UserError(
                f"the model to serve is the tuned one, {tuned}, and not {served}",
                "leave inference.preset out, or serve the other model with a Workspace of its own",
                field="inference.preset.name",
            )
    first = adapter or tuned_adapter(workspace)
    return _plan_serving(workspace, inference, tuning.preset, (first,), catalog, by)


def tuned_adapter(workspace: Workspace) -> ServedAdapter:
    """What the tuning of this workspace makes, as an adapter of the workspace's name."""
    tuning = workspace.tuning
    if tuning is None:
        raise UserError("nothing is tuned that could be served", field="tuning")
    return ServedAdapter(workspace.metadata.name, tuning.output.image, tuning.output.volume_source)


def machines(workspace: Workspace, offer: Offer) -> int:
    """How many of these machines serve together; of this one there is only one."""
    return 1 if offer.is_local else workspace.resource.count


def _spec() -> InferenceSpec:
    from kaito_core.api import InferenceSpec

    return InferenceSpec.model_validate({})


# --- a preset


def _plan_serving(
    workspace: Workspace,
    inference: InferenceSpec,
    model: PresetSpec,
    tuned: tuple[ServedAdapter, ...],
    catalog: Catalog,
    by: By,
) -> ServingPlan:
    found: list[Problem] = []
    preset, asked, user, adapters = collect(
        found,
        lambda: _preset(catalog, model.name, tuned=bool(tuned)),
        lambda: _asked(workspace, catalog.registry.runtimes()),
        lambda: _user_config(inference.config, catalog),
        lambda: _adapters(inference.adapters, tuned),
    )
    wanted = requirements(workspace)
    if found:
        raise UserError([*found, *misnamed(wanted, catalog)])
    try:
        able, left_out = _able(preset, asked, user, adapters)
    except UserError as e:
        raise UserError([_without_tuned(p, len(tuned)) for p in e.problems]) from e
    named = workspace.metadata.annotations.get("kaito.sh/runtime", "").strip() != ""
    others = [r for n, r in catalog.registry.runtimes().items() if named and r not in asked and n not in left_out]
    task = _Serving(preset, able, adapters, workspace.resource.count, catalog.images, user, tuple(others))
    considered, refused = place(task, wanted, None, catalog, by)
    options = model.preset_options
    return ServingPlan(
        workspace=workspace,
        candidates=tuple(replace(c, runtime=task.runtime(c.offer)) for c in considered),
        refusal=refused,
        by=by,
        preset=preset,
        runtimes=able,
        left_out=left_out,
        named=named,
        adapters=adapters,
        model_image=options.image if options else "",
        model_folder=model_folder(workspace, preset, catalog),
        secrets=_secrets(workspace, inference, model),
    )


def _preset(catalog: Catalog, name: str, *, tuned: bool) -> Preset:
    try:
        return catalog.registry.preset(name)
    except UserError as e:
        if tuned:
            raise
        # A registry speaks of the place where presets are named most often.
        fields = [p.field.replace("tuning.preset", "inference.preset") for p in e.problems]
        raise UserError([replace(p, field=f) for p, f in zip(e.problems, fields, strict=True)]) from e


def _asked(workspace: Workspace, installed: Mapping[str, InferenceRuntime]) -> tuple[InferenceRuntime, ...]:
    """The runtimes that may serve it: the one that the workspace names, else all that are installed, the preferred one first."""
    name = workspace.metadata.annotations.get("kaito.sh/runtime", "").strip().lower()
    packages = [d for d, provides in KNOWN.items() if "runtimes" in provides]
    if name and name not in installed:
        known = next((d for d in packages if knows(d, "runtimes", name)), "")
        close = difflib.get_close_matches(name, installed, n=1)
        there = f"there is {', '.join(sorted(installed))}" if installed else "none is installed"
        remedy = f"you need `pip install {known}`" if known else f"did you mean {close[0]}?" if close else ""
        raise UserError(
            f"there is no runtime {name!r}; {there}",
            remedy or "remove the annotation, and kaito chooses",
            field=RUNTIME_FIELD,
        )
    if not installed:
        raise UserError(
            "no installed plugin serves models", f"install one: pip install {' or '.join(packages)}", field="inference"
        )
    if name:
        return (installed[name],)
    return tuple(sorted(installed.values(), key=lambda r: (-r.priority, r.name)))


def _user_config(name: str, catalog: Catalog) -> Mapping[str, Any] | None:
    """The content of ``inference_config.yaml``; None for the defaults."""
    if is_default(name, BUILT_IN_CONFIGS, catalog):
        return None
    parsed = read_config(name, CONFIG_KEY, "inference.config", catalog)
    if parsed is not None and not isinstance(parsed, dict):
        raise UserError(
            f"{CONFIG_KEY} of the ConfigMap {name!r} must be a mapping",
            "write for example `vllm:` with the engine's settings below it",
            field="inference.config",
        )
    return with_templates(parsed, catalog.config_maps[name], CONFIG_FIELD) if parsed else None


def _adapters(specs: Sequence[AdapterSpec], tuned: tuple[ServedAdapter, ...]) -> tuple[ServedAdapter, ...]:
    found = list(tuned)
    taken = {a.name for a in tuned}
    for i, spec in enumerate(specs):
        path = f"{ADAPTERS_FIELD}[{i}]"
        try:
            strength = float(spec.strength)
        except ValueError as e:
            raise UserError(f"{spec.strength!r} is not a number from 0 to 1", field=f"{path}.strength") from e
        if spec.source.name in taken:
            raise UserError(
                f"the name {spec.source.name!r} is that of the adapter which is tuned here",
                "give this one another name",
                field=f"{path}.source.name",
            )
        found.append(ServedAdapter(spec.source.name, spec.source.image, spec.source.volume_source, strength))
    return tuple(found)


def _secrets(workspace: Workspace, inference: InferenceSpec, model: PresetSpec) -> Secrets:
    options, tuning = model.preset_options, workspace.tuning
    pull = [
        *(options.image_pull_secrets if options else ()),
        *(s for a in inference.adapters for s in a.source.image_pull_secrets),
        tuning.output.image_push_secret if tuning and tuning.output.image else "",  # what pushed it may pull it
    ]
    return Secrets(tuple(dict.fromkeys(s for s in pull if s)), options.model_access_secret if options else "")


def _able(
    preset: Preset,
    asked: Iterable[InferenceRuntime],
    user: Mapping[str, Any] | None,
    adapters: tuple[ServedAdapter, ...],
) -> tuple[tuple[Configured, ...], dict[str, str]]:
    """Those of the runtimes that can serve the model with these adapters, and why the others cannot.

    A configuration with errors is never passed over: the user meant something by it. UserError when none is left."""
    able: list[Configured] = []
    left_out: dict[str, str] = {}
    problems: list[Problem] = []
    for runtime in asked:
        with blamed_on(f"the runtime {runtime.name!r}"):
            unable = runtime.serves(preset)
            if unable is not None:
                left_out[runtime.name] = unable.message
                problems.append(replace(unable, message=f"{runtime.name}: {unable.message}", field=PRESET_FIELD))
                continue
            try:
                able.append(Configured(runtime, runtime.resolve(preset, user, adapters)))
            except UserError as e:
                found = [replace(p, field=_place(p.field)) for p in e.problems]
                if not all(p.field.startswith(ADAPTERS_FIELD) for p in found):
                    raise UserError(found) from e
                left_out[runtime.name] = "; ".join(p.message for p in found)
                problems.extend(found)
    if not able:
        raise UserError(problems)
    return tuple(able), left_out


def _place(field: str) -> str:
    """A field as a runtime names it – a setting below its section, or ``adapters`` – as a place in what the user wrote."""
    if field.startswith("adapters"):
        return f"inference.{field}"
    return field if field.startswith(("inference", "metadata")) else f"{CONFIG_FIELD}.{field}".rstrip(".")


def _without_tuned(problem: Problem, tuned: int) -> Problem:
    """A problem with an adapter, at the place where the user wrote it: what is tuned stands before the written ones."""
    match = re.match(r"inference\.adapters\[(\d+)\]", problem.field)
    if not match or not tuned:
        return problem
    number = int(match[1]) - tuned
    field = "tuning.output" if number < 0 else f"{ADAPTERS_FIELD}[{number}]{problem.field[match.end() :]}"
    return replace(problem, field=field)


class _Serving:
    """An endpoint and how it fits machines, as a `kaito_core.planning.placement.Task`: on each the first runtime that fits there."""

    def __init__(
        self,
        preset: Preset,
        able: tuple[Configured, ...],
        adapters: tuple[ServedAdapter, ...],
        count: int,
        images: Images,
        user: Mapping[str, Any] | None = None,
        others: tuple[InferenceRuntime, ...] = (),
    ) -> None:
        self.preset, self.able, self.adapters, self.count, self.images = preset, able, adapters, count, images
        self.user, self.others = user, others
        self._fits: dict[Any, tuple[str, ServingFit]] = {}

    def fit(self, offer: Offer) -> ServingFit:
        return self._on(offer)[1]

    def obstacle(self, offer: Offer) -> str:
        return self.images.serving(self.runtime(offer), offer).obstacle(offer)

    def runtime(self, offer: Offer) -> str:
        """The name of the runtime that serves it there."""
        return self._on(offer)[0]

    def _on(self, offer: Offer) -> tuple[str, ServingFit]:
        key = (*same_fit(offer), offer.is_local)
        known = self._fits.get(key)
        if known is None:
            known = self._fits[key] = self._first(offer)
        return known

    def _first(self, offer: Offer) -> tuple[str, ServingFit]:
        passed: list[str] = []
        tried: list[tuple[bool, str, ServingFit]] = []
        for option in self._order(offer, passed):
            name = option.runtime.name
            with blamed_on(f"the runtime {name!r}"):
                count = 1 if offer.is_local else self.count
                fit = option.runtime.fit(self.preset, option.config, offer, count, self.adapters)
            image = self.images.serving(name, offer)
            obstacle, doubt = image.obstacle(offer), image.doubt(offer)
            if fit.fits and not obstacle:
                return name, replace(fit, notes=(*fit.notes, *passed, *([doubt] if doubt else [])))
            passed.append(
                f"{name} cannot run there: {obstacle}" if obstacle else f"{name} does not fit there: {why_not(fit)}"
            )
            tried.append((bool(obstacle), name, fit))
        return min(tried, key=lambda t: (t[0], t[2].memory.total - t[2].capacity))[1:]

    def _order(self, offer: Offer, passed: list[str]) -> list[Configured]:
        """What is not installed completely on this machine comes last there."""
        if not offer.is_local or len(self.able) == 1:
            return list(self.able)
        lacks = {c.runtime.name: c.runtime.missing() for c in self.able}
        if any(not lack for lack in lacks.values()):
            passed += [
                f"{name} is not installed completely on this machine: {lack}" for name, lack in lacks.items() if lack
            ]
        return sorted(self.able, key=lambda c: bool(lacks[c.runtime.name]))

    def smaller(self) -> Iterable[tuple[str, _Serving]]:
        for runtime in self.others:
            try:
                able, _ = _able(self.preset, [runtime], self.user, self.adapters)
            except UserError:
                continue
            yield f"the runtime {runtime.name}", _Serving(self.preset, able, self.adapters, self.count, self.images)
        if self.user:
            able, _ = _able(self.preset, [c.runtime for c in self.able], None, self.adapters)
            yield (
                "the defaults in place of inference.config",
                _Serving(self.preset, able, self.adapters, self.count, self.images),
            )
        for count in (2, 4, 8):
            if count > self.count:
                yield f"resource.count {count}", _Serving(self.preset, self.able, self.adapters, count, self.images)


# --- a pod template


def _plan_template(workspace: Workspace, template: Mapping[str, Any], catalog: Catalog, by: By) -> TemplatePlan:
    task, wanted = _Pods(_gpus(template)), requirements(workspace)
    considered, refused = place(task, wanted, None, catalog, by)
    return TemplatePlan(workspace=workspace, candidates=considered, refusal=refused, by=by)


def _gpus(template: Mapping[str, Any]) -> int:
    """How many GPUs the containers of a pod template ask for together; what is not as Kubernetes has it counts nothing."""
    total = 0
    spec = template.get("spec")
    containers = spec.get("containers") if isinstance(spec, Mapping) else None
    for container in containers if isinstance(containers, list) else ():
        resources = container.get("resources") if isinstance(container, Mapping) else None
        limits = resources.get("limits") if isinstance(resources, Mapping) else None
        asked = str(limits.get("nvidia.com/gpu", "")) if isinstance(limits, Mapping) else ""
        total += int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 10 else 0
    return total


class _Pods:
    """A pod of a template: it fits every machine that has its GPUs."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus

    def fit(self, offer: Offer) -> ServingFit:
        has = offer.gpus if offer.gpu else 0
        configuration = ServingConfiguration("cuda" if has else "cpu", "", 0, 0)
        if has >= self.gpus:
            return ServingFit(configuration, MemoryEstimate(()), offer.device_memory)
        note = f"has {has} GPU{'s' if has != 1 else ''}, and the template asks for {self.gpus}"
        return ServingFit(configuration, MemoryEstimate((MemoryItem("pods", 1),)), 0, notes=(note,))

    def obstacle(self, offer: Offer) -> str:
        return ""  # the image is the user's own

    def smaller(self) -> Iterable[tuple[str, _Pods]]:
        return ()
