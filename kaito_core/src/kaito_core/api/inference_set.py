"""The InferenceSet: several equal Workspaces that serve one model, and how many of them there shall be.

Fields, labels and conditions are KAITO's. Three things are different: ``spec.labelSelector`` is optional, as in a Workspace;
``template.resource`` and ``template.inference`` are the Workspace's own, with all their fields; and what KAITO accepts and passes
over (``nodeCountLimit``, ``updateStrategy``, a changed template) has an effect. ``autoUpgrade`` does not exist here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from pydantic import Field, PlainValidator, Strict, WithJsonSchema
from pydantic_core import PydanticCustomError

from kaito_core.api import names
from kaito_core.api.base import Observed, Resource
from kaito_core.api.conditions import Condition
from kaito_core.api.inference import InferenceSpec
from kaito_core.api.resource import LabelSelector, LabelValue, ResourceSpec
from kaito_core.api.validation import validate_workspace
from kaito_core.api.workspace import V1BETA1, Metadata, Workspace
from kaito_core.problems import Problem

TEMPLATE: Final = "inferenceset.kaito.sh/template"
"""The annotation of a Workspace that holds the template it was last made from, as JSON."""

CONFIG: Final = "config"
"""In this JSON: digest of the settings in the ConfigMap that the template names."""

READY: Final = "InferenceSetReady"
DELETING: Final = "InferenceSetDeleting"
REASONS: Final[dict[str, tuple[str, ...]]] = {
    READY: ("inferencesetReady", "inferencesetNotReady", "InvalidInferenceSet", "NameTaken", "NodeCountLimit"),
    DELETING: ("inferencesetDeleted",),
}
"""The conditions and their reasons; the first two are KAITO's."""

LONGEST_NAME: Final = 52
"""Characters: with ``-`` and the largest number of a replica it is a Workspace's name still, of 63 at most."""
SET_NAME: Final = "^[a-z]([-a-z0-9]*[a-z0-9])?$"
"""What a Service may be called, too (RFC 1035): the set's has its name."""
ALWAYS: Final = "the replicas of a set serve always: nobody holds the requests to its Service while they sleep"
PERCENT: Final = "^([1-9][0-9]?|100)%$"


