"""What the kit asks of a cloud besides the provisioner: an author's fake, or a live account behind the same five methods."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from kaito_core.plugins.types import NodeProvisioner, ProvisioningError


class Cloud(Protocol):
    """One cloud, empty at first. It outlives every provisioner that works on it."""

    def make(self) -> NodeProvisioner:
        """A provisioner as a host has it that has just started: it remembers nothing, and is attached to a cluster if it needs one."""

    def fail_next(self, failure: ProvisioningError) -> None:
        """The next machines that are asked for are refused, once: the cloud says what it says when it means such a failure. With
        `Transient.retry_after` it asks to wait so many seconds. Only called for failures that ``capabilities`` declares."""

    def lose_answer_next(self) -> None:
        """The next call that changes something is carried out, and its answer never arrives. Only called when ``capabilities``
        declares ``lost_answers``."""

    def machines(self) -> Collection[str]:
        """What there is and costs money now, as the cloud itself has it: one name for each machine, on its way in and out included."""

    def advance(self) -> None:
        """Time passes: what the cloud has begun goes on. A fake does the next step; a live account waits some seconds."""
