"""A workload as Kubernetes objects: what a person finds in the pod, and that an API server takes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.problems import UserError
from kaito_core.testing.cluster import Cluster
from kaito_core.workloads.kubernetes import Revision, config_map, config_name, job, results_claim, results_claim_name
from kaito_core.workloads.pod import read_stages
from kaito_core.workloads.workload import Mount, Stage, Workload

OWNER = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "one", "namespace": "team", "uid": "5f8e4d52-0000-4000-8000-000000000000"},
}
REVISION = Revision(3, "abcdef0123456789")
WHERE: dict[str, Any] = {"namespace": "team", "owner": OWNER, "revision": REVISION}
STAGES = tuple(
    Stage(name, ("python", "-m", "kaito_core.stages", name), f"key-{name}", gpu=name in ("train", "verify"))
    for name in ("fetch", "check", "train", "verify", "push")
)
WORKLOAD = Workload(
    name="one",
    image="",
    stages=STAGES,
    mounts=(
        Mount("data", "/mnt/data", "KAITO_DATA"),
        Mount("weights", "/workspace/weights", "KAITO_WEIGHTS"),
        Mount("results", "/mnt/results", "KAITO_RESULTS"),
    ),
    files={"/mnt/config/job.json": "{}"},
    env={"KAITO_JOB": "/mnt/config/job.json"},
    registry_secrets=("push-login",),
    hub_secret="hub",
    gpus=2,
    labels={"kaito.sh/workspace": "one"},
)


def rendered(workload: Workload = WORKLOAD, **arguments: Any) -> dict[str, Any]:
    given = {"selector": {"app": "tune"}, "checkpoints": None, "image": "r.io/tuner:1", **arguments}
    return job(workload, **WHERE, **given)


def pod(workload: Workload = WORKLOAD, **arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = rendered(workload, **arguments)["spec"]["template"]["spec"]
    return found


def test_only_the_container_that_trains_has_the_gpu() -> None:
    """KAITO's defects 10 and 11: data and push rights are looked at on the GPU, after hours or never."""
    spec = pod()
    assert [c["name"] for c in spec["initContainers"]] == ["fetch", "check"]
    assert all("resources" not in c for c in spec["initContainers"])
    [main] = spec["containers"]
    assert (main["name"], main["command"][-3:]) == ("one", ["train", "verify", "push"])
    assert main["resources"] == {"requests": {"nvidia.com/gpu": "2"}, "limits": {"nvidia.com/gpu": "2"}}
    assert "resources" not in pod(replace(WORKLOAD, gpus=0))["containers"][0]


def test_nothing_runs_beside_the_stages_and_every_image_is_ours() -> None:
    """KAITO's defects 1 and 13: a pusher that polls beside the trainer, and unpinned images of others."""
    spec = pod()
    assert len(spec["containers"]) == 1
    assert {c["image"] for c in [*spec["initContainers"], *spec["containers"]]} == {"r.io/tuner:1"}
    assert {c["image"] for c in pod(replace(WORKLOAD, image="mine:2"))["initContainers"]} == {"mine:2"}


