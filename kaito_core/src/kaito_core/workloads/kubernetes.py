"""A `Workload` as Kubernetes objects: a ConfigMap with its files, and a Job whose pod runs its stages. Pure functions.

The stages that need no GPU and no training run as init containers, one each, so that bad data and a wrong push secret end
the pod before the container that holds the GPU has begun. The pod has no side containers, no privileges, no service
account, and a root file system that cannot be written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from kaito_core.api import labels
from kaito_core.kube.kinds import CONFIG_MAPS, JOBS, VOLUME_CLAIMS, Object, owner_reference
from kaito_core.problems import UserError
from kaito_core.workloads.pod import (
    DOCKER_CONFIG,
    HUB_SECRET,
    INIT_STAGES,
    REGISTRY_SECRETS,
    SECRETS,
    STAGES_FILE,
    USER,
    write_stages,
)
from kaito_core.workloads.workload import Mount, Stage, Workload

GPU_RESOURCE: Final = "nvidia.com/gpu"

GPU_TOLERATIONS: Final = (
    {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
    {"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"},
    {"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
)
"""KAITO's, which its users' node pools are tainted for, and the usual one of GPU pools elsewhere."""

GONE_SECONDS: Final = 60
"""A pod on a node that does not answer is given up after so long (Kubernetes' own default is five minutes of GPU money)."""

GRACE_SECONDS: Final = 120
"""For the checkpoint after SIGTERM, as on a laptop."""

BACKOFF_LIMIT: Final = 6
"""KAITO's, and Kubernetes' default."""

CONFIG_BYTES: Final = 1 << 20
"""What the API server takes in one ConfigMap."""

NAME: Final = 63
"""Characters of a label, which a job's name becomes on its pods."""

CACHE: Final = "/mnt/cache"
"""Where downloads are kept by content."""

RESULTS: Final = "results"
"""The mount whose content is worth keeping: checkpoints, the adapter, what is done."""


@dataclass(frozen=True)
class Revision:
    """Which state of a Workspace an object belongs to."""

    number: int
    hash: str
    """SHA-256 in hexadecimal of what the Workspace asks for."""


def job_name(workspace_name: str) -> str:
    """The job has the Workspace's own name, as in KAITO."""
    return workspace_name


def config_name(workload: Workload) -> str:
    """By its content: one revision of a Workspace may be laid out in another way on another machine."""
    text = json.dumps(_config_data(workload), sort_keys=True)
    return fitting(workload.name, f"-job-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def _config_data(workload: Workload) -> dict[str, str]:
    data = {_file_key(workload, path): content for path, content in workload.files.items()}
    return {**data, STAGES_FILE: write_stages(workload.stages)}


def results_claim_name(workspace_name: str) -> str:
    return fitting(workspace_name, "-results")


def config_map(workload: Workload, *, namespace: str, owner: Object, revision: Revision) -> Object:
    """The workload's files and its stages. UserError when they are more than the API server takes."""
    data = _config_data(workload)
    size = sum(len(k) + len(v.encode()) for k, v in data.items())
    if size > CONFIG_BYTES:
        raise UserError(
            f"the files of the job are {size:,} bytes, and Kubernetes takes {CONFIG_BYTES:,} in a ConfigMap",
            "make the training configuration, the list of URLs or what a plugin adds smaller",
            field="tuning",
        )
    return {
        "apiVersion": CONFIG_MAPS.api_version,
        "kind": CONFIG_MAPS.kind,
        "metadata": metadata_of(config_name(workload), namespace, owner, revision, workload),
        "immutable": True,
        "data": data,
    }


def results_claim(name: str, *, namespace: str, owner: Object, storage_class: str, size: str) -> Object:
    """The claim that keeps a Workspace's checkpoints; it lives as long as the Workspace."""
    return {
        "apiVersion": VOLUME_CLAIMS.api_version,
        "kind": VOLUME_CLAIMS.kind,
        "metadata": {
            "name": results_claim_name(name),
            "namespace": namespace,
            "labels": {labels.WORKSPACE: name},
            "ownerReferences": [owner_reference(owner)],
        },
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": storage_class,
            "resources": {"requests": {"storage": size}},
        },
    }


def job(
    workload: Workload,
    *,
    namespace: str,
    owner: Object,
    revision: Revision,
    selector: Mapping[str, str],
    checkpoints: Mapping[str, Any] | None,
    image: str,
    image_pull_secrets: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Object:
    """The Job that runs the workload on nodes with the labels of ``selector``.

    ``checkpoints`` is a volume source for the results, which outlive the pod there, in the folder NAMESPACE/NAME; without
    one they are in the pod's scratch space. ``image`` is for workloads that name none, ``env`` for every pod: what the
    workload says itself comes before it."""
    pod = pod_spec(
        workload,
        namespace=namespace,
        selector=selector,
        results=checkpoints,
        image=image,
        image_pull_secrets=image_pull_secrets,
        env=env,
    )
    pod["restartPolicy"] = "Never"
    metadata = metadata_of(job_name(workload.name), namespace, owner, revision, workload)
    return {
        "apiVersion": JOBS.api_version,
        "kind": JOBS.kind,
        "metadata": metadata,
        "spec": {
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": BACKOFF_LIMIT,
            # A second pod beside one that still ends would write to the same checkpoints.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    # The input is wrong: trying again would only find that out again.
                    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},
                    # The node went away: nobody's fault, and no try used up.
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {
                "metadata": {"labels": metadata["labels"], "annotations": metadata["annotations"]},
                "spec": pod,
            },
        },
    }


def pod_spec(
    workload: Workload,
    *,
    namespace: str,
    selector: Mapping[str, str],
    results: Mapping[str, Any] | None,
    image: str,
    image_pull_secrets: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cache: Mapping[str, Any] | None = None,
) -> Object:
    """The spec of a pod that runs the workload's stages; ``results`` and ``cache`` are volume sources for what shall outlive it."""
    pod: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [*GPU_TOLERATIONS, *_gone_node_tolerations()],
        "affinity": affinity(selector, workload.name, namespace),
        "volumes": _volumes(workload, results, cache),
    }
    if image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": n} for n in image_pull_secrets]
    first = [s for s in workload.stages if s.name in INIT_STAGES]
    then = [s for s in workload.stages if s.name not in INIT_STAGES]
    common = {
        "image": workload.image or image,
        "env": _environment({**(env or {}), **_places(workload, namespace, results)}, workload),
        "volumeMounts": _mounts(workload, cache),
    }
    pod["initContainers"] = [_container(stage.name, [stage], common) for stage in first]
    main = _container(_main_name(workload.name), then, common)
    if workload.gpus:
        # Neither CPU nor memory is asked for: how much a training takes of them nobody has measured for this model and this
        # machine, and a guess would keep the pod off machines that can run it. The GPU is what the machine was chosen for.
        main["resources"] = {
            "requests": {GPU_RESOURCE: str(workload.gpus)},
            "limits": {GPU_RESOURCE: str(workload.gpus)},
        }
    pod["containers"] = [main]
    return pod


