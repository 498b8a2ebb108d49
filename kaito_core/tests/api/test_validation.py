"""The rules for one Workspace, each with what a person reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from kaito_core.api import PLACEHOLDER, Workspace, labels, load_documents, load_text, read_workspace
from kaito_core.planning.plan import requirements
from kaito_core.problems import errors

QUICKSTART = Path(__file__).parent / "data" / "quickstart.yaml"

TUNING: dict[str, Any] = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "tune"},
    "resource": {"instanceType": "Standard_NC24ads_A100_v4", "labelSelector": {"matchLabels": {"app": "tune"}}},
    "tuning": {
        "preset": {"name": "phi-3-mini-128k-instruct"},
        "method": "qlora",
        "input": {"urls": ["https://example.com/data.jsonl"]},
        "output": {"image": "registry.example.com/adapter:0.0.1", "imagePushSecret": "push"},
    },
}
INFERENCE: dict[str, Any] = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "serve"},
    "inference": {
        "preset": {"name": "phi-3-mini-128k-instruct"},
        "adapters": [{"source": {"name": "mine", "image": "registry.example.com/adapter:1"}, "strength": "0.5"}],
    },
}


def changed(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of ``base`` with another value at ``path`` (``tuning.input.urls``); None takes it away."""
    result = copy.deepcopy(base)
    *way, last = path.split(".")
    here: Any = result
    for step in way:
        here = here[int(step)] if isinstance(here, list) else here.setdefault(step, {})
    if value is None:
        here.pop(last, None)
    else:
        here[last] = value
    return result


def said(data: dict[str, Any]) -> list[str]:
    return [f"{p.field}: {p.message}" for p in read_workspace(data)[1] if p.severity == "error"]


# --- the quick start


def test_the_quick_start_unfilled_is_refused_in_words_that_say_just_that() -> None:
    documents = load_documents([QUICKSTART])
    image, secret = documents.problems
    assert "still holds the placeholders ACR_REPO_HERE and IMAGE_NAME_HERE" in image.message
    assert "put your registry and repository there (OCI and Kubernetes names are lower case)" in image.remedy
    assert "still holds the placeholder ACR_REGISTRY_SECRET_HERE" in secret.message
    assert (image.line, image.column, secret.line) == (18, 12, 19)
    assert {p.kind for p in documents.problems} == {PLACEHOLDER}
    assert documents.workspaces[0].name == "workspace-tuning-phi-3", "a plan can be shown all the same"


@pytest.mark.parametrize("version", ["v1alpha1", "v1beta1"])
def test_the_quick_start_filled_in_is_accepted_as_it_is(version: str) -> None:
    text = QUICKSTART.read_text().replace("v1alpha1", version)
    text = text.replace("ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1", "myregistry.azurecr.io/phi-3-adapter:0.0.1")
    documents = load_text(text.replace("ACR_REGISTRY_SECRET_HERE", "acr-secret"))
    assert documents.problems == ()
    (workspace,) = documents.workspaces
    assert workspace.tuning is not None
    assert (workspace.tuning.method, workspace.resource.count) == ("qlora", 1)
    assert workspace.resource.label_selector is not None
    assert workspace.resource.label_selector.match_labels == {"app": "tuning-phi-3"}


# --- what is accepted