def _int_or_text(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise PydanticCustomError("int_or_percent", "must be a number like 1 or a share like '25%'")
    return value


IntOrPercent = Annotated[
    int | str, PlainValidator(_int_or_text), WithJsonSchema({"x-kubernetes-int-or-string": True, "type": "integer"})
]
Number = Annotated[int, Strict(), Field(ge=0, le=2**31 - 1)]


class TemplateMetadata(Resource):
    """What each Workspace of the set gets."""

    labels: Mapping[str, LabelValue] = Field(default_factory=dict, description="Labels of each Workspace.")
    annotations: Mapping[str, str] = Field(
        default_factory=dict, description="Annotations of each Workspace: `kaito.sh/runtime` and the like."
    )


class WorkspaceTemplate(Resource):
    """The Workspaces of the set."""

    metadata: TemplateMetadata = Field(
        default_factory=lambda: TemplateMetadata.model_validate({}), description="What each Workspace of the set gets."
    )
    resource: ResourceSpec = Field(
        default_factory=lambda: ResourceSpec.model_validate({}),
        description="The machines of each replica, as in a Workspace.",
    )
    inference: InferenceSpec = Field(description="What each replica serves, as in a Workspace.")


class RollingUpdate(Resource):
    """How fast replicas are brought to a changed template."""

    max_unavailable: IntOrPercent = Field(
        1,
        description="How many replicas may be away at one time because of a change: a number, or a share as `25%`, rounded up.",
    )


class UpdateStrategy(Resource):
    """What happens when the template changes."""

    type: Literal["RollingUpdate", "OnDelete"] = Field(
        "RollingUpdate",
        description="`RollingUpdate`: replicas are changed one after the other; `OnDelete`: only new ones follow the template.",
    )
    rolling_update: RollingUpdate | None = Field(None, description="How fast, with `RollingUpdate`.")


class InferenceSetSpec(Resource):
    """What is wanted."""

    replicas: Number = Field(1, description="How many Workspaces. Autoscalers write it through the scale subresource.")
    node_count_limit: Number = Field(
        0,
        description="How many machines all replicas together may have, `template.resource.count` each; 0: any number.",
    )
    label_selector: LabelSelector | None = Field(
        None,
        description="`resource.labelSelector` of each Workspace. Either here or in `template.resource`.",
        json_schema_extra={"note": "required by KAITO, optional here"},
    )
    template: WorkspaceTemplate = Field(description="The Workspaces of the set.")
    update_strategy: UpdateStrategy = Field(
        default_factory=lambda: UpdateStrategy.model_validate({}), description="What happens when the template changes."
    )


class InferenceSetStatus(Observed):
    """What has become of it."""

    replicas: int = Field(0, description="How many Workspaces there are; those on their way out do not count.")
    ready_replicas: int = Field(0, description="How many of them serve.")
    updated_replicas: int = Field(0, description="How many of them have the present template.")
    selector: str = Field("", description="Selects the pods of all replicas; autoscalers read it.")
    observed_generation: int | None = Field(None, description="The `metadata.generation` that this status is about.")
    conditions: tuple[Condition, ...] = Field((), description="Facts about the set.")


class InferenceSet(Resource):
    """Several equal Workspaces that serve one model."""

    api_version: Literal["kaito.sh/v1alpha1", "kaito.sh/v1beta1"] = Field(
        description="`kaito.sh/v1beta1` or `kaito.sh/v1alpha1`."
    )
    kind: Literal["InferenceSet"] = Field(description="`InferenceSet`.")
    metadata: Metadata = Field(description="Name, namespace, labels and annotations.")
    spec: InferenceSetSpec = Field(description="What is wanted.")
    status: InferenceSetStatus | None = Field(None, description="What has become of it; written by kaito alone.")

    def replica(self, name: str) -> Workspace:
        """The Workspace that one replica is."""
        template = self.spec.template
        resource = template.resource
        if self.spec.label_selector is not None:
            resource = resource.model_copy(update={"label_selector": self.spec.label_selector})
        given = {
            "name": name,
            "namespace": self.metadata.namespace,
            "labels": dict(template.metadata.labels),
            "annotations": dict(template.metadata.annotations),
        }
        return Workspace.model_validate(
            {
                "apiVersion": V1BETA1,
                "kind": "Workspace",
                "metadata": given,
                "resource": resource.to_object(),
                "inference": template.inference.to_object(),
            }
        )

    def placed(self, problem: Problem) -> Problem:
        """A problem of a replica, with the field of the set that it comes from."""
        field = problem.field
        if field == "metadata.namespace":
            return problem
        if field.startswith("resource.labelSelector") and self.spec.label_selector is not None:
            return replace(problem, field=f"spec.{field.removeprefix('resource.')}")
        return replace(problem, field=f"spec.template.{field}" if field else "spec.template")

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def namespace(self) -> str:
        return self.metadata.namespace

    @property
    def allowed_replicas(self) -> int:
        """``spec.replicas``, or as many as ``spec.nodeCountLimit`` leaves."""
        limit, each = self.spec.node_count_limit, self.spec.template.resource.count
        return min(self.spec.replicas, limit // each) if limit else self.spec.replicas

    def max_unavailable(self, replicas: int) -> int:
        """How many of so many replicas may be away at one time because of a change; at least 1, or nothing would move."""
        rolling = self.spec.update_strategy.rolling_update
        given = rolling.max_unavailable if rolling else 1
        share = math.ceil(int(given.rstrip("%")) * replicas / 100) if isinstance(given, str) else given
        return max(1, share)


def config_of(template: str) -> str:
    """What the annotation `TEMPLATE` says of the settings; empty for the defaults. Anybody may have written something else there."""
    try:
        found = json.loads(template)
    except (ValueError, RecursionError):
        return ""
    config = found.get(CONFIG) if isinstance(found, dict) else None
    return config if isinstance(config, str) else ""


def validate_inference_set(inference_set: InferenceSet, *, allow_private: bool = False) -> list[Problem]:
    """Everything that is wrong with an InferenceSet by itself, the rules of its Workspaces among it.

    ``allow_private`` as in `kaito_core.api.validation.validate_workspace`."""
    replica = inference_set.replica(f"{inference_set.metadata.name}-0")
    found = validate_workspace(replica, allow_private=allow_private)
    return [*_own(inference_set), *(inference_set.placed(p) for p in found if p.field != "metadata.name")]


def _own(inference_set: InferenceSet) -> Iterator[Problem]:
    name, spec = inference_set.metadata.name, inference_set.spec
    if len(name) > LONGEST_NAME:
        yield Problem(f"is {len(name)} characters long; {LONGEST_NAME} is the most, as its Workspaces add a number",
                      "choose a shorter name", "metadata.name")  # fmt: skip
    elif trouble := names.label_trouble(name):
        yield Problem(trouble, "choose a name like my-model", "metadata.name")
    elif not name[0].isalpha():
        yield Problem(f"{name!r} begins with a digit, and its Service cannot be called so", "begin with a letter",
                      "metadata.name")  # fmt: skip
    if spec.label_selector is not None and spec.template.resource.label_selector is not None:
        yield Problem("is given here and in template.resource", "keep one of them", "spec.labelSelector")
    if spec.template.inference.policy not in (None, "always"):
        yield Problem(ALWAYS, "remove it; to give the machines back, scale the set to 0",
                      "spec.template.inference.policy")  # fmt: skip
    rolling = spec.update_strategy.rolling_update
    if rolling is not None:
        given = rolling.max_unavailable
        if not (re.match(PERCENT, given) and "\n" not in given if isinstance(given, str) else given >= 1):
            yield Problem(f"{given!r} leaves nothing that could be changed, or is no share",
                          "write a number from 1 on, or a share like '25%'",
                          "spec.updateStrategy.rollingUpdate.maxUnavailable")  # fmt: skip
