"""The resources people write: the Workspace of ``kaito.sh/v1alpha1`` and ``v1beta1`` and the InferenceSet, how files become
Workspaces, what is checked about them without a cluster, and the CRDs that are generated from them."""

from __future__ import annotations

from kaito_core.api.conditions import Condition
from kaito_core.api.documents import ConfigMap, Document, Documents, Secret, load_documents, load_text
from kaito_core.api.inference import AdapterSpec, InferenceSpec, PresetOptions, PresetSpec
from kaito_core.api.inference_set import InferenceSet, InferenceSetStatus, validate_inference_set
from kaito_core.api.reading import read_inference_set, read_workspace
from kaito_core.api.resource import LabelSelector, Partition, ResourceSpec
from kaito_core.api.source import DataDestination, DataSource
from kaito_core.api.status import Attempt, ProgressStatus, WorkspaceStatus
from kaito_core.api.tuning import TuningSpec
from kaito_core.api.updates import check_update
from kaito_core.api.validation import PLACEHOLDER, validate_workspace
from kaito_core.api.workspace import V1ALPHA1, V1BETA1, VERSIONS, Metadata, Workspace

__all__ = [
    "PLACEHOLDER",
    "V1ALPHA1",
    "V1BETA1",
    "VERSIONS",
    "AdapterSpec",
    "Attempt",
    "Condition",
    "ConfigMap",
    "DataDestination",
    "DataSource",
    "Document",
    "Documents",
    "InferenceSet",
    "InferenceSetStatus",
    "InferenceSpec",
    "LabelSelector",
    "Metadata",
    "Partition",
    "PresetOptions",
    "PresetSpec",
    "ProgressStatus",
    "ResourceSpec",
    "Secret",
    "TuningSpec",
    "Workspace",
    "WorkspaceStatus",
    "check_update",
    "load_documents",
    "load_text",
    "read_inference_set",
    "read_workspace",
    "validate_inference_set",
    "validate_workspace",
]
