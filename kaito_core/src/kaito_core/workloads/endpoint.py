"""A `Workload` that serves as Kubernetes objects: a StatefulSet, its Services, and the activator's place in them. Pure functions.

        Service NAME, 80 and 29500
          │               │
EndpointSlice of     EndpointSlice NAME-activator, ours: there while no pod is ready,
Kubernetes' own:     so that a request is held and not refused
the ready pods
"""

from __future__ import annotations

import copy
import hashlib
import ipaddress
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from kaito_core.api import labels
from kaito_core.kube.kinds import ENDPOINT_SLICES, SERVICES, STATEFUL_SETS, Object, owner_reference
from kaito_core.plugins.types import ServedAdapter
from kaito_core.workloads.kubernetes import GPU_TOLERATIONS, Revision, affinity, fitting, metadata_of, pod_spec
from kaito_core.workloads.pod import SECRETS
from kaito_core.workloads.workload import Workload

HTTP: Final = 80
"""The port of the Service, as the quick start shows it."""
TORCH: Final = 29500
"""The second one: where the processes of a model on several machines find each other."""

BETWEEN: Final = {"torch": TORCH, "rendezvous": 29501, "launchers": 29502, "copies": 29550}
"""Ports between the machines of one model. NCCL and ZeroMQ choose more of their own."""

API_KEY: Final = "api-key"
"""The key of the Secret that ``kaito.sh/api-key-secret`` names, and the file that the pod sees."""

PROBE_SECONDS: Final = 10
START_PROBE_SECONDS: Final = 2
"""Seconds between two probes; at the start somebody is waiting. Of several machines only the first one answers: the others are
never ready, and are not killed for it."""
DRAIN_SECONDS: Final = 5
"""A pod that ends serves on for so long: until then, every node has heard that it is no longer in the Service."""

Address = tuple[str, int]
"""IP and port of the activator for one endpoint."""


def serving_labels(workspace_name: str) -> dict[str, str]:
    """What the pods of an endpoint have, and those of a job do not."""
    return {labels.WORKSPACE: workspace_name, labels.SERVING: "true"}


def service(workspace: Object, *, port: int) -> Object:
    """The Service of the Workspace's own name, as KAITO's: ports 80 and 29500, an address from outside on demand."""
    metadata = workspace["metadata"]
    annotations = metadata.get("annotations") or {}
    load_balancer = str(annotations.get(labels.ENABLE_LOAD_BALANCER, "")).lower() == "true"
    name = metadata["name"]
    return {
        **_head(SERVICES, name, workspace),
        "spec": {
            "type": "LoadBalancer" if load_balancer else "ClusterIP",
            # Of several machines the first one answers.
            "selector": {**serving_labels(name), FIRST_POD: f"{name}-0"},
            "ports": [
                {"name": "http", "protocol": "TCP", "port": HTTP, "targetPort": port},
                {"name": "torch", "protocol": "TCP", "port": TORCH, "targetPort": TORCH},
            ],
        },
    }


SERVICE_NAME: Final = "kubernetes.io/service-name"
MANAGED_BY: Final = "endpointslice.kubernetes.io/managed-by"
"""Labels of an EndpointSlice; the Service's own ones are on those that Kubernetes makes, too."""
POD_INDEX: Final = "apps.kubernetes.io/pod-index"
"""Which of a StatefulSet's pods it is, from 0 on (Kubernetes 1.28)."""
FIRST_POD: Final = "statefulset.kubernetes.io/pod-name"


def headless_name(workspace_name: str) -> str:
    return fitting(workspace_name, "-headless")


def headless_service(workspace: Object) -> Object:
    """Gives each pod a name that the others find it by, ready or not."""
    name = workspace["metadata"]["name"]
    return {
        **_head(SERVICES, headless_name(name), workspace),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": serving_labels(name),
            "ports": [{"name": n, "protocol": "TCP", "port": p, "targetPort": p} for n, p in BETWEEN.items()],
        },
    }


