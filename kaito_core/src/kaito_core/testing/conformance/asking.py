"""Requests for machines as the host makes them, and how long a cloud is waited for."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Final

from kaito_core.api.labels import WORKSPACE, WORKSPACE_NAMESPACE
from kaito_core.plugins.types import (
    NodeProvisioner,
    NodeRequest,
    NodeStatus,
    Offer,
    ProvisioningError,
    Requirements,
)
from kaito_core.testing.conformance.cloud import Cloud

TAGS: Final[Mapping[str, str]] = {WORKSPACE: "conformance", WORKSPACE_NAMESPACE: "default"}

_NUMBERS = itertools.count()
_RUN: Final = secrets.token_hex(2)


def new_id() -> str:
    """An id that nobody has used, in the form of the host's: a letter, then 10 letters and digits. Of a live account too."""
    return f"ws{_RUN}{next(_NUMBERS):05x}"


def request(offer: Offer, wanted: Requirements, *, count: int = 1, request_id: str = "") -> NodeRequest:
    """A wish for ``count`` machines of this offer."""
    wanted = replace(wanted, count=count, capacity_types=(offer.capacity_type,))
    return NodeRequest(request_id or new_id(), offer, wanted, dict(TAGS))


def best_offer(offers: Iterable[Offer]) -> Offer | None:
    """The one that is bought: the first that can be had, those with a GPU before others."""
    can = [o for o in offers if not o.retired]
    return next((o for o in can if o.gpus), can[0] if can else None)


def worded(error: Exception) -> None:
    """Fails when a failure comes without the cloud's words."""
    assert str(error).strip(), f"{type(error).__name__} without a word"


def until(cloud: Cloud, look: Callable[[], NodeStatus], wanted: tuple[str, ...], steps: int) -> NodeStatus:
    """What ``look`` says once its phase is one of ``wanted``, or at last; time passes in between."""
    status = look()
    for _ in range(steps):
        if status.phase in wanted:
            break
        cloud.advance()
        status = look()
    return status


def give_back(cloud: Cloud, provisioner: NodeProvisioner, ids: Iterable[str], steps: int) -> list[str]:
    """Release everything, whatever fails on the way; the ids that are still not gone."""
    left = list(ids)
    for _ in range(steps):
        for request_id in tuple(left):
            try:
                if provisioner.release(request_id).phase == "absent":
                    left.remove(request_id)
            except ProvisioningError:
                continue
        if not left:
            break
        cloud.advance()
    return left
