"""What shall be done about one Workspace: plain data, made by `decide`, carried out by `kaito_core.controller.act`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kaito_core.kube.kinds import Kind, Object
from kaito_core.plugins.types import NodeRequest


@dataclass(frozen=True)
class Ensure:
    """Ask a provisioner for machines, or how far they are."""

    provisioner: str
    request: NodeRequest

    @property
    def key(self) -> str:
        """Where the answer is in `Observed.asked`."""
        return f"ensure/{self.provisioner}/{self.request.id}"


@dataclass(frozen=True)
class Observe:
    """Ask what has become of a request, without asking for anything."""

    provisioner: str
    request_id: str

    @property
    def key(self) -> str:
        """Where the answer is in `Observed.asked`."""
        return f"observe/{self.provisioner}/{self.request_id}"


@dataclass(frozen=True)
class Release:
    """Give a request's machines back."""

    provisioner: str
    request_id: str

    @property
    def key(self) -> str:
        """Where the answer is in `Observed.asked`."""
        return f"release/{self.provisioner}/{self.request_id}"


@dataclass(frozen=True)
class Deletion:
    """An object that shall go; only the very one that was seen, never one of the same name."""

    kind: Kind
    name: str
    uid: str = ""
    foreground: bool = False
    """Its dependents go first: the pods of a job before the job."""


@dataclass(frozen=True)
class Note:
    """A Kubernetes Event on the Workspace."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Endpoint:
    """What the activator is told of a Workspace's endpoint."""

    address: str = ""
    """Where it answers now, ``http://IP:PORT``; empty when it does not."""
    words: str = ""
    """What is being waited for, for clients."""
    refused: bool = False
    """It will not come, for the reason in ``words``."""


@dataclass(frozen=True)
class Decision:
    """Carried out in the order of the fields. Every step may be the last one before a crash."""

    finalizer: bool | None = None
    """Put it (True), remove it (False), leave it (None)."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Written together with the finalizer that is put."""
    ask: Ensure | Observe | Release | None = None
    """The answer goes into `Observed.asked`, and everything is decided anew."""
    create: tuple[tuple[Kind, Object], ...] = ()
    """Made in this order. That one exists already is fine when it is ours."""
    apply: tuple[tuple[Kind, Object], ...] = ()
    """Made so, in this order, whether they were there or not."""
    delete: tuple[Deletion, ...] = ()
    status: Mapping[str, Any] | None = None
    """The whole status; written only when it differs. None: left as it is."""
    notes: tuple[Note, ...] = ()
    endpoint: Endpoint | None = None
    """None: nothing is served."""
    again: bool = False
    """Decide anew at once: what was done is the ground of the next step."""
    look_again_after: float | None = None
    """Seconds; None: the next change of anything will do."""