# --- parts


def metadata_of(name: str, namespace: str, owner: Object, revision: Revision, workload: Workload) -> Object:
    """The metadata of an object that belongs to ``owner`` and goes with it."""
    return {
        "name": name,
        "namespace": namespace,
        "labels": {**workload.labels, labels.WORKSPACE: workload.name},
        "annotations": {
            **workload.annotations,
            labels.REVISION: str(revision.number),
            labels.REVISION_HASH: revision.hash,
            labels.CONFIG: config_name(workload),
        },
        "ownerReferences": [owner_reference(owner)],
    }


def _container(name: str, stages: Sequence[Stage], common: Mapping[str, Any]) -> Object:
    return {
        "name": name,
        **common,
        "command": ["python", "-P", "-m", "kaito_core.stages.pod", *(s.name for s in stages)],
        "terminationMessagePolicy": "File",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _main_name(workspace_name: str) -> str:
    """The Workspace's, as in KAITO; the names of a pod's containers must differ."""
    return f"{workspace_name}-main" if workspace_name in INIT_STAGES else workspace_name


def _places(workload: Workload, namespace: str, checkpoints: Mapping[str, Any] | None) -> dict[str, str]:
    """Where the stages find their folders."""
    places = {m.env: m.path for m in workload.mounts}
    if checkpoints:
        # Several Workspaces may be given one volume, and none may find its files changed by another.
        places |= {m.env: f"{m.path}/{namespace}/{workload.name}" for m in workload.mounts if m.name == RESULTS}
    return places


def _environment(given: Mapping[str, str], workload: Workload) -> list[Object]:
    env = {
        # The root file system cannot be written: whatever wants to keep something on the side does it in /tmp.
        "HOME": "/tmp",  # noqa: S108 – a volume of this pod alone
        "XDG_CACHE_HOME": "/tmp/cache",  # noqa: S108
        "HF_HOME": "/tmp/cache/huggingface",  # noqa: S108
        "TRITON_CACHE_DIR": "/tmp/cache/triton",  # noqa: S108
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/cache/inductor",  # noqa: S108
        "KAITO_CACHE": CACHE,
        **given,
        **workload.env,
    }
    if workload.registry_secrets:
        env |= {REGISTRY_SECRETS: ",".join(workload.registry_secrets), "DOCKER_CONFIG": DOCKER_CONFIG}
    if workload.hub_secret:
        env |= {HUB_SECRET: workload.hub_secret}
    # The kubelet takes $(NAME) and $$ in a value for something of its own; these values mean what they say.
    return [{"name": k, "value": v.replace("$", "$$")} for k, v in env.items()]


def _volumes(
    workload: Workload, checkpoints: Mapping[str, Any] | None, cache: Mapping[str, Any] | None
) -> list[Object]:
    config = {"name": config_name(workload)}
    volumes: list[Object] = [
        {"name": "config-volume", "configMap": config},
        {"name": "dshm", "emptyDir": {"medium": "Memory"}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "docker-config", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
    ]
    if cache:
        volumes.append({"name": "cache-volume", **cache})
    for mount in workload.mounts:
        source = checkpoints if mount.name == RESULTS and checkpoints else mount.source
        volumes.append({"name": _volume_name(mount), **(source or {"emptyDir": {}})})
    for number, name in enumerate(workload.registry_secrets):
        # Optional, so that a Secret that is not there is said in words by the first stage, in a second, and not by a pod
        # that hangs in ContainerCreating.
        secret = {"secretName": name, "optional": True, "defaultMode": 0o440}
        volumes.append({"name": f"registry-secret-{number}", "secret": secret})
    if workload.hub_secret:
        secret = {"secretName": workload.hub_secret, "optional": True, "defaultMode": 0o440}
        volumes.append({"name": "hub-secret", "secret": secret})
    return volumes


def _mounts(workload: Workload, cache: Mapping[str, Any] | None) -> list[Object]:
    config = _config_folder(workload)
    mounts: list[Object] = [
        {"name": "config-volume", "mountPath": config, "readOnly": True},
        {"name": "dshm", "mountPath": "/dev/shm"},  # noqa: S108 – shared memory of the processes of one training
        {"name": "scratch", "mountPath": "/tmp", "subPath": "tmp"},  # noqa: S108
        {"name": "cache-volume", "mountPath": CACHE}
        if cache
        else {"name": "scratch", "mountPath": CACHE, "subPath": "cache"},
        {"name": "docker-config", "mountPath": DOCKER_CONFIG},
    ]
    for path in workload.files:
        key = _file_key(workload, path)
        if path != f"{config}/{key}":
            # A file of a plugin's, alone, so that it does not hide what is beside it in the image.
            mounts.append({"name": "config-volume", "mountPath": path, "subPath": key, "readOnly": True})
    for mount in workload.mounts:
        mounts.append(
            {"name": _volume_name(mount), "mountPath": mount.path, **({"readOnly": True} if mount.read_only else {})}
        )
    for number, name in enumerate(workload.registry_secrets):
        path = f"{SECRETS}/registry/{name}"
        mounts.append({"name": f"registry-secret-{number}", "mountPath": path, "readOnly": True})
    if workload.hub_secret:
        mounts.append({"name": "hub-secret", "mountPath": f"{SECRETS}/hub", "readOnly": True})
    return mounts


def _volume_name(mount: Mount) -> str:
    return f"{mount.name}-volume"


def affinity(selector: Mapping[str, str], name: str, namespace: str) -> Object:
    """On nodes with these labels that nobody got for himself, or that were got for this very Workspace: one that was got for
    another goes when that one has ended."""
    wanted = [_in(k, v) for k, v in sorted(selector.items())]
    nobodys = [{"key": labels.WORKSPACE, "operator": "DoesNotExist"}]
    own = [_in(labels.WORKSPACE, name), _in(labels.WORKSPACE_NAMESPACE, namespace)]
    terms = [{"matchExpressions": [*wanted, *whose]} for whose in (nobodys, own)]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


def _in(key: str, value: str) -> Object:
    return {"key": key, "operator": "In", "values": [value]}


def _gone_node_tolerations() -> list[Object]:
    return [
        {
            "key": f"node.kubernetes.io/{what}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": GONE_SECONDS,
        }
        for what in ("not-ready", "unreachable")
    ]


def _config_folder(workload: Workload) -> str:
    """Where the job is, and the stages beside it."""
    return str(PurePosixPath(workload.env["KAITO_JOB"]).parent)


def _file_key(workload: Workload, path: str) -> str:
    """What a file is called in the ConfigMap: as it is, beside the job; elsewhere by its path, made to fit."""
    folder, name = PurePosixPath(path).parent, PurePosixPath(path).name
    if str(folder) == _config_folder(workload) and _KEY.fullmatch(name) and name != STAGES_FILE:
        return name
    return f"{hashlib.sha256(path.encode()).hexdigest()[:8]}-{_NOT_KEY.sub('-', name)}"


_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_NOT_KEY = re.compile(r"[^A-Za-z0-9._-]")


def fitting(name: str, suffix: str) -> str:
    """``name`` and ``suffix`` within the length of a label; a name that is too long ends in a digest of itself."""
    room = NAME - len(suffix)
    if len(name) <= room:
        return name + suffix
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: room - 9].rstrip('-.')}-{digest}{suffix}"
