"""The rules for a Workspace that need no cluster, no catalogue and no network.

All problems are found at once, each with its field; the Workspace itself stays usable, so that a plan can be shown for
one whose only fault is a value that is still to be filled in (``Problem.kind == "placeholder"``). The rules are KAITO's
(its admission webhook), except that a Workspace may have both ``tuning`` and ``inference``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from kaito_core.api import labels, names
from kaito_core.api.inference import AdapterSpec, InferenceSpec, PresetSpec
from kaito_core.api.resource import PLACE, LabelSelector, Partition, ResourceSpec, bytes_of, seconds_of
from kaito_core.api.source import DataDestination, DataSource
from kaito_core.api.suggest import closest
from kaito_core.api.tuning import TuningSpec
from kaito_core.api.workspace import V1ALPHA1, V1BETA1, Metadata, Workspace
from kaito_core.oci_reference import Reference
from kaito_core.problems import Problem

PLACEHOLDER: Final = "placeholder"

_METHOD = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*\Z")
_PLACE = re.compile(PLACE.removesuffix("$") + r"\Z")
_MIG_PROFILE = re.compile(r"[1-7]g\.\d+gb\Z")
_SCHEMALESS = re.compile(r"\.(volumeSource|template)\b")
_PUSH_REMEDY = (
    "name a Secret of type kubernetes.io/dockerconfigjson; on this machine the credentials of `docker login` are used "
    "when no Secret of that name is in the file"
)


def validate_workspace(workspace: Workspace, *, allow_private: bool = False) -> list[Problem]:
    """Everything that is wrong with a Workspace, by itself.

    ``allow_private``: URLs may name hosts inside a network (KAITO's v1beta1 refuses them)."""
    public_only = workspace.api_version == V1BETA1 and not allow_private
    unfilled = list(_placeholders(workspace))
    problems = [*_metadata(workspace.metadata), *_resource(workspace)]
    if workspace.tuning is None and workspace.inference is None:
        problems.append(
            Problem("has neither tuning nor inference", "add 'tuning:' to tune a model or 'inference:' to serve one")
        )
    if workspace.tuning is not None:
        problems += _tuning(workspace.tuning, workspace, public_only)
    if workspace.inference is not None:
        problems += _inference(workspace.inference, workspace)
    # A placeholder breaks the grammar of its field too; saying so twice helps nobody.
    to_fill = {p.field for p in unfilled}
    return unfilled + [p for p in problems if p.field not in to_fill]


# --- placeholders


def _placeholders(workspace: Workspace) -> Iterator[Problem]:
    for part in ("metadata", "resource", "inference", "tuning"):
        value = getattr(workspace, part)
        if value is not None:
            data = {"name": value.name} if part == "metadata" else value.to_object()
            for path, text in _texts(data, part):
                found = names.placeholders(text, angled=not _SCHEMALESS.search(path))
                if found:
                    words = "placeholder" if len(found) == 1 else "placeholders"
                    yield Problem(
                        f"still holds the {words} {names.listed(found)}", _filling(path), path, kind=PLACEHOLDER
                    )


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}")
    elif isinstance(value, Iterable):
        for i, item in enumerate(value):
            yield from _texts(item, f"{path}[{i}]")


def _filling(path: str) -> str:
    lower = "(OCI and Kubernetes names are lower case)"
    if path.endswith(".image"):
        return f"put your registry and repository there {lower}, for example myregistry.azurecr.io/phi-3-adapter:0.0.1"
    if "Secret" in path:
        return f"put the name of your Secret there {lower}, for example acr-secret"
    return "put your own value there"


# --- metadata and resource


def _metadata(metadata: Metadata) -> Iterator[Problem]:
    for field, name in (("name", metadata.name), ("namespace", metadata.namespace)):
        if trouble := names.label_trouble(name):
            yield Problem(trouble, f"choose a {field} like my-workspace", f"metadata.{field}")
    for key, value in metadata.labels.items():
        yield from _label(key, value, "metadata.labels")
    for key, value in metadata.annotations.items():
        known = labels.ANNOTATION_VALUES.get(key)
        if key in labels.WITHOUT_EFFECT:
            instead, remedy = labels.WITHOUT_EFFECT[key]
            yield Problem(f"has no effect here: {instead}", remedy or "remove the annotation, if you like",
                          f"metadata.annotations.{key}", severity="warning")  # fmt: skip
        elif key.startswith("kaito.sh/") and (close := _meant(key)):
            yield Problem(f"unknown annotation; did you mean '{close}'?", f"write '{close}'",
                          f"metadata.annotations.{key}", severity="warning")  # fmt: skip
        elif known and value not in known:
            yield Problem(
                f"{value!r} has no effect here",
                f"write {names.listed((repr(v) for v in known), 'or')}, or remove the annotation",
                f"metadata.annotations.{key}",
                severity="warning",
            )
    for key in metadata.model_extra or {}:
        if close := closest(key, ("name", "namespace", "labels", "annotations")):
            yield Problem(f"unknown field '{key}'; did you mean '{close}'?", f"write '{close}'",
                          f"metadata.{key}", severity="warning")  # fmt: skip