@pytest.mark.parametrize(
    ("base", "path", "value"),
    [
        (TUNING, "resource", None),
        (TUNING, "resource.labelSelector", None),
        (TUNING, "inference", {}),
        (TUNING, "inference", {"config": "serving"}),
        (TUNING, "status", {"whatever": ["an", "older", "controller", "wrote"]}),
        (TUNING, "metadata.managedFields", [{"manager": "kubectl"}]),
        (TUNING, "metadata.creationTimestamp", None),
        (TUNING, "tuning.method", "dora"),
        (
            TUNING,
            "tuning.input",
            {"urls": ["data/train.jsonl", "file:///data/a b.jsonl", "hf://datasets/o/n/f.parquet"]},
        ),
        (TUNING, "tuning.input", {"image": "registry.example.com/data:1", "imagePullSecrets": ["pull"]}),
        (TUNING, "tuning.input", {"volumeSource": {"persistentVolumeClaim": {"claimName": "data"}}}),
        (TUNING, "tuning.output", {"volumeSource": {"hostPath": {"path": "/out", "type": "<any>"}}}),
        (INFERENCE, "inference", {"template": {"spec": {"containers": [{"name": "c", "args": ["<x>"]}]}}}),
        (INFERENCE, "inference.preset.presetOptions", {"modelAccessSecret": "hf"}),
        (INFERENCE, "inference.preset.name", "meta-llama/Llama-3.1-8B-Instruct"),
        (INFERENCE, "resource", {"preferredNodes": ["n1"]}),
        (
            TUNING,
            "resource",
            {"instanceTypes": ["a", "b"], "capacityType": "auto", "regions": ["eastus"], "keep": "1h30m"},
        ),
        (
            TUNING,
            "resource",
            {"gpu": {"model": "A100", "count": 2, "memory": "40Gi"}, "maxPricePerHour": 4, "maxCost": 0.5},
        ),
        (INFERENCE, "resource", {"count": 2}),
    ],
)
def test_what_is_accepted(base: dict[str, Any], path: str, value: Any) -> None:
    workspace, problems = read_workspace(changed(base, path, value))
    assert workspace is not None
    assert errors(problems) == []


def test_the_method_is_written_in_lower_case_whatever_the_person_wrote() -> None:
    """Defect 6: ``QLoRA`` passes KAITO's webhook, and its controller then finds no configuration for it."""
    workspace, problems = read_workspace(changed(TUNING, "tuning.method", "QLoRA"))
    assert problems == []
    assert workspace is not None
    assert workspace.tuning is not None
    assert workspace.tuning.method == "qlora"


def test_no_machine_named_means_that_kaito_chooses_and_not_an_expensive_default() -> None:
    for version in ("kaito.sh/v1alpha1", "kaito.sh/v1beta1"):
        workspace, _ = read_workspace({**TUNING, "resource": {}, "apiVersion": version})
        assert workspace is not None
        assert workspace.resource.instance_type == ""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", 0), ("45s", 45), ("10m", 600), ("1h30m", 5400), ("2h0m1s", 7201), ("0s", 0)],
)
def test_how_long_machines_are_kept(text: str, seconds: float) -> None:
    workspace, problems = read_workspace(changed(TUNING, "resource.keep", text))
    assert problems == []
    assert workspace is not None
    assert workspace.resource.keep_seconds == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("", 0), ("40Gi", 40 << 30), ("1.5Ti", 3 << 39), ("80G", 80 * 10**9), ("512", 512), ("3k", 3000)]
)
def test_the_memory_of_a_gpu_is_a_quantity(text: str, size: int) -> None:
    workspace, problems = read_workspace(changed(TUNING, "resource.gpu", {"memory": text}))
    assert problems == []
    assert workspace is not None
    assert workspace.resource.gpu is not None
    assert workspace.resource.gpu.memory_bytes == size


# --- what is refused

