"""``kaito run``, ``status``, ``logs``, ``delete`` and ``plan`` against a real API server.

There is no node, and mostly no controller: the test writes the status that one would write, so that each answer of the
command line has one cause. Machines come from the fake cloud, which has prices. What pods print is tested where there are
pods (``test_end_to_end.py``)."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from kaito_core.api.crd import crd
from kaito_core.kube.client import Client, connect
from kaito_core.kube.kinds import (
    CONFIG_MAPS,
    CRDS,
    JOBS,
    LEASES,
    NAMESPACES,
    SECRETS,
    WORKSPACES,
    Object,
    owner_reference,
)
from kaito_core.plugins.types import Offer, Price
from kaito_core.testing.cluster import running_cluster, why_no_cluster
from kaito_core.testing.provisioner_plugin import CloudFolder
from tests.conftest import Kaito, workspace

REASON = why_no_cluster()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

PASSWORD = "a-secret-that-nobody-may-see"
MACHINE = Offer("Standard_Test", cpus=4, memory=16 << 30, price=Price(0.5, "test", "2026-01-01"))
FILE = """\
apiVersion: v1
kind: Secret
metadata: {{name: registry-login}}
stringData: {{token: {password}}}
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: training}}
data:
  training_config.yaml: |
    training_config:
      TrainingArguments:
        max_steps: 4
---
apiVersion: kaito.sh/v1alpha1
kind: Workspace
metadata: {{name: small}}
tuning:
  preset: {{name: {preset}}}
  method: qlora
  config: training
  input: {{urls: ["https://example.com/a.jsonl"]}}
  output: {{image: "{image}", imagePushSecret: registry-login}}
