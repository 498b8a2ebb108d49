"""Which machine is better than another, and why one is not taken at all. Pure functions on offers and what a job costs there."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Literal, Protocol, TypeVar

from kaito_core.planning import catalogue
from kaito_core.plugins.types import Gpu, Offer, Requirements

By = Literal["cost", "time"]
"""What makes a machine better: a cheaper job, or an earlier end."""

GIB = 1 << 30

FREE = frozenset({"existing", "local"})
"""Provisioners whose machines are there anyway and cost nothing more."""

OVERHEAD = 600.0
"""Seconds beside the training for which a machine is paid: it starts, pulls the image, fetches data and weights, checks and saves.
A guess. Without it, eight of the fastest GPUs would seem the cheapest for a job of a minute."""

NOBODY = "no installed plugin can get it"
ELSEWHERE = "it can only be got from a cluster"
"""How the reason begins why a machine that is only known from the catalogue is not taken; the second where a plugin could."""


class Considered(Protocol):
    """A machine, how long the job takes there, and what came of it."""

    @property
    def offer(self) -> Offer: ...

    @property
    def seconds(self) -> float | None: ...

    @property
    def rejected(self) -> str: ...

    @property
    def cost(self) -> float | None: ...


C = TypeVar("C", bound=Considered)


def is_free(offer: Offer) -> bool:
    """Whether the machine is there anyway, so that the job costs nothing more."""
    return offer.provisioner in FREE


def cost_of(offer: Offer, count: int, seconds: float | None) -> float | None:
    """US dollars for so many machines for so much training and what goes with it, an estimate; None when the price or the time
    is not known."""
    if offer.price is None or seconds is None:
        return None
    return offer.price.per_hour * count * (seconds + OVERHEAD) / 3600


# --- what a workspace asks for


def mismatch(offer: Offer, wanted: Requirements) -> str:
    """What the workspace asks of a machine and this one has not; empty when it has everything.

    Where a machine stands and how it is paid for is asked only of what has to be got; what is there is there."""
    gpu = offer.gpu if offer.gpus else None
    if (wanted.gpu_model or wanted.gpus or wanted.gpu_memory) and gpu is None:
        return "has no GPU, and resource.gpu asks for one"
    if gpu is not None:
        if wanted.gpu_model and not is_model(gpu, wanted.gpu_model):
            return f"has {gpu.model}, and resource.gpu.model asks for {wanted.gpu_model}"
        if offer.gpus < wanted.gpus:
            has = "1 GPU" if offer.gpus == 1 else f"{offer.gpus} GPUs"
            return f"has {has}, and resource.gpu.count asks for {wanted.gpus}"
        if gpu.memory < wanted.gpu_memory:
            return f"has {gib(gpu.memory)} per GPU, and resource.gpu.memory asks for {gib(wanted.gpu_memory)}"
    if is_free(offer):
        return ""
    if wanted.instance_types and offer.instance_type.lower() not in {t.lower() for t in wanted.instance_types}:
        return "another machine is named in resource.instanceType"
    if offer.capacity_type not in wanted.capacity_types:
        return f"is {offer.capacity_type}, and resource.capacityType asks for {' or '.join(wanted.capacity_types)}"
    for field, place, places in (("regions", offer.region, wanted.regions), ("zones", offer.zone, wanted.zones)):
        if place and places and place not in places:
            return f"is in {place}, and resource.{field} asks for {' or '.join(places)}"
    return ""


def is_model(gpu: Gpu, wanted: str) -> bool:
    """Whether every word that is asked for is in the model's name: ``A100`` is in ``A100-SXM4-80GB``, ``A10`` is not."""
    has = catalogue.words(gpu.model)
    return all(word in has or f"{word}GB" in has for word in catalogue.words(wanted))


def too_dear(offer: Offer, wanted: Requirements, max_cost: float | None, cost: float | None) -> str:
    """Why the machine costs more than it may; empty when it does not. What is there anyway costs nothing more."""
    if is_free(offer):
        return ""
    for field, limit in (("maxPricePerHour", wanted.max_price_per_hour), ("maxCost", max_cost)):
        if limit is not None and offer.price is None:
            return f"its price is unknown, and resource.{field} is set"
    if wanted.max_price_per_hour is not None and offer.price and offer.price.per_hour > wanted.max_price_per_hour:
        limit_text = money(wanted.max_price_per_hour)
        return f"costs {money(offer.price.per_hour)} an hour, above resource.maxPricePerHour of {limit_text}"
    # While the time is unknown – the data has not been looked at – nobody can tell what the job will cost.
    if max_cost is not None and cost is not None and cost > max_cost:
        return f"the job would cost about {money(cost)} (estimate), above resource.maxCost of {money(max_cost)}"
    return ""


def unobtainable(offer: Offer, installed: Collection[str] = ()) -> str:
    """Why a machine that is only known cannot be had; empty when somebody offers it. ``installed``: names of provisioners."""
    if offer.provisioner:
        return ""
    package = catalogue.provisioner_package(offer.cloud)
    name = package.removeprefix("kaito-provisioner-")
    if name and name in installed:
        return f"{ELSEWHERE}, by the provisioner {name} (--context NAME)"
    return NOBODY + (f" (pip install {package})" if package else "")


def only_known(rejected: str) -> bool:
    """Whether nothing but `unobtainable` speaks against a machine."""
    return rejected.startswith((NOBODY, ELSEWHERE))


# --- which is better


def in_order(candidates: Iterable[C], wanted: Requirements, by: By) -> list[C]:
    """The usable ones best first, then the rejected ones, those that come nearest first. Stable: of equal ones the first is taken.

    This machine is the best where it is offered at all: what runs here runs nowhere else. Then machines with a GPU go before
    those without, which are many times slower; then those that cost nothing more; then what the user named, in that order; then
    the cheapest job (or the one that ends first), and what has no known price last."""
    order = {name.lower(): i for i, name in enumerate(wanted.instance_types)}

    def key(candidate: C) -> tuple[Any, ...]:
        offer = candidate.offer
        place = order.get(offer.instance_type.lower(), len(order))
        free = is_free(offer)
        if candidate.rejected:
            first = (True, not offer.is_local, not free, place, not only_known(candidate.rejected))
            return (*first, *(_by_time(candidate) if by == "time" else ()), *_by_cost(candidate))
        if by == "time":
            return (
                False,
                not offer.is_local,
                not offer.gpus,
                place,
                *_by_time(candidate),
                not free,
                *_by_cost(candidate),
            )
        return False, not offer.is_local, not offer.gpus, not free, place, *_by_cost(candidate)

    return sorted(candidates, key=key)


def _by_cost(candidate: Considered) -> tuple[Any, ...]:
    """Smaller for a cheaper job. Without the time the price of an hour decides; what has no price comes last."""
    price, cost = candidate.offer.price, candidate.cost
    return price is None, cost is None, cost or 0.0, price.per_hour if price else 0.0


def _by_time(candidate: Considered) -> tuple[Any, ...]:
    seconds = candidate.seconds
    return seconds is None, seconds or 0.0


# --- words


def gib(size: float) -> str:
    """Bytes as people read them: ``4.6 GiB``, ``312 MiB``."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / (1 << 20):.0f} MiB"


def money(dollars: float) -> str:
    """US dollars as people read them: ``$3.67``, ``$0.035``; never ``$0.00`` for what costs something."""
    if 0 < dollars < 0.001:
        return "<$0.001"
    return f"${dollars:.2f}" if dollars >= 0.1 or not dollars else f"${dollars:.3f}"