def test_no_container_may_do_more_than_it_must() -> None:
    spec = pod()
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    for container in [*spec["initContainers"], *spec["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_secrets_are_mounted_read_only_and_are_nowhere_else() -> None:
    spec = pod()
    named = {v["secret"]["secretName"]: v for v in spec["volumes"] if "secret" in v}
    assert set(named) == {"push-login", "hub"}
    assert all(v["secret"]["defaultMode"] == 0o440 for v in named.values())
    for container in [*spec["initContainers"], *spec["containers"]]:
        mounts = {m["name"]: m for m in container["volumeMounts"]}
        assert all(mounts[v["name"]]["readOnly"] for v in named.values())
        assert not [e for e in container["env"] if "valueFrom" in e]


def test_shared_memory_and_kaito_s_paths() -> None:
    spec = pod()
    volumes = {v["name"]: v for v in spec["volumes"]}
    assert volumes["dshm"]["emptyDir"] == {"medium": "Memory"}
    paths = {m["mountPath"]: m["name"] for m in spec["containers"][0]["volumeMounts"]}
    assert paths["/dev/shm"] == "dshm"
    assert {"/mnt/data", "/mnt/results", "/workspace/weights", "/mnt/config"} <= set(paths)


def test_it_tolerates_the_taints_of_gpu_pools_and_gives_a_lost_node_up_soon() -> None:
    tolerations = pod()["tolerations"]
    assert {"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"} in tolerations
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in tolerations
    assert {t["tolerationSeconds"] for t in tolerations if "tolerationSeconds" in t} == {60}


def allows(spec: dict[str, Any], node: dict[str, str]) -> bool:
    """Whether the pod's affinity takes a node with these labels."""
    affinity = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]

    def fits(term: dict[str, Any]) -> bool:
        if term["operator"] == "DoesNotExist":
            return term["key"] not in node
        return node.get(term["key"]) in term["values"]

    return any(all(fits(e) for e in term["matchExpressions"]) for term in affinity["nodeSelectorTerms"])


def test_it_runs_on_the_machines_that_were_got_for_it_and_on_nobody_else_s() -> None:
    spec = pod()
    own = {"kaito.sh/workspace": "one", "kaito.sh/workspacenamespace": "team"}
    assert allows(spec, {"app": "tune"})
    assert allows(spec, {"app": "tune", **own})
    assert not allows(spec, {"app": "tune", **own, "kaito.sh/workspace": "two"})
    assert not allows(spec, {"app": "tune", **own, "kaito.sh/workspacenamespace": "others"})
    assert not allows(spec, own)
    assert not allows(pod(selector={}), {"kaito.sh/workspace": "two"})


def test_results_on_a_volume_of_somebody_s_are_in_a_folder_of_their_own() -> None:
    spec = pod(checkpoints={"persistentVolumeClaim": {"claimName": "shared"}})
    volumes = {v["name"]: v for v in spec["volumes"]}
    assert volumes["results-volume"]["persistentVolumeClaim"] == {"claimName": "shared"}
    [places] = [e["value"] for e in spec["containers"][0]["env"] if e["name"] == "KAITO_RESULTS"]
    assert places == "/mnt/results/team/one"


def test_wrong_input_is_never_tried_again_and_a_lost_node_uses_up_no_try() -> None:
    rules = rendered()["spec"]["podFailurePolicy"]["rules"]
    assert [r["action"] for r in rules] == ["FailJob", "Ignore"]
    assert rules[0]["onExitCodes"]["values"] == [2]


def test_values_mean_what_they_say() -> None:
    """The kubelet would take ``$(HOME)`` for something of its own."""
    env = pod(replace(WORKLOAD, env={**WORKLOAD.env, "A": "$(HOME) $$"}))["containers"][0]["env"]
    assert {"name": "A", "value": "$$(HOME) $$$$"} in env


def test_the_stages_come_with_the_job() -> None:
    made = config_map(WORKLOAD, **WHERE)
    assert made["immutable"] is True
    assert tuple(read_stages(made["data"]["stages.json"]).values()) == tuple(replace(s, gpu=False) for s in STAGES)
    with pytest.raises(UserError, match="1,048,576"):
        config_map(replace(WORKLOAD, files={"/mnt/config/job.json": "x" * (1 << 20)}), **WHERE)


@given(
    st.from_regex(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True), st.from_regex(r"[a-z0-9]{63}", fullmatch=True)
)
def test_names_are_labels_and_differ_where_their_workspaces_do(name: str, other: str) -> None:
    for made in (config_name(replace(WORKLOAD, name=name)), results_claim_name(name)):
        assert len(made) <= 63
        assert made[0].isalnum()
        assert made[-1].isalnum()
    if name != other:
        assert results_claim_name(name) != results_claim_name(other)


# --- a real API server


@pytest.fixture(scope="module")
def strict(workspaces: Cluster) -> Iterator[Cluster]:
    """With a namespace that is held to the strictest of Kubernetes' security standards."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team", "labels": labels}}
    workspaces.kubectl("apply", "-f", "-", stdin=json.dumps(namespace))
    workspaces.kubectl("-n", "team", "create", "serviceaccount", "default", check=False)
    yield workspaces
    workspaces.kubectl("delete", "namespace", "team", "--wait=false")


@pytest.mark.parametrize("checkpoints", [None, {"persistentVolumeClaim": {"claimName": "shared"}}])
@pytest.mark.parametrize("name", ["one", "check", "a" * 63])
def test_an_api_server_takes_every_field_of_it(strict: Cluster, name: str, checkpoints: Any) -> None:
    workload = replace(WORKLOAD, name=name, files={**WORKLOAD.files, "/etc/proxy/rules.conf": "deny"})
    made = rendered(workload, checkpoints=checkpoints, image_pull_secrets=["pull"], env={"HTTPS_PROXY": "http://p"})
    bare = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bare", "namespace": "team"},
            "spec": made["spec"]["template"]["spec"]}  # fmt: skip
    claim = results_claim(name, namespace="team", owner=OWNER, storage_class="disk", size="20Gi")
    for obj in (made, bare, config_map(workload, **WHERE), claim):
        strict.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(obj))