REFUSED = [
    (TUNING, "metadata.name", "My_Workspace", "metadata.name: 'My_Workspace' is not a Kubernetes name"),
    (TUNING, "metadata.name", "a.b", "metadata.name: 'a.b' is not a Kubernetes name"),
    (TUNING, "metadata.name", "x" * 64, "metadata.name: is 64 characters long; 63 is the most"),
    (TUNING, "metadata.name", None, "metadata.name: name is required"),
    (TUNING, "metadata.labels", {"a b": "c"}, "metadata.labels.a b: 'a b' is not a label key"),
    (TUNING, "tuning", None, ": has neither tuning nor inference"),
    (TUNING, "spec", {}, "spec: a Workspace has no 'spec'"),
    (TUNING, "resource.count", 2, "resource.count: tuning runs on one machine, not on 2"),
    (TUNING, "resource.count", 0, "resource.count: must be 1 or more, and is the number 0"),
    (TUNING, "resource.count", "1", "resource.count: must be a whole number, and is the text '1'"),
    (TUNING, "resource.count", True, "resource.count: must be a whole number, and is true"),
    (TUNING, "resource.instanceTypes", ["a"], "resource.instanceTypes: cannot be set beside instanceType"),
    (INFERENCE, "resource.instanceTypes", ["a", ""], "resource.instanceTypes[1]: is empty"),
    (TUNING, "resource.capacityType", "Spot", "resource.capacityType: the text 'Spot' is not possible here; did you mean 'spot'?"),
    (TUNING, "resource.gpu.memory", "40 GB", "resource.gpu.memory: '40 GB' is not a size"),
    (TUNING, "resource.gpu.count", 0, "resource.gpu.count: must be 1 or more"),
    (TUNING, "resource.gpu.modle", "T4", "resource.gpu.modle: unknown field 'modle'; did you mean 'model'?"),
    (TUNING, "resource.regions", ["East US"], "resource.regions[0]: 'East US' is not the name of a region"),
    (TUNING, "resource.zones", ["a", "B"], "resource.zones[1]: 'B' is not the name of a zone"),
    (TUNING, "resource.maxPricePerHour", 0, "resource.maxPricePerHour: must be more than 0, and is 0"),
    (TUNING, "resource.maxPricePerHour", "3", "resource.maxPricePerHour: input should be a valid number, and is the text '3'"),
    (TUNING, "resource.maxCost", -2.5, "resource.maxCost: must be more than 0, and is -2.5"),
    (TUNING, "resource.maxCost", float("inf"), "resource.maxCost: "),
    (TUNING, "resource.maxCost", float("nan"), "resource.maxCost: "),
    (TUNING, "resource.keep", "10", "resource.keep: '10' is not a duration"),
    (TUNING, "resource.keep", "1d", "resource.keep: '1d' is not a duration"),
    (TUNING, "resource.partition", {"mode": "mig", "profile": "1g.5gb"}, "resource.partition: a part of a GPU cannot be used"),
    (TUNING, "resource.labelSelector.matchExpressions", [{"key": "a", "operator": "Exists"}],
     "resource.labelSelector.matchExpressions[0].operator: the operator 'Exists' is not supported"),
    (TUNING, "resource.labelSelector.matchExpressions", [{"key": "a", "operator": "In"}],
     "resource.labelSelector.matchExpressions[0].values: In needs at least one value"),
    (TUNING, "resource.labelSelector.matchLabels", {"kaito.sh/workspace": "x"},
     "resource.labelSelector: has reserved labels only"),
    (TUNING, "resource.labelSelector.matchLabels", {"app": "no spaces"},
     "resource.labelSelector.matchLabels.app: 'no spaces' is not a label value"),
    (TUNING, "tuning.preset", None, "tuning.preset: preset is required"),
    (TUNING, "tuning.preset.name", " ", "tuning.preset.name: is empty"),
    (TUNING, "tuning.preset.accessMode", "Private",
     "tuning.preset.accessMode: the text 'Private' is not possible here; did you mean 'private'?"),
    (TUNING, "tuning.method", None, "tuning.method: method is required"),
    (TUNING, "tuning.method", "", "tuning.method: is empty"),
    (TUNING, "tuning.method", "q lora", "tuning.method: 'q lora' is not a method"),
    (TUNING, "tuning.config", "My_Config", "tuning.config: 'My_Config' is not a Kubernetes name"),
    (TUNING, "tuning.input", None, "tuning.input: input is required"),
    (TUNING, "tuning.input", {}, "tuning.input: needs one of urls, volumeSource or image"),
    (TUNING, "tuning.input.urls", [], "tuning.input: needs one of urls, volumeSource or image"),
    (TUNING, "tuning.input.urls", "https://x", "tuning.input.urls: must be a list, and is the text 'https://x'"),
    (TUNING, "tuning.input.urls", ["ok", ""], "tuning.input.urls[1]: is empty"),
    (TUNING, "tuning.input.urls", ["s3://b/k"], "tuning.input.urls[0]: the scheme 's3' is not supported"),
    (TUNING, "tuning.input.urls", ["https:x"], "tuning.input.urls[0]: is not a URL: 'https:' must be followed by '//'"),
    (TUNING, "tuning.input.urls", ["https:///x"], "tuning.input.urls[0]: is not a URL: it names no host"),
    (TUNING, "tuning.input.urls", ["https://[::1/x"], "tuning.input.urls[0]: is not a URL: Invalid IPv6"),
    (TUNING, "tuning.input.urls", ["hf://datasets"], "tuning.input.urls[0]: names no file"),
    (TUNING, "tuning.input.image", "registry.example.com/data:1", "tuning.input: has urls and image: only one is possible"),
    (TUNING, "tuning.input", {"volumeSource": {}}, "tuning.input.volumeSource: must name exactly one kind of volume"),
    (TUNING, "tuning.output", {}, "tuning.output: needs one of volumeSource or image"),
    (TUNING, "tuning.output.volumeSource", {"emptyDir": {}}, "tuning.output: has volumeSource and image: only one is possible"),
    (TUNING, "tuning.output.image", "registry.example.com/Adapter:1",
     "tuning.output.image: the repository 'Adapter' must be lower case"),
    (TUNING, "tuning.output.imagePushSecret", None, "tuning.output.imagePushSecret: imagePushSecret is required with image"),
    (TUNING, "tuning.output.imagePushSecret", "Push", "tuning.output.imagePushSecret: 'Push' is not a Kubernetes name"),
    (TUNING, "tuning.output.image", "<registry>/adapter:1", "tuning.output.image: still holds the placeholder <registry>"),
    (INFERENCE, "inference", {}, "inference: has neither preset nor template"),
    (INFERENCE, "inference.template", {"spec": {}}, "inference: has both preset and template"),
    (INFERENCE, "inference.adapters.0.source.name", None, "inference.adapters[0].source.name: an adapter needs a name"),
    (INFERENCE, "inference.adapters.0.source.name", "A", "inference.adapters[0].source.name: 'A' is not a Kubernetes name"),
    (INFERENCE, "inference.adapters.0.source.image", None, "inference.adapters[0].source: needs one of volumeSource or image"),
    (INFERENCE, "inference.adapters.0.source.urls", ["https://x/y"],
     "inference.adapters[0].source.urls: an adapter cannot come from URLs"),
    (INFERENCE, "inference.adapters.0.strength", "1.5", "inference.adapters[0].strength: '1.5' is not a number from 0 to 1"),
    (INFERENCE, "inference.adapters.0.strength", "nan", "inference.adapters[0].strength: 'nan' is not a number"),
    (INFERENCE, "inference.adapters.0.strength", 0.5, "inference.adapters[0].strength: must be text, and is the number 0.5"),
    (INFERENCE, "inference.adapters", INFERENCE["inference"]["adapters"] * 2,
     "inference.adapters[1].source.name: the name 'mine' is taken by adapters[0]"),
    (INFERENCE, "inference.adapters", INFERENCE["inference"]["adapters"] * 11,
     "inference.adapters: has more than 10 items"),
    (TUNING, "inference", {"template": {"spec": {}}}, "inference.template: a pod template cannot serve what is tuned beside it"),
    (TUNING, "inference", {"idleAfter": "soon"}, "inference.idleAfter: 'soon' is not a duration of more than 0"),
    (TUNING, "inference", {"idleAfter": "0s"}, "inference.idleAfter: '0s' is not a duration of more than 0"),
    (INFERENCE, "resource.partition", {"mode": "mig", "profile": "1g.10gb"},
     "resource.partition: kaito cannot serve on a part of a GPU yet, and does not buy whole GPUs in its place"),
    (INFERENCE, "resource.partition", {"mode": "accelerator", "count": 2},
     "resource.partition: kaito cannot serve on a part of a GPU yet, and does not buy whole GPUs in its place"),
    (TUNING, "resource.labelSelector.matchExpressions", [{"key": "a", "operator": "In", "values": ["b", "c"]}],
     "resource.labelSelector.matchExpressions[0].values: kaito selects nodes by one value of a label, and this names several"),
    (TUNING, "resource.labelSelector",
     {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "a", "operator": "In", "values": ["c"]}]},
     "resource.labelSelector.matchExpressions[0].values: asks for another value of 'a' than matchLabels does"),
    (INFERENCE, "resource.instanceTyp", "x", "resource.instanceTyp: unknown field 'instanceTyp'; did you mean 'instanceType'?"),
    (INFERENCE, "resource.InstanceType", "x", "resource.InstanceType: unknown field 'InstanceType'; did you mean 'instanceType'?"),
    (INFERENCE, "resource.instance_type", "x", "resource.instance_type: unknown field 'instance_type'; did you mean"),
    (INFERENCE, "method", "qlora", "method: unknown field 'method' here; there is tuning.method"),
    (INFERENCE, "resource", "big", "resource: must hold fields, and is the text 'big'"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "path", "value", "words"), REFUSED, ids=[row[3][:60] for row in REFUSED])