def _meant(annotation: str) -> str:
    """The annotation that was probably meant; empty when this one is known, or near to none."""
    known = (*labels.HONOURED, *labels.WITHOUT_EFFECT, *labels.WRITTEN)
    return "" if annotation in known else closest(annotation, known)


def _label(key: str, value: str, path: str) -> Iterator[Problem]:
    for trouble in (names.label_key_trouble(key), names.label_value_trouble(value)):
        if trouble:
            yield Problem(trouble, "change the label", f"{path}.{key}")


def _resource(workspace: Workspace) -> Iterator[Problem]:
    resource = workspace.resource
    if resource.label_selector is not None:
        yield from _selector(resource.label_selector)
    if workspace.tuning is not None:
        if resource.count > 1:
            yield Problem(f"tuning runs on one machine, not on {resource.count}",
                          "remove count, or choose a machine with more GPUs: all of them are used",
                          "resource.count")  # fmt: skip
    elif resource.max_cost is not None:
        yield Problem("limits what a job costs, and an endpoint has no end", "limit the hour: maxPricePerHour",
                      "resource.maxCost", severity="warning")  # fmt: skip
    if resource.partition is not None:
        yield from _partition(resource.partition, tunes=workspace.tuning is not None)
    if resource.preferred_nodes:
        yield Problem("has no effect here: kaito chooses among all nodes that fit", "give the nodes a label, and name it in "
                      "resource.labelSelector", "resource.preferredNodes", severity="warning")  # fmt: skip
    yield from _choice(resource)


def _choice(resource: ResourceSpec) -> Iterator[Problem]:
    """What limits the choice of machines."""
    if resource.instance_type and resource.instance_types:
        yield Problem("cannot be set beside instanceType", "put all machines into instanceTypes, the most wanted first",
                      "resource.instanceTypes")  # fmt: skip
    for i, name in enumerate(resource.instance_types):
        if not name:
            yield Problem("is empty", "write the name of an instance type, or remove the item",
                          f"resource.instanceTypes[{i}]")  # fmt: skip
    if resource.gpu is not None and resource.gpu.memory and bytes_of(resource.gpu.memory) is None:
        yield Problem(f"{resource.gpu.memory!r} is not a size", "write for example 40Gi", "resource.gpu.memory")
    for field, places, example in (
        ("regions", resource.regions, "eastus or us-east-1"),
        ("zones", resource.zones, "us-east-1a"),
    ):
        for i, place in enumerate(places):
            if not _PLACE.match(place):
                yield Problem(f"{place!r} is not the name of a {field[:-1]}", f"write it as its cloud does, like {example}",
                              f"resource.{field}[{i}]")  # fmt: skip
    for field, limit in (("maxPricePerHour", resource.max_price_per_hour), ("maxCost", resource.max_cost)):
        if limit is not None and limit <= 0:
            yield Problem(f"must be more than 0, and is {limit:g}", "write the US dollars, or remove it for no limit",
                          f"resource.{field}")  # fmt: skip
    if resource.keep and seconds_of(resource.keep) is None:
        yield Problem(f"{resource.keep!r} is not a duration", "write for example 45s, 10m or 1h30m", "resource.keep")


def _selector(selector: LabelSelector) -> Iterator[Problem]:
    path = "resource.labelSelector"
    keys = list(selector.match_labels)
    for key, value in selector.match_labels.items():
        yield from _label(key, value, f"{path}.matchLabels")
    for i, requirement in enumerate(selector.match_expressions):
        here = f"{path}.matchExpressions[{i}]"
        keys.append(requirement.key)
        if trouble := names.label_key_trouble(requirement.key):
            yield Problem(trouble, "change the key", f"{here}.key")
        if requirement.operator != "In":
            yield Problem(f"the operator {requirement.operator!r} is not supported: only matchLabels and In are, as "
                          "new nodes get these labels", "write 'operator: In' with values, or use matchLabels",
                          f"{here}.operator")  # fmt: skip
        elif not requirement.values:
            yield Problem("In needs at least one value", "add values", f"{here}.values")
        elif len(requirement.values) > 1:
            yield Problem("kaito selects nodes by one value of a label, and this names several", "keep one of them, or give "
                          "all of these nodes another label with one value", f"{here}.values")  # fmt: skip
        elif selector.match_labels.get(requirement.key, requirement.values[0]) != requirement.values[0]:
            yield Problem(f"asks for another value of {requirement.key!r} than matchLabels does", "keep one of them",
                          f"{here}.values")  # fmt: skip
        for j, value in enumerate(requirement.values):
            if trouble := names.label_value_trouble(value):
                yield Problem(trouble, "change the value", f"{here}.values[{j}]")
    reserved = [key for key in keys if key in labels.RESERVED_SELECTOR_KEYS]
    if reserved and len(reserved) == len(keys):
        yield Problem("has reserved labels only, which are passed over: nothing is left to select by",
                      "add a label of your own under matchLabels", path)  # fmt: skip
    elif reserved:
        yield Problem(f"{names.listed(reserved)} {'is' if len(reserved) == 1 else 'are'} reserved and passed over",
                      "remove the label: kaito sets it on its nodes itself", path, severity="warning")  # fmt: skip


