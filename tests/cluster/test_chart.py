"""The Helm chart, and the same objects as `kaito install` has them: rendered, and taken by a real API server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kaito_core import __version__
from kaito_core.api.crd import crd, crd_yaml, inference_set_crd
from kaito_core.testing.cluster import Cluster, running_cluster, why_no_cluster
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from manifests import CHART, helm

HELM = helm()
needs_helm = pytest.mark.skipif(HELM is None, reason="helm is not there: https://helm.sh/docs/intro/install")
needs_cluster = pytest.mark.skipif(bool(why_no_cluster()), reason=why_no_cluster())
REGISTRY = "image.registry=registry.example.com/kaito"


def run_helm(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HELM), *arguments], capture_output=True, text=True, env=env, check=False)


def rendered(*settings: str) -> list[dict[str, Any]]:
    """The chart's objects with these settings."""
    sets = [part for s in (REGISTRY, *settings) for part in ("--set", s)]
    done = run_helm("template", "kaito", CHART, "--namespace", "kaito-system", "--kube-version=1.31.0", *sets)
    assert done.returncode == 0, done.stderr
    return [o for o in yaml.safe_load_all(done.stdout) if o]


def rules(objects: list[dict[str, Any]], kind: str, namespace: str = "") -> set[tuple[str, str]]:
    """(verb, resource) of all rules of that kind in that namespace."""
    roles = [o for o in objects if o["kind"] == kind and o["metadata"].get("namespace", "") == namespace]
    return {(v, r) for o in roles for rule in o["rules"] for v in rule["verbs"] for r in rule["resources"]}


# --- as text


def test_the_definition_is_what_kaito_prints() -> None:
    for definition in (crd(), inference_set_crd()):
        written = CHART / "files" / f"{definition['metadata']['name']}.yaml"
        assert written.read_text(encoding="utf-8") == crd_yaml(definition), "run: make manifests"


def test_chart_and_package_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["version"] == chart["appVersion"] == __version__


