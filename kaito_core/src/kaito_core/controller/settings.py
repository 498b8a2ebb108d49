"""What the one who runs the controller decides for all Workspaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """The same for every Workspace of a controller; the chart's values end here."""

    tuner_image: str
    """The image of pods whose workload names none."""
    image_pull_secrets: tuple[str, ...] = ()
    """Names of Secrets, in the Workspace's namespace, that the kubelet pulls images with."""
    checkpoint_storage_class: str = ""
    """Each tuning gets a volume claim of this class for its checkpoints. Without one, and without
    ``tuning.checkpoints``, they are in the pod's scratch space and die with it."""
    checkpoint_size: str = "20Gi"
    """Size of that claim, as a Kubernetes quantity."""
    pod_env: Mapping[str, str] = field(default_factory=dict)
    """Environment of every pod: proxies, ``HF_ENDPOINT``, ``KAITO_INSECURE_REGISTRIES``."""