def _partition(partition: Partition, *, tunes: bool) -> Iterator[Problem]:
    path = "resource.partition"
    if tunes:
        yield Problem("a part of a GPU cannot be used for tuning", "remove partition", path)
    else:
        yield Problem("kaito cannot serve on a part of a GPU yet, and does not buy whole GPUs in its place",
                      "remove partition to serve on whole GPUs", path)  # fmt: skip
    if partition.mode == "mig":
        if not _MIG_PROFILE.match(partition.profile):
            trouble = f"{partition.profile!r} is not a MIG profile" if partition.profile else "mode mig needs a profile"
            yield Problem(trouble, "write the slice as NVIDIA does: 1g.10gb", f"{path}.profile")
        if partition.count is not None:
            yield Problem("count goes with mode accelerator only", "remove it", f"{path}.count")
    else:
        if partition.count is None:
            yield Problem("mode accelerator needs a count", "say how many GPUs", f"{path}.count")
        if partition.profile:
            yield Problem("profile goes with mode mig only", "remove it", f"{path}.profile")


# --- tuning and inference


def _tuning(tuning: TuningSpec, workspace: Workspace, public_only: bool) -> Iterator[Problem]:
    if not _METHOD.match(tuning.method):
        yield Problem(f"{tuning.method!r} is not a method" if tuning.method else "is empty", "write qlora or lora",
                      "tuning.method")  # fmt: skip
    yield from _preset(tuning.preset, "tuning.preset", workspace)
    yield from _object_name(tuning.config, "tuning.config", "ConfigMap")
    yield from _source(tuning.input, "tuning.input", public_only)
    yield from _destination(tuning.output)
    if tuning.checkpoints is not None:
        yield from _volume(tuning.checkpoints.volume_source, "tuning.checkpoints.volumeSource")


def _inference(inference: InferenceSpec, workspace: Workspace) -> Iterator[Problem]:
    if inference.preset is not None:
        yield from _preset(inference.preset, "inference.preset", workspace)
    if inference.preset is not None and inference.template is not None:
        yield Problem("has both preset and template", "keep the preset for a model that kaito knows, "
                      "or the template for a pod of your own", "inference")  # fmt: skip
    # Beside tuning, the model is the tuned one.
    if inference.preset is None and inference.template is None and workspace.tuning is None:
        yield Problem("has neither preset nor template", "add 'preset:' with the name of a model", "inference")
    if workspace.tuning is not None and inference.template is not None:
        yield Problem("a pod template cannot serve what is tuned beside it", "leave the template out, or give it a Workspace "
                      "of its own", "inference.template")  # fmt: skip
    if workspace.tuning is None and inference.policy == "never":
        yield Problem("'never' serves nothing, and there is nothing to tune either", "remove it, or write 'onDemand'",
                      "inference.policy", severity="warning")  # fmt: skip
    yield from _idle(inference, workspace)
    yield from _object_name(inference.config, "inference.config", "ConfigMap")
    first: dict[str, int] = {}
    for i, adapter in enumerate(inference.adapters):
        path = f"inference.adapters[{i}]"
        yield from _adapter(adapter, path)
        name = adapter.source.name
        if name and first.setdefault(name, i) != i:
            yield Problem(f"the name {name!r} is taken by adapters[{first[name]}]", "give each adapter its own name",
                          f"{path}.source.name")  # fmt: skip


def _idle(inference: InferenceSpec, workspace: Workspace) -> Iterator[Problem]:
    path, policy = "inference.idleAfter", workspace.serving_policy()
    if not inference.idle_after:
        return
    if not seconds_of(inference.idle_after):
        yield Problem(
            f"{inference.idle_after!r} is not a duration of more than 0", "write for example 5m or 1h30m", path
        )
    elif policy != "onDemand":
        yield Problem(f"has no effect while the model is served {policy!r}", "write 'policy: onDemand', or remove it", path,
                      severity="warning")  # fmt: skip