@needs_helm
def test_kaito_install_has_what_the_chart_renders() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "manifests.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@needs_helm
def test_lint() -> None:
    done = run_helm("lint", CHART, "--set", REGISTRY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@needs_helm
def test_the_one_required_value_is_asked_for_in_words() -> None:
    done = run_helm("template", "kaito", CHART, "--kube-version=1.31.0")
    assert done.returncode != 0
    assert "image.registry is not set" in done.stderr
    assert "images/build.py" in done.stderr


@needs_helm
@pytest.mark.parametrize(
    "wrong", ["replicas=0", "imagee.registry=x", "logLevel=loud", "checkpoints.size=big", "tenants.templates=all"]
)
def test_a_value_that_makes_no_sense_is_refused(wrong: str) -> None:
    done = run_helm("template", "kaito", CHART, "--kube-version=1.31.0", "--set", REGISTRY, "--set", wrong)
    assert done.returncode != 0
    assert "schema" in done.stderr


@needs_helm
def test_nobody_s_secrets_are_read() -> None:
    objects = rendered()
    everything = rules(objects, "ClusterRole") | rules(objects, "Role", "kaito-system")
    assert not [r for r in everything if "secrets" in r[1] or "*" in r]
    assert ("get", "secrets") in rules(rendered("secretNamespaces={team-a}"), "Role", "team-a")


@needs_helm
def test_with_a_namespace_to_watch_there_are_no_rights_elsewhere() -> None:
    objects = rendered("watchNamespace=team-a")
    assert rules(objects, "ClusterRole") == {("get", "nodes"), ("list", "nodes"), ("watch", "nodes")}
    assert rules(objects, "Role", "team-a") == rules(rendered(), "ClusterRole") - rules(objects, "ClusterRole")
    [deployment] = [o for o in objects if o["kind"] == "Deployment"]
    assert "--namespace=team-a" in deployment["spec"]["template"]["spec"]["containers"][0]["args"]


@needs_helm
def test_every_flag_is_one_of_kaito_controller_s() -> None:
    settings = ["watchNamespace=a", "image.pullSecrets={s}", "checkpoints.storageClass=c", "podEnv.A=b", "env.C=d",
                "image.computeCapability.tuner=7.0", "serving.images.vllm=v", "serving.imageVolumes=false", "serving.modelCache.persistentVolumeClaim.claimName=m",
                "tenants.volumes={secret,hostPath}", "tenants.templates=any"]  # fmt: skip
    [deployment] = [o for o in rendered(*settings) if o["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    helped = subprocess.run(
        [sys.executable, "-m", "kaito_core", "controller", "--help"], capture_output=True, text=True, check=True
    ).stdout
    flags = {a.partition("=")[0] for a in container["args"][1:]}
    assert flags <= set(re.findall(r"--[a-z-]+", helped))
    ip = {"fieldRef": {"fieldPath": "status.podIP"}}
    env = {e["name"]: e.get("value") or e["valueFrom"] for e in container["env"]}
    assert env == {"C": "d", "KAITO_POD_ENV": '{"A":"b"}', "POD_IP": ip}
    assert "--compute-capability=tuner=7.0" in container["args"]
    assert '--model-cache={"persistentVolumeClaim":{"claimName":"m"}}' in container["args"]
    assert {"--allow-volume=secret", "--allow-volume=hostPath", "--allow-any-template"} <= set(container["args"])


@needs_helm
def test_everything_that_can_be_switched_on_renders() -> None:
    kinds = [o["kind"] for o in rendered("metrics.serviceMonitor.enabled=true", "networkPolicy.enabled=false")]
    assert "ServiceMonitor" in kinds
    assert "NetworkPolicy" not in kinds
    [deployment] = [
        o for o in rendered("image.controller=r.example.com/mine:2", "podLabels.a=b") if o["kind"] == "Deployment"
    ]
    template = deployment["spec"]["template"]
    assert template["metadata"]["labels"]["a"] == "b"
    container = template["spec"]["containers"][0]
    assert container["image"] == "r.example.com/mine:2"
    assert f"--tuner-image=registry.example.com/kaito/kaito-tuner:{__version__}" in container["args"]


# --- taken by a real API server


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture
def release(cluster: Cluster) -> Iterator[str]:
    """A namespace for one test; whatever it installed is gone afterwards."""
    yield "kaito-system"
    on(cluster, "uninstall", "kaito", "--namespace=kaito-system")
    kaito(cluster, "uninstall", "--yes", "--all")
    cluster.kubectl("delete", "crd", "workspaces.kaito.sh", "inferencesets.kaito.sh", "--ignore-not-found")


def on(cluster: Cluster, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_helm(
        *arguments, env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "KUBECONFIG": str(cluster.kubeconfig)}
    )


def install(cluster: Cluster, *settings: str) -> subprocess.CompletedProcess[str]:
    sets = [part for s in (REGISTRY, *settings) for part in ("--set", s)]
    return on(cluster, "upgrade", "--install", "kaito", CHART, "--namespace=kaito-system", "--create-namespace", *sets)


def kaito(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "kaito_core", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "KUBECONFIG": str(cluster.kubeconfig)},
        check=False,
    )


WORKSPACE = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "kept", "namespace": "default"},
    "tuning": {
        "preset": {"name": "demo-phi-3"},
        "method": "qlora",
        "input": {"urls": ["https://example.com/data.jsonl"]},
        "output": {"image": "registry.example.com/team/adapter:1", "imagePushSecret": "login"},
    },
}


@needs_helm
@needs_cluster
def test_installed_upgraded_and_uninstalled_by_helm(cluster: Cluster, release: str) -> None:
    """KAITO's users lose all Workspaces when the definition goes with the chart; ours stays."""
    assert (done := install(cluster)).returncode == 0, done.stderr
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(WORKSPACE))
    assert (done := install(cluster, "replicas=1", "podEnv.A=b")).returncode == 0, done.stderr
    assert (
        cluster.kubectl("get", "deployment", "kaito-controller", "-n", release, "-o", "jsonpath={.spec.replicas}")
        == "1"
    )
    assert on(cluster, "uninstall", "kaito", "--namespace", release).returncode == 0
    assert "kept" in cluster.kubectl("get", "workspaces")
    assert (done := install(cluster)).returncode == 0, done.stderr  # and in again, over the definition that stayed
    assert "kept" in cluster.kubectl("get", "workspaces")


