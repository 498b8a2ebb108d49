"""The CRD: structural, and, on a real API server, of one mind with the Python rules."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kaito_core.api import Workspace, check_update, read_workspace
from kaito_core.api.crd import crd, crd_yaml, workspace_schema
from kaito_core.problems import errors

QUICKSTART = Path(__file__).parent / "data" / "quickstart.yaml"
FILLED = (
    QUICKSTART.read_text()
    .replace("ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE", "myregistry.azurecr.io/phi-3-adapter")
    .replace("ACR_REGISTRY_SECRET_HERE", "acr-secret")
)
SERVE = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "serve"},
    "inference": {"preset": {"name": "phi-4"}},
}
ADAPTER = {"source": {"name": "a", "image": "r.example.com/a:1"}, "strength": "0.5"}


def schemas(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from schemas(inner, f"{path}.{name}")
    for part in ("items", "additionalProperties"):
        if isinstance(node.get(part), dict):
            yield from schemas(node[part], f"{path}[]")


def test_the_schema_is_structural_and_every_field_is_described() -> None:
    for path, schema in schemas(workspace_schema()):
        assert not {"$ref", "anyOf", "allOf", "title", "nullable", "note"} & set(schema), path
        assert schema["type"], path
        assert not ("properties" in schema and "additionalProperties" in schema), path
        if path and not path.endswith("[]") and path != ".metadata":
            assert schema["description"], path


def test_both_versions_are_served_with_one_schema_and_the_columns_of_the_quick_start() -> None:
    spec = crd()["spec"]
    assert spec["names"]["shortNames"] == ["wk", "wks"]
    assert [(v["name"], v["served"], v["storage"]) for v in spec["versions"]] == [
        ("v1beta1", True, True),
        ("v1alpha1", True, False),
    ]
    first, second = (v["schema"] for v in spec["versions"])
    assert first == second
    columns = [c["name"].upper() for c in spec["versions"][1]["additionalPrinterColumns"] if not c.get("priority")]
    assert [c for c in columns if c not in ("JOBSTARTED", "STATE")] == [
        "INSTANCE", "RESOURCEREADY", "INFERENCEREADY", "WORKSPACEREADY", "AGE",
    ]  # fmt: skip
    assert yaml.safe_load(crd_yaml()) == crd()


# --- on a real API server


@pytest.fixture
def kubectl(workspaces: Any) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        head = [workspaces.programs / "kubectl", "--kubeconfig", workspaces.kubeconfig]
        return subprocess.run([*map(str, head), *arguments], input=stdin, capture_output=True, text=True, check=False)

    return run


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


CREATE: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"inference": {"adapters": [ADAPTER]}}, ""),
    ({"inference": {"config": "serving"}}, ""),
    ({"metadata": {"name": "a.b"}}, "DNS-1123 label"),
    ({"tuning": None}, "either tuning or inference"),
    ({"resource": {"count": 2}}, "resource.count must be 1"),
    ({"resource": {"count": "1"}}, "must be of type integer"),
    ({"resource": {"partition": {"mode": "accelerator", "count": 1}}}, "remove resource.partition"),
    ({"resource": {"labelSelector": {"matchExpressions": [{"key": "a", "operator": "Exists"}]}}}, "the operator In"),
    ({"tuning": {"method": None}}, "Required value"),
    ({"tuning": {"method": ""}}, "method must be specified"),
    ({"tuning": {"input": None}}, "Required value"),
    ({"tuning": {"input": {"urls": []}}}, "exactly one of urls"),
    ({"tuning": {"input": {"volumeSource": {"emptyDir": {}}}}}, "exactly one of urls"),
    ({"tuning": {"input": {"urls": None, "volumeSource": {"emptyDir": {"medium": "Memory"}}}}}, ""),
    ({"tuning": {"output": {"imagePushSecret": None}}}, "imagePushSecret must be specified"),
    ({"tuning": {"output": {"volumeSource": {"emptyDir": {}}}}}, "exactly one of volumeSource"),
    ({"tuning": None, "inference": {}}, "preset or template must be specified"),
    ({"tuning": None, "inference": {"preset": {"name": "p"}, "template": {"spec": {}}}}, "at the same time"),
    ({"tuning": None, "inference": {"template": {"spec": {"containers": [{"name": "c"}]}}}}, ""),
    ({"inference": {"policy": "onDemand", "idleAfter": "1h30m"}}, ""),
    ({"inference": {"policy": "sometimes"}}, "Unsupported value"),
    ({"inference": {"idleAfter": "soon"}}, "idleAfter must be a duration"),
    ({"inference": {"template": {"spec": {}}}}, "cannot serve what is tuned beside it"),
    ({"inference": {"adapters": [ADAPTER, ADAPTER]}}, "its own name"),
    ({"inference": {"adapters": [{**ADAPTER, "strength": "1.5"}]}}, "from 0 to 1"),
    ({"inference": {"adapters": [{"source": {"name": "a", "urls": ["https://x/y"]}}]}}, "URLs are not supported"),
    ({"inference": {"adapters": [{"source": {"name": str(i), "image": "r/a:1"}} for i in range(11)]}}, "at most 10"),
    ({"inference": {"preset": {"name": "p", "accessMode": "secret"}}}, "Unsupported value"),
    ({"tuning": None, "inference": {"preset": {"name": "p"}}, "resource": {"partition": {"mode": "mig"}}}, "needs a profile"),
    ({"resource": {"instanceType": None, "instanceTypes": ["a", "b"], "capacityType": "auto", "regions": ["eastus", "us-east-1"],
      "zones": ["us-east-1a"], "maxPricePerHour": 4, "maxCost": 2.5, "keep": "1h30m",
      "gpu": {"model": "A100", "count": 2, "memory": "40Gi"}}}, ""),
    ({"resource": {"instanceTypes": ["a"]}}, "instanceType and instanceTypes cannot be set at the same time"),
    ({"resource": {"instanceTypes": []}}, ""),
    ({"resource": {"instanceType": "", "instanceTypes": ["a", ""]}}, "must not hold an empty name"),
    ({"resource": {"instanceType": None, "instanceTypes": ["a"] * 17}}, "at most 16 items"),
    ({"resource": {"capacityType": "cheap"}}, "Unsupported value"),
    ({"resource": {"regions": ["East US"]}}, "regions must be names"),
    ({"resource": {"regions": [""]}}, "regions must be names"),
    ({"resource": {"zones": ["us_east"]}}, "zones must be names"),
    ({"resource": {"maxPricePerHour": 0}}, "maxPricePerHour must be more than 0"),
    ({"resource": {"maxPricePerHour": "3"}}, "must be of type number"),
    ({"resource": {"maxPricePerHour": True}}, "must be of type number"),
    ({"resource": {"maxCost": -1.5}}, "maxCost must be more than 0"),
    ({"resource": {"keep": ""}}, ""),
    ({"resource": {"keep": "10m"}}, ""),
    ({"resource": {"keep": "10"}}, "keep must be a duration"),
    ({"resource": {"keep": "1m1h"}}, "keep must be a duration"),
    ({"resource": {"keep": "10m\n"}}, "keep must be a duration"),
    ({"resource": {"gpu": {}}}, ""),
    ({"resource": {"gpu": {"count": 0}}}, "greater than or equal to 1"),
    ({"resource": {"gpu": {"memory": "lots"}}}, "memory must be a size"),
    ({"resource": {"gpu": {"memory": "40"}}}, ""),
    ({"resource": {"gpu": {"memory": "-1Gi"}}}, "memory must be a size"),
]  # fmt: skip


def test_the_api_server_and_python_agree_on_what_may_be_created(kubectl: Callable[..., Any]) -> None:
    for patch, words in CREATE:
        data = merged(yaml.safe_load(FILLED), patch)
        result = kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(data))
        assert (result.returncode == 0) == (words == ""), (patch, result.stderr)
        assert words in result.stderr, (patch, result.stderr)
        assert bool(errors(read_workspace(data)[1])) == bool(words), patch


UPDATE: list[tuple[str, dict[str, Any], str]] = [
    ("tune", {"resource": {"instanceType": "x"}}, "instanceType cannot be changed"),
    ("tune", {"resource": {"instanceType": None}}, ""),
    ("tune", {"resource": {"instanceType": None, "instanceTypes": ["a", "b"]}}, ""),
    ("tune", {"resource": {"capacityType": "spot", "regions": ["eastus"], "zones": ["eastus-1"], "maxPricePerHour": 1,
              "maxCost": 9, "keep": "5m", "gpu": {"memory": "16Gi"}}}, ""),
    ("tune", {"resource": {"labelSelector": None}}, "labelSelector cannot be changed"),
    ("tune", {"resource": {"labelSelector": {"matchLabels": {"app": "x"}}}}, "labelSelector cannot be changed"),
    ("tune", {"tuning": {"preset": {"name": "x"}}}, "preset cannot be changed"),
    ("tune", {"tuning": {"method": "QLoRA"}}, ""),
    ("tune", {"tuning": {"method": "lora"}}, "method cannot be changed"),
    ("tune", {"tuning": {"input": {"name": "x"}}}, ""),
    ("tune", {"tuning": {"input": {"urls": ["https://example.com/x"]}, "config": "c"}}, ""),
    ("tune", {"tuning": None, "inference": {"preset": {"name": "p"}}}, "tuning cannot be set or removed"),
    ("tune", {"inference": {"preset": {"name": "p"}}}, ""),
    ("serve", {"tuning": yaml.safe_load(FILLED)["tuning"]}, "tuning cannot be set or removed"),
    ("serve", {"resource": {"count": 2}}, "count cannot be changed"),
    ("serve", {"resource": {"partition": {"mode": "accelerator", "count": 1}}}, "partition cannot be changed"),
    ("serve", {"inference": {"preset": {"name": "p"}}}, "inference.preset cannot be changed"),
    ("serve", {"inference": {"preset": None, "template": {"spec": {}}}}, "template cannot be set or removed"),
    ("serve", {"inference": {"adapters": [ADAPTER]}}, ""),
]  # fmt: skip


def test_the_api_server_and_python_agree_on_what_may_be_changed(kubectl: Callable[..., Any]) -> None:
    before: dict[str, Any] = {"tune": merged(yaml.safe_load(FILLED), {"metadata": {"name": "tune"}}), "serve": SERVE}
    for data in before.values():
        assert kubectl("create", "-f", "-", stdin=json.dumps(data)).returncode == 0
    for name, patch, words in UPDATE:
        result = kubectl("patch", "wk", name, "--type=merge", "--dry-run=server", "-p", json.dumps(patch))
        assert (result.returncode == 0) == (words == ""), (patch, result.stderr)
        assert words in result.stderr, (patch, result.stderr)
        old, new = (Workspace.model_validate(data) for data in (before[name], merged(before[name], patch)))
        assert bool(check_update(old, new)) == bool(words), patch


def test_the_unfilled_quick_start_is_refused_by_the_api_server_too(kubectl: Callable[..., Any]) -> None:
    result = kubectl("create", "--dry-run=server", "-f", str(QUICKSTART))
    assert "image still holds a placeholder" in result.stderr
    assert "imagePushSecret still holds a placeholder" in result.stderr


def test_the_status_shows_in_the_table_and_reads_back_as_a_workspace(kubectl: Callable[..., Any]) -> None:
    kubectl("create", "-f", "-", stdin=json.dumps({**SERVE, "metadata": {"name": "shown"}}))
    now = "2024-01-01T00:00:00Z"
    condition = {
        "type": "WorkspaceSucceeded",
        "status": "True",
        "reason": "x",
        "message": "",
        "lastTransitionTime": now,
    }
    status = {"state": "Ready", "conditions": [condition], "progress": {"stage": "train", "loss": 1.5, "step": 3}}
    done = kubectl("patch", "wk", "shown", "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
    assert done.returncode == 0, done.stderr
    table = kubectl("get", "workspace", "shown").stdout.splitlines()
    assert table[0].split()[:2] == ["NAME", "INSTANCE"]
    assert table[1].split()[:3] == ["shown", "True", "Ready"]
    workspace = Workspace.model_validate_json(kubectl("get", "wk", "shown", "-o", "json").stdout)
    assert workspace.status is not None
    assert workspace.status.progress is not None
    assert workspace.status.progress.loss == 1.5
