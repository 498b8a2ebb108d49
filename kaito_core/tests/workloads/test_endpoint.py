"""An endpoint as Kubernetes objects: what a person finds, and that an API server takes it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kaito_core.kube.kinds import Object
from kaito_core.plugins.types import ServedAdapter, ServingConfiguration
from kaito_core.testing.cluster import Cluster
from kaito_core.testing.planning import PRESET
from kaito_core.workloads.endpoint import (
    activator_slice,
    applied,
    as_image_volumes,
    from_template,
    headless_service,
    is_applied,
    mounts_images,
    routed,
    service,
    stateful_set,
)
from kaito_core.workloads.kubernetes import Revision, config_map
from kaito_core.workloads.serving import PORT, ServingJob, serving_workload, start_seconds

GIB = 1 << 30
OWNER: Object = {
    "apiVersion": "kaito.sh/v1beta1",
    "kind": "Workspace",
    "metadata": {"name": "one", "namespace": "default", "uid": "5f8e4d52-0000-4000-8000-000000000000",
                 "labels": {"inferenceset.kaito.sh/created-by": "many", "team": "a"}},
}  # fmt: skip
REVISION = Revision(3, "abcdef0123456789")
ADAPTERS = (ServedAdapter("own", "r.io/own:1"), ServedAdapter("disk", volume={"hostPath": {"path": "/a"}}))
JOB = ServingJob(
    "one", "default", PRESET, "echo", {}, ServingConfiguration("cuda", "bfloat16", 4096, 8, tensor=2), adapters=ADAPTERS
)


def rendered(job: ServingJob = JOB, **more: Any) -> Object:
    workload = serving_workload(job, serve=("python", "-m", "server"))
    given = {"machines": job.machines, "image": "r.io/server:1", "selector": {"app": "serve"}, **more}
    return stateful_set(workload, namespace="default", owner=OWNER, revision=REVISION, **given)


def pod(made: Object) -> dict[str, Any]:
    found: dict[str, Any] = made["spec"]["template"]["spec"]
    return found


def test_the_service_is_the_one_of_the_quick_start() -> None:
    made = service(OWNER, port=PORT)
    assert made["metadata"]["name"] == "one"
    assert made["spec"]["type"] == "ClusterIP"
    assert [(p["port"], p["targetPort"]) for p in made["spec"]["ports"]] == [(80, 5000), (29500, 29500)]
    outside = {**OWNER, "metadata": {**OWNER["metadata"], "annotations": {"kaito.sh/enablelb": "True"}}}
    assert service(outside, port=PORT)["spec"]["type"] == "LoadBalancer"


def test_weights_and_adapters_come_before_the_container_with_the_gpus() -> None:
    found = pod(rendered())
    assert [c["name"] for c in found["initContainers"]] == ["fetch", "check"]
    (main,) = found["containers"]
    assert main["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert not any("resources" in c for c in found["initContainers"])
    assert main["command"][-1] == "serve"
    assert main["ports"][0]["containerPort"] == 5000


def test_it_may_take_as_long_to_start_as_its_weights_need() -> None:
    """KAITO's formula: 15 minutes and 18 seconds per GiB, between half an hour and three hours."""
    assert start_seconds(0) == 1800
    assert start_seconds(100 * GIB) == 15 * 60 + 18 * 100
    assert start_seconds(10_000 * GIB) == 3 * 3600
    probe = pod(rendered())["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 1800
    assert probe["httpGet"] == {"path": "/health", "port": "http"}


def test_of_several_machines_the_others_are_not_killed_for_not_answering() -> None:
    made = rendered(replace(JOB, machines=2))
    assert made["spec"]["replicas"] == 2
    (main,) = pod(made)["containers"]
    assert "startupProbe" not in main
    assert "livenessProbe" not in main
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in main["env"]}
    assert env["KAITO_NODE_RANK"] == {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}
    assert (env["KAITO_NODES"], env["KAITO_LEADER"]) == ("2", "one-0.one-headless.default.svc")
    assert headless_service(OWNER)["spec"]["publishNotReadyAddresses"] is True


