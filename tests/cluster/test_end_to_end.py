"""The whole way on a real node: docs/installation.md is followed to the letter, and KAITO's quick start ends as an image in a
registry. Then things go wrong, one after the other, on the same cluster.

Real: the API server, the nodes' kubelet and containerd, our images, the chart, the registry with its password, the training.
Not real: the GPU, which the node only says it has; a plugin moves the computing to the CPU (``cpu_plugin``).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.system import (
    END_TO_END,
    PASSWORD,
    USER,
    System,
    ask,
    gpu_node,
    said,
    training,
    values,
)

pytestmark = END_TO_END


# --- installing


def test_without_helm(system: System) -> None:
    """In, ready, in again without a change, and out."""
    system.run("pull-secrets")
    system.run("service-accounts")
    assert "the controller is ready" in system.run("install").stdout
    system.run("verify")
    again = system.run("install").stdout
    assert "  keep  deployments.apps/kaito-controller" in again
    assert "change" not in again
    assert "removed  deployments.apps/kaito-controller" in system.shell("kaito uninstall --yes").stdout
    assert "workspaces.kaito.sh" in system.kubectl("get", "crds", "-o", "name")
    system.shell("kaito uninstall --all --yes")
    assert "workspaces.kaito.sh" not in system.kubectl("get", "crds", "-o", "name")


def test_with_helm(system: System) -> None:
    (system.folder / "kaito-values.yaml").write_text(yaml.safe_dump(values(system)), encoding="utf-8")
    system.run("helm")
    system.run("verify")
    plugins = system.shell("kubectl -n kaito-system exec deployment/kaito-controller -- kaito plugins").stdout
    assert re.search(r"kaito-test-cpu 0\.1\.0 +active", plugins), plugins
    refused = system.shell(system.commands["install"], ok=False)
    assert refused.returncode == 2
    assert "was installed in kaito-system by Helm" in refused.stderr


# --- the quick start


def test_the_quick_start_ends_with_an_adapter_in_the_registry(system: System, tmp_path: Path) -> None:
    from kaito_core.artifacts.credentials import Credentials
    from kaito_core.artifacts.pull import pull
    from kaito_core.oci_reference import Reference

    node = _lasting(system.get("node", "gpu-1"))
    system.run("push-secret")  # for this machine's name of the registry, and for the pods':
    system.shell(
        system.commands["push-secret"]
        .replace(system.registry.host, system.output)
        .replace("registry-login", "pods-login")
    )
    system.tune("my-adapter", "small.jsonl", secret="pods-login")
    ended = system.result("my-adapter")
    assert ended["status"]["state"] == "Succeeded", system.report()
    system.run("wait")

    columns = table(system.kubectl("get", "workspace", "my-adapter"))
    assert columns["INSTANCE"] == "Standard_NC6s_v3"
    assert columns["RESOURCEREADY"] == columns["JOBSTARTED"] == columns["WORKSPACEREADY"] == "True"

    adapter = json.loads(system.run("result").stdout)
    assert adapter["image"] == f"{system.output}/team/my-adapter:1"
    assert adapter["evalLossAfter"] < adapter["evalLossBefore"]
    pulled = pull(Reference.parse(f"{system.registry.host}/team/my-adapter:1"), tmp_path, Credentials(USER, PASSWORD))
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert pulled.annotations["sh.kaito.model.name"] == "demo-phi-3"

    assert _lasting(system.get("node", "gpu-1")) == node  # a machine that was there before is left as it was
    assert PASSWORD not in system.report()


def test_the_quick_start_goes_on_to_its_last_line(system: System) -> None:
    """Ready, a Service with its two ports, and a pod that asks it: until then, no GPU was held for it."""
    columns = table(system.kubectl("get", "workspace", "my-adapter"))
    assert columns["INFERENCEREADY"] == columns["WORKSPACEREADY"] == "True", system.report()
    service = table(system.kubectl("get", "svc", "my-adapter"))
    assert (service["TYPE"], service["PORT(S)"]) == ("ClusterIP", "80/TCP,29500/TCP")
    assert system.workspace("my-adapter")["status"]["serving"]["phase"] == "Asleep"
    address = system.kubectl("get", "svc", "my-adapter", "-o", "jsonpath={.spec.clusterIPs[0]}")
    answer = ask(system, f"http://{address}/chat", {"prompt": "Who bakes the bread?"})
    assert isinstance(answer["Result"], str), answer
    assert system.workspace("my-adapter")["status"]["serving"]["phase"] == "Ready"
    models = ask(system, f"http://{address}/v1/chat/completions",
                 {"model": "my-adapter", "messages": [{"role": "user", "content": "Who bakes the bread?"}]})  # fmt: skip
    assert models["choices"][0]["message"]["content"]
    system.kubectl("annotate", "workspace", "my-adapter", "kaito.sh/serve-after-tuning=never")
    system.until("the end of the endpoint", lambda: "my-adapter" not in system.kubectl("get", "svc,sts", "-o", "name"))


def table(printed: str) -> dict[str, str]:
    """What kubectl prints of one object, by column; some are empty."""
    header, line = printed.splitlines()
    return {m[0].strip(): line[m.start() : m.end()].strip() for m in re.finditer(r"\S+\s*", header)}


def _lasting(node: dict[str, Any]) -> dict[str, Any]:
    """What the kubelet does not change by itself."""
    return {"labels": node["metadata"]["labels"], "taints": node["spec"].get("taints")}


# --- what goes wrong before a GPU is used


def _refused_before_the_gpu(system: System, name: str) -> str:
    """The words of a Workspace that failed in an init container; the container with the GPU has never run."""
    ended = system.result(name, 180)
    assert ended["status"]["state"] == "Failed", system.report()
    [pod] = system.pods(name)  # not tried again: it would fail in the same way
    [main] = pod["status"]["containerStatuses"]
    assert "waiting" in main["state"]
    assert not main.get("started")
    return str(said(ended, "WorkspaceSucceeded")["message"])


def test_a_wrong_push_secret_is_found_before_the_gpu_is_used(system: System) -> None:
    """KAITO's defect 11: a wrong imagePushSecret is discovered after hours of training, which is then repeated."""
    system.kubectl("create", "secret", "docker-registry", "wrong-login", f"--docker-server={system.output}",
                   f"--docker-username={USER}", "--docker-password=guessed")  # fmt: skip
    system.tune("wrong-secret", "small.jsonl", secret="wrong-login")
    assert system.output in _refused_before_the_gpu(system, "wrong-secret")
    assert "guessed" not in system.report()