def test_what_is_refused(base: dict[str, Any], path: str, value: Any, words: str) -> None:
    problems = said(changed(base, path, value))
    assert any(p.startswith(words) for p in problems), problems
    assert len(problems) == 1, "one mistake is told once"
    assert all(p.remedy for p in read_workspace(changed(base, path, value))[1])


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1", "10.0.0.1", "192.168.1.1:8000", "169.254.169.254", "[::1]", "[fe80::1]",
     "[::ffff:10.0.0.1]", "metadata.google.internal", "2130706433", "0x7f.1", "user@127.0.0.1", "LOCALHOST."],
)  # fmt: skip
def test_v1beta1_refuses_hosts_inside_a_network_and_v1alpha1_does_not(host: str) -> None:
    data = changed(TUNING, "tuning.input.urls", [f"http://{host}/data.jsonl"])
    assert "is inside a network" in said(data)[0]
    assert said({**data, "apiVersion": "kaito.sh/v1alpha1"}) == []
    assert read_workspace(data, allow_private=True)[1] == []


def test_v1alpha1_needs_the_image_of_a_private_model() -> None:
    data = changed(TUNING, "tuning.preset.accessMode", "private")
    assert said(data) == []
    data["apiVersion"] = "kaito.sh/v1alpha1"
    assert said(data) == ["tuning.preset.accessMode: accessMode private needs the image that holds the model"]
    assert said(changed(data, "tuning.preset.presetOptions", {"image": "registry.example.com/llama:1"})) == []


