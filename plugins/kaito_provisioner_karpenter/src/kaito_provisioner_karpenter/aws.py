"""What AWS says before anything is asked for: where a type is sold, what the account may have, and what spot costs.

Needs boto3 (``pip install 'kaito-provisioner-karpenter[aws]'``) and the rights that the README lists. Every question may fail on
its own: then nothing is known of that matter, a line in the log says so, and planning goes on. What is found out is an
expectation: a price is no capacity, and Karpenter has the last word."""

from __future__ import annotations

import importlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from kaito_core.planning import catalogue
from kaito_core.plugins.types import CapacityType, Offer, Price

CHECKS: Final = "KAITO_AWS_CHECKS"
"""``off``: AWS is not asked."""

FRESH: Final = 600.0
"""Seconds that an answer is used, as long as Karpenter keeps its own."""
AGAIN: Final = 120.0
"""Seconds until something is asked again that failed."""

SPOT_SOURCE: Final = "AWS spot price history"

QUOTAS: Final[tuple[tuple[str, CapacityType, str, str], ...]] = (
    (r"(g|gr|vt)\d", "on-demand", "L-DB2E81BA", "Running On-Demand G and VT instances"),
    (r"(g|gr|vt)\d", "spot", "L-3819A6DF", "All G and VT Spot Instance Requests"),
    (r"p\d", "on-demand", "L-417A185B", "Running On-Demand P instances"),
    (r"p[234]", "spot", "L-7212CCBC", "All P4, P3 and P2 Spot Instance Requests"),
    (r"p5", "spot", "L-C4BD4855", "All P5 Spot Instance Requests"),
    (r"[acdhimrtz]\d", "on-demand", "L-1216C47A", "Running On-Demand Standard instances"),
    (r"[acdhimrtz]\d", "spot", "L-34B43A08", "All Standard Spot Instance Requests"),
)
"""Quotas of the service ``ec2``, in vCPUs per region. For spot of P6 sources disagree, so that nothing is said of it."""

log = logging.getLogger("kaito.provisioner.karpenter.aws")


@dataclass(frozen=True)
class Facts:
    """What is known; what is not in it is not known."""

    zones: Mapping[str, frozenset[str]] | None = None
    """Where each type that was asked for is sold; None when AWS did not say."""
    quotas: Mapping[str, float] = field(default_factory=dict)
    """vCPUs that the account may have, by code."""
    used: Mapping[str, int] | None = None
    """vCPUs that run now, by code; None when AWS did not say."""
    spot: Mapping[str, tuple[float, str, str]] = field(default_factory=dict)
    """The lowest spot price of each type now: US dollars an hour, zone, date."""


def quota_of(instance_type: str, capacity_type: str) -> tuple[str, str]:
    """Code and name of the quota that a machine counts against; empty when it is not known."""
    for pattern, kind, code, name in QUOTAS:
        if kind == capacity_type and re.match(pattern, instance_type):
            return code, name
    return "", ""


def checked(offers: Iterable[Offer], facts: Facts) -> list[Offer]:
    """The offers with what is known of them: one that cannot be had says why, and spot has today's price."""
    return [_checked(o, facts) for o in offers]


def _checked(offer: Offer, facts: Facts) -> Offer:
    if offer.retired:
        return offer
    if facts.zones is not None:
        sold = facts.zones.get(offer.instance_type, frozenset())
        if not sold:
            return replace(offer, retired=f"AWS does not sell it in {offer.region}")
        if offer.zone and offer.zone not in sold:
            return replace(offer, retired=f"AWS does not sell it in {offer.zone}, but in {', '.join(sorted(sold))}")
    code, name = quota_of(offer.instance_type, offer.capacity_type)
    limit = facts.quotas.get(code)
    if limit is not None:
        used = (facts.used or {}).get(code, 0)
        if limit - used < offer.cpus:
            taken = f", {used} in use" if facts.used is not None else ""
            return replace(
                offer,
                retired=f"the quota {name} ({code}) in {offer.region} is {limit:.0f} vCPUs{taken}, and it needs "
                f"{offer.cpus}: ask for more in the Service Quotas console",
            )
    price = facts.spot.get(offer.instance_type)
    if offer.capacity_type == "spot" and price is not None:
        return replace(offer, price=Price(price[0], f"{SPOT_SOURCE}, {price[1]}", price[2]))
    return offer


# --- asking


def zones_of(ec2: Any, types: Sequence[str]) -> dict[str, frozenset[str]]:
    """The availability zones in which each type is sold. A type that is sold nowhere is simply not in the answer."""
    found: dict[str, set[str]] = {}
    pages = ec2.get_paginator("describe_instance_type_offerings").paginate(
        LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": list(types)}]
    )
    for page in pages:
        for sold in page["InstanceTypeOfferings"]:
            found.setdefault(sold["InstanceType"], set()).add(sold["Location"])
    return {t: frozenset(z) for t, z in found.items()}