@needs_helm
@needs_cluster
def test_the_rights_are_as_small_as_they_look(cluster: Cluster, release: str) -> None:
    assert (done := install(cluster)).returncode == 0, done.stderr

    def can(verb: str, what: str, namespace: str = "default") -> bool:
        who = f"--as=system:serviceaccount:{release}:kaito-controller"
        return cluster.kubectl("auth", "can-i", verb, what, who, "-n", namespace, check=False).strip() == "yes"

    assert can("create", "jobs.batch")
    assert can("patch", "workspaces.kaito.sh", "anywhere") or can("patch", "workspaces.kaito.sh")
    assert can("create", "leases.coordination.k8s.io", release)
    assert can("update", "leases.coordination.k8s.io/kaito-controller", release)
    for verb, what in [
        ("get", "secrets"),
        ("list", "secrets"),
        ("create", "pods"),
        ("delete", "inferencesets.kaito.sh"),
        ("delete", "nodes"),
        ("update", "leases.coordination.k8s.io/another"),
        ("list", "configmaps"),
    ]:
        assert not can(verb, what), f"{verb} {what}"


@needs_helm
@needs_cluster
def test_the_pods_fit_the_strictest_security_standard(cluster: Cluster) -> None:
    """Asked of the API server itself, whose admission holds a namespace to it."""
    [deployment] = [o for o in rendered() if o["kind"] == "Deployment"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "controller", "namespace": "strict"},
        "spec": {**deployment["spec"]["template"]["spec"], "serviceAccountName": "default"},
    }
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strict", "labels": labels}}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    cluster.kubectl("-n", "strict", "create", "serviceaccount", "default", check=False)
    cluster.kubectl("apply", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))


# --- kaito install


@needs_cluster
def test_a_dry_run_changes_nothing(cluster: Cluster, release: str) -> None:
    done = kaito(cluster, "install", "--registry", "registry.example.com/kaito", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "would create  deployments.apps/kaito-controller" in done.stdout
    assert "kaito" not in cluster.kubectl("get", "clusterroles,crds", "-o", "name")


@needs_cluster
def test_what_is_printed_can_be_applied_and_uninstalled(cluster: Cluster, release: str) -> None:
    printed = kaito(cluster, "install", "--registry", "registry.example.com/kaito", "--tag", "7", "--print").stdout
    cluster.kubectl("create", "namespace", release, check=False)
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=printed)
    [image] = re.findall(r"image: (\S+)", cluster.kubectl("get", "deployment", "-n", release, "-o", "yaml"))
    assert image == "registry.example.com/kaito/kaito-controller:7"
    done = kaito(cluster, "uninstall", "--yes")
    assert done.returncode == 0, done.stderr
    left = cluster.kubectl("get", "clusterroles,crds", "-o", "name")
    assert "clusterrole.rbac.authorization.k8s.io/kaito" not in left
    assert "workspaces.kaito.sh" in left


@needs_cluster
def test_workspaces_are_never_left_to_nobody_unasked(cluster: Cluster, release: str) -> None:
    """KAITO's users find GPU machines that nobody gives back, after the controller was removed first."""
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=crd_yaml())
    cluster.kubectl("wait", "--for=condition=Established", "crd/workspaces.kaito.sh")
    held = {**WORKSPACE, "metadata": {**WORKSPACE["metadata"], "finalizers": ["workspace.finalizer.kaito.sh"]}}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(held))
    refused = kaito(cluster, "uninstall", "--yes")
    assert refused.returncode == 2
    assert "default/kept" in refused.stderr
    assert "--keep-workspaces" in refused.stderr
    nobody = kaito(cluster, "uninstall", "--yes", "--all")
    assert nobody.returncode == 2
    assert "the controller is not running" in nobody.stderr
    assert kaito(cluster, "uninstall", "--yes", "--keep-workspaces").returncode == 0
    assert "kept" in cluster.kubectl("get", "workspaces")
    cluster.kubectl("patch", "workspace", "kept", "--type=merge", "-p", '{"metadata":{"finalizers":null}}')


@needs_helm
@needs_cluster
def test_the_two_ways_of_installing_do_not_mix(cluster: Cluster, release: str) -> None:
    assert (done := install(cluster)).returncode == 0, done.stderr
    for command in (["install", "--registry", "registry.example.com/kaito"], ["uninstall", "--yes"]):
        refused = kaito(cluster, *command)
        assert refused.returncode == 2
        assert "by Helm" in refused.stderr


def test_a_registry_that_is_none_is_refused() -> None:
    command = [sys.executable, "-m", "kaito_core", "install", "--print", "--registry", "https://registry.example.com"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--registry" in done.stderr
    assert "Traceback" not in done.stderr