def _preset(preset: PresetSpec, path: str, workspace: Workspace) -> Iterator[Problem]:
    if not preset.name.strip():
        yield Problem("is empty", "write the name of a preset, for example phi-3-mini-128k-instruct", f"{path}.name")
    options = preset.preset_options
    if options is not None:
        yield from _image(options.image, f"{path}.presetOptions.image")
        for i, secret in enumerate(options.image_pull_secrets):
            yield from _object_name(secret, f"{path}.presetOptions.imagePullSecrets[{i}]", "Secret", required=True)
        yield from _object_name(options.model_access_secret, f"{path}.presetOptions.modelAccessSecret", "Secret")
    if workspace.api_version == V1ALPHA1 and preset.access_mode == "private" and not (options and options.image):
        yield Problem("accessMode private needs the image that holds the model", "add presetOptions.image, or remove "
                      "accessMode", f"{path}.accessMode")  # fmt: skip


def _adapter(adapter: AdapterSpec, path: str) -> Iterator[Problem]:
    source = adapter.source
    if not source.name:
        yield Problem(
            "an adapter needs a name", "add 'name:'; requests ask for the adapter by it", f"{path}.source.name"
        )
    elif trouble := names.subdomain_trouble(source.name):
        yield Problem(trouble, "choose a name like my-adapter", f"{path}.source.name")
    if source.urls:
        yield Problem("an adapter cannot come from URLs", "use image or volumeSource", f"{path}.source.urls")
    else:
        yield from _source(source, f"{path}.source", public_only=False, choices=("volumeSource", "image"))
    try:
        fine = 0 <= float(adapter.strength) <= 1
    except ValueError:
        fine = False
    if not fine:
        yield Problem(f"{adapter.strength!r} is not a number from 0 to 1", 'write for example "0.5", in quotes',
                      f"{path}.strength")  # fmt: skip


def _source(
    source: DataSource, path: str, public_only: bool, choices: tuple[str, ...] = ("urls", "volumeSource", "image")
) -> Iterator[Problem]:
    given = {"urls": bool(source.urls), "volumeSource": source.volume_source is not None, "image": bool(source.image)}
    yield from _exactly_one(given, path, choices)
    for i, url in enumerate(source.urls):
        trouble, remedy = names.url_trouble(url, public_only=public_only)
        if trouble:
            yield Problem(trouble, remedy, f"{path}.urls[{i}]")
    yield from _volume(source.volume_source, f"{path}.volumeSource")
    yield from _image(source.image, f"{path}.image")
    for i, secret in enumerate(source.image_pull_secrets):
        yield from _object_name(secret, f"{path}.imagePullSecrets[{i}]", "Secret", required=True)


def _destination(output: DataDestination) -> Iterator[Problem]:
    path = "tuning.output"
    given = {"volumeSource": output.volume_source is not None, "image": bool(output.image)}
    yield from _exactly_one(given, path, tuple(given))
    yield from _volume(output.volume_source, f"{path}.volumeSource")
    yield from _image(output.image, f"{path}.image")
    yield from _object_name(output.image_push_secret, f"{path}.imagePushSecret", "Secret")
    if output.image and not output.image_push_secret:
        yield Problem("imagePushSecret is required with image", _PUSH_REMEDY, f"{path}.imagePushSecret")


def _exactly_one(given: Mapping[str, bool], path: str, choices: tuple[str, ...]) -> Iterator[Problem]:
    chosen = [name for name in choices if given[name]]
    if not chosen:
        yield Problem(f"needs one of {names.listed(choices, 'or')}", f"add '{choices[-1]}:' or another of them", path)
    elif len(chosen) > 1:
        yield Problem(f"has {names.listed(chosen)}: only one is possible", "keep one of them", path)


def _volume(volume: Mapping[str, Any] | None, path: str) -> Iterator[Problem]:
    if volume is not None and len(volume) != 1:
        kinds = names.listed(volume) if volume else "none"
        yield Problem(f"must name exactly one kind of volume, and names {kinds}",
                      "write for example persistentVolumeClaim: {claimName: my-data}", path)  # fmt: skip


def _image(image: str, path: str) -> Iterator[Problem]:
    if image:
        try:
            Reference.parse(image)
        except ValueError as e:
            remedy = "write registry/repository:tag, like myregistry.azurecr.io/phi-3-adapter:0.0.1"
            yield Problem(str(e), remedy, path)


def _object_name(name: str, path: str, kind: str, *, required: bool = False) -> Iterator[Problem]:
    if not name and required:
        yield Problem("is empty", f"write the name of a {kind}, or remove the item", path)
    elif name and (trouble := names.subdomain_trouble(name)):
        yield Problem(trouble, f"write the name of a {kind}", path)