def test_bad_data_is_found_before_the_gpu_is_used(system: System) -> None:
    system.tune("bad-data", "bad.jsonl", secret="pods-login")
    assert _refused_before_the_gpu(system, "bad-data")


def test_an_image_that_cannot_be_pulled_is_said_in_the_kubelet_s_words(system: System) -> None:
    missing = f"{system.registry.host}/kaito/no-such-tuner:1"
    system.tune("no-image", "small.jsonl", secret="pods-login", **{"test.kaito.sh/image": missing})

    def words() -> str:
        condition = said(system.workspace("no-image"), "JobStarted")
        return str(condition["message"]) if "Pull" in condition.get("reason", "") else ""

    assert missing in system.until("the reason that the pod does not start", words)
    system.kubectl("delete", "workspace", "no-image", "--timeout=120s")
    system.until("the end of its pods", lambda: not system.pods("no-image"))


# --- what goes wrong in the middle


def test_a_pod_that_runs_out_of_memory_is_tried_again(system: System) -> None:
    limit = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "too-little"},
             "spec": {"limits": [{"type": "Container", "default": {"memory": "350Mi"}}]}}  # fmt: skip
    system.kubectl("apply", "-f", "-", stdin=json.dumps(limit))
    try:
        system.tune("memory", "small.jsonl", secret="pods-login")

        def killed() -> bool:
            ends = [
                c["state"].get("terminated", {})
                for p in system.pods("memory")
                for c in p["status"].get("containerStatuses", ())
            ]
            return any(e.get("reason") == "OOMKilled" for e in ends)

        system.until("the pod without memory", killed)
    finally:
        system.kubectl("delete", "limitrange", "too-little")
    ended = system.result("memory")
    assert ended["status"]["state"] == "Succeeded", system.report()
    assert len(system.pods("memory")) >= 2


