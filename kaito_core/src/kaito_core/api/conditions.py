"""Condition types, their reasons, and the states of a Workspace, as tools that watch KAITO know them.

Plain strings, because they end up in JSON and YAML.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from kaito_core.api.base import Observed

# Condition types
ACCEPTED: Final = "Accepted"
"""Not in KAITO: whether the Workspace can be run at all; when False, its reason says why not."""
NODE_CLAIM_READY: Final = "NodeClaimReady"
NODES_READY: Final = "NodesReady"
RESOURCE_READY: Final = "ResourceReady"
INFERENCE_READY: Final = "InferenceReady"
JOB_STARTED: Final = "JobStarted"
BENCHMARK_COMPLETED: Final = "BenchmarkCompleted"
MODEL_MIRROR_READY: Final = "ModelMirrorReady"
SCALING_DOWN_COMPLETED: Final = "ScalingDownCompleted"
WORKSPACE_DELETING: Final = "WorkspaceDeleting"
WORKSPACE_SUCCEEDED: Final = "WorkspaceSucceeded"
RECONCILED: Final = "Reconciled"
"""Not in KAITO: there, and False, only while something that the controller does for the object fails. It says nothing of how the
object itself is: that is in the other conditions, which an error leaves as they are."""

REASONS: Final[dict[str, tuple[str, ...]]] = {
    ACCEPTED: (
        "Planned",
        "InvalidWorkspace",
        "PlanRefused",
        "DoesNotFit",
        "NoNode",
        "PolicyRefused",
        "ConfigMapMissing",
        "SecretMissing",
        "NameTaken",
    ),
    NODE_CLAIM_READY: ("NodeClaimsReady", "NodeClaimNotReady"),
    NODES_READY: ("NodesReady", "NodeNotReady", "NodePluginsNotReady"),
    RESOURCE_READY: ("workspaceResourceStatusSuccess", "workspaceResourceStatusNotReady", "ModelMirrorNotReady"),
    INFERENCE_READY: (
        "WorkspaceInferenceStatusSuccess",
        "WorkspaceInferenceStatusPending",
        "SASTokenFetchFailed",
        "ImagePullError",
        "ContainerCrashLoopBackOff",
        "ContainerOOMKilled",
        "ContainerStartError",
        "PodEvicted",
        "NodeDiskPressure",
        "NodeMemoryPressure",
        "Unschedulable",
        "ModelMirrorCreateFailed",
    ),
    JOB_STARTED: (
        "WorkspaceTuningJobStatusStarted",
        "WorkspaceTuningJobStatusPending",
        "WorkspaceTuningJobStatusFailed",
    ),
    BENCHMARK_COMPLETED: ("BenchmarkCompleted", "BenchmarkFailed"),
    MODEL_MIRROR_READY: ("ModelMirrorPending",),
    WORKSPACE_DELETING: ("workspaceDeleted",),
    RECONCILED: ("ReconcileError",),
    WORKSPACE_SUCCEEDED: ("workspaceSucceeded", "workspacePending", "workspaceFailed", "BenchmarkFailed"),
}
"""KAITO's reasons per condition type. A node claim's own reason, or the cloud's, may stand in their place."""

State = Literal["Pending", "Ready", "NotReady", "Running", "Succeeded", "Failed"]
"""``Ready`` and ``NotReady`` belong to inference; ``Running``, ``Succeeded`` and ``Failed`` to tuning."""


class Condition(Observed):
    """One fact about the Workspace, in the form of Kubernetes' ``metav1.Condition``."""

    type: str = Field(max_length=316, description="What the condition is about: `ResourceReady`, `JobStarted`, …")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field("", max_length=1024, description="Why, as one word for programs.")
    message: str = Field("", max_length=32768, description="Why, for people: the cause in the words of whoever failed.")
    last_transition_time: str = Field(
        "",
        description="When `status` last changed (RFC 3339).",
        json_schema_extra={"format": "date-time"},
    )
    observed_generation: int | None = Field(None, description="The `metadata.generation` that the condition is about.")
