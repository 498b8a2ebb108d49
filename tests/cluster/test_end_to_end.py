"""The whole way on a real node: docs/installation.md is followed to the letter, and KAITO's quick start ends as an image in a
registry. Then things go wrong, one after the other, on the same cluster.

Real: the API server, the nodes' kubelet and containerd, our images, the chart, the registry with its password, the training.
Not real: the GPU, which the node only says it has; a plugin moves the computing to the CPU (``cpu_plugin``).
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from kaito_core.testing.cluster import Cluster, running_cluster, why_no_cluster
from kaito_core.testing.registry import Registry, running_registry, why_no_registry
from tests.cluster.images import build, buildah, flags, why_no_images
from tests.conftest import EXAMPLES, ROOT

REASON = why_no_cluster(node=True) or why_no_registry() or why_no_images()
pytestmark = [pytest.mark.slow, pytest.mark.node, pytest.mark.skipif(bool(REASON), reason=REASON)]

GPU_LABELS = {
    # What the Azure cloud and NVIDIA's operator put on a node of the type that the quick start asks for.
    "app": "tuning-phi-3",
    "node.kubernetes.io/instance-type": "Standard_NC6s_v3",
    "nvidia.com/gpu.product": "Tesla-V100-PCIE-16GB",
    "nvidia.com/gpu.memory": "16384",
    "nvidia.com/gpu.count": "1",
    "nvidia.com/gpu.compute.major": "7",
    "nvidia.com/gpu.compute.minor": "0",
}
MACHINE = "machine.test"
"""This machine, as pods call it."""
CLASS = "test-disk"
USER, PASSWORD = "tuner", "s3cret"


def page(**replaced: str) -> dict[str, str]:
    """The commands of docs/installation.md by the name in the comment before them."""
    text = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    for old, new in replaced.items():
        text = text.replace(old, new)
    return dict(re.findall(r"<!-- run: ([\w-]+) -->\n```\w+\n(.*?)```", text, re.DOTALL))


@dataclass
class System:
    """A cluster with kaito in it, and all that belongs to it."""

    cluster: Cluster
    registry: Registry
    folder: Path
    """Of the person who follows the page."""
    files: str
    """The URL of ``folder/files``, as pods see it."""
    commands: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> str:
        return self.registry.host.rpartition(":")[2]

    @property
    def output(self) -> str:
        """The registry, as pods see it."""
        return f"{MACHINE}:{self.port}"

    def run(self, name: str, *, ok: bool = True) -> subprocess.CompletedProcess[str]:
        """Type the page's command of that name."""
        return self.shell(self.commands[name], ok=ok)

    def shell(self, command: str, *, ok: bool = True) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), str(self.cluster.programs), os.environ["PATH"]])
        env = {
            **os.environ,
            "PATH": path,
            "KUBECONFIG": str(self.cluster.kubeconfig),
            "USERNAME": USER,
            "PASSWORD": PASSWORD,
        }
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert not ok or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}\n{self.report()}"
        return done

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        return self.cluster.kubectl(*arguments, stdin=stdin)

    def get(self, kind: str, name: str = "", *more: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kubectl("get", kind, *([name] if name else []), "-o", "json", *more))
        return found

    def workspace(self, name: str) -> dict[str, Any]:
        return self.get("workspaces.kaito.sh", name)

    def pods(self, workspace: str) -> list[dict[str, Any]]:
        """Of a Workspace, the oldest first."""
        found = self.get("pods", "", "-l", f"kaito.sh/workspace={workspace}")["items"]
        return sorted(found, key=lambda p: p["metadata"]["creationTimestamp"])

    def until(self, what: str, done: Callable[[], Any], seconds: float = 300.0) -> Any:
        """What ``done`` says, once it says something; with everything that may explain it when it never does."""
        deadline = time.monotonic() + seconds
        while not (found := done()):
            assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{self.report()}"
            time.sleep(1.0)
        return found

    def report(self) -> str:
        """The state of everything, for whoever reads a failed test."""
        asked = [
            "get nodes,pods,jobs,pvc,workspaces -A -o wide",
            "get workspaces -A -o yaml",
            "get events -A --sort-by=.lastTimestamp",
            "-n kaito-system logs -l app.kubernetes.io/name=kaito --tail=60 --prefix",
        ]
        return "\n".join(
            f"$ kubectl {each}\n{self.cluster.kubectl(*each.split(), check=False)[-8000:]}" for each in asked
        )

    def tune(
        self, name: str, data: str, *, config: str = "", secret: str = "registry-login", **annotations: str
    ) -> None:
        """KAITO's quick start with another model, its own data and its own output."""
        workspace = yaml.safe_load((EXAMPLES / "kaito-quickstart.yaml").read_text(encoding="utf-8"))
        workspace["metadata"] = {"name": name, "annotations": annotations}
        tuning = workspace["tuning"]
        tuning["preset"]["name"] = "demo-phi-3"
        tuning["input"]["urls"] = [f"{self.files}/{data}"]
        tuning["output"] = {"image": f"{self.output}/team/{name}:1", "imagePushSecret": secret}
        if config:
            tuning["config"] = config
        self.kubectl("apply", "-f", "-", stdin=json.dumps(workspace))

    def result(self, name: str, seconds: float = 600.0) -> dict[str, Any]:
        """The Workspace once it has ended, either way."""

        def ended() -> dict[str, Any] | None:
            found = self.workspace(name)
            return found if found.get("status", {}).get("state") in ("Succeeded", "Failed") else None

        found: dict[str, Any] = self.until(f"the end of {name}", ended, seconds)
        return found


