"""What of the offers can be had now, as far as quotas and restrictions say: a hint for the plan, never a promise.

Azure says nothing of capacity before it is asked for a machine; and a family that its listing leaves out is unknown, not zero."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from kaito_core.plugins.types import Offer
from kaito_provisioner_aks import pool
from kaito_provisioner_aks.arm import Edge
from kaito_provisioner_aks.errors import Refused

KEPT: Final = 60.0
"""Seconds that a look at the quotas is good for: what is given back can be had again."""

KEPT_SIZES: Final = 600.0
"""And one at the sizes, whose list is several MB."""

TOTAL, SPOT_TOTAL = "cores", "lowprioritycores"
"""The quotas of a whole region, in vCPUs. Spot machines count against theirs alone."""

log = logging.getLogger("kaito_provisioner_aks.market")


@dataclass(frozen=True)
class Size:
    """What a subscription may do with one size of machine in one region."""

    family: str
    spot: bool = True
    restricted: str = ""
    """Why it cannot be had at all."""


@dataclass(frozen=True)
class Market:
    """What was found out; whatever is not in it is unknown."""

    left: Mapping[str, int] = field(default_factory=dict)
    """vCPUs by quota, its name in lower case."""
    sizes: Mapping[str, Size] = field(default_factory=dict)
    """By name in lower case."""
    held: frozenset[tuple[str, bool]] = frozenset()
    """(size in lower case, spot) of the pools that we have."""


def read_usages(usages: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """What is left of each quota."""
    return {
        str(u["name"]["value"]).lower(): int(u["limit"]) - int(u.get("currentValue") or 0)
        for u in usages
        if (u.get("name") or {}).get("value") and u.get("limit") is not None
    }


def read_sizes(skus: Iterable[Mapping[str, Any]], location: str) -> dict[str, Size]:
    """The sizes of virtual machines in that region."""
    found = {}
    for sku in skus:
        if str(sku.get("resourceType") or "").lower() != "virtualmachines" or not sku.get("name"):
            continue
        able = {c.get("name"): c.get("value") for c in sku.get("capabilities") or ()}
        found[str(sku["name"]).lower()] = Size(
            str(sku.get("family") or ""), able.get("LowPriorityCapable") != "False", _restriction(sku, location)
        )
    return found


def _restriction(sku: Mapping[str, Any], location: str) -> str:
    """Of a whole region; one of zones leaves the others, and machines that are in no zone."""
    for restriction in sku.get("restrictions") or ():
        where = [str(v).lower() for v in restriction.get("values") or ()]
        if restriction.get("type") == "Location" and (not where or location in where):
            why = restriction.get("reasonCode") or "restricted"
            return f"this subscription may not have {sku['name']} in {location} ({why})"
    return ""


def marked(offers: Iterable[Offer], market: Market, count: int, location: str) -> list[Offer]:
    """The offers, with the reason in ``retired`` where ``count`` machines certainly cannot be had. What a catalogue says of the end
    of a size counts as long as Azure itself does not list it: where it still sells one, it can be had."""
    return [replace(o, retired=_reason(o, market, count, location) or _ended(o, market)) for o in offers]


def _ended(offer: Offer, market: Market) -> str:
    return "" if offer.instance_type.lower() in market.sizes else offer.retired


def _reason(offer: Offer, market: Market, count: int, location: str) -> str:
    spot = offer.capacity_type == "spot"
    if (offer.instance_type.lower(), spot) in market.held:
        # What somebody waits for may have used up the quota itself; it must not look as if it were gone.
        return ""
    size = market.sizes.get(offer.instance_type.lower())
    if market.sizes and size is None:
        return f"{location} has no {offer.instance_type}"
    if size is None:
        return ""
    if size.restricted:
        return size.restricted
    if spot and not size.spot:
        return f"there are no spot machines of {offer.instance_type}"
    needed = offer.cpus * count
    for quota, words in (
        ((SPOT_TOTAL, "spot machines"),) if spot else ((size.family, size.family), (TOTAL, "all families together"))
    ):
        left = market.left.get(quota.lower())
        if left is not None and left < needed:
            return f"quota: {max(0, left)} of {needed} vCPUs of {words} are left in {location}"
    return ""


class Watch:
    """Looks at the market once in a while. What cannot be found out is noted, and never an error."""

    def __init__(self, edge: Edge, clock: Callable[[], float] = time.monotonic) -> None:
        self._edge = edge
        self._clock = clock
        self._market = Market()
        self._sizes: Mapping[str, Size] = {}
        self._until = self._sizes_until = float("-inf")
        self._lock = threading.Lock()

    def __call__(self, location: str) -> Market:
        # While one looks, the others go by what was seen before.
        if self._clock() >= self._until and self._lock.acquire(blocking=False):
            try:
                self._market = self._look(location)
                self._until = self._clock() + KEPT
            finally:
                self._lock.release()
        return self._market

    def _look(self, location: str) -> Market:
        try:
            # The pools last: whatever has used a quota that was seen is in the list by then.
            left = read_usages(self._edge.usages(location))
            if self._clock() >= self._sizes_until:
                self._sizes = read_sizes(self._edge.skus(location), location)
                self._sizes_until = self._clock() + KEPT_SIZES
            pools = [pool.read(p) for p in self._edge.pools()]
        except Refused as e:
            log.warning("quotas and restrictions are not known, so all sizes are offered: %s", e)
            return Market()
        return Market(left, self._sizes, frozenset((p.vm_size.lower(), p.spot) for p in pools if p.owner))