def stateful_set(
    workload: Workload,
    *,
    namespace: str,
    owner: Object,
    revision: Revision,
    selector: Mapping[str, str],
    machines: int,
    image: str,
    image_pull_secrets: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cache: Mapping[str, Any] | None = None,
    api_key_secret: str = "",
) -> Object:
    """One pod for each machine, on nodes with the labels of ``selector``. ``cache`` is a volume source for the files of models."""
    endpoint = workload.endpoint
    if endpoint is None:
        raise ValueError(f"the workload {workload.name} does not serve")
    pod = pod_spec(
        workload,
        namespace=namespace,
        selector=selector,
        results=None,
        image=image,
        image_pull_secrets=image_pull_secrets,
        env={**(env or {}), **_several(workload.name, namespace, machines)},
        cache=cache,
    )
    main = pod["containers"][0]
    main["ports"] = [{"name": "http", "containerPort": endpoint.port, "protocol": "TCP"}]
    asked = {"httpGet": {"path": endpoint.health, "port": "http"}, "periodSeconds": PROBE_SECONDS, "timeoutSeconds": 5}
    main["readinessProbe"] = {**asked, "periodSeconds": 5, "failureThreshold": 2}
    if machines == 1:
        start = math.ceil(endpoint.start_seconds / START_PROBE_SECONDS)
        main["startupProbe"] = {**asked, "periodSeconds": START_PROBE_SECONDS, "failureThreshold": start}
        main["livenessProbe"] = {**asked, "failureThreshold": 3}
    if machines > 1:
        place = {"fieldRef": {"fieldPath": f"metadata.labels['{POD_INDEX}']"}}
        main["env"] = [*main["env"], {"name": "KAITO_NODE_RANK", "valueFrom": place}]
    main["lifecycle"] = {"preStop": {"sleep": {"seconds": DRAIN_SECONDS}}}
    if api_key_secret:
        secret = {"secretName": api_key_secret, "defaultMode": 0o440}
        pod["volumes"].append({"name": "api-key", "secret": secret})
        # Copied: all containers share one list.
        main["volumeMounts"] = [
            *main["volumeMounts"],
            {"name": "api-key", "mountPath": f"{SECRETS}/{API_KEY}", "readOnly": True},
        ]
        main["env"] = [*main["env"], {"name": "KAITO_API_KEY_FILE", "value": f"{SECRETS}/{API_KEY}/{API_KEY}"}]
    own = handed_on(owner)
    metadata = metadata_of(workload.name, namespace, owner, revision, workload)
    metadata["labels"] = {**metadata["labels"], **own, **serving_labels(workload.name)}
    return _set(metadata, workload.name, machines, pod)


def from_template(
    template: Mapping[str, Any], *, owner: Object, revision: Revision, selector: Mapping[str, str], machines: int
) -> Object:
    """The StatefulSet of a pod template of the user's own: as it is, and on the Workspace's machines."""
    name, namespace = owner["metadata"]["name"], owner["metadata"]["namespace"]
    given = copy.deepcopy(dict(template))
    pod = given.get("spec") or {}
    pod["tolerations"] = [*(pod.get("tolerations") or ()), *GPU_TOLERATIONS]
    pod["affinity"] = {**(pod.get("affinity") or {}), **affinity(selector, name, namespace)}
    metadata = {
        "name": name,
        "namespace": namespace,
        "labels": {**handed_on(owner), **serving_labels(name)},
        "annotations": {labels.REVISION: str(revision.number), labels.REVISION_HASH: revision.hash},
        "ownerReferences": [owner_reference(owner)],
    }
    made = _set(metadata, name, machines, pod)
    said = given.get("metadata") or {}
    at = made["spec"]["template"]["metadata"]
    at["labels"] = {**(said.get("labels") or {}), **at["labels"]}
    at["annotations"] = {**(said.get("annotations") or {}), **at["annotations"]}
    return made


def activator_slice(workspace: Object, address: Address) -> Object:
    """Sends what comes for the endpoint to the activator."""
    name, (ip, port) = workspace["metadata"]["name"], address
    made = _head(ENDPOINT_SLICES, slice_name(name), workspace)
    made["metadata"]["labels"] |= {SERVICE_NAME: name, MANAGED_BY: labels.GROUP}
    return {
        **made,
        "addressType": f"IPv{ipaddress.ip_address(ip).version}",
        "endpoints": [{"addresses": [ip], "conditions": {"ready": True, "serving": True, "terminating": False}}],
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
    }


def slice_name(workspace_name: str) -> str:
    return f"{workspace_name}-activator"


