"""What a tenant may put into a pod of a cluster: kinds of volumes, and Pod Security baseline control by control."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from kaito_core.api import InferenceSpec, TuningSpec
from kaito_core.api.pod_security import (
    CAPABILITIES,
    SELINUX_TYPES,
    SYSCTLS,
    PodSecurity,
    forbidden,
    template_problems,
)

if TYPE_CHECKING:
    from kaito_core.testing.cluster import Cluster

ALLOWED: dict[str, Any] = {
    "persistentVolumeClaim": {"claimName": "data"},
    "ephemeral": {"volumeClaimTemplate": {"spec": {}}},
    "csi": {"driver": "blob.csi.azure.com"},
    "nfs": {"server": "10.0.0.1", "path": "/data"},
    "azureFile": {"shareName": "data", "secretName": "share"},
    "azureDisk": {"diskName": "d", "diskURI": "/d"},
    "awsElasticBlockStore": {"volumeID": "v"},
    "gcePersistentDisk": {"pdName": "p"},
    "configMap": {"name": "rows"},
    "emptyDir": {},
    "image": {"reference": "r.io/data:1"},
}
REFUSED: dict[str, Any] = {
    "hostPath": {"path": "/"},
    "projected": {"sources": [{"serviceAccountToken": {"path": "token", "audience": "vault"}}]},
    "secret": {"secretName": "payments"},
    "downwardAPI": {"items": []},
    "flexVolume": {"driver": "x"},
    "gitRepo": {"repository": "x"},
    "hostpath": {"path": "/"},
    "tomorrow": {},
}

TEMPLATE = yaml.safe_load("""
spec:
  containers:
    - name: custom-llm-container
      image: registry.example.com/kaito-base:0.0.1
      command: [accelerate]
      args: [launch, --num_processes, "1", inference_api.py, --pipeline, text-generation]
      env: [{name: HF_TOKEN, valueFrom: {secretKeyRef: {name: hf-token, key: HF_TOKEN}}}]
      livenessProbe: {httpGet: {path: /health, port: 5000}, initialDelaySeconds: 600}
      readinessProbe: {httpGet: {path: /health, port: 5000}}
      ports: [{containerPort: 5000}]
      resources: {requests: {nvidia.com/gpu: 1}, limits: {nvidia.com/gpu: 1}}
      securityContext: {runAsNonRoot: true, capabilities: {drop: [ALL], add: [NET_BIND_SERVICE]}, privileged: false}
      volumeMounts: [{name: dshm, mountPath: /dev/shm}]
  securityContext: {seccompProfile: {type: RuntimeDefault}, sysctls: [{name: net.ipv4.tcp_syncookies, value: "1"}]}
  serviceAccountName: default
  hostNetwork: false
  tolerations: [{key: sku, operator: Equal, value: gpu, effect: NoSchedule}]
  volumes: [{name: dshm, emptyDir: {medium: Memory}}]
