"""What a decision depends on, as one snapshot: nothing in here does I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kaito_core.kube.kinds import Kind, Object
from kaito_core.plugins.types import NodeStatus
from kaito_core.problems import Problem

if TYPE_CHECKING:
    from kaito_core.controller.settings import Settings
    from kaito_core.planning.plan import Plan
    from kaito_core.workloads.endpoint import Address
    from kaito_core.workloads.workload import Workload

Refusal = Literal[
    "InvalidWorkspace",
    "PlanRefused",
    "DoesNotFit",
    "NoNode",
    "PolicyRefused",
    "ConfigMapMissing",
    "SecretMissing",
    "NameTaken",
]
"""Reasons of the condition ``Accepted`` when it is False."""

WAITING: frozenset[Refusal] = frozenset({"NoNode", "ConfigMapMissing", "SecretMissing", "NameTaken"})
"""Those that may mend themselves without a change of the Workspace: what is missing is added, what is in the way goes."""

NameConflict = tuple[Kind, Object]
"""An object of another owner that has the name of one of the Workspace's."""


@dataclass(frozen=True)
class Planned:
    """What planning said of the Workspace as it stands: a plan with a machine to run on, or why there is none."""

    plan: Plan | None = None
    refusal: Refusal | None = None
    problems: tuple[Problem, ...] = ()
    """Why it is refused; with a plan, the warnings: what was written and has no effect."""
    failed: frozenset[str] = frozenset()
    """The provisioners that could not say what they have: that an offer of theirs is not in the plan means nothing."""


@dataclass(frozen=True)
class PodProgress:
    """The last thing that a pod's log said of how far the tuning is."""

    time: float
    """Seconds since the epoch, by the pod's clock."""
    fields: Mapping[str, Any]
    """As in `kaito_core.api.status.ProgressStatus`, camel case."""


@dataclass(frozen=True)
class Installed:
    """What a decision needs to know of a node provisioner."""

    holds: bool = True
    patience: float = 1800.0
    """Both as in `kaito_core.plugins.NodeProvisioner`."""


@dataclass(frozen=True)
class Observed:
    """One Workspace's world at one moment."""

    now: float
    """Seconds since the epoch."""
    planned: Planned = field(default_factory=Planned)
    """Only looked at, and only made, while there is neither a job nor an end for this revision."""
    job: Object | None = None
    pods: tuple[Object, ...] = ()
    """Of the job, in any order."""
    failed_create: str = ""
    """What the API server said last to the controller that should make the pods of the job, or of the endpoint (``FailedCreate``);
    empty when it said nothing, or enough pods are there."""
    stateful_set: Object | None = None
    service: Object | None = None
    headless: Object | None = None
    slice: Object | None = None
    """Of the endpoint, and the activator's place in it."""
    routed: bool = False
    """Whether the Service reaches a pod by itself."""
    servers: tuple[Object, ...] = ()
    """The pods of the endpoint."""
    activity: Mapping[str, PodProgress] = field(default_factory=dict)
    """What these pods said of how busy they are, by uid."""
    activator: Address | None = None
    """Where requests are held while there is no pod; None where nobody holds them."""
    mounts_images: bool = False
    """Whether a pod may have a volume that is an image."""
    config: str = ""
    """What the settings are that the endpoint is served with (`kaito_core.controller.configs.digest`); empty for the defaults."""
    demand: bool = False
    """Whether requests wait there, or have just come."""
    nodes: Mapping[str, Object | None] = field(default_factory=dict)
    """The Node objects that the pods are bound to, and those of ``status.workerNodes``, by name; None where the node is gone."""
    revisions: tuple[Object, ...] = ()
    """The Workspace's ControllerRevisions."""
    name_conflicts: tuple[NameConflict, ...] = ()
    """Objects of other owners where the Workspace's own belong, as far as they are known (`kaito_core.controller.reconcile.ownership`)."""
    asked: Mapping[str, NodeStatus] = field(default_factory=dict)
    """What the provisioners answered in this very reconcile, by `Ensure.key` and `Release.key`."""
    progress: PodProgress | None = None
    provisioners: Mapping[str, Installed] = field(default_factory=dict)
    """Those that are installed, by name."""


@dataclass(frozen=True)
class World:
    """What does not change from one Workspace to the next."""

    settings: Settings
    workload: Callable[[Any, Plan], Workload]
    """What will be run for a plan, after every plugin had its say."""
