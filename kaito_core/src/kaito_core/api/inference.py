"""What is served: a preset or a pod template, with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from kaito_core.api.base import Name, Resource, Text
from kaito_core.api.resource import seconds_of
from kaito_core.api.source import DataSource

MAX_ADAPTERS = 10

Policy = Literal["onDemand", "always", "never"]
"""When a model is served: from the first request until it has been idle, all the time, or not at all."""

IDLE_SECONDS: Final = 15 * 60.0
"""How long an endpoint on demand waits for a next request where the Workspace does not say."""


class PresetOptions(Resource):
    """Where a preset's model comes from when it is not public."""

    image: Text = Field(
        "", description="An OCI image with the model's weights.", json_schema_extra={"note": "deprecated in v1beta1"}
    )
    image_pull_secrets: tuple[Name, ...] = Field(
        (),
        max_length=64,
        description="Secrets to pull `image` with.",
        json_schema_extra={"note": "deprecated in v1beta1"},
    )
    model_access_secret: Name = Field(
        "",
        description="A Secret with the key `HF_TOKEN`, for models that their hub gives out on request only.",
        json_schema_extra={"note": "since v1beta1"},
    )


class PresetSpec(Resource):
    """A model that kaito knows."""

    name: Name = Field(
        description="The preset's name; upper and lower case are the same. Or any model that kaito can read: `org/name` or "
        "`org/name@revision` of the Hugging Face hub, or, on this machine, a folder as `/path` or `./path`."
    )
    access_mode: Literal["public", "private"] = Field(
        "public",
        description="`private` when the weights come from `presetOptions.image`.",
        json_schema_extra={"note": "deprecated in v1beta1"},
    )
    preset_options: PresetOptions | None = Field(None, description="Where the model comes from when it is not public.")


class AdapterSpec(Resource):
    """A tuned adapter to load onto the model."""

    source: DataSource = Field(description="Where the adapter is: `name`, and `image` or `volumeSource`.")
    strength: Annotated[str, Field(max_length=32)] = Field(
        "1.0", description='How much of the adapter to mix in, from "0" to "1", in quotes.'
    )


class InferenceSpec(Resource):
    """What is served. Beside `tuning` it holds the settings for serving the tuned model."""

    preset: PresetSpec | None = Field(
        None, description="The model, by the name of its preset. Either this or `template`.",
        json_schema_extra={"note": "cannot be changed"},
    )  # fmt: skip
    template: Mapping[str, Any] | None = Field(
        None,
        description="A pod template of your own in place of a preset, passed on as it is.",
        json_schema_extra={"note": "cannot be set or removed later"},
    )
    config: Name = Field(
        "",
        description="A ConfigMap with the key `inference_config.yaml`: settings for the runtime.",
        json_schema_extra={"note": "KAITO: since v0.4"},
    )
    adapters: tuple[AdapterSpec, ...] = Field(
        (), max_length=MAX_ADAPTERS, description=f"Adapters to load onto the model, {MAX_ADAPTERS} at most."
    )
    policy: Policy | None = Field(
        None,
        description=(
            "When the model is served: `onDemand` (machines from the first request until it has been idle for `idleAfter`), `always` "
            "or `never`. When absent: `onDemand` after a tuning, else `always`."
        ),
        json_schema_extra={"note": "not in KAITO"},
    )
    idle_after: Annotated[str, Field(max_length=32)] = Field(
        "",
        description="With `onDemand`: how long no request comes before the machines are given back, as `5m` or `1h30m`. "
        "When absent: `15m`.",
        json_schema_extra={"note": "not in KAITO"},
    )

    @property
    def idle_seconds(self) -> float:
        """How long an endpoint on demand waits for a next request."""
        return seconds_of(self.idle_after) or IDLE_SECONDS