"""


@pytest.fixture(scope="module")
def kubeconfig() -> Iterator[Path]:
    with running_cluster() as cluster:
        client = connect(kubeconfig=str(cluster.kubeconfig))
        client.apply(CRDS, crd())
        while not client.serves(WORKSPACES):
            time.sleep(0.1)
        yield cluster.kubeconfig


class Team:
    """A person with a namespace of their own as the current context, and a cloud to get machines from."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self.namespace = f"team-{uuid4().hex[:8]}"
        config = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
        config["contexts"][0]["context"]["namespace"] = self.namespace
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(config), encoding="utf-8")
        self.context = config["current-context"]
        self.client: Client = connect(kubeconfig=str(self.kubeconfig))
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}}
        self.client.create(NAMESPACES, namespace)
        self.cloud = CloudFolder(folder / "cloud", [MACHINE])
        self.file = folder / "workspace.yaml"
        self.write()

    def write(self, *, preset: str = "demo-phi-3", image: str = "r.io/a:1") -> None:
        self.file.write_text(FILE.format(preset=preset, image=image, password=PASSWORD), encoding="utf-8")

    @property
    def environment(self) -> dict[str, str]:
        return {"KUBECONFIG": str(self.kubeconfig), **self.cloud.environment}

    def workspace(self) -> Object | None:
        return self.client.get(WORKSPACES, "small", self.namespace)

    def until_there(self) -> Object:
        deadline = time.monotonic() + 60
        while (found := self.workspace()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return found

    def says(self, *conditions: tuple[str, str, str, str], **status: Any) -> None:
        """What a controller would say of the Workspace as it is now."""
        found = self.until_there()
        told = [
            {"type": t, "status": s, "reason": r, "message": m, "lastTransitionTime": "2026-01-01T00:00:00Z",
             "observedGeneration": found["metadata"]["generation"]}
            for t, s, r, m in conditions
        ]  # fmt: skip
        patch = {"status": {"conditions": told, **status}}
        self.client.patch(WORKSPACES, "small", self.namespace, patch, subresource="status")

    def succeeds(self) -> None:
        adapter = {"image": "r.io/a:1", "digest": "sha256:abc", "evalLossBefore": 3.0, "evalLossAfter": 1.0}
        said = ("WorkspaceSucceeded", "True", "workspaceSucceeded", "the adapter is in r.io/a:1")
        self.says(("ResourceReady", "True", "r", ""), said, state="Succeeded", adapter=adapter, workerNodes=["gpu-1"])

    def fails(self) -> None:
        self.says(("WorkspaceSucceeded", "False", "workspaceFailed", "the data has no answers"), state="Failed")


@pytest.fixture
def team(kubeconfig: Path, tmp_path: Path, environment: dict[str, str]) -> Iterator[Team]:
    team = Team(kubeconfig, tmp_path)
    environment.update(team.environment)
    yield team
    if team.workspace() is not None:
        team.client.patch(WORKSPACES, "small", team.namespace, {"metadata": {"finalizers": None}})
    team.client.delete(NAMESPACES, team.namespace)


@pytest.fixture
def controller(team: Team) -> Iterator[None]:
    """The Lease of a controller that is there."""
    renewed = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    metadata = {"name": "kaito-controller", "namespace": team.namespace}
    spec = {"holderIdentity": "somebody", "leaseDurationSeconds": 15, "renewTime": renewed}
    team.client.create(LEASES, {"apiVersion": LEASES.api_version, "kind": "Lease", "metadata": metadata, "spec": spec})
    yield
    team.client.delete(LEASES, "kaito-controller", team.namespace)


def meanwhile(*acts: Any) -> threading.Thread:
    thread = threading.Thread(target=lambda: [act() for act in acts], daemon=True)
    thread.start()
    return thread


# --- run


class Command:
    """``kaito ARGUMENTS…`` while it runs."""

    def __init__(self, environment: dict[str, str], *arguments: str | Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-u", "-m", "kaito_core", *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.out = ""

    def says(self, words: str) -> None:
        """Wait until it has said that."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self.out += line
            if words in line:
                return
        raise AssertionError(self.out + self._child.communicate()[1])

    def interrupt(self) -> None:
        self._child.send_signal(signal.SIGINT)

    def goes_on(self) -> bool:
        """Whether it has not ended."""
        return self._child.poll() is None

    def ends(self, code: int) -> str:
        """Wait for its end; what it said to stderr."""
        out, err = self._child.communicate(timeout=120)
        self.out += out
        assert self._child.returncode == code, self.out + err
        assert "Traceback" not in err
        return err


@pytest.mark.usefixtures("controller")
def test_a_file_is_applied_and_followed_to_its_end(kaito: Kaito, team: Team, environment: dict[str, str]) -> None:
    done = Command(environment, "run", "--yes", team.file)
    team.says(("ResourceReady", "False", "workspaceResourceStatusNotReady", "waiting for Standard_Test"))
    done.says("waiting for")
    team.succeeds()
    err = done.ends(0)
    shown = done.out.splitlines()
    assert shown[0] == f"target: the cluster of the context '{team.context}' (the current one of your kubeconfig)"
    assert any("Standard_Test" in line and "✔" in line for line in shown)
    assert "small costs $0.50 an hour" in done.out
    assert shown[shown.index("small succeeded") - 5 :] == [
        f"  applied Workspace {team.namespace}/small",
        "  ResourceReady: no – waiting for Standard_Test",
        "  on gpu-1",
        "  ResourceReady: yes",
        "",
        "small succeeded",
        "  held-out loss  3.0000 before, 1.0000 after",
        "  image          r.io/a:1",
        "  digest         sha256:abc",
    ]
    assert PASSWORD not in done.out + err

    made = [team.client.get(k, n, team.namespace) for k, n in ((SECRETS, "registry-login"), (CONFIG_MAPS, "training"))]
    for each in (*made, team.workspace()):
        assert each is not None
        assert "kaito" in {m["manager"] for m in each["metadata"]["managedFields"]}

    team.cloud.change(offers=[])  # what is done needs no machine
    again = kaito("run", "--yes", team.file)
    assert again.returncode == 0, again.stderr
    assert f"{team.namespace}/small is done already" in again.stdout
    assert "sha256:abc" in again.stdout


@pytest.mark.usefixtures("controller")
def test_a_failure_is_the_conditions_message(kaito: Kaito, team: Team) -> None:
    meanwhile(team.fails)
    done = kaito("run", "--yes", team.file)
    assert done.returncode == 1
    assert f"error: {team.namespace}/small failed: the data has no answers\n" in done.stderr
    again = kaito("run", "--yes", team.file)
    assert again.returncode == 1
    assert "just as it is now, it was tried before" in again.stderr
    assert f"kaito delete -n {team.namespace} small" in again.stderr

    team.write(image="r.io/a:2")
    meanwhile(lambda: _until_generation(team, 2), team.succeeds)
    assert kaito("run", "--yes", team.file).returncode == 0


def _until_generation(team: Team, number: int) -> None:
    while team.until_there()["metadata"]["generation"] != number:
        time.sleep(0.1)


@pytest.mark.usefixtures("controller")
def test_ctrl_c_leaves_the_run_to_the_cluster(team: Team, environment: dict[str, str]) -> None:
    first = Command(environment, "run", "--yes", team.file)
    team.says(("ResourceReady", "False", "r", "waiting"))
    first.says("waiting")
    first.interrupt()
    err = first.ends(130)
    assert f"{team.namespace}/small goes on in the cluster" in err
    assert f"kaito logs -f -n {team.namespace} small" in err
    assert f"stop it:  kaito delete -n {team.namespace} small" in err
    # The same command follows it again; what runs was agreed to before.
    second = Command(environment, "run", team.file)
    second.says("  going on with Workspace")
    team.succeeds()
    second.ends(0)
    assert "an hour" not in second.out


@pytest.mark.usefixtures("controller")
def test_money_is_not_spent_without_a_yes(kaito: Kaito, team: Team) -> None:
    refused = kaito("run", team.file)
    assert refused.returncode == 2
    assert "this costs money, and nobody is there to be asked" in refused.stderr
    assert team.workspace() is None
    assert team.client.get(SECRETS, "registry-login", team.namespace) is None


@pytest.mark.usefixtures("controller")
def test_what_the_api_server_refuses_is_said_in_its_words(kaito: Kaito, team: Team) -> None:
    """KAITO's webhook refuses it; here the definition itself does."""
    meanwhile(team.succeeds)
    assert kaito("run", "--yes", team.file).returncode == 0
    team.write(preset="phi-3-mini-4k-instruct")
    refused = kaito("run", "--yes", team.file)
    assert refused.returncode == 2
    line = next(n for n, text in enumerate(team.file.read_text().splitlines(), 1) if text.startswith("tuning:"))
    assert refused.stderr.startswith(f"{team.file}:{line}:")
    assert "error: tuning: the cluster does not accept it:" in refused.stderr
    assert "preset cannot be changed" in refused.stderr


@pytest.mark.usefixtures("controller")
def test_what_another_controller_looks_after_is_not_written(kaito: Kaito, team: Team) -> None:
    """It would be written back, or be gone with its owner."""
    owner = team.client.create(
        CONFIG_MAPS, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "web", "namespace": team.namespace}}
    )
    login = {"name": "registry-login", "namespace": team.namespace, "ownerReferences": [owner_reference(owner)]}
    before = team.client.create(SECRETS, {"apiVersion": "v1", "kind": "Secret", "metadata": login})
    run = kaito("run", "--yes", team.file)
    assert run.returncode == 2
    words = f"the Secret {team.namespace}/registry-login is there already and belongs to the ConfigMap web"
    assert re.search(rf"{re.escape(str(team.file))}:\d+:\d+: error: metadata.name: {words}", run.stderr), run.stderr
    assert team.workspace() is None
    assert team.client.get(SECRETS, "registry-login", team.namespace) == before


