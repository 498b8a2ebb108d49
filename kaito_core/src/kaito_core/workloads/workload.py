"""A `Workload` is a container that does not know where it runs.

The same record becomes a pod on a cluster and processes on this machine. A process never hard-codes a place: every mount
says which environment variable holds its path, so that a container sees ``/mnt/data`` and a laptop a folder of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Mount:
    """A folder that the stages share."""

    name: str
    path: str
    """Where a container sees it (KAITO's paths: ``/mnt/data``, ``/mnt/results``, ``/workspace/weights``)."""
    env: str
    """The environment variable that tells the process where it really is."""
    source: Mapping[str, Any] | None = None
    """A Kubernetes volume source (``{"hostPath": …}``, ``{"persistentVolumeClaim": …}``); None is scratch space."""
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a workload: resumable, with its own clear failure."""

    name: str
    command: tuple[str, ...]
    """The program and its arguments; ``python`` means the interpreter that has the plugins."""
    key: str
    """A digest of everything this stage depends on: done once for a key is done for good."""
    gpu: bool = False


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a workload that serves listens on."""

    port: int
    health: str = "/health"
    """Answers 200 once requests can be served."""
    start_seconds: int = 1800
    """How long the start may take, loading the weights included, before something must be wrong."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What to run: stages in order, sharing mounts and environment."""

    name: str
    image: str
    stages: tuple[Stage, ...]
    mounts: tuple[Mount, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    """Small read-only files by container path; ``$KAITO_JOB`` points at the job."""
    env: Mapping[str, str] = field(default_factory=dict)
    registry_secrets: tuple[str, ...] = ()
    """Secrets of type ``kubernetes.io/dockerconfigjson``, merged into one ``config.json`` below ``$DOCKER_CONFIG``."""
    hub_secret: str = ""
    """A Secret whose key ``HF_TOKEN`` becomes the environment variable of that name."""
    gpus: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    endpoint: Endpoint | None = None
    """Of a workload that serves: its last stage does not end by itself. None for one that ends."""


def local_model(folder: str) -> tuple[Mount, ...]:
    """The folder with a model's files on the machine that runs the workload, seen under its own path; nothing without one."""
    if not folder:
        return ()
    source = {"hostPath": {"path": folder, "type": "Directory"}}
    return (Mount("model", folder, "KAITO_MODEL_FOLDER", source, read_only=True),)
