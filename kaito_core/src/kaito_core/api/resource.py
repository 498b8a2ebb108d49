"""The machines that a Workspace asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import Field

from kaito_core.api.base import Count, Name, Resource

KAITO_DEFAULT_INSTANCE_TYPE: Final = "Standard_NC24ads_A100_v4"
"""What KAITO (v1alpha1) buys when ``instanceType`` is absent; through its v0.3 it was ``Standard_NC12s_v3``.

Not applied here: an absent ``instanceType`` means that kaito chooses the cheapest machine on which the job fits. A
default that costs several dollars an hour and exists in one cloud only is one of the things that people complained
about most."""

LabelValue = Annotated[str, Field(max_length=63)]


class LabelSelectorRequirement(Resource):
    """One ``In`` requirement of a selector."""

    key: str = Field(max_length=317, description="The label's key.")
    operator: Annotated[str, Field(max_length=16)] = Field(
        description="`In`; no other operator can be put on new nodes."
    )
    values: tuple[LabelValue, ...] = Field((), max_length=64, description="The values that the label may have.")


class LabelSelector(Resource):
    """Labels of the nodes to use; new nodes get them."""

    match_labels: Mapping[str, LabelValue] = Field(
        default_factory=dict,
        description="Labels that a node must have, and that new nodes get.",
        json_schema_extra={"maxProperties": 64},
    )
    match_expressions: tuple[LabelSelectorRequirement, ...] = Field(
        (), max_length=64, description="Further requirements, all with the operator `In`."
    )


class Partition(Resource):
    """A part of a GPU, or some of a machine's GPUs."""

    mode: Literal["mig", "accelerator"] = Field(
        description="`mig`: one NVIDIA MIG slice; `accelerator`: some of a node's GPUs."
    )
    profile: Name = Field("", description="With `mig`: the slice, as `1g.10gb`.")
    count: Count | None = Field(None, description="With `accelerator`: how many GPUs.")


class ResourceSpec(Resource):
    """The machines that a Workspace asks for. All of it is optional: kaito then chooses the machine."""

    count: Count = Field(
        1,
        description="How many machines. Tuning uses one.",
        json_schema_extra={"note": "deprecated in v1beta1; cannot be changed"},
    )
    instance_type: Name = Field(
        "",
        description=(
            "The machine, as its cloud calls it (`Standard_NC24ads_A100_v4`). "
            "When absent, kaito chooses the cheapest one on which the job fits."
        ),
        json_schema_extra={"note": "KAITO's v1alpha1 has an expensive default here; ours has none"},
    )
    label_selector: LabelSelector | None = Field(
        None,
        description="Labels of the nodes to use; new nodes get them. On this machine it means nothing.",
        json_schema_extra={"note": "required by KAITO, optional here; cannot be changed"},
    )
    preferred_nodes: tuple[Name, ...] = Field(
        (),
        max_length=256,
        description="Existing nodes to use first, by name.",
        json_schema_extra={"note": "deprecated in v1beta1"},
    )
    partition: Partition | None = Field(
        None,
        description="A part of a GPU, or some of a machine's GPUs. For inference only.",
        json_schema_extra={"note": "since v1beta1; cannot be changed"},
    )