""")
"""The form of KAITO's examples of a model of one's own."""


def places(model: type[BaseModel], path: str) -> Iterator[str]:
    """Where the API has a `volumeSource`, written as a path with ``[0]`` for lists."""
    for name, field in model.model_fields.items():
        here = f"{path}.{field.alias or name}"
        if field.alias == "volumeSource":
            yield here
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                several = str(field.annotation).startswith("tuple")
                yield from places(kind, f"{here}[0]" if several else here)


PLACES = [*places(TuningSpec, "tuning"), *places(InferenceSpec, "inference")]


def workspace(path: str, value: Any) -> dict[str, Any]:
    """A Workspace with this value at this place."""
    made = value
    for step in reversed(path.split(".")):
        name, several, _ = step.partition("[0]")
        made = {name: [made] if several else made}
    return dict(made)


def test_the_places_of_volumes() -> None:
    assert PLACES == [
        "tuning.input.volumeSource",
        "tuning.output.volumeSource",
        "tuning.checkpoints.volumeSource",
        "inference.adapters[0].source.volumeSource",
    ]


@pytest.mark.parametrize("path", PLACES)
def test_a_volume_of_a_workspace_shows_nothing_of_the_node_and_no_secret(path: str) -> None:
    for kind, source in ALLOWED.items():
        assert forbidden(workspace(path, {kind: source}), PodSecurity()) == []
    for kind, source in REFUSED.items():
        [problem] = forbidden(workspace(path, {kind: source}), PodSecurity())
        assert problem.field == f"{path}.{kind}"
        assert problem.message == f"a volume of the kind {kind!r} is not allowed in this cluster"
        assert forbidden(workspace(path, {kind: source}), PodSecurity(frozenset({kind}))) == []


def changed(path: str, value: Any) -> dict[str, Any]:
    """The template with this value at this place; ``name[0]`` is an item of a list, made where there is none."""
    made: Any = copy.deepcopy(TEMPLATE)
    at = made
    *way, last = path.split("/")
    for step in way:
        name, several, _ = step.partition("[0]")
        at = at.setdefault(name, [{}] if several else {})
        at = at[0] if several else at
    at[last] = value
    return dict(made)


CONTAINERS = ("spec/initContainers[0]", "spec/containers[0]", "spec/ephemeralContainers[0]")
SECURITY: list[tuple[str, Any]] = [
    ("windowsOptions/hostProcess", True),
    ("seLinuxOptions/type", "spc_t"),
    ("seLinuxOptions/user", "root"),
    ("seLinuxOptions/role", "r"),
    ("seccompProfile/type", "Unconfined"),
    ("appArmorProfile/type", "Unconfined"),
]
VIOLATIONS: list[tuple[str, Any]] = [
    *((f"spec/{name}", True) for name in ("hostNetwork", "hostPID", "hostIPC")),
    *((f"spec/{name}", "admin") for name in ("serviceAccountName", "serviceAccount")),
    *((f"spec/securityContext/{path}", value) for path, value in SECURITY),
    *((f"{c}/securityContext/{path}", value) for c in CONTAINERS for path, value in SECURITY),
    *((f"{c}/securityContext/privileged", True) for c in CONTAINERS),
    *((f"{c}/securityContext/procMount", "Unmasked") for c in CONTAINERS),
    *(
        (f"{c}/{handler}/{asks}", {"host": "169.254.169.254", "port": 80})
        for c in CONTAINERS
        for handler in ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle/preStop", "lifecycle/postStart")
        for asks in ("httpGet", "tcpSocket")
    ),
]


@pytest.mark.parametrize(("path", "value"), VIOLATIONS)
def test_each_control_of_baseline(path: str, value: Any) -> None:
    [problem] = template_problems(changed(path, value), "inference.template")
    field = f"inference.template.{path}".replace("/", ".") + (".host" if isinstance(value, dict) else "")
    assert problem.field == field
    assert "Pod Security baseline" in problem.remedy


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        *((f"{c}/ports", [{"hostPort": 8080}], "ports[0].hostPort") for c in CONTAINERS),
        *(
            (f"{c}/securityContext/capabilities/add", ["CHOWN", cap], "securityContext.capabilities.add[1]")
            for c in CONTAINERS
            for cap in ("SYS_ADMIN", "NET_RAW", "ALL", "sys_admin", "CAP_CHOWN")
        ),
        ("spec/securityContext/sysctls", [{"name": "kernel.msgmax"}], "securityContext.sysctls[0].name"),
        *(("spec/volumes", [{"name": "v", kind: {}}], f"spec.volumes[0].{kind}") for kind in REFUSED),
        (
            "metadata/annotations",
            {"container.apparmor.security.beta.kubernetes.io/c": "unconfined"},
            "metadata.annotations[container.apparmor.security.beta.kubernetes.io/c]",
        ),
    ],
)
def test_each_control_of_baseline_on_lists(path: str, value: Any, field: str) -> None:
    [problem] = template_problems(changed(path, value), "inference.template")
    assert problem.field.endswith(field)


def test_what_baseline_allows_passes() -> None:
    assert template_problems(TEMPLATE, "inference.template") == []
    assert template_problems({"spec": {}}, "inference.template") == []
    volumes = [{"name": kind.lower(), kind: source} for kind, source in ALLOWED.items()]
    assert template_problems(changed("spec/volumes", volumes), "inference.template") == []
    apparmor = {"container.apparmor.security.beta.kubernetes.io/c": "localhost/mine", "mine": "x"}
    assert template_problems(changed("metadata/annotations", apparmor), "inference.template") == []
    for path, value in (
        ("spec/containers[0]/ports", [{"containerPort": 80, "hostPort": 0}]),
        ("spec/containers[0]/livenessProbe/httpGet", {"host": "", "port": 80}),
        ("spec/securityContext/seLinuxOptions", {"type": "container_t", "level": "s0:c123"}),
        ("spec/containers[0]/securityContext/procMount", "Default"),
        ("spec/serviceAccountName", ""),
    ):
        assert template_problems(changed(path, value), "inference.template") == []


def test_the_platform_may_open_templates_and_kinds_of_volumes() -> None:
    privileged = {"inference": {"template": changed("spec/containers[0]/securityContext/privileged", True)}}
    assert forbidden(privileged, PodSecurity())
    assert forbidden(privileged, PodSecurity(any_template=True)) == []
    secret = {"inference": {"template": changed("spec/volumes", [{"name": "s", "secret": {"secretName": "mine"}}])}}
    assert forbidden(secret, PodSecurity(frozenset({"secret"}))) == []
    host = {"inference": {"template": changed("spec/volumes", [{"name": "s", "hostPath": {"path": "/"}}])}}
    assert forbidden(host, PodSecurity(frozenset({"hostPath"}))), "baseline has no host path"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=2)
)


@given(path=st.sampled_from([p for p, _ in VIOLATIONS]), junk=JUNK)
def test_what_is_not_as_kubernetes_has_it_does_not_pass(path: str, junk: Any) -> None:
    """A value of another form is a problem, at every step of the way to a control."""
    steps = path.split("/")
    for length in range(2, len(steps)):
        shorter = "/".join(steps[:length]).removesuffix("[0]")
        absent = junk is None or (shorter.endswith("ontainers") and junk in ([], [None], [None, None]))
        assert absent or template_problems(changed(shorter, junk), "inference.template")
    assert junk is None or template_problems({"spec": junk}, "t")
    assert template_problems(junk, "t")


# --- held against Kubernetes' own Pod Security admission


def pod(name: str, template: dict[str, Any]) -> dict[str, Any]:
    """The template as a pod that is valid but for what it violates."""
    made = copy.deepcopy({**template, "apiVersion": "v1", "kind": "Pod"})
    made["metadata"] = {**(made.get("metadata") or {}), "name": name, "namespace": "baseline"}
    spec = made["spec"]
    for kind in ("initContainers", "containers"):
        for number, container in enumerate(spec.get(kind) or ()):
            container.setdefault("name", f"{kind.lower()}-{number}")
            container.setdefault("image", "i")
            if kind == "initContainers":
                container["restartPolicy"] = "Always"  # which may have probes
            for handler in (*(container.get(h) for h in ("livenessProbe", "readinessProbe", "startupProbe")),
                            *(container.get("lifecycle") or {}).values()):  # fmt: skip
                if handler and "tcpSocket" in handler:
                    handler.pop("httpGet", None)
            for port in container.get("ports") or ():
                port.setdefault("containerPort", port.get("hostPort"))
    if spec.get("hostNetwork") or spec.get("hostIPC"):
        spec["securityContext"].pop("sysctls")  # of a network of its own
    for sysctl in (spec.get("securityContext") or {}).get("sysctls") or ():
        sysctl.setdefault("value", "1")
    return made


def allowed() -> Iterator[dict[str, Any]]:
    """A template for every value that passes."""
    yield TEMPLATE
    yield from (changed("spec/containers[0]/securityContext/capabilities/add", [c]) for c in CAPABILITIES)
    yield from (changed("spec/securityContext/sysctls", [{"name": s, "value": "1"}]) for s in SYSCTLS)
    yield from (changed("spec/securityContext/seLinuxOptions/type", t) for t in SELINUX_TYPES)
    yield changed("spec/securityContext/seccompProfile", {"type": "Localhost", "localhostProfile": "p"})
    yield changed("spec/securityContext/appArmorProfile", {"type": "Localhost", "localhostProfile": "p"})
    for kind in ("nfs", "emptyDir", "configMap", "persistentVolumeClaim", "image"):
        yield changed("spec/volumes", [{"name": "dshm", kind: ALLOWED[kind]}])


def test_kubernetes_itself_refuses_the_same(cluster: Cluster) -> None:
    # A pod for Windows looks different, no pod begins with ephemeral containers, accounts are no matter of Pod Security, and the API
    # server wants a user namespace for another /proc, in which Pod Security allows it.
    beyond = ("windowsOptions", "ephemeralContainers", "serviceAccount", "procMount")
    bad = [changed(path, value) for path, value in VIOLATIONS if not any(b in path for b in beyond)]
    bad += [
        changed("spec/containers[0]/ports", [{"hostPort": 8080}]),
        changed("spec/containers[0]/securityContext/capabilities/add", ["SYS_ADMIN"]),
        changed("spec/securityContext/sysctls", [{"name": "kernel.msgmax"}]),
        changed("spec/volumes", [{"name": "dshm", "hostPath": {"path": "/"}}]),
    ]
    good = list(allowed())
    assert all(template_problems(t, "t") for t in bad)
    assert not any(template_problems(t, "t") for t in good)
    enforced = {"pod-security.kubernetes.io/enforce": "baseline"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "baseline", "labels": enforced}}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    while not cluster.kubectl("get", "serviceaccount", "default", "-n", "baseline", check=False):
        time.sleep(0.05)
    pods = [*(pod(f"bad-{n}", t) for n, t in enumerate(bad)), *(pod(f"good-{n}", t) for n, t in enumerate(good))]
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": pods})
    create = [
        str(cluster.programs / "kubectl"),
        "--kubeconfig",
        str(cluster.kubeconfig),
        "create",
        "--dry-run=server",
        "-f",
        "-",
    ]
    said = subprocess.run(create, input=listed, capture_output=True, text=True, check=False)
    refused = {
        int(n) for n in re.findall(r'pods "bad-(\d+)" is forbidden: violates PodSecurity "baseline', said.stderr)
    }
    assert refused == set(range(len(bad))), [bad[n] for n in set(range(len(bad))) - refused]
    assert len(re.findall(r"^pod/good-\d+ created", said.stdout, re.MULTILINE)) == len(good), said.stderr


@pytest.mark.parametrize("example", ["kaito-quickstart", "inference", "with-config"])
def test_the_examples_for_clusters_pass(example: str) -> None:
    text = (Path(__file__).parents[3] / "examples" / f"{example}.yaml").read_text(encoding="utf-8")
    for document in yaml.safe_load_all(text):
        assert forbidden(document, PodSecurity()) == []