def test_labels_of_a_set_are_handed_on_and_others_are_not() -> None:
    has = rendered()["spec"]["template"]["metadata"]["labels"]
    assert has["inferenceset.kaito.sh/created-by"] == "many"
    assert "team" not in has


def test_an_object_is_applied_when_it_differs_and_not_else() -> None:
    wanted = applied(service(OWNER, port=PORT))
    assert not is_applied(None, wanted)
    assert is_applied(wanted, wanted)
    assert not is_applied(wanted, applied(service(OWNER, port=PORT + 1)))
    leaving = {**wanted, "metadata": {**wanted["metadata"], "deletionTimestamp": "2027-01-15T08:00:00Z"}}
    assert not is_applied(leaving, wanted)


@pytest.mark.parametrize(
    ("server", "runtimes", "can"),
    [
        ((1, 35), ["containerd://2.1.4"], True),
        ((1, 36), ["containerd://2.10.0", "cri-o://1.31.2"], True),
        ((1, 34), ["containerd://2.1.4"], False),
        ((1, 35), ["containerd://2.1.4", "containerd://1.7.27"], False),
        ((1, 35), ["docker://28.2.2"], False),
        ((1, 35), ["containerd://unknown", ""], False),
        ((1, 35), [], False),
    ],
)
def test_images_are_mounted_only_where_every_node_can(server: tuple[int, int], runtimes: list[str], can: bool) -> None:
    nodes = [{"status": {"nodeInfo": {"containerRuntimeVersion": r}}} for r in runtimes]
    assert mounts_images(server, nodes) is can


def test_a_service_is_routed_when_a_slice_of_kubernetes_has_a_ready_endpoint() -> None:
    ours = activator_slice(OWNER, ("10.0.0.1", 20001))
    theirs: Object = {
        "metadata": {"labels": {"kubernetes.io/service-name": "one"}},
        "endpoints": [{"conditions": {"ready": False}, "targetRef": {"uid": "p"}}],
    }
    assert not routed([ours, theirs], "one", {"p"})
    theirs["endpoints"].append({"conditions": {"ready": True}, "targetRef": {"uid": "p"}})
    assert routed([ours, theirs], "one", {"p"})
    assert not routed([ours, theirs], "one", {"another"}), "a pod that has the labels and is not the endpoint's"
    assert not routed([theirs], "one-headless", {"p"})
    assert not routed([], "one", {"p"})


def test_an_adapter_in_an_image_becomes_a_volume_and_one_on_a_disk_stays() -> None:
    own, disk = as_image_volumes(ADAPTERS)
    assert own.volume == {"image": {"reference": "r.io/own:1", "pullPolicy": "IfNotPresent"}}
    assert not own.image
    assert disk == ADAPTERS[1]


# --- a real API server


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("mounted", [False, True])
def test_an_api_server_takes_every_field_of_it(workspaces: Cluster, mounted: bool, machines: int) -> None:
    job = replace(JOB, machines=machines, adapters=as_image_volumes(ADAPTERS) if mounted else ADAPTERS)
    cache = {"persistentVolumeClaim": {"claimName": "models"}}
    workload = serving_workload(job, serve=("python", "-m", "server"))
    template = {"metadata": {"labels": {"app": "mine"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    mine = from_template(template, owner=OWNER, revision=REVISION, selector={"app": "serve"}, machines=machines)
    for obj in (
        rendered(job, api_key_secret="keys", cache=cache, image_pull_secrets=("pull",)),
        service(OWNER, port=PORT),
        headless_service(OWNER),
        activator_slice(OWNER, ("10.0.0.1", 20001)),
        activator_slice(OWNER, ("fd00::1", 20001)),
        config_map(workload, namespace="default", owner=OWNER, revision=REVISION),
        mine,
    ):
        text = json.dumps(applied(obj))
        workspaces.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)
