"""What is tuned, with which data, and where the adapter goes."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from kaito_core.api.base import Name, Resource
from kaito_core.api.inference import PresetSpec
from kaito_core.api.source import Checkpoints, DataDestination, DataSource

Method = Annotated[str, Field(max_length=63), AfterValidator(lambda method: method.strip().lower())]
"""A tuning method in lower case, so that ``QLoRA`` and ``qlora`` are one. Which ones exist is up to the tuners."""


class TuningSpec(Resource):
    """A fine-tuning job."""

    preset: PresetSpec = Field(
        description="The model to tune, by the name of its preset.", json_schema_extra={"note": "cannot be changed"}
    )
    method: Method = Field(
        description="How to tune: `qlora`, `lora`, or what an installed tuner has. Upper and lower case are the same.",
        json_schema_extra={"note": "cannot be changed"},
    )
    config: Name = Field(
        "",
        description="A ConfigMap with the key `training_config.yaml`. Absent: the tuner's defaults.",
    )
    input: DataSource = Field(
        description="The training data.", json_schema_extra={"note": "`name` cannot be changed once set"}
    )
    output: DataDestination = Field(description="Where the adapter goes.")
    checkpoints: Checkpoints | None = Field(
        None,
        description="In a cluster: where checkpoints outlive the pod, so that a new one goes on. Without effect on this machine.",
        json_schema_extra={"note": "not in KAITO"},
    )
