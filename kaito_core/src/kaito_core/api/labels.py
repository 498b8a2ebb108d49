"""Labels, annotations and finalizers that KAITO's users and tools know, and the reserved ones."""

from __future__ import annotations

from typing import Final

GROUP: Final = "kaito.sh"

# Labels
WORKSPACE: Final = "kaito.sh/workspace"
WORKSPACE_NAMESPACE: Final = "kaito.sh/workspacenamespace"
REQUEST: Final = "kaito.sh/request"
"""On what a node provisioner got: the id of the request."""
RAG_ENGINE: Final = "kaito.sh/ragengine"
RAG_ENGINE_NAMESPACE: Final = "kaito.sh/ragenginenamespace"
SERVING: Final = "kaito.sh/serving"
"""Ours, on the pods of an endpoint."""
INFERENCE_SET: Final = "inferenceset.kaito.sh/created-by"
MACHINE_TYPE: Final = "kaito.sh/machine-type"
INFERENCE_ROLE: Final = "kaito.sh/inference-role"
REVISION_NAME: Final = "workspace.kaito.io/name"
KARPENTER_WORKSPACE: Final = "karpenter.kaito.sh/workspace-name"
KARPENTER_WORKSPACE_NAMESPACE: Final = "karpenter.kaito.sh/workspace-namespace"
KARPENTER_INFERENCE_SET: Final = "karpenter.kaito.sh/inferenceset"
KARPENTER_INFERENCE_SET_NAMESPACE: Final = "karpenter.kaito.sh/inferenceset-namespace"
KARPENTER_MANAGED_BY: Final = "karpenter.kaito.sh/managed-by"

RESERVED_SELECTOR_KEYS: Final = frozenset(
    {
        WORKSPACE,
        WORKSPACE_NAMESPACE,
        RAG_ENGINE,
        RAG_ENGINE_NAMESPACE,
        KARPENTER_WORKSPACE,
        KARPENTER_WORKSPACE_NAMESPACE,
        KARPENTER_INFERENCE_SET,
        KARPENTER_INFERENCE_SET_NAMESPACE,
    }
)
"""Set on nodes by the controller itself, to know its own: in ``resource.labelSelector`` they are passed over."""

# Annotations
ENABLE_LOAD_BALANCER: Final = "kaito.sh/enablelb"
RUNTIME: Final = "kaito.sh/runtime"
BYPASS_RESOURCE_CHECKS: Final = "kaito.sh/bypass-resource-checks"
NODE_IMAGE_FAMILY: Final = "kaito.sh/node-image-family"
NODE_CLASS_NAME: Final = "kaito.sh/node-class-name"
DISABLE_BENCHMARK: Final = "kaito.sh/disable-benchmark"
PERFORMANCE_MODE: Final = "kaito.sh/performance-mode"
USE_LOCAL_WEIGHTS: Final = "kaito.sh/use-local-weights"
MODEL_STREAMING: Final = "kaito.sh/model-streaming"
SERVE_AFTER_TUNING: Final = "kaito.sh/serve-after-tuning"
"""Ours: whether a tuned model is served, where the Workspace has no ``inference.policy``."""
ASKED: Final = "kaito.sh/asked"
"""Who is asked for the first machines, and for which: written with the finalizer, before they are asked for."""
API_KEY_SECRET: Final = "kaito.sh/api-key-secret"  # noqa: S105 – the name of an annotation
"""Ours: the Secret whose key ``api-key`` a request to the endpoint must have as its bearer token."""
CONFIG: Final = "kaito.sh/config"
"""The ConfigMap of a job or an endpoint."""
WAKE: Final = "kaito.sh/wake"
"""Ours: when somebody wanted the endpoint to be there (RFC 3339)."""
APPLIED: Final = "kaito.sh/applied"
"""A digest of what an object was made from."""
REVISION_HASH: Final = "workspace.kaito.io/hash"
REVISION: Final = "workspace.kaito.io/revision"

HANDED_ON: Final = frozenset({INFERENCE_SET, INFERENCE_ROLE})
"""Labels of a Workspace that its pods have too."""

ANNOTATION_VALUES: Final[dict[str, tuple[str, ...]]] = {
    ENABLE_LOAD_BALANCER: ("True",),
    USE_LOCAL_WEIGHTS: ("true", "false"),
    SERVE_AFTER_TUNING: ("onDemand", "always", "never"),
}
"""Values that have an effect; any other is passed over, so a person is told. Runtimes come from plugins."""

_STREAMING: Final = "kaito does not stream models from object storage"
WITHOUT_EFFECT: Final[dict[str, tuple[str, str]]] = {
    PERFORMANCE_MODE: (
        "kaito does not translate it into settings of vLLM",
        "write vLLM's own settings into the ConfigMap of inference.config",
    ),
    BYPASS_RESOURCE_CHECKS: (
        "a model that does not fit by the memory estimate is still refused",
        "ask for a machine with more memory, or lower the context length in the ConfigMap",
    ),
    NODE_IMAGE_FAMILY: (
        "the machine gets the image family of its node class or agent pool",
        f"set the family there, and name the node class with {NODE_CLASS_NAME}",
    ),
    DISABLE_BENCHMARK: ("kaito runs no benchmark when an endpoint starts", ""),
    MODEL_STREAMING: (_STREAMING, ""),
    "kaito.sh/model-mirror-storage-class": (_STREAMING, ""),
    "kaito.sh/streaming-service-account": (_STREAMING, ""),
    "inference.kaito.sh/static-model-mirror": (_STREAMING, ""),
    "inference.kaito.sh/stream-datarefs-url": (_STREAMING, ""),
    "inference.kaito.sh/stream-identity-client-id": (_STREAMING, ""),
    "inference.kaito.sh/stream-source-type": (_STREAMING, ""),
}
"""KAITO's annotations that kaito does not honour: what happens in their place, and what to do for the same effect."""

HONOURED: Final = (
    ENABLE_LOAD_BALANCER, RUNTIME, NODE_CLASS_NAME, USE_LOCAL_WEIGHTS, SERVE_AFTER_TUNING, API_KEY_SECRET,
)  # fmt: skip
"""Annotations that people write and kaito reads."""

WRITTEN: Final = (ASKED, CONFIG, WAKE, APPLIED)
"""Annotations that kaito writes itself."""

# Finalizers
FINALIZER: Final = "workspace.finalizer.kaito.sh"