def test_a_lost_machine_costs_what_was_trained_since_the_last_checkpoint(system: System) -> None:
    """KAITO's defect 9: a lost machine loses everything, because retries start from zero."""
    config = training(system, "slow", max_steps=120, save_steps=5, per_device_train_batch_size=4)
    system.tune("resumes", "long.jsonl", config=config, secret="pods-login")

    def step() -> int:
        return int(system.workspace("resumes").get("status", {}).get("progress", {}).get("step", 0))

    system.until("some steps", lambda: step() >= 20)
    system.cluster.leave("gpu-1")
    system.kubectl("delete", "node", "gpu-1")  # as its cloud does
    gpu_node(system, "gpu-2")
    ended = system.result("resumes", 900)
    assert ended["status"]["state"] == "Succeeded", system.report()
    last = system.pods("resumes")[-1]
    assert last["spec"]["nodeName"] == "gpu-2"
    log = system.kubectl("logs", last["metadata"]["name"], "-c", last["spec"]["containers"][0]["name"])
    resumed = re.search(r"going on from checkpoint-(\d+)", log)
    assert resumed, log[-3000:]
    assert int(resumed[1]) >= 15


# --- an endpoint, under load

LOAD = """
import json, sys, time, urllib.request as r
url, seconds = sys.argv[1], float(sys.argv[2])
body = json.dumps({"model": "first", "max_tokens": 4, "messages": [{"role": "user", "content": "Who bakes the bread?"}]}).encode()
said, until = {"answers": 0, "failures": []}, time.monotonic() + seconds
print("begun", flush=True)
while time.monotonic() < until:
    try:
        with r.urlopen(r.Request(url, body, {"Content-Type": "application/json"}), timeout=600) as answer:  # as long as the activator holds a request
            json.load(answer)["choices"][0]["message"]["content"]
        said["answers"] += 1
    except Exception as e:
        said["failures"].append(f"{type(e).__name__}: {e}")
    time.sleep(0.2)
print(json.dumps(said))
"""


def endpoint(system: System, adapters: list[str]) -> None:
    """The demonstration model, with adapters from the registry that asks for a password."""
    image = {"image": f"{system.output}/team/my-adapter:1", "imagePullSecrets": ["pods-login"]}
    named = [{"source": {"name": a, **image}} for a in adapters]
    inference = {"preset": {"name": "demo-phi-3"}, "adapters": named}
    workspace = {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": "served"},
                 "resource": {"labelSelector": {"matchLabels": {"app": "tuning-phi-3"}}}, "inference": inference}  # fmt: skip
    system.kubectl("apply", "-f", "-", stdin=json.dumps(workspace))


def serves(system: System, revision: int) -> bool:
    """Whether the endpoint is ready in the form of its present spec."""
    workspace = system.workspace("served")
    there = said(workspace, "InferenceReady")
    current = there.get("observedGeneration") == workspace["metadata"]["generation"] >= revision
    return bool(current and there["status"] == "True")


def test_an_endpoint_is_changed_and_its_pod_dies_without_a_failed_request(system: System) -> None:
    endpoint(system, ["first"])
    system.until("the endpoint", lambda: serves(system, 1), 400)
    [pod] = system.pods("served")
    volumes = [v["image"]["reference"] for v in pod["spec"]["volumes"] if "image" in v]
    assert volumes == [f"{system.output}/team/my-adapter:1"], "Kubernetes mounts the adapter's image by itself"
    # By its address, as the quick start does: what is tried here is not the cluster's name server.
    address = system.kubectl("get", "svc", "served", "-o", "jsonpath={.spec.clusterIPs[0]}")
    url = f"http://{address}/v1/chat/completions"
    load = {"imagePullSecrets": [{"name": "kaito-pull"}]}
    image = f"{system.registry.host}/kaito/my-controller:1"
    system.kubectl("run", "load", "--restart=Never", f"--image={image}", f"--overrides={json.dumps({'spec': load})}",
                   "--command", "--", "python", "-c", LOAD, url, "110")  # fmt: skip
    system.until("the load", lambda: "begun" in system.kubectl("logs", "load", check=False))
    endpoint(system, ["first", "second"])
    system.until("the changed endpoint", lambda: serves(system, 2), 400)
    system.kubectl("delete", "pod", "served-0", "--wait=false")
    system.until("the end of the load", lambda: system.get("pod", "load")["status"]["phase"] == "Succeeded", 900)
    result = json.loads(system.kubectl("logs", "load").splitlines()[-1])
    assert result["failures"] == [], f"{result}\n{system.report()}"
    assert result["answers"] > 5
    system.until("the endpoint again", lambda: serves(system, 2), 400)
    models = ask(system, url,
                 {"model": "second", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]})  # fmt: skip
    assert models["choices"]