def routed(slices: Iterable[Object], service_name: str, pods: Collection[str]) -> bool:
    """Whether Kubernetes itself sends what comes for the Service to one of the pods with these uids: one of its own slices has that
    endpoint, and it is ready.

    A pod that is ready is not yet there: who would take the activator away on the pod's word alone would leave the Service empty
    until Kubernetes has caught up, and clients refused."""

    def is_kubernetes(of: Object) -> bool:
        has = of["metadata"].get("labels") or {}
        return bool(has.get(SERVICE_NAME) == service_name and has.get(MANAGED_BY) != labels.GROUP)

    endpoints = (e for each in slices if is_kubernetes(each) for e in each.get("endpoints") or ())
    return any(
        (e.get("conditions") or {}).get("ready") and (e.get("targetRef") or {}).get("uid") in pods for e in endpoints
    )


MOUNTS_IMAGES: Final = (1, 35)
"""The release of Kubernetes that has image volumes switched on (KEP-4639), …"""
RUNTIMES: Final = {"containerd": (2, 1), "cri-o": (1, 31)}
"""… and those of the container runtimes that can mount them."""


def mounts_images(server: tuple[int, int], nodes: Iterable[Object]) -> bool:
    """Whether a pod may have a volume that is an image, wherever it comes to run among these nodes."""
    runtimes = [n.get("status", {}).get("nodeInfo", {}).get("containerRuntimeVersion", "") for n in nodes]
    return server >= MOUNTS_IMAGES and bool(runtimes) and all(map(_can_mount, runtimes))


def _can_mount(runtime: str) -> bool:
    """``containerd://2.1.4`` can."""
    name, _, version = runtime.partition("://")
    found = re.match(r"v?(\d+)\.(\d+)", version)
    needed = RUNTIMES.get(name.lower())
    return bool(needed and found) and (int(found[1]), int(found[2])) >= needed  # type: ignore[index, operator]


def as_image_volumes(adapters: Iterable[ServedAdapter]) -> tuple[ServedAdapter, ...]:
    """Adapters that are in images, as volumes that the kubelet makes of these images."""
    return tuple(
        replace(a, image="", volume={"image": {"reference": a.image, "pullPolicy": "IfNotPresent"}}) if a.image else a
        for a in adapters
    )


def applied(obj: Object) -> Object:
    """The object with a digest of itself, by which it is seen whether the one in the cluster is this one."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    metadata = obj["metadata"]
    return {
        **obj,
        "metadata": {**metadata, "annotations": {**(metadata.get("annotations") or {}), labels.APPLIED: digest}},
    }


def is_applied(there: Object | None, wanted: Object) -> bool:
    """Whether the object in the cluster was made from ``wanted`` (as `applied` returns it)."""
    if there is None or "deletionTimestamp" in there["metadata"]:
        return False
    has = (there["metadata"].get("annotations") or {}).get(labels.APPLIED)
    return bool(has == wanted["metadata"]["annotations"][labels.APPLIED])


def handed_on(owner: Object) -> dict[str, str]:
    """Labels of the Workspace that its pods have too: a set balances over the pods of all its replicas."""
    has = owner["metadata"].get("labels") or {}
    return {k: v for k, v in has.items() if k in labels.HANDED_ON}


def _head(kind: Any, name: str, owner: Object) -> Object:
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {
            "name": name,
            "namespace": owner["metadata"]["namespace"],
            "labels": {labels.WORKSPACE: owner["metadata"]["name"]},
            "ownerReferences": [owner_reference(owner)],
        },
    }


def _set(metadata: Object, name: str, machines: int, pod: Object) -> Object:
    return {
        "apiVersion": STATEFUL_SETS.api_version,
        "kind": STATEFUL_SETS.kind,
        "metadata": metadata,
        "spec": {
            "replicas": machines,
            "serviceName": headless_name(name),
            "podManagementPolicy": "Parallel",
            # Several machines of one model cannot change one by one: the controller takes all of an old form away together.
            "updateStrategy": {"type": "RollingUpdate" if machines == 1 else "OnDelete"},
            "selector": {"matchLabels": serving_labels(name)},
            "template": {
                "metadata": {"labels": metadata["labels"], "annotations": metadata["annotations"]},
                "spec": pod,
            },
        },
    }


def _several(name: str, namespace: str, machines: int) -> dict[str, str]:
    """How the pods of a model on several machines find each other."""
    if machines == 1:
        return {}
    return {
        "KAITO_NODES": str(machines),
        "KAITO_LEADER": f"{name}-0.{headless_name(name)}.{namespace}.svc",
    }