def quotas_of(service_quotas: Any, codes: Iterable[str]) -> dict[str, float]:
    """vCPUs by quota code; one that the account has no value of its own for is left out."""
    found = {}
    for code in sorted(codes):
        try:
            answer = service_quotas.get_service_quota(ServiceCode="ec2", QuotaCode=code)
        except service_quotas.exceptions.NoSuchResourceException:
            continue
        found[code] = float(answer["Quota"]["Value"])
    return found


def used_of(ec2: Any) -> dict[str, int]:
    """vCPUs of the machines that run or start now, by the quota that they count against."""
    found: dict[str, int] = {}
    states = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    for page in ec2.get_paginator("describe_instances").paginate(Filters=states):
        for instance in (i for r in page["Reservations"] for i in r["Instances"]):
            kind = "spot" if instance.get("InstanceLifecycle") == "spot" else "on-demand"
            code, _ = quota_of(instance["InstanceType"], kind)
            if code:
                found[code] = found.get(code, 0) + _cpus(instance)
    return found


def _cpus(instance: Mapping[str, Any]) -> int:
    """vCPUs of a machine that runs; where AWS leaves them out, as the catalogue has them."""
    options = instance.get("CpuOptions") or {}
    if "CoreCount" in options:
        return int(options["CoreCount"]) * int(options.get("ThreadsPerCore", 1))
    known = catalogue.instance_types().get(instance["InstanceType"].lower())
    return known.cpus if known else 0


def spot_prices_of(ec2: Any, types: Sequence[str]) -> dict[str, tuple[float, str, str]]:
    """The lowest spot price of each type now, with its zone and its date."""
    found: dict[str, tuple[float, str, str]] = {}
    pages = ec2.get_paginator("describe_spot_price_history").paginate(
        InstanceTypes=list(types),
        ProductDescriptions=["Linux/UNIX", "Linux/UNIX (Amazon VPC)"],
        StartTime=datetime.now(UTC),
    )
    for page in pages:
        for price in page["SpotPriceHistory"]:
            dollars, zone = float(price["SpotPrice"]), price["AvailabilityZone"]
            before = found.get(price["InstanceType"])
            if before is None or dollars < before[0]:
                found[price["InstanceType"]] = (dollars, zone, price["Timestamp"].date().isoformat())
    return found


class Market:
    """Asks AWS, and remembers the answers for ten minutes. ``client`` makes a boto3 client of (service, region)."""

    def __init__(
        self,
        client: Callable[[str, str], Any] | None = None,
        clock: Callable[[], float] = time.time,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._client = client or _client
        self._clock = clock
        self._environ = environ
        self._answers: dict[Any, tuple[float, Any]] = {}

    def checked(self, region: str, offers: Sequence[Offer]) -> list[Offer]:
        """The offers with what AWS says of them. Never raises, but ImportError where boto3 is not installed."""
        if self._environ.get(CHECKS, "").lower() == "off":
            return list(offers)
        return checked(offers, self.facts(region, offers))

    def facts(self, region: str, offers: Sequence[Offer]) -> Facts:
        """What AWS says of these types in this region."""
        types = tuple(sorted({o.instance_type for o in offers}))
        spot = tuple(sorted({o.instance_type for o in offers if o.capacity_type == "spot"}))
        codes = frozenset(quota_of(o.instance_type, o.capacity_type)[0] for o in offers) - {""}

        def ec2() -> Any:
            return self._client("ec2", region)

        ask = self._ask
        return Facts(
            zones=ask(("where types are sold", region, types), lambda: zones_of(ec2(), types), None),
            quotas=ask(("quotas", region, codes), lambda: quotas_of(self._client("service-quotas", region), codes), {}),
            used=ask(("what runs", region), lambda: used_of(ec2()), None),
            spot=ask(("spot prices", region, spot), lambda: spot_prices_of(ec2(), spot), {}) if spot else {},
        )

    def _ask(self, key: tuple[Any, ...], question: Callable[[], Any], unknown: Any) -> Any:
        now = self._clock()
        until, answer = self._answers.get(key, (0.0, unknown))
        if now < until:
            return answer
        try:
            answer = question()
            self._answers[key] = (now + FRESH, answer)
        except ImportError:
            raise
        except Exception as e:  # a look-up is a courtesy, whatever it dies of: no credentials, no network, no rights
            log.warning("AWS was not asked about %s in %s: %s", key[0], key[1], e)
            answer = unknown
            self._answers[key] = (now + AGAIN, unknown)
        return answer


def _client(service: str, region: str) -> Any:
    # By name: boto3 is an extra, and its types are not what anything here is checked against.
    boto3, config = importlib.import_module("boto3"), importlib.import_module("botocore.config")
    # A plan waits for this: rather no answer than a late one.
    quick = config.Config(connect_timeout=3, read_timeout=5, retries={"total_max_attempts": 2, "mode": "standard"})
    return boto3.client(service, region_name=region, config=quick)