def test_an_endpoint_whose_machine_is_lost_comes_back_on_another(system: System) -> None:
    node = system.pods("served")[0]["spec"]["nodeName"]
    system.cluster.leave(node)
    system.kubectl("delete", "node", node)  # as its cloud does
    gpu_node(system, "gpu-3")
    on = system.until("the pod on the other machine", lambda: [
        p for p in system.pods("served") if p["spec"].get("nodeName") == "gpu-3" and "deletionTimestamp" not in p["metadata"]
    ], 400)  # fmt: skip
    assert len(on) == 1
    system.until("the endpoint", lambda: serves(system, 2), 400)
    system.kubectl("delete", "workspace", "served", "--timeout=120s")
    system.until("the end of its pods", lambda: not system.pods("served"))


def test_an_endpoint_with_a_key_wakes_for_those_who_have_it_and_follows_its_settings(system: System) -> None:
    """Its adapter is fetched by an init container, as where nodes cannot mount images."""
    values_file = system.folder / "kaito-values.yaml"
    given = yaml.safe_load(values_file.read_text(encoding="utf-8"))
    given["serving"]["imageVolumes"] = False
    values_file.write_text(yaml.safe_dump(given), encoding="utf-8")
    system.run("helm")

    def settings(context: int) -> None:
        data = {"inference_config.yaml": f"transformers: {{max-model-len: {context}}}"}
        document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": data}
        system.kubectl("apply", "-f", "-", stdin=json.dumps(document))

    def phase() -> str:
        return str(system.workspace("locked").get("status", {}).get("serving", {}).get("phase", ""))

    settings(512)
    system.kubectl("create", "secret", "generic", "key", "--from-literal=api-key=sesame")
    image = {"image": f"{system.output}/team/my-adapter:1", "imagePullSecrets": ["pods-login"]}
    adapters = [{"source": {"name": "first", **image}}]
    inference = {"preset": {"name": "demo-phi-3"}, "policy": "onDemand", "config": "settings", "adapters": adapters}
    metadata = {"name": "locked", "annotations": {"kaito.sh/api-key-secret": "key"}}
    system.kubectl("apply", "-f", "-", stdin=json.dumps({
        "apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": metadata,
        "resource": {"labelSelector": {"matchLabels": {"app": "tuning-phi-3"}}}, "inference": inference}))  # fmt: skip
    system.until("the endpoint asleep", lambda: phase() == "Asleep")
    url = f"http://{system.kubectl('get', 'svc', 'locked', '-o', 'jsonpath={.spec.clusterIPs[0]}')}/v1/chat/completions"
    question = {"model": "first", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
    for wrong in ("", "guessed"):
        assert ask(system, url, question, wrong)["status"] == 401
    assert (phase(), system.pods("locked")) == ("Asleep", []), "no machine was got for them"
    assert ask(system, url, question, "sesame")["status"] == 200
    assert ask(system, url, question, "guessed")["status"] == 401, "now it is the pod that asks for it"
    [pod] = system.pods("locked")
    assert not any("image" in v for v in pod["spec"]["volumes"])
    assert "adapter 'first': " in system.kubectl("logs", pod["metadata"]["name"], "-c", "fetch")
    long = {**question, "messages": [{"role": "user", "content": "word " * 300}]}  # a token each
    assert ask(system, url, long, "sesame")["status"] == 200
    settings(256)
    system.until("the pod with the changed settings", lambda: [
        p for p in system.pods("locked") if p["metadata"]["uid"] != pod["metadata"]["uid"]], 120)  # fmt: skip
    assert ask(system, url, long, "sesame")["status"] == 400, "256 tokens are too few for it now"
    assert "sesame" not in system.report()
    system.kubectl("delete", "workspace", "locked", "--timeout=120s")
    system.until("the end of its pods", lambda: not system.pods("locked"))


# --- and out again


def test_upgrade_and_uninstall_leave_the_workspaces(system: System) -> None:
    system.run("upgrade")
    assert len(system.get("workspaces.kaito.sh")["items"]) >= 4
    system.run("uninstall")
    assert "workspaces.kaito.sh" in system.kubectl("get", "crds", "-o", "name")
    # What a Workspace owned goes with it, and Kubernetes takes its time for that.
    system.until("the end of all pods", lambda: not system.get("pods", "", "-l", "kaito.sh/workspace")["items"])
    system.kubectl("-n", "kaito-system", "wait", "--for=delete", "pod", "--all", "--timeout=120s")
