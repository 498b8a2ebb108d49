"""What has become of a Workspace. Written by the controller; in a file it is accepted and passed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from kaito_core.api.base import Observed
from kaito_core.api.conditions import Condition, State


class Metric(Observed):
    """One measured figure."""

    description: str = Field("", description="What was measured.")
    value: str = Field("", description="The figure.")
    unit: str = Field("", description="Its unit.")
    config: Mapping[str, str] = Field(default_factory=dict, description="The settings it was measured with.")


class Performance(Observed):
    """Measured figures of a serving Workspace."""

    metrics: Mapping[str, Metric] = Field(
        default_factory=dict, description="Figures by name, among them `peakTokensPerMinute`."
    )


class ProgressStatus(Observed):
    """How far a tuning is."""

    stage: str = Field("", description="`fetch`, `check`, `train`, `verify` or `push`.")
    step: int | None = Field(None, description="Optimizer steps done.")
    steps: int | None = Field(None, description="Optimizer steps in all.")
    loss: float | None = Field(None, description="The last training loss.")
    eval_loss: float | None = Field(None, description="The last loss on held-out data.")
    tokens_per_second: float | None = Field(None, description="Training speed.")
    seconds_left: float | None = Field(None, description="Estimated time to the end, in seconds.")
    cost_so_far: float | None = Field(None, description="What the machines have cost so far, in US dollars (estimate).")


class AdapterStatus(Observed):
    """What a tuning made."""

    image: str = Field("", description="Where the adapter was pushed.")
    digest: str = Field("", description="The digest of its manifest.")
    eval_loss_before: float | None = Field(None, description="Loss on held-out data without the adapter.")
    eval_loss_after: float | None = Field(None, description="Loss on held-out data with it.")


class Attempt(Observed):
    """One try to get machines and run the job on them."""

    number: int | None = Field(
        None,
        description="Which try of this Workspace it is, counted from 0, also when older ones are not listed any more.",
    )
    revision: int | None = Field(None, description="The revision of the Workspace that it was for.")
    provisioner: str = Field("", description="The node provisioner that was asked.")
    instance_type: str = Field("", description="The machine that was tried.")
    region: str = Field("", description="Where.")
    capacity_type: str = Field("", description="`on-demand` or `spot`.")
    alternatives: tuple[str, ...] = Field(
        (), max_length=64, description="Other machines that were asked for along with it, of which any would have done."
    )
    price_per_hour: float | None = Field(None, description="What the machine costs, in US dollars an hour, if known.")
    started: str = Field("", description="When it began (RFC 3339).", json_schema_extra={"format": "date-time"})
    idle_since: str = Field(
        "",
        description="Since when its machines are only kept for the next job (RFC 3339).",
        json_schema_extra={"format": "date-time"},
    )
    ended: str = Field("", description="When it ended (RFC 3339).", json_schema_extra={"format": "date-time"})
    reason: str = Field("", description="How it ended, as one word for programs.")
    message: str = Field("", description="How it ended, in the words of whoever ended it.")


class ServingStatus(Observed):
    """How the endpoint is."""

    phase: Literal["Asleep", "Starting", "Ready", "Failed"] | None = Field(
        None, description="`Asleep`: no machine is held, and the next request gets one."
    )
    since: str = Field("", description="Since when (RFC 3339).", json_schema_extra={"format": "date-time"})
    revision: str = Field("", description="Of `Failed`: the state of the Workspace that has failed.")
    final: bool | None = Field(None, description="Of `Failed`: it is not tried again before the Workspace is changed.")
    config: str = Field(
        "", description="Digest of the settings in the ConfigMap that the endpoint is served with, or shall be."
    )
    annotations: str = Field("", description="Digest of the annotations that it is served by, or shall be.")
    last_request: str = Field(
        "", description="When a request was seen last (RFC 3339).", json_schema_extra={"format": "date-time"}
    )


class WorkspaceStatus(Observed):
    """What has become of a Workspace."""

    state: State | None = Field(
        None,
        description="In one word: serving is `Ready` or `NotReady`, tuning `Running`, `Succeeded` or `Failed`.",
        json_schema_extra={"note": "KAITO: v1beta1 only"},
    )
    conditions: tuple[Condition, ...] = Field((), description="Facts about the Workspace.")
    worker_nodes: tuple[str, ...] = Field((), description="The nodes it runs on.")
    target_node_count: int | None = Field(
        None, description="How many nodes it needs.", json_schema_extra={"note": "KAITO: v1beta1 only"}
    )
    performance: Performance | None = Field(
        None, description="Measured figures of serving.", json_schema_extra={"note": "KAITO: v1beta1 only"}
    )
    progress: ProgressStatus | None = Field(
        None, description="How far a tuning is.", json_schema_extra={"note": "not in KAITO"}
    )
    adapter: AdapterStatus | None = Field(
        None, description="What a tuning made.", json_schema_extra={"note": "not in KAITO"}
    )
    serving: ServingStatus | None = Field(
        None, description="How the endpoint is.", json_schema_extra={"note": "not in KAITO"}
    )
    finished_revision: str = Field(
        "",
        description="The revision whose tuning has ended, well or not: it is not run again.",
        json_schema_extra={"note": "not in KAITO"},
    )
    attempts: tuple[Attempt, ...] = Field(
        (),
        max_length=100,
        description="The tries to get machines and run the job, the oldest first.",
        json_schema_extra={"note": "not in KAITO"},
    )