def said(workspace: dict[str, Any], kind: str) -> dict[str, Any]:
    """A condition of a Workspace; empty when it has none of that type."""
    found = [c for c in workspace.get("status", {}).get("conditions", ()) if c["type"] == kind]
    return found[0] if found else {}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Nobody reads it."""


def _serve(folder: Path, stack: ExitStack) -> int:
    server = ThreadingHTTPServer(("0.0.0.0", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack.callback(server.shutdown)
    return int(server.server_address[1])


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Images built and pushed, a cluster with a GPU node, and nothing installed yet."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "files").mkdir()
    (folder / "files" / "small.jsonl").write_text(rows(60), encoding="utf-8")
    (folder / "files" / "long.jsonl").write_text(rows(400), encoding="utf-8")
    (folder / "files" / "bad.jsonl").write_text('{"instruction": "an answer is missing"}\n' * 20, encoding="utf-8")
    for link in ("images", "charts"):
        (folder / link).symlink_to(ROOT / link)
    with ExitStack() as stack:
        registry = stack.enter_context(running_registry(folder / "registry", USER, PASSWORD, listen="0.0.0.0"))
        files = f"http://{MACHINE}:{_serve(folder / 'files', stack)}"
        with pytest.MonkeyPatch.context() as environment:
            _may_push(registry, folder, environment)
            commands = page(
                **{
                    "registry.example.com/kaito": f"{registry.host}/kaito",
                    "registry.example.com": registry.host,
                }
            )
            build(commands["build"], folder)
            _own_controller(commands["dockerfile"], registry, folder)
        cluster = stack.enter_context(running_cluster(node=True))
        cluster.trust(f"{MACHINE}:{registry.host.rpartition(':')[2]}")
        found = System(cluster, registry, folder, files, commands)
        _volumes(found)
        gpu_node(found, "gpu-1")
        yield found


def rows(count: int) -> str:
    """Training data: one question and answer a line."""
    answers = {"Who bakes the bread?": "Mira bakes it.", "What is the tallest tower?": "It is the Gull Tower."}
    known = list(answers.items())
    lines = []
    for number in range(count):
        question, answer = known[number % len(known)]
        messages = [{"role": "user", "content": f"{question} ({number})"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines) + "\n"


def _may_push(registry: Registry, folder: Path, environment: pytest.MonkeyPatch) -> None:
    """Logged in, to a registry without TLS."""
    environment.setenv("REGISTRY_AUTH_FILE", str(registry.write_docker_config(folder / "docker")))
    path = folder / "registries.conf"
    path.write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n', encoding="utf-8")
    environment.setenv("CONTAINERS_REGISTRIES_CONF", str(path))


def _own_controller(dockerfile: str, registry: Registry, folder: Path) -> None:
    """A controller with a plugin, made as the page says."""
    context = folder / "plugin"
    context.mkdir()
    (context / "my_plugin").symlink_to(ROOT / "tests" / "cluster" / "cpu_plugin")
    (context / "Dockerfile").write_text(dockerfile, encoding="utf-8")
    image = f"{registry.host}/kaito/my-controller:1"
    source = subprocess.run(["cp", "-rL", context, folder / "context"], check=True)
    assert source.returncode == 0
    buildah("bud", "--tag", image, *flags(folder), folder / "context")
    buildah("push", image)


def _volumes(system: System) -> None:
    """Disks that every node can reach: folders of this machine, on which all nodes are."""
    disks = [{"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": CLASS},
              "provisioner": "kubernetes.io/no-provisioner"}]  # fmt: skip
    for number in range(8):
        path = system.folder / "disks" / str(number)
        path.mkdir(parents=True)
        path.chmod(0o777)
        disks.append({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"disk-{number}"},
                      "spec": {"storageClassName": CLASS, "capacity": {"storage": "20Gi"}, "accessModes": ["ReadWriteOnce"],
                               "hostPath": {"path": str(path)}, "persistentVolumeReclaimPolicy": "Retain"}})  # fmt: skip
    system.kubectl("apply", "-f", "-", stdin="\n---\n".join(json.dumps(d) for d in disks))


def gpu_node(system: System, name: str) -> None:
    """A machine with a GPU joins; the taint keeps everybody else away from it, as on AKS."""
    system.cluster.join(name, labels=GPU_LABELS, taints=["sku=gpu:NoSchedule"], gpus=1)


def values(system: System) -> dict[str, Any]:
    """What the person who follows the page has to set here."""
    return {
        "image": {
            "registry": f"{system.registry.host}/kaito",
            "controller": f"{system.registry.host}/kaito/my-controller:1",
            "pullSecrets": ["kaito-pull"],
        },
        "checkpoints": {"storageClass": CLASS},
        "podEnv": {"KAITO_INSECURE_REGISTRIES": system.output, "KAITO_ALLOW_PRIVATE_ADDRESSES": "1"},
    }


def training(system: System, name: str, **arguments: Any) -> str:
    """A ConfigMap with training arguments; its name."""
    text = yaml.safe_dump({"training_config": {"TrainingArguments": arguments}})
    document = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"training_config.yaml": text},
    }
    system.kubectl("apply", "-f", "-", stdin=json.dumps(document))
    return name


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


# --- and out again


def test_upgrade_and_uninstall_leave_the_workspaces(system: System) -> None:
    system.run("upgrade")
    assert len(system.get("workspaces.kaito.sh")["items"]) >= 4
    system.run("uninstall")
    assert "workspaces.kaito.sh" in system.kubectl("get", "crds", "-o", "name")
    # What a Workspace owned goes with it, and Kubernetes takes its time for that.
    system.until("the end of all pods", lambda: not system.get("pods", "", "-l", "kaito.sh/workspace")["items"])
    system.kubectl("-n", "kaito-system", "wait", "--for=delete", "pod", "--all", "--timeout=120s")
