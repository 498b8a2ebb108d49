"""A whole system for the end-to-end tests: our images, built and in a registry with a password; a cluster with a real node that has
a GPU as far as Kubernetes knows; and the person who follows docs/installation.md.

Not real is the GPU: a plugin moves the computing to the CPU (``cpu_plugin``)."""

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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from kaito_core import __version__
from kaito_core.testing.cluster import Cluster, running_cluster, why_no_cluster
from kaito_core.testing.registry import Registry, running_registry, why_no_registry
from tests.cluster.images import build, buildah, flags, vllm_base, why_no_images
from tests.conftest import EXAMPLES, ROOT

if TYPE_CHECKING:
    pass

REASON = why_no_cluster(node=True) or why_no_registry() or why_no_images()
END_TO_END = [pytest.mark.slow, pytest.mark.node, pytest.mark.skipif(bool(REASON), reason=REASON)]
"""The marks of every test that needs this."""

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
A10_LABELS = {
    **GPU_LABELS,
    "app": "a10",
    "node.kubernetes.io/instance-type": "Standard_NV36ads_A10_v5",
    "nvidia.com/gpu.product": "NVIDIA-A10",
    "nvidia.com/gpu.memory": "24512",
    "nvidia.com/gpu.compute.major": "8",
    "nvidia.com/gpu.compute.minor": "6",
}
"""vLLM no longer knows the V100 of the quick start."""
CAPABILITY = "7.0"
"""The lowest compute capability that the images of the test are declared for: they compute on the CPU, beside the oldest GPU that a
node here says it has."""
MACHINE = "machine.test"
"""This machine, as pods call it."""
CLASS = "test-disk"
CRDS = "KAITO_TEST_KARPENTER_CRDS"
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
    runtime_images: dict[str, str] = field(default_factory=dict)
    """Of the runtimes that have one of their own."""

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

    def kubectl(self, *arguments: str, stdin: str = "", check: bool = True) -> str:
        return self.cluster.kubectl(*arguments, stdin=stdin, check=check)

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
            # Last: what a long report keeps, wherever it is cut.
            *(
                f"-n {namespace} logs {name} --all-containers --timestamps --tail=40"
                for namespace, name in self._unready()
            ),
        ]
        return "\n".join(
            f"$ kubectl {each}\n{self.cluster.kubectl(*each.split(), check=False)[-8000:]}" for each in asked
        )

    def _unready(self) -> list[tuple[str, str]]:
        """Namespace and name of the pods that run and are not ready."""
        running = [p for p in self.get("pods", "", "-A")["items"] if p["status"].get("phase") == "Running"]
        return [
            (p["metadata"]["namespace"], p["metadata"]["name"])
            for p in running
            if not any(c["type"] == "Ready" and c["status"] == "True" for c in p["status"].get("conditions", ()))
        ]

    def tune(
        self,
        name: str,
        data: str,
        *,
        config: str = "",
        secret: str = "registry-login",
        resource: dict[str, Any] | None = None,
        **annotations: str,
    ) -> None:
        """KAITO's quick start with another model, its own data and its own output."""
        workspace = yaml.safe_load((EXAMPLES / "kaito-quickstart.yaml").read_text(encoding="utf-8"))
        if resource is not None:
            workspace["resource"] = resource
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


ASK = """
import json, sys, time, urllib.error, urllib.request
url, body, key = sys.argv[1:]
headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
for left in reversed(range(20)):
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers), timeout=600)
    except urllib.error.HTTPError as e:
        answer = e
    except urllib.error.URLError as e:
        # A Service that was made a moment ago: kube-proxy refuses what comes for it until it has heard of its endpoints.
        if not isinstance(e.reason, ConnectionRefusedError) or not left:
            raise
        time.sleep(1)
        continue
    break
print(json.dumps({"status": answer.status, **json.loads(answer.read())}))
"""


def ask(system: System, url: str, body: dict[str, Any], key: str = "") -> dict[str, Any]:
    """What the quick start does with curl: a pod that asks, and is gone. Needs nothing but Python. The answer, and its HTTP status."""
    spec = {"imagePullSecrets": [{"name": "kaito-pull"}]}
    image = f"{system.registry.host}/kaito/my-controller:1"
    system.kubectl("run", "curl", "--restart=Never", f"--image={image}", f"--overrides={json.dumps({'spec': spec})}",
                   "--command", "--", "python", "-c", ASK, url, json.dumps(body), key)  # fmt: skip
    try:
        ended = ("Succeeded", "Failed")
        system.until("the answer", lambda: system.get("pod", "curl")["status"].get("phase") in ended, 600)
        said = system.kubectl("logs", "curl")
        assert system.get("pod", "curl")["status"]["phase"] == "Succeeded", f"{said}\n{system.report()}"
        found: dict[str, Any] = json.loads(said)
        return found
    finally:
        system.kubectl("delete", "pod", "curl", "--wait=true")


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


@contextmanager
def running_system(folder: Path, *, vllm: bool = False) -> Iterator[System]:
    """Images built and pushed, with ``vllm`` also vLLM's; a cluster with a GPU node, and nothing installed yet."""
    (folder / "files").mkdir()
    (folder / "files" / "small.jsonl").write_text(rows(60), encoding="utf-8")
    (folder / "files" / "long.jsonl").write_text(rows(400), encoding="utf-8")
    (folder / "files" / "bad.jsonl").write_text('{"instruction": "an answer is missing"}\n' * 20, encoding="utf-8")
    runtimes: dict[str, str] = {}
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
            if vllm:
                command = f"python3 images/build.py vllm --registry {registry.host}/kaito --push"
                build(command, folder, on=vllm_base(folder))
                runtimes["vllm"] = f"{registry.host}/kaito/kaito-vllm:{__version__}"
            _own_controller(commands["dockerfile"], registry, folder)
        cluster = stack.enter_context(running_cluster(node=True))
        cluster.trust(f"{MACHINE}:{registry.host.rpartition(':')[2]}")
        found = System(cluster, registry, folder, files, commands, runtimes)
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
    for number in range(20):  # one for each Workspace of the tests: a disk that was used is not given out again
        path = system.folder / "disks" / str(number)
        path.mkdir(parents=True)
        path.chmod(0o777)
        disks.append({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"disk-{number}"},
                      "spec": {"storageClassName": CLASS, "capacity": {"storage": "20Gi"}, "accessModes": ["ReadWriteOnce"],
                               "hostPath": {"path": str(path)}, "persistentVolumeReclaimPolicy": "Retain"}})  # fmt: skip
    system.kubectl("apply", "-f", "-", stdin="\n---\n".join(json.dumps(d) for d in disks))


def gpu_node(system: System, name: str, labels: dict[str, str] = GPU_LABELS) -> None:
    """A machine with a GPU joins; the taint keeps everybody else away from it, as on AKS."""
    system.cluster.join(name, labels=labels, taints=["sku=gpu:NoSchedule"], gpus=1)


def values(system: System) -> dict[str, Any]:
    """What the person who follows the page has to set here."""
    return {
        "image": {
            "registry": f"{system.registry.host}/kaito",
            "controller": f"{system.registry.host}/kaito/my-controller:1",
            "computeCapability": {"tuner": CAPABILITY},
            "pullSecrets": ["kaito-pull"],
        },
        "serving": {"images": system.runtime_images},
        "checkpoints": {"storageClass": CLASS},
        "secretNamespaces": ["default"],
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
