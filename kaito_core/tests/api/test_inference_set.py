"""The InferenceSet: what it says of its replicas, what is wrong with one, and the API server's opinion of the same."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kaito_core.api import InferenceSet, InferenceSetStatus, read_inference_set, read_workspace
from kaito_core.api.crd import crd_yaml, inference_set_crd, inference_set_schema, workspace_schema
from kaito_core.problems import errors

SERVE: dict[str, Any] = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "InferenceSet",
    "metadata": {"name": "llm"},
    "spec": {"template": {"inference": {"preset": {"name": "phi-4"}}}},
}
KAITO = """
apiVersion: kaito.sh/v1alpha1
kind: InferenceSet
metadata: {name: phi-4-mini}
spec:
  replicas: 2
  nodeCountLimit: 4
  labelSelector: {matchLabels: {apps: phi-4}}
  updateStrategy: {type: RollingUpdate, rollingUpdate: {maxUnavailable: 1}}
  template:
    metadata: {annotations: {kaito.sh/runtime: vllm}}
    resource: {instanceType: Standard_NC24ads_A100_v4}
    inference:
      preset: {name: phi-4-mini-instruct, presetOptions: {modelAccessSecret: hf}}
      adapters: [{source: {name: a, image: "r.example.com/a:1"}}]
"""
SELECTOR = {"matchLabels": {"apps": "x"}}
ADAPTER = {"source": {"name": "a", "image": "r.example.com/a:1"}}


def merged(base: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(base) if isinstance(base, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def template(**parts: Any) -> dict[str, Any]:
    return {"spec": {"template": parts}}


def rolling(maximum: Any) -> dict[str, Any]:
    return {"spec": {"updateStrategy": {"rollingUpdate": {"maxUnavailable": maximum}}}}


# --- by itself


def test_kaito_s_own_form_is_read() -> None:
    read, problems = read_inference_set(yaml.safe_load(KAITO))
    assert read is not None
    assert not errors(problems)
    replica = read.replica("phi-4-mini-0")
    assert replica.resource.instance_type == "Standard_NC24ads_A100_v4"
    assert replica.resource.label_selector is not None
    assert replica.resource.label_selector.match_labels == {"apps": "phi-4"}
    assert replica.metadata.annotations == {"kaito.sh/runtime": "vllm"}
    assert read_workspace(replica.to_object()) == (replica, [])


def test_all_that_is_wrong_is_said_at_once_and_where() -> None:
    data = merged(
        SERVE,
        {
            "metadata": {"name": "9lives"},
            "spec": {
                "replica": 2,
                "replicas": "3",
                "template": {
                    "tuning": {},
                    "metadata": {"labels": {"a b": "c"}},
                    "resource": {"instanceTyp": "x", "keep": "long"},
                    "inference": {"adapters": [{"source": {"name": "a"}}]},
                },
            },
        },
    )
    read, problems = read_inference_set(data)
    assert read is None
    said = {p.field: p.message for p in errors(problems)}
    assert said["metadata.name"].startswith("'9lives' begins with a digit")
    assert said["spec.replica"] == "unknown field 'replica'; did you mean 'replicas'?"
    assert said["spec.replicas"] == "must be a whole number, and is the text '3'"
    assert said["spec.template.tuning"].startswith("unknown field 'tuning'")
    assert said["spec.template.resource.instanceTyp"].endswith("did you mean 'instanceType'?")
    assert said["spec.template.resource.keep"].endswith("is not a duration")
    assert said["spec.template.inference.adapters[0].source"].startswith("needs one of")
    assert any(f.startswith("spec.template.metadata.labels") for f in said)


def test_fields_at_the_top_are_shown_their_place() -> None:
    _, problems = read_inference_set({**SERVE, "template": {}})
    assert [p.message for p in problems] == [
        "unknown field 'template' here; there is spec.template and spec.template.inference.template"
    ]


def test_placeholders_are_found_in_the_template() -> None:
    _, problems = read_inference_set(merged(SERVE, template(inference={"config": "CONFIG_HERE"})))
    assert [(p.field, p.kind) for p in problems] == [("spec.template.inference.config", "placeholder")]


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
                        st.sampled_from(["spec", "template", "replicas", "inference", "updateStrategy", "rollingUpdate",
                                         "maxUnavailable", "metadata", "name", "labels", "resource", "x"]), inner),
                    max_leaves=12))  # fmt: skip
def test_whatever_is_written_there_is_a_reason_and_never_a_traceback(data: Any) -> None:
    given_object = {"apiVersion": "kaito.sh/v1alpha1", "kind": "InferenceSet", "metadata": {"name": "a"}}
    read, problems = read_inference_set({**given_object, **(data if isinstance(data, dict) else {"spec": data})})
    assert read is not None or problems


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 100) | st.integers(1, 100).map("{}%".format))
def test_at_least_one_may_be_away_and_never_more_than_asked_for(replicas: int, maximum: int | str) -> None:
    read, _ = read_inference_set(merged(SERVE, rolling(maximum)))
    assert read is not None
    may = read.max_unavailable(replicas)
    wanted = maximum if isinstance(maximum, int) else int(maximum[:-1]) * replicas / 100
    assert max(1, wanted) <= may < wanted + 1 or may == 1


@pytest.mark.parametrize(("limit", "each", "allowed"), [(0, 2, 5), (4, 2, 2), (5, 2, 2), (1, 2, 0), (99, 1, 5)])
def test_how_many_replicas_a_limit_of_machines_allows(limit: int, each: int, allowed: int) -> None:
    spec = {"replicas": 5, "nodeCountLimit": limit, "template": {"resource": {"count": each}}}
    read, _ = read_inference_set(merged(SERVE, {"spec": spec}))
    assert read is not None
    assert read.allowed_replicas == allowed


def test_the_status_of_a_later_version_is_read_too() -> None:
    data = {**SERVE, "status": {"replicas": 1, "performance": {"metrics": {}}, "selector": "a=b"}}
    assert InferenceSet.model_validate(data).status == InferenceSetStatus(replicas=1, selector="a=b")


# --- the definition


def test_the_template_has_the_workspace_s_own_parts() -> None:
    ours = inference_set_schema()["properties"]["spec"]["properties"]["template"]["properties"]
    theirs = workspace_schema()["properties"]

    def without_rules(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                k: without_rules(v) for k, v in node.items() if k not in ("x-kubernetes-validations", "description")
            }
        return node

    for part in ("resource", "inference"):
        assert without_rules(ours[part]) == without_rules(theirs[part])
    assert "oldSelf" not in json.dumps(inference_set_schema())


def test_the_definition_has_kaito_s_names_and_a_scale() -> None:
    definition = inference_set_crd()
    assert definition["metadata"]["name"] == "inferencesets.kaito.sh"
    assert definition["spec"]["names"]["shortNames"] == ["is", "isets"]
    for version in definition["spec"]["versions"]:
        assert version["subresources"]["scale"] == {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    assert yaml.safe_load(crd_yaml(definition)) == definition


# --- on a real API server


Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def kubectl(cluster: Any) -> Iterator[Kubectl]:
    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        head = [cluster.programs / "kubectl", "--kubeconfig", cluster.kubeconfig]
        return subprocess.run([*map(str, head), *arguments], input=stdin, capture_output=True, text=True, check=False)

    done = run("apply", "--server-side", "-f", "-", stdin=crd_yaml(inference_set_crd()))
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 30
    while "inferencesets" not in run("api-resources", "--api-group=kaito.sh", "-o", "name").stdout:
        assert time.monotonic() < deadline
    yield run
    # Others share the control plane, and a controller looks after InferenceSets wherever it finds them.
    run("delete", "crd", "inferencesets.kaito.sh")


CREATE: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"apiVersion": "kaito.sh/v1alpha1"}, ""),
    (yaml.safe_load(KAITO), ""),
    ({"metadata": {"name": "a.b"}}, "metadata.name must begin with a letter"),
    ({"metadata": {"name": "9a"}}, "metadata.name must begin with a letter"),
    ({"metadata": {"name": "a" * 52}}, ""),
    ({"metadata": {"name": "a" * 53}}, "52 at most"),
    ({"spec": {"replicas": 0}}, ""),
    ({"spec": {"replicas": -1}}, "greater than or equal to 0"),
    ({"spec": {"replicas": "1"}}, "must be of type integer"),
    ({"spec": {"replicas": 2**31}}, "less than or equal to 2147483647"),
    ({"spec": {"nodeCountLimit": -1}}, "greater than or equal to 0"),
    ({"spec": {"template": None}}, "Required value"),
    (template(inference=None), "Required value"),
    (template(inference={"preset": None}), "preset or template must be specified"),
    (template(inference={"template": {"spec": {}}}), "at the same time"),
    (template(inference={"preset": None, "template": {"spec": {"containers": [{"name": "c"}]}}}), ""),
    (template(inference={"adapters": [ADAPTER, ADAPTER]}), "its own name"),
    (template(inference={"adapters": [{"source": {"name": "a", "urls": ["https://x/y"]}}]}), "URLs are not supported"),
    (template(inference={"policy": "always"}), ""),
    (template(inference={"policy": "onDemand"}), "the replicas of a set serve always"),
    (template(inference={"policy": "never"}), "the replicas of a set serve always"),
    (template(resource={"instanceType": "x", "instanceTypes": ["y"]}), "cannot be set at the same time"),
    (template(resource={"keep": "long"}), "keep must be a duration"),
    (template(resource={"partition": {"mode": "mig"}}), "needs a profile"),
    (template(resource={"count": 2, "labelSelector": SELECTOR}), ""),
    ({"spec": {"labelSelector": SELECTOR}}, ""),
    ({"spec": {"labelSelector": SELECTOR, "template": {"resource": {"labelSelector": SELECTOR}}}}, "cannot be given both"),
    ({"spec": {"updateStrategy": {"type": "OnDelete"}}}, ""),
    ({"spec": {"updateStrategy": {"type": "Recreate"}}}, "Unsupported value"),
    (rolling(2), ""),
    (rolling(0), "a number from 1 on"),
    (rolling(-1), "a number from 1 on"),
    (rolling("25%"), ""),
    (rolling("100%"), ""),
    (rolling("0%"), "a number from 1 on"),
    (rolling("101%"), "a number from 1 on"),
    (rolling("2"), "a number from 1 on"),
    (rolling(True), "must be of type"),
    (rolling(1.5), "must be of type"),
]  # fmt: skip


def test_the_api_server_and_python_agree_on_what_may_be_created(kubectl: Kubectl) -> None:
    for patch, words in CREATE:
        data = merged(SERVE, patch)
        result = kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(data))
        assert (result.returncode == 0) == (words == ""), (patch, result.stderr)
        assert words in result.stderr, (patch, result.stderr)
        read, problems = read_inference_set(data)
        assert bool(errors(problems)) == bool(words), (patch, problems)
        assert words or read is not None


def test_a_field_that_does_not_exist_here_is_refused_by_name(kubectl: Kubectl) -> None:
    data = merged(SERVE, {"spec": {"autoUpgrade": {"enabled": True}}})
    done = kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(data))
    assert 'unknown field "spec.autoUpgrade"' in done.stderr


def test_the_template_may_change_in_every_way(kubectl: Kubectl) -> None:
    assert kubectl("create", "-f", "-", stdin=json.dumps(merged(SERVE, {"metadata": {"name": "any"}}))).returncode == 0
    for patch in (
        template(inference={"preset": {"name": "phi-3"}}),
        template(inference={"preset": None, "template": {"spec": {}}}),
        template(resource={"count": 2, "instanceType": "x"}),
        template(resource={"instanceType": "y", "partition": {"mode": "accelerator", "count": 1}}),
    ):
        done = kubectl("patch", "is", "any", "--type=merge", "-p", json.dumps(patch))
        assert done.returncode == 0, done.stderr
    kubectl("delete", "is", "any")


def test_scaling_and_the_table(kubectl: Kubectl) -> None:
    assert kubectl("create", "-f", "-", stdin=json.dumps(SERVE)).returncode == 0
    status = {"replicas": 1, "readyReplicas": 1, "updatedReplicas": 1, "selector": "a=b", "observedGeneration": 1}
    kubectl("patch", "is", "llm", "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
    done = kubectl("scale", "inferenceset", "llm", "--replicas=3")
    assert done.returncode == 0, done.stderr
    seen = json.loads(kubectl("get", "is", "llm", "--subresource=scale", "-o", "json").stdout)
    assert seen["kind"] == "Scale"
    assert seen["spec"] == {"replicas": 3}
    assert seen["status"] == {"replicas": 1, "selector": "a=b"}
    patch = json.dumps({"spec": {"replicas": 2}})
    assert kubectl("patch", "is", "llm", "--subresource=scale", "--type=merge", "-p", patch).returncode == 0
    head, row = kubectl("get", "is", "llm").stdout.splitlines()
    assert head.split() == ["NAME", "REPLICAS", "READYREPLICAS", "UPDATEDREPLICAS", "AGE"]
    assert row.split()[:4] == ["llm", "2", "1", "1"]
    read = InferenceSet.model_validate_json(kubectl("get", "is", "llm", "-o", "json").stdout)
    assert read.spec.replicas == 2
    assert read.status is not None
    assert read.status.observed_generation == 1
    kubectl("delete", "is", "llm")
