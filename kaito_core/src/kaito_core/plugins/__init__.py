"""The plugin system, in three files: what can be extended (`hookspecs`), what a plugin hands over (`types`), and how it is
found (`manager`). A plugin imports `hookimpl` and the records from here; `manager` is for the core itself."""

from __future__ import annotations

import pluggy

from kaito_core.plugins.types import (
    API_VERSION,
    Architecture,
    Change,
    ChatFormat,
    Cluster,
    Command,
    Configuration,
    DataFacts,
    Gpu,
    InferenceRuntime,
    InsufficientCapacity,
    MemoryEstimate,
    MemoryItem,
    ModelSource,
    NodeProvisioner,
    NodeRequest,
    NodeStatus,
    NotAuthorized,
    Offer,
    Preset,
    Price,
    ProvisioningError,
    QuotaExceeded,
    Requirements,
    Transient,
    Tuner,
    TuningFit,
    Unsupported,
    normalised,
)

hookimpl = pluggy.HookimplMarker("kaito")

__all__ = [
    "API_VERSION",
    "Architecture",
    "Change",
    "ChatFormat",
    "Cluster",
    "Command",
    "Configuration",
    "DataFacts",
    "Gpu",
    "InferenceRuntime",
    "InsufficientCapacity",
    "MemoryEstimate",
    "MemoryItem",
    "ModelSource",
    "NodeProvisioner",
    "NodeRequest",
    "NodeStatus",
    "NotAuthorized",
    "Offer",
    "Preset",
    "Price",
    "ProvisioningError",
    "QuotaExceeded",
    "Requirements",
    "Transient",
    "Tuner",
    "TuningFit",
    "Unsupported",
    "hookimpl",
    "normalised",
]
