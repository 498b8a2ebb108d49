"""What all resource models share: camelCase in YAML, snake_case in Python, frozen, and unknown fields refused.

Models hold what a person wrote, no more: whether a name is well formed or two fields fit together is decided in
`kaito_core.api.validation`, which finds all such problems at once and leaves the model usable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator
from pydantic.alias_generators import to_camel

Count = Annotated[int, Strict(), Field(ge=1, le=2**31 - 1)]
"""A whole number from 1 on; a quoted "1" is refused, as an API server would."""

Text = Annotated[str, Field(max_length=2048)]
"""Bounded, so that an API server can bound the cost of the rules that compare it."""

Name = Annotated[str, Field(max_length=253)]
"""The longest name that Kubernetes knows (a DNS subdomain)."""

Volume = Mapping[str, Any]
"""A Kubernetes VolumeSource, passed on as it is."""


class Resource(BaseModel):
    """A part of a resource. Built from a mapping as YAML or JSON has it: ``Workspace.model_validate({...})``."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """Kubernetes drops ``field: null`` before it looks at the object."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data

    def to_object(self) -> dict[str, Any]:
        """The mapping that `model_validate` reads back into an equal model; defaults are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)


class Observed(Resource):
    """A part of a status. Other writers may add fields of their own, which are passed over."""

    model_config = ConfigDict(extra="ignore")
