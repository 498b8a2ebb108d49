"""vLLM in a cluster: the image of `images/vllm`, on vLLM's own build for CPUs, serves what was tuned, on one machine and on two.

Minutes and gigabytes, so only when asked for:

    KAITO_TEST_VLLM=1 pytest -m node tests/cluster/test_vllm.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.cluster.system import A10_LABELS, END_TO_END, System, ask, gpu_node, running_system, said, values

ASKED = "KAITO_TEST_VLLM"
pytestmark = [
    *END_TO_END,
    pytest.mark.skipif(not os.environ.get(ASKED), reason=f"{ASKED} is not set: it takes minutes"),
]

RESOURCE = {"labelSelector": {"matchLabels": {"app": "a10"}}}
QUESTION = {"messages": [{"role": "user", "content": "Who bakes the bread?"}], "max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Installed, as docs/serving.md says it for vLLM."""
    with running_system(tmp_path_factory.mktemp("user"), vllm=True) as found:
        (found.folder / "kaito-values.yaml").write_text(yaml.safe_dump(values(found)), encoding="utf-8")
        for step in ("pull-secrets", "helm", "verify"):
            found.run(step)
        found.shell(found.commands["push-secret"].replace(found.registry.host, found.output))
        gpu_node(found, "a10-1", A10_LABELS)
        yield found


def settings(system: System, **flags: Any) -> None:
    """The ConfigMap ``settings``: what a small machine can serve."""
    text = yaml.safe_dump({"vllm": {"kv-cache-memory-bytes": "64M", "max-model-len": 512, "max-num-seqs": 4, **flags}})
    document = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "settings"},
        "data": {"inference_config.yaml": text},
    }
    system.kubectl("apply", "-f", "-", stdin=json.dumps(document))


def ready(system: System, name: str) -> bool:
    return said(system.workspace(name), "InferenceReady").get("status") == "True"


def url(system: System, name: str, path: str = "/v1/chat/completions") -> str:
    address = system.kubectl("get", "svc", name, "-o", "jsonpath={.spec.clusterIPs[0]}")
    return f"http://{address}{path}"


def test_what_is_tuned_is_served_by_vllm_with_its_adapter(system: System) -> None:
    settings(system)
    system.tune("my-adapter", "small.jsonl", resource=RESOURCE, **{"kaito.sh/serve-after-tuning": "always"})
    inference = json.dumps({"inference": {"config": "settings"}})
    system.kubectl("patch", "workspace", "my-adapter", "--type=merge", "-p", inference)
    assert system.result("my-adapter")["status"]["state"] == "Succeeded", system.report()
    system.until("the endpoint", lambda: ready(system, "my-adapter"), 600)
    [pod] = system.pods("my-adapter")[-1:]
    assert "/kaito-vllm:" in pod["spec"]["containers"][0]["image"]
    log = system.kubectl("logs", pod["metadata"]["name"])
    assert "kaito_runtime_vllm.engine serve" in log, log[-3000:]
    tuned = ask(system, url(system, "my-adapter"), {"model": "my-adapter", **QUESTION})
    base = ask(system, url(system, "my-adapter"), {"model": "demo-phi-3", **QUESTION})
    assert tuned["status"] == base["status"] == 200, (tuned, base)
    assert tuned["choices"][0]["message"]["content"] != base["choices"][0]["message"]["content"]
    answer = ask(system, url(system, "my-adapter", "/chat"), {"prompt": "Who bakes the bread?"})
    assert isinstance(answer["Result"], str), answer
    system.kubectl("delete", "workspace", "my-adapter", "--timeout=180s")
    system.until("the end of its pods", lambda: not system.pods("my-adapter"))


def test_copies_on_two_machines_answer_and_come_back_together(system: System) -> None:
    """As far as vLLM's build for CPUs goes: it has copies on several machines, and computes nothing along a pipeline."""
    gpu_node(system, "a10-2", A10_LABELS)
    settings(system, **{"data-parallel-size": 2})
    resource = {"count": 2, **RESOURCE}
    inference = {"preset": {"name": "demo-phi-3"}, "config": "settings"}
    head = {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": "two"}}
    system.kubectl("apply", "-f", "-", stdin=json.dumps({**head, "resource": resource, "inference": inference}))
    system.until("the endpoint", lambda: ready(system, "two"), 600)
    assert {p["spec"]["nodeName"] for p in system.pods("two")} == {"a10-1", "a10-2"}
    where = url(system, "two")
    assert ask(system, where, {"model": "demo-phi-3", **QUESTION})["status"] == 200

    def starts() -> int:
        return sum(c["restartCount"] for p in system.pods("two") for c in p["status"].get("containerStatuses", ()))

    system.kubectl("delete", "pod", "two-1", "--grace-period=0", "--force")
    system.until("the first machine's engine, which ends too", lambda: starts() > 0, 300)
    system.until("the endpoint again", lambda: ready(system, "two"), 600)
    assert ask(system, where, {"model": "demo-phi-3", **QUESTION})["status"] == 200
