"""What the one who runs the controller decides for all Workspaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kaito_core.api.pod_security import PodSecurity
from kaito_core.planning.images import Images


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
    serve_after_tuning: str = "onDemand"
    """What becomes of a tuned model where its Workspace does not say: ``onDemand``, ``always`` or ``never``."""
    runtime_images: Mapping[str, str] = field(default_factory=dict)
    """The image of the pods that serve, by runtime. ``transformers`` is in `tuner_image`; another runtime is not used without one."""
    images: Images = field(default_factory=Images)
    """Which GPUs these images can compute on."""
    model_cache: Mapping[str, Any] = field(default_factory=dict)
    """A Kubernetes volume source that keeps the files of models, by content, for all endpoints; empty: each pod fetches its own."""
    pod_security: PodSecurity = field(default_factory=PodSecurity)
    """What Workspaces may put into pods beyond the default."""
    image_volumes: bool = True
    """Mount the images of adapters where the cluster can (Kubernetes 1.35 and containerd 2.1 or CRI-O 1.31 on every node); else, and
    without it, an init container fetches them."""