def test_warnings_stop_nobody() -> None:
    data = changed(TUNING, "metadata.annotations", {"kaito.sh/enablelb": "true"})
    data["metadata"]["lables"] = {}
    data["resource"]["labelSelector"]["matchLabels"]["kaito.sh/workspace"] = "x"
    workspace, problems = read_workspace(data)
    assert workspace is not None
    assert {(p.severity, p.field) for p in problems} == {
        ("warning", "metadata.annotations.kaito.sh/enablelb"),
        ("warning", "metadata.lables"),
        ("warning", "resource.labelSelector"),
    }


@pytest.mark.parametrize(
    ("base", "path", "value", "field"),
    [
        (TUNING, "inference", {"policy": "always", "idleAfter": "5m"}, "inference.idleAfter"),
        (INFERENCE, "inference.policy", "never", "inference.policy"),
        (INFERENCE, "resource.maxCost", 5.0, "resource.maxCost"),
        (TUNING, "metadata.annotations", {"kaito.sh/serve-after-tuning": "yes"}, "metadata.annotations.kaito.sh/serve-after-tuning"),
    ],
)  # fmt: skip
def test_what_has_no_effect_on_an_endpoint_is_said(base: dict[str, Any], path: str, value: Any, field: str) -> None:
    workspace, problems = read_workspace(changed(base, path, value))
    assert workspace is not None
    assert [(p.severity, p.field) for p in problems] == [("warning", field)]