def test_a_cluster_without_a_controller(kaito: Kaito, team: Team) -> None:
    refused = kaito("run", "--yes", team.file)
    assert refused.returncode == 2
    assert "nobody looks after Workspaces" in refused.stderr
    for way in ("kaito install", "--standalone", "--local"):
        assert way in refused.stderr


@pytest.mark.usefixtures("controller")
def test_files_that_only_this_machine_has(kaito: Kaito, team: Team, tmp_path: Path) -> None:
    refused = kaito("run", "--yes", workspace(tmp_path / "own", image="r.io/a:1"))
    assert refused.returncode == 2
    assert "a cluster cannot read 'data.jsonl'" in refused.stderr
    assert "workspace.yaml:24:18: error: tuning.input.urls[0]" in refused.stderr


def test_a_server_that_is_away_is_no_reason_to_run_elsewhere(kaito: Kaito, team: Team, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    config = yaml.safe_load(team.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{port}"
    (tmp_path / "away").write_text(yaml.safe_dump(config))
    for command in ("run", "plan"):
        done = kaito(command, team.file, KUBECONFIG=str(tmp_path / "away"))
        assert done.returncode == 1
        assert "does not answer" in done.stderr
        assert "--local" in done.stderr
    status = kaito("status", KUBECONFIG=str(tmp_path / "away"))
    assert status.returncode == 0
    assert status.stderr.count("\n") == 1
    assert "warning: only this machine is shown" in status.stderr
    assert kaito("status", "--context", team.context, KUBECONFIG=str(tmp_path / "away")).returncode == 1
    nowhere = kaito("run", "--context", "nowhere", team.file)
    assert nowhere.returncode == 2
    assert "no context 'nowhere'" in nowhere.stderr
    assert "--local" in nowhere.stderr


def test_plan_asks_the_cluster(kaito: Kaito, team: Team) -> None:
    shown = json.loads(kaito("plan", "--json", team.file).stdout)["plans"][0]
    assert [c["instanceType"] for c in shown["candidates"] if c["chosen"]] == ["Standard_Test"]
    assert shown["config"]["TrainingArguments"]["max_steps"] == 4
    # A ConfigMap that is not in the file is the cluster's.
    secret, config_map, rest = team.file.read_text().split("---\n")
    team.file.write_text("---\n".join([secret, rest]))
    assert "the ConfigMap 'training' is not there" in kaito("plan", team.file).stderr
    made = yaml.safe_load(config_map.replace("max_steps: 4", "max_steps: 5"))
    made["metadata"]["namespace"] = team.namespace
    team.client.create(CONFIG_MAPS, made)
    shown = json.loads(kaito("plan", "--json", team.file).stdout)["plans"][0]
    assert shown["config"]["TrainingArguments"]["max_steps"] == 5
    team.cloud.change(offers=[])
    none = kaito("plan", team.file)
    assert none.returncode == 2
    assert "the cluster has no node" in none.stdout
    assert team.workspace() is None


# --- without a controller


def test_standalone_looks_after_the_workspace_and_gives_everything_back(
    kaito: Kaito, team: Team, environment: dict[str, str]
) -> None:
    run = Command(environment, "run", "--yes", "--standalone", "--tuner-image", "r.io/tuner:1", team.file)
    run.says("ResourceReady: yes")
    while team.client.get(JOBS, "small", team.namespace) is None:
        time.sleep(0.1)
    run.interrupt()
    assert f"nobody looks after {team.namespace}/small now" in run.ends(130)
    assert team.cloud.provisioner().machines

    refused = kaito("delete", "small")
    assert refused.returncode == 2
    assert "no controller runs" in refused.stderr
    deleted = kaito("delete", "--standalone", "small")
    assert deleted.returncode == 0, deleted.stderr
    assert f"{team.namespace}/small is gone, and its machines have been given back" in deleted.stdout
    assert not team.cloud.provisioner().leaks()
    assert team.workspace() is None


@pytest.mark.usefixtures("controller")
def test_two_controllers_are_one_too_many(kaito: Kaito, team: Team) -> None:
    refused = kaito("run", "--standalone", "--tuner-image", "r.io/tuner:1", "--yes", team.file)
    assert refused.returncode == 2
    assert "has a controller" in refused.stderr
    assert team.workspace() is None


def test_standalone_needs_an_image_and_a_cluster(kaito: Kaito, team: Team) -> None:
    assert "give --tuner-image, or set KAITO_TUNER_IMAGE" in kaito("run", "--standalone", team.file).stderr
    assert "--standalone needs a cluster" in kaito("run", "--local", "--standalone", team.file).stderr


# --- looking at it, and deleting it


@pytest.mark.usefixtures("controller")
def test_status_shows_what_is_known(kaito: Kaito, team: Team) -> None:
    assert "no Workspace in the namespace" in kaito("status").stdout
    meanwhile(team.succeeds)
    kaito("run", "--yes", team.file)
    rows = kaito("status").stdout.splitlines()
    assert rows[0] == f"Workspaces in the namespace {team.namespace} of {team.context}"
    assert rows[2].split() == ["small", "Succeeded", "-", "demo-phi-3", "(qlora)"]
    assert "no runs on this machine" in kaito("status", "--local").stdout
    (row,) = json.loads(kaito("status", "small", "--json").stdout)
    assert (row["phase"], row["context"]) == ("Succeeded", team.context)

    attempt = {"provisioner": "fake", "instanceType": "Standard_Test", "started": "2026-01-01T00:00:00Z"}
    team.says(
        ("ResourceReady", "False", "workspaceResourceStatusNotReady", "waiting for it"),
        state="Running",
        progress={"stage": "train", "step": 3, "steps": 12, "loss": 1.5, "secondsLeft": 600},
        attempts=[attempt],
    )
    full = kaito("status", "small").stdout
    for words in (
        "small: Running, demo-phi-3 (qlora)",
        "train, step 3/12, loss 1.5000, 10 min left",
        "nodes     gpu-1",
        "workspaceResourceStatusNotReady: waiting for it",
        "fake for Standard_Test, going on",
        "r.io/a:1@sha256:abc",
    ):
        assert words in full
    logs = kaito("logs", "small")
    assert logs.returncode == 1
    assert "there is no pod of small" in logs.stderr


def test_a_name_that_means_two_things(kaito: Kaito, team: Team, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "runs" / "small"
    folder.mkdir(parents=True)
    state = {"name": "small", "namespace": "default", "preset": "demo-phi-3", "method": "qlora"}
    (folder / "state.json").write_text(json.dumps({**state, "order": ["fetch"], "stages": {}}))
    assert kaito("status", "small").stdout.startswith("small: Pending, qlora of demo-phi-3")
    team.client.create(WORKSPACES, {"apiVersion": WORKSPACES.api_version, "kind": "Workspace",
                                    "metadata": {"name": "small", "namespace": team.namespace},
                                    "tuning": {"preset": {"name": "demo-phi-3"}, "method": "qlora",
                                               "input": {"urls": ["https://example.com/a.jsonl"]},
                                               "output": {"image": "r.io/a:1", "imagePushSecret": "s"}}})  # fmt: skip
    for command in ("status", "logs", "delete"):
        asked = kaito(command, "small")
        assert asked.returncode == 2
        assert f"say which one: --local, or --context {team.context}" in asked.stderr
    assert folder.is_dir()
    assert "demo-phi-3" in kaito("status", "--local", "small").stdout
    assert "New" in kaito("status", "--context", team.context, "small").stdout
    assert "nobody is there to be asked" in kaito("delete", "--local", "small").stderr
    assert kaito("delete", "--local", "--yes", "small").returncode == 0
    assert not folder.exists()
    assert team.workspace() is not None
    assert kaito("delete", "small").returncode == 0
    assert team.workspace() is None
    nobody = kaito("status", "small")
    assert nobody.returncode == 2
    assert "there is no run named 'small' on this machine, and no Workspace 'small'" in nobody.stderr


@pytest.mark.usefixtures("controller")
def test_delete_waits_until_the_controller_lets_it_go(kaito: Kaito, team: Team, environment: dict[str, str]) -> None:
    meanwhile(team.succeeds)
    kaito("run", "--yes", team.file)
    patch = {"metadata": {"finalizers": ["workspace.finalizer.kaito.sh"]}}
    team.client.patch(WORKSPACES, "small", team.namespace, patch)
    assert "is being deleted" in kaito("delete", "--no-wait", "small").stdout
    assert "Deleting" in kaito("status").stdout
    refused = kaito("run", "--yes", team.file)
    assert refused.returncode == 2
    assert "is being deleted" in refused.stderr
    team.says(("WorkspaceDeleting", "True", "workspaceDeleted", "giving back what was got for it"))

    deleting = Command(environment, "delete", "small")
    deleting.says("  waiting: giving back what was got for it")
    team.client.patch(WORKSPACES, "small", team.namespace, {"metadata": {"finalizers": None}})
    deleting.ends(0)
    assert f"{team.namespace}/small is gone, and its machines have been given back" in deleting.out
