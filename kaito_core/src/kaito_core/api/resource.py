"""The machines that a Workspace asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import Field, Strict

from kaito_core.api.base import Count, Name, Resource

KAITO_DEFAULT_INSTANCE_TYPE: Final = "Standard_NC24ads_A100_v4"
"""What KAITO (v1alpha1) buys when ``instanceType`` is absent; through its v0.3 it was ``Standard_NC12s_v3``.

Not applied here: an absent ``instanceType`` means that kaito chooses the cheapest machine on which the job fits. A
default that costs several dollars an hour and exists in one cloud only is one of the things that people complained
about most."""

LabelValue = Annotated[str, Field(max_length=63)]

Dollars = Annotated[float, Strict(), Field(allow_inf_nan=False)]
"""US dollars; a quoted "1.5" is refused, as an API server would."""

DURATION: Final = "^([0-9]+h)?([0-9]+m)?([0-9]+s)?$"
QUANTITY: Final = "^[0-9]+([.][0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$"
PLACE: Final = "^[a-z0-9]+(-[a-z0-9]+)*$"
"""What the API server matches too (`kaito_core.api.crd`): durations, sizes, and the names of regions and zones."""

_UNITS: Final = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40,
}  # fmt: skip


def seconds_of(duration: str) -> float | None:
    """``1h30m`` as seconds; None for what is no duration."""
    found = re.match(DURATION, duration) if duration.isascii() and "\n" not in duration else None
    if not found or not duration:
        return None
    hours, minutes, seconds = (float(part[:-1]) if part else 0.0 for part in found.groups())
    return hours * 3600 + minutes * 60 + seconds


def bytes_of(quantity: str) -> int | None:
    """``40Gi`` as bytes; None for what is no size."""
    if not re.match(QUANTITY, quantity) or not quantity.isascii() or "\n" in quantity:
        return None
    number = quantity.rstrip("KMGTki")
    return int(float(number) * _UNITS[quantity[len(number) :]])


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
        (), max_length=64, description="Further requirements, all with the operator `In` and one value."
    )

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels that a node must have. An expression with several values is refused by `kaito_core.api.validation`."""
        expressions = {e.key: e.values[0] for e in self.match_expressions if e.values}
        return {**self.match_labels, **expressions}


class Partition(Resource):
    """A part of a GPU, or some of a machine's GPUs."""

    mode: Literal["mig", "accelerator"] = Field(
        description="`mig`: one NVIDIA MIG slice; `accelerator`: some of a node's GPUs."
    )
    profile: Name = Field("", description="With `mig`: the slice, as `1g.10gb`.")
    count: Count | None = Field(None, description="With `accelerator`: how many GPUs.")


class GpuSpec(Resource):
    """The GPUs that a machine must have."""

    model: Annotated[str, Field(max_length=63)] = Field(
        "", description="As `kaito catalog` calls it (`A100-80GB`), or the beginning of that: `A100` is every A100."
    )
    count: Count | None = Field(None, description="At least so many per machine.")
    memory: Annotated[str, Field(max_length=32)] = Field(
        "", description="At least so much usable memory per GPU, as `40Gi`."
    )

    @property
    def memory_bytes(self) -> int:
        """``memory`` in bytes; 0 when nothing is asked for."""
        return bytes_of(self.memory) or 0


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
    instance_types: tuple[Name, ...] = Field(
        (),
        max_length=16,
        description="Machines to take instead of one, the most wanted first: the next is tried when one cannot be had.",
        json_schema_extra={"note": "not in KAITO; not together with `instanceType`"},
    )
    gpu: GpuSpec | None = Field(
        None, description="What GPUs a machine must have.", json_schema_extra={"note": "not in KAITO"}
    )
    capacity_type: Literal["spot", "on-demand", "auto"] | None = Field(
        None,
        description=(
            "`spot` machines are cheaper and may be taken away at any time; `on-demand` ones are not; `auto` takes the cheapest "
            "of both. When absent: `on-demand`."
        ),
        json_schema_extra={"note": "not in KAITO"},
    )
    regions: tuple[LabelValue, ...] = Field(
        (),
        max_length=32,
        description="The regions where a machine may be got, as their cloud calls them (`eastus`).",
        json_schema_extra={"note": "not in KAITO"},
    )
    zones: tuple[LabelValue, ...] = Field(
        (),
        max_length=32,
        description="The zones where a machine may be got, as their cloud calls them (`us-east-1a`).",
        json_schema_extra={"note": "not in KAITO"},
    )
    max_price_per_hour: Dollars | None = Field(
        None,
        description="US dollars that an hour of one machine may cost. What has no known price is not taken.",
        json_schema_extra={"note": "not in KAITO"},
    )
    max_cost: Dollars | None = Field(
        None,
        description="US dollars that the whole job may cost, as estimated. What has no known price is not taken.",
        json_schema_extra={"note": "not in KAITO"},
    )
    keep: Annotated[str, Field(max_length=32)] = Field(
        "",
        description="How long the machines are kept for the next job, as `10m` or `1h30m`. When absent, they are given back at once.",
        json_schema_extra={"note": "not in KAITO"},
    )
    label_selector: LabelSelector | None = Field(
        None,
        description="Labels of the nodes to use; new nodes get them. On this machine it means nothing.",
        json_schema_extra={"note": "required by KAITO, optional here; cannot be changed"},
    )
    preferred_nodes: tuple[Name, ...] = Field(
        (),
        max_length=256,
        description="Existing nodes to use first, by name. Without effect here: use `labelSelector`.",
        json_schema_extra={"note": "deprecated in v1beta1"},
    )
    partition: Partition | None = Field(
        None,
        description="A part of a GPU, or some of a machine's GPUs. Refused, as kaito cannot serve on it yet.",
        json_schema_extra={"note": "since v1beta1; cannot be changed"},
    )

    @property
    def wanted_types(self) -> tuple[str, ...]:
        """The instance types that are named, the most wanted first; empty when any will do."""
        return (self.instance_type,) if self.instance_type else self.instance_types

    @property
    def capacity_types(self) -> tuple[Literal["on-demand", "spot"], ...]:
        """The capacity types that may be taken."""
        if self.capacity_type == "auto":
            return ("spot", "on-demand")
        return ("spot",) if self.capacity_type == "spot" else ("on-demand",)

    @property
    def keep_seconds(self) -> float:
        """How long the machines are kept for the next job; 0 when they are given back at once."""
        return seconds_of(self.keep) or 0.0