KAITO_ANNOTATIONS = {
    "kaito.sh/enablelb": "True",
    "kaito.sh/runtime": "vllm",
    "kaito.sh/node-class-name": "default",
    "kaito.sh/use-local-weights": "true",
    "kaito.sh/bypass-resource-checks": "true",
    "kaito.sh/node-image-family": "ubuntu",
    "kaito.sh/disable-benchmark": "true",
    "kaito.sh/performance-mode": "throughput",
    "kaito.sh/model-streaming": "disabled",
    "kaito.sh/model-mirror-storage-class": "fast",
    "kaito.sh/streaming-service-account": "reader",
    "inference.kaito.sh/static-model-mirror": "mirror",
    "inference.kaito.sh/stream-datarefs-url": "https://example.com/refs",
    "inference.kaito.sh/stream-identity-client-id": "id",
    "inference.kaito.sh/stream-source-type": "public",
}
"""Every annotation that KAITO's documentation gives to people, with a value that it knows."""


@pytest.mark.parametrize("key", KAITO_ANNOTATIONS)
def test_an_annotation_of_kaito_is_honoured_or_said_to_have_no_effect(key: str) -> None:
    workspace, problems = read_workspace(changed(INFERENCE, "metadata.annotations", {key: KAITO_ANNOTATIONS[key]}))
    assert workspace is not None
    if key in labels.HONOURED:
        assert problems == []
        source = Path(labels.__file__).parent.parent
        readers = [f for f in source.rglob("*.py") if f.parent.name != "api" and _reads(f, key)]
        assert readers, "what is honoured is read somewhere"
    else:
        assert [(p.severity, p.field) for p in problems] == [("warning", f"metadata.annotations.{key}")]
        assert "has no effect here: " in problems[0].message


def _reads(file: Path, annotation: str) -> bool:
    text = file.read_text(encoding="utf-8")
    name = next(n for n, value in vars(labels).items() if value == annotation)
    return f'"{annotation}"' in text or f"labels.{name}" in text


def test_a_mistyped_annotation_is_said() -> None:
    _, problems = read_workspace(changed(INFERENCE, "metadata.annotations", {"kaito.sh/runtme": "transformers"}))
    assert [(p.severity, p.message) for p in problems] == [
        ("warning", "unknown annotation; did you mean 'kaito.sh/runtime'?")
    ]


def test_preferred_nodes_are_said_to_have_no_effect() -> None:
    _, problems = read_workspace(changed(INFERENCE, "resource.preferredNodes", ["n1"]))
    assert [(p.severity, p.field) for p in problems] == [("warning", "resource.preferredNodes")]


def test_an_expression_with_one_value_selects_nodes_as_a_label_does() -> None:
    selector = {"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "c", "operator": "In", "values": ["d"]}]}
    workspace, problems = read_workspace(changed(TUNING, "resource.labelSelector", selector))
    assert problems == []
    assert workspace is not None
    assert requirements(workspace).labels == {"a": "b", "c": "d"}


def test_a_broken_structure_does_not_hide_other_mistakes() -> None:
    data = changed(TUNING, "resource.instanceTyp", "x")
    data["tuning"]["output"] = {"image": "UPPER/case", "imagePushSecret": 5}
    del data["tuning"]["method"]
    workspace, problems = read_workspace(data)
    assert workspace is None
    assert {p.field for p in problems} == {
        "resource.instanceTyp", "tuning.output.image", "tuning.output.imagePushSecret", "tuning.method",
    }  # fmt: skip


def test_a_required_field_under_a_wrong_name_is_one_mistake() -> None:
    data = changed(TUNING, "tuning.Method", "qlora")
    del data["tuning"]["method"]
    assert said(data) == ["tuning.Method: unknown field 'Method'; did you mean 'method'?"]


def test_a_model_writes_itself_and_cannot_be_changed() -> None:
    workspace, _ = read_workspace(TUNING)
    assert workspace is not None
    assert Workspace.model_validate(workspace.to_object()) == workspace
    with pytest.raises(ValueError, match="frozen"):
        workspace.metadata.name = "other"  # type: ignore[misc]


def test_the_urls_text_is_not_repeated_because_it_may_hold_a_token() -> None:
    assert "s3cret" not in str(
        read_workspace(changed(TUNING, "tuning.input.urls", ["ftp://u:s3cret@h/x?sig=s3cret"]))[1]
    )
