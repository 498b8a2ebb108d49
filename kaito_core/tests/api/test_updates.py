"""What may become of an existing Workspace."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from kaito_core.api import Workspace, check_update

TUNING: dict[str, Any] = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "w"},
    "resource": {"instanceType": "a", "labelSelector": {"matchLabels": {"app": "w"}}},
    "tuning": {
        "preset": {"name": "phi"},
        "method": "qlora",
        "input": {"name": "mine", "urls": ["https://example.com/x"]},
        "output": {"image": "r.example.com/a:1", "imagePushSecret": "s"},
    },
}
INFERENCE: dict[str, Any] = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "w"},
    "inference": {"preset": {"name": "phi"}},
}


def merged(base: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386), as ``kubectl patch --type merge`` does it."""
    if not isinstance(patch, dict):
        return patch
    result = copy.deepcopy(base) if isinstance(base, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


CASES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (TUNING, {"resource": {"count": 2}}, "resource.count"),
    (TUNING, {"resource": {"instanceType": "b"}}, "resource.instanceType"),
    (TUNING, {"resource": {"instanceType": None}}, ""),
    (TUNING, {"resource": {"labelSelector": {"matchLabels": {"app": "x"}}}}, "resource.labelSelector"),
    (TUNING, {"resource": {"preferredNodes": ["n"]}}, ""),
    (TUNING, {"resource": {"instanceType": None, "instanceTypes": ["b", "a"]}}, ""),
    (TUNING, {"resource": {"capacityType": "spot", "regions": ["r"], "zones": ["z"], "gpu": {"model": "T4"}}}, ""),
    (TUNING, {"resource": {"maxPricePerHour": 1, "maxCost": 2, "keep": "10m"}}, ""),
    (INFERENCE, {"resource": {"partition": {"mode": "accelerator", "count": 1}}}, "resource.partition"),
    (TUNING, {"tuning": None, "inference": {"preset": {"name": "phi"}}}, "tuning"),
    (INFERENCE, {"tuning": TUNING["tuning"]}, "tuning"),
    (TUNING, {"inference": {"preset": {"name": "phi"}}}, ""),
    (TUNING, {"tuning": {"preset": {"name": "other"}}}, "tuning.preset"),
    (TUNING, {"tuning": {"method": "QLoRA"}}, ""),
    (TUNING, {"tuning": {"method": "lora"}}, "tuning.method"),
    (TUNING, {"tuning": {"input": {"name": "yours"}}}, "tuning.input.name"),
    (TUNING, {"tuning": {"input": {"urls": ["https://example.com/y"]}}}, ""),
    (TUNING, {"tuning": {"output": {"image": "r.example.com/a:2"}, "config": "c"}}, ""),
    (INFERENCE, {"inference": {"preset": {"name": "other"}}}, "inference.preset"),
    (INFERENCE, {"inference": {"preset": None, "template": {"spec": {}}}}, "inference.preset"),
    (INFERENCE, {"inference": {"adapters": [{"source": {"name": "a", "image": "r.example.com/a:1"}}]}}, ""),
    (INFERENCE, {"metadata": {"annotations": {"kaito.sh/model-streaming": "disabled"}}},
     "metadata.annotations.kaito.sh/model-streaming"),
    (INFERENCE, {"metadata": {"labels": {"team": "a"}}}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("base", "patch", "field"), CASES)
def test_updates(base: dict[str, Any], patch: dict[str, Any], field: str) -> None:
    problems = check_update(Workspace.model_validate(base), Workspace.model_validate(merged(base, patch)))
    assert field in {p.field for p in problems} if field else problems == []
    assert all("cannot be" in p.message and p.remedy for p in problems)


def test_a_template_cannot_come_or_go() -> None:
    with_template = Workspace.model_validate(
        merged(INFERENCE, {"inference": {"preset": None, "template": {"spec": {}}}})
    )
    assert "inference.template" in {p.field for p in check_update(Workspace.model_validate(INFERENCE), with_template)}
    assert check_update(with_template, with_template) == []
