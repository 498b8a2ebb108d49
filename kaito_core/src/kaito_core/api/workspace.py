"""The Workspace: one set of models for both versions.

``v1alpha1`` and ``v1beta1`` have the same fields here, so that an object can be written in one version and read in the
other without loss. In KAITO, ``resource.partition``, ``presetOptions.modelAccessSecret`` and most of the status exist
in v1beta1 only, and the two versions differ in one default: v1alpha1 has an ``instanceType``
(`kaito_core.api.resource.KAITO_DEFAULT_INSTANCE_TYPE`). We have none in either version: absent means that kaito
chooses. What is left of the difference are two rules in `kaito_core.api.validation`: ``accessMode`` (v1alpha1) and
which hosts a URL may name (v1beta1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

from pydantic import ConfigDict, Field

from kaito_core.api import labels
from kaito_core.api.base import Resource
from kaito_core.api.inference import InferenceSpec, Policy
from kaito_core.api.resource import ResourceSpec
from kaito_core.api.status import WorkspaceStatus
from kaito_core.api.tuning import TuningSpec

V1ALPHA1: Final = "kaito.sh/v1alpha1"
V1BETA1: Final = "kaito.sh/v1beta1"
VERSIONS: Final = (V1ALPHA1, V1BETA1)


class Metadata(Resource):
    """What Kubernetes keeps about any object. Keys that are not named here are kept as they are."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="The Workspace's name: lower case letters, digits and '-', 63 at most.")
    namespace: str = Field("default", description="The namespace it lives in.")
    labels: Mapping[str, str] = Field(default_factory=dict, description="Labels, for selecting.")
    annotations: Mapping[str, str] = Field(default_factory=dict, description="Annotations, for settings and notes.")
    generation: int | None = Field(
        None, description="Counts the changes of what is wished for; kept by the API server."
    )
    uid: str = Field("", description="Kept by the API server.")
    resource_version: str = Field("", description="Kept by the API server.")
    creation_timestamp: str = Field("", description="Kept by the API server.")
    deletion_timestamp: str = Field("", description="Set by the API server once the object is being deleted.")
    finalizers: tuple[str, ...] = Field((), description="Who must clean up before the object may go.")
    owner_references: tuple[Mapping[str, Any], ...] = Field((), description="The objects that this one goes with.")


class Workspace(Resource):
    """A model to tune or to serve, and the machines for it."""

    api_version: Literal["kaito.sh/v1alpha1", "kaito.sh/v1beta1"] = Field(
        description="`kaito.sh/v1beta1` or `kaito.sh/v1alpha1`."
    )
    kind: Literal["Workspace"] = Field(description="`Workspace`.")
    metadata: Metadata = Field(description="Name, namespace, labels and annotations.")
    resource: ResourceSpec = Field(
        default_factory=lambda: ResourceSpec.model_validate({}),
        description="The machines. When absent, kaito chooses the cheapest one on which the job fits.",
    )
    inference: InferenceSpec | None = Field(
        None,
        description="What to serve. Beside `tuning`: the settings for serving the tuned model.",
        json_schema_extra={"note": "KAITO refuses a Workspace with both `inference` and `tuning`"},
    )
    tuning: TuningSpec | None = Field(
        None, description="What to tune.", json_schema_extra={"note": "cannot be set or removed later"}
    )
    status: WorkspaceStatus | None = Field(None, description="What has become of it; written by kaito alone.")

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def namespace(self) -> str:
        return self.metadata.namespace

    def serving_policy(self, after_tuning: Policy = "onDemand") -> Policy:
        """When its model is served: what ``inference.policy`` says; without it always, or after a tuning what the annotation
        ``kaito.sh/serve-after-tuning`` says, or else ``after_tuning``."""
        if self.inference is not None and self.inference.policy is not None:
            return self.inference.policy
        if self.tuning is None:
            return "always"
        said = self.metadata.annotations.get(labels.SERVE_AFTER_TUNING)
        return next((p for p in get_args(Policy) if p == said), after_tuning)
