"""``kaito controller`` as a process: how it starts, what it says when it cannot, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from kaito_core.controller.health import serve
from kaito_core.kube.client import Client, connect
from kaito_core.kube.kinds import LEASES, WORKSPACES, Kind

BINDINGS = Kind("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "clusterrolebindings", namespaced=False)
SERVICE_ACCOUNTS = Kind("v1", "ServiceAccount", "serviceaccounts")

Run = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: str) -> list[str]:
    where = ["--metrics-address", "127.0.0.1:0", "--health-address", "127.0.0.1:0"]
    return [sys.executable, "-m", "kaito_core", "controller", "--tuner-image", "r.io/tuner:1", *where, *arguments]


def environment(kubeconfig: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KAITO_", "KUBERNETES_"))}
    return {**kept, "KUBECONFIG": kubeconfig}


class Process:
    """A controller that runs, and its log."""

    def __init__(self, folder: Path, kubeconfig: str, *arguments: str) -> None:
        self._file = folder / f"{uuid4().hex}.log"
        with self._file.open("wb") as log:
            self.process = subprocess.Popen(command(*arguments), stderr=log, env=environment(kubeconfig), cwd=folder)

    def lines(self) -> list[dict[str, Any]]:
        """The log; every line is a JSON object, or this fails."""
        return [json.loads(line) for line in self._file.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def until(self, said: str) -> re.Match[str]:
        """Wait for a line of the log."""
        deadline = time.monotonic() + 60
        while True:
            for line in self.lines():
                if found := re.search(said, line["msg"]):
                    return found
            assert self.process.poll() is None, self._file.read_text()
            assert time.monotonic() < deadline, f"{said}\n{self._file.read_text()}"
            time.sleep(0.05)

    def get(self, path: str) -> str:
        ports = self.until(r"metrics on port (\d+) and health on port (\d+)").groups()
        port = ports[0] if path == "/metrics" else ports[1]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as e:
            return str(e.read().decode())

    def ready(self) -> None:
        deadline = time.monotonic() + 60
        while self.get("/readyz") != "ok\n":
            assert time.monotonic() < deadline, self._file.read_text()
            time.sleep(0.05)


@contextmanager
def running(folder: Path, kubeconfig: str, *arguments: str) -> Iterator[Process]:
    controller = Process(folder, kubeconfig, *arguments)
    try:
        yield controller
    finally:
        controller.process.kill()
        controller.process.wait()


@pytest.fixture
def kubeconfig(workspaces: Any) -> str:
    return str(workspaces.kubeconfig)


@pytest.fixture
def client(kubeconfig: str) -> Client:
    return connect(kubeconfig=kubeconfig)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(*arguments: str, kubeconfig: str = "/nowhere", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            capture_output=True,
            text=True,
            env={**environment(kubeconfig), **env},
            cwd=tmp_path,
            timeout=120,
            check=False,
        )

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_gets_ready_leads_and_ends_in_peace(
    kubeconfig: str, client: Client, tmp_path: Path, number: signal.Signals
) -> None:
    lease = f"controller-{uuid4().hex[:8]}"
    with running(tmp_path, kubeconfig, "--lease-name", lease) as controller:
        controller.ready()
        controller.until("leads")
        assert controller.get("/healthz") == "ok\n"
        assert f'leader_election_master_status{{name="{lease}"}} 1.0' in controller.get("/metrics")
        held = client.get(LEASES, lease, "default")
        assert held is not None
        assert held["spec"]["holderIdentity"]
        controller.process.send_signal(number)
        assert controller.process.wait(60) == 0
        said = [line["msg"] for line in controller.lines()]
        assert said[-1] == "stopped"
        assert "draining" in said  # what was being done then, for somebody else's Workspace, may have ended after it
    released = client.get(LEASES, lease, "default")
    assert released is not None
    assert released["spec"]["holderIdentity"] == ""


def test_a_stand_by_is_ready_and_takes_over(kubeconfig: str, tmp_path: Path) -> None:
    lease = f"controller-{uuid4().hex[:8]}"
    with running(tmp_path, kubeconfig, "--lease-name", lease) as first:
        first.until("leads")
        with running(tmp_path, kubeconfig, "--lease-name", lease) as second:
            second.ready()
            assert f'leader_election_master_status{{name="{lease}"}} 0.0' in second.get("/metrics")
            first.process.terminate()
            second.until("leads")


def test_whose_lease_is_taken_ends_at_once(kubeconfig: str, client: Client, tmp_path: Path) -> None:
    """Somebody else has begun: nothing may go on here, and the exit code says that this was not wanted."""
    lease = f"controller-{uuid4().hex[:8]}"
    with running(tmp_path, kubeconfig, "--lease-name", lease) as controller:
        controller.until("leads")
        client.patch(LEASES, lease, "default", {"spec": {"holderIdentity": "somebody"}})
        assert controller.process.wait(60) == 1
        assert controller.lines()[-1]["msg"] == "the lease is lost; ending at once"


def test_it_reconciles_what_there_is(kubeconfig: str, client: Client, tmp_path: Path) -> None:
    name = f"one-{uuid4().hex[:8]}"
    workspace = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": name, "namespace": "default"},
        "resource": {"labelSelector": {"matchLabels": {"apps": "nowhere"}}},
        "tuning": {
            "preset": {"name": "demo-phi-3"},
            "method": "qlora",
            "input": {"urls": ["https://example.com/a.jsonl"]},
            "output": {"image": "r.io/a:1", "imagePushSecret": "push"},
        },
    }
    client.create(WORKSPACES, workspace)
    try:
        with running(tmp_path, kubeconfig, "--no-leader-election") as controller:
            deadline = time.monotonic() + 60
            while not (client.get(WORKSPACES, name, "default") or {}).get("status", {}).get("conditions"):
                assert time.monotonic() < deadline, controller.lines()
                time.sleep(0.1)
            reconciled = r'reconcile_total\{controller="workspace",result="\w+"\} [1-9]'
            while not re.search(reconciled, metrics := controller.get("/metrics")):
                assert time.monotonic() < deadline, metrics
            assert 'kaito_workspace_count{phase="' in metrics
    finally:
        client.patch(WORKSPACES, name, "default", {"metadata": {"finalizers": None}})
        client.delete(WORKSPACES, name, "default")


def test_it_waits_for_an_api_server_that_is_away(kubeconfig: str, tmp_path: Path) -> None:
    """And says that it is alive and not ready, so that the kubelet lets it wait."""
    config = yaml.safe_load(Path(kubeconfig).read_text())
    real = config["clusters"][0]["cluster"]["server"]
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{port}"
    (tmp_path / "away").write_text(yaml.safe_dump(config))
    with running(tmp_path, str(tmp_path / "away")) as controller:
        controller.until(r"does not answer: .*refused.*; trying again in 5 s")
        assert controller.get("/healthz") == "ok\n"
        assert "workspaces.kaito.sh is not complete yet" in controller.get("/readyz")
        controller.process.terminate()
        assert controller.process.wait(60) == 0
    assert real not in str(controller.lines())


def test_rights_that_are_missing_are_named(run: Run, client: Client, kubeconfig: str, tmp_path: Path) -> None:
    name = f"poor-{uuid4().hex[:8]}"
    client.apply(SERVICE_ACCOUNTS, {"apiVersion": "v1", "kind": "ServiceAccount",
                                    "metadata": {"name": name, "namespace": "default"}})  # fmt: skip
    client.apply(
        BINDINGS,
        {
            "apiVersion": BINDINGS.api_version,
            "kind": BINDINGS.kind,
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": "default"}],
        },
    )
    token = client.create(
        Kind("v1", "TokenRequest", f"serviceaccounts/{name}/token"),
        {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "metadata": {"name": name, "namespace": "default"},
         "spec": {"expirationSeconds": 600}},
    )["status"]["token"]  # fmt: skip
    config = yaml.safe_load(Path(kubeconfig).read_text())
    config["users"][0]["user"] = {"token": token}
    (tmp_path / "poor").write_text(yaml.safe_dump(config))
    done = run(kubeconfig=str(tmp_path / "poor"))
    assert done.returncode == 1
    assert "error: these credentials may not: list nodes; watch nodes; " in done.stderr
    assert "create leases.coordination.k8s.io in default" in done.stderr
    assert "watch pods" not in done.stderr  # `view` allows that
    assert "Traceback" not in done.stderr
    assert token not in done.stderr


def test_a_cluster_without_the_definition(run: Run, tmp_path: Path) -> None:
    knows_nothing = serve(("127.0.0.1", 0), {})
    cluster = {"name": "x", "cluster": {"server": f"http://127.0.0.1:{knows_nothing.server_port}"}}
    context = {"name": "x", "context": {"cluster": "x", "user": "x"}}
    config = {
        "clusters": [cluster],
        "contexts": [context],
        "users": [{"name": "x", "user": {}}],
        "current-context": "x",
    }
    (tmp_path / "empty").write_text(yaml.safe_dump(config))
    try:
        done = run(kubeconfig=str(tmp_path / "empty"))
    finally:
        knows_nothing.shutdown()
        knows_nothing.server_close()
    assert done.returncode == 2
    assert "error: the cluster does not know Workspaces" in done.stderr
    assert "kaito crd | kubectl apply" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (("--tuner-image", ""), {}, "there is no image for the pods that tune"),
        (("--workers", "0"), {}, "--workers"),
        (("--metrics-address", "here"), {}, "--metrics-address: 'here' is not an address"),
        (("--checkpoint-size", "much"), {}, "--checkpoint-size: 'much' is not a size"),
        (("--pod-env", "NAME"), {}, "--pod-env 'NAME' is not NAME=VALUE"),
        ((), {"KAITO_POD_ENV": "NAME=VALUE"}, "KAITO_POD_ENV must be a JSON object of texts"),
        ((), {"KAITO_LOG_LEVEL": "loud"}, "loud"),
        ((), {}, "no usable cluster configuration"),
        (("--kubeconfig", "/nowhere", "--context", "x"), {}, "no usable cluster configuration"),
    ],
)
def test_bad_input_is_one_clear_message(run: Run, arguments: tuple[str, ...], env: dict[str, str], said: str) -> None:
    done = run(*arguments, **env)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
