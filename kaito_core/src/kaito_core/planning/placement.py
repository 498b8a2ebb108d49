"""Where a task can run: every machine that could be had with how the task fits there, best first, and what would help when none fits.

The same for a training and for an endpoint: what they need of a machine is the `Task`'s to say, which machine is better and why one is
not taken is decided here and in `kaito_core.planning.choice`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kaito_core.planning import catalogue
from kaito_core.planning.choice import (
    By,
    cost_of,
    gib,
    in_order,
    is_free,
    mismatch,
    money,
    only_known,
    too_dear,
    unobtainable,
)
from kaito_core.planning.names import unknown_gpu
from kaito_core.plugins.types import Offer, Requirements, ServingFit, TuningFit
from kaito_core.problems import Problem

Fit = TuningFit | ServingFit


@dataclass(frozen=True, slots=True)
class Candidate:
    """One machine and how the task would run there."""

    offer: Offer
    fit: Fit
    why: str
    """Why it is in the list: what the user named, or what the machine is."""
    rejected: str = ""
    """Why it is not taken; empty when it can be."""
    cost: float | None = None
    """US dollars for the job on all machines, an estimate: the training and ten minutes for what goes with it; None when the price
    or the time is not known, and of an endpoint, which has no end."""
    runtime: str = ""
    """The name of the runtime that serves there; empty for what is no endpoint."""

    @property
    def seconds(self) -> float | None:
        """Estimated time of the training; None while it is not known, and of an endpoint, which has no end."""
        return seconds_of(self.fit)


def seconds_of(fit: Fit) -> float | None:
    """Estimated time of the training; None while it is not known, and of an endpoint."""
    return fit.seconds if isinstance(fit, TuningFit) else None


class Task(Protocol):
    """What is to be run, and how it fits machines. A fit depends on what is in a machine, not on where it stands and what it costs:
    the same one in fifty regions need only be looked at once (`same_fit`)."""

    def fit(self, offer: Offer) -> Fit: ...

    def obstacle(self, offer: Offer) -> str:
        """Why what computes there cannot use the machine's GPUs, however much memory they have; empty when it can."""

    def smaller(self) -> Iterable[tuple[str, Task]]:
        """The same with less memory, in words that follow "it fits MACHINE with …", the least painful change first."""


def same_fit(offer: Offer) -> tuple[object, ...]:
    """What a fit depends on, as a key: machines that agree in it run a task in just the same way."""
    gpu = offer.gpu
    # Not the record itself: it would be hashed anew for every machine.
    return (
        gpu and (gpu.model, gpu.memory, gpu.compute_capability, gpu.vendor),
        offer.gpus,
        offer.cpus,
        offer.memory,
    )


def candidates(
    task: Task,
    wanted: Requirements,
    max_cost: float | None,
    offers: Iterable[Offer],
    installed: Collection[str],
    by: By,
) -> tuple[Candidate, ...]:
    """Usable machines best first, then the rejected ones with the reason. ``installed``: names of provisioners."""
    named = {t.lower() for t in wanted.instance_types}
    instead = functools.cache(lambda cloud: _replacement(task, wanted, max_cost, cloud))
    considered = []
    for offer in offers:
        is_named = offer.instance_type.lower() in named
        if offer.is_local:
            why = "it is here, and costs nothing more"
        elif is_named:
            why = f"named in resource.instanceType{'s' if len(named) > 1 else ''}"
        else:
            why = "it can be had"
        found = consider(task, offer, wanted, max_cost, why)
        rejected = found.rejected or unobtainable(offer, installed)
        # Of a machine that the user chose by its name, or by the labels of its nodes.
        chosen = is_named or is_free(offer)
        if rejected and chosen and _is_no_more(task, offer) and (better := instead(offer.cloud)):
            rejected += f"; the cheapest that fits instead is {better}"
        considered.append(replace(found, rejected=rejected))
    return tuple(in_order(considered, wanted, by))


def consider(task: Task, offer: Offer, wanted: Requirements, max_cost: float | None, why: str = "") -> Candidate:
    """How the task would run on this machine, and why it is not taken, whichever provisioner has the machine.

    The only place that decides it: what a plan takes and what it recommends have both passed here."""
    fit = task.fit(offer)
    cost = cost_of(offer, wanted.count, seconds_of(fit))
    reason = against(task, offer) or mismatch(offer, wanted)
    if not reason and not fit.fits:
        reason = why_not(fit)
    return Candidate(offer, fit, why, reason or too_dear(offer, wanted, max_cost, cost), cost)


def cannot_use(task: Task, offer: Offer) -> str:
    """Why the task cannot run on such a machine at all, whatever its memory and its price; empty when it can."""
    return catalogue.obstacle(offer) or task.obstacle(offer)


def against(task: Task, offer: Offer) -> str:
    """Why no change of the workspace makes such a machine one for this task; empty when there may be one.

    Whether the machine can be had now (a quota, a missing setting) is the last to be asked: to mend it would be in vain."""
    known = catalogue.instance_types().get(offer.instance_type.lower())
    ended = offer.retired if known is not None and known.retired and known.retired in offer.retired else ""
    return ended or cannot_use(task, offer) or offer.retired


def why_not(fit: Fit) -> str:
    """Why what does not fit does not. What cannot use a machine at all has no memory there, and says why."""
    if fit.capacity <= 0 and fit.notes:
        return fit.notes[0]
    return f"needs {gib(fit.memory.total)}, has {gib(fit.capacity)}"


def _is_no_more(task: Task, offer: Offer) -> bool:
    """Whether no change of the task helps: the cloud gives the machine up, or the task cannot use it."""
    known = catalogue.instance_types().get(offer.instance_type.lower())
    retired = not is_free(offer) and known is not None and bool(known.retired)
    return retired or bool(cannot_use(task, offer))


def _replacement(task: Task, wanted: Requirements, max_cost: float | None, cloud: str) -> str:
    """The cheapest machine of that cloud that could take the job in place of one that cannot."""
    anything = replace(wanted, instance_types=())
    considered = (
        consider(task, offer, anything, max_cost)
        for offer in catalogue.offers(cloud, wanted.regions, wanted.capacity_types)
        if offer.price
    )
    found = in_order((c for c in considered if not c.rejected), anything, "cost")
    return _priced(found[0].offer) if found else ""


def _priced(offer: Offer) -> str:
    """``Standard_NC4as_T4_v3 (1×T4, $0.53 an hour in eastus)``."""
    if offer.price is None:
        return str(offer)
    where = f" in {offer.region}" if offer.region else ""
    spot = " as spot" if offer.capacity_type == "spot" else ""
    return f"{str(offer).removesuffix(')')}, {money(offer.price.per_hour)} an hour{where}{spot})"


SHOWN = 5
"""Reasons in a refusal; the rest is counted."""


def refusal(
    task: Task,
    wanted: Requirements,
    max_cost: float | None,
    considered: Iterable[Candidate],
    installed: Collection[str],
) -> Problem:
    """Says that nothing fits, why, and the least that would have to change. Each machine that a remedy names has passed `consider` as it
    would be after the change: it is not refused in its turn."""
    tried = list(considered)
    odd = unknown_gpu(wanted)
    if not tried:
        return Problem(
            "no machine is known that could run this",
            odd or "name an instance type in resource.instanceType, or use --local",
            field="resource.instanceType",
        )
    # What is only in the catalogue was not asked for, unless it was named.
    named = {t.lower() for t in wanted.instance_types}
    told = [c for c in tried if c.offer.provisioner or c.offer.instance_type.lower() in named] or tried
    reasons = "; ".join(dict.fromkeys(f"{c.offer}: {c.rejected}" for c in told[:SHOWN]))
    if len(told) > SHOWN:
        reasons += f"; and {len(told) - SHOWN} more"
    known = next((c for c in tried if only_known(c.rejected)), None)
    dear = _only_dear(task, wanted, tried)
    smaller = _smallest_change(task, wanted, max_cost, tried)
    fits_somewhere = any(c.fit.fits and c.offer.provisioner and not cannot_use(task, c.offer) for c in tried)
    larger = "" if fits_somewhere or dear else _smallest_machine(task, wanted, max_cost, tried, installed)
    remedies = [
        odd,
        f"it fits {smaller}" if smaller else "",
        f"the cheapest that fits is {_priced(dear)}" if dear else "",
        f"as it stands, the smallest machine is {larger}" if larger else "",
        f"{_priced(known.offer)} would do: {known.rejected}" if known else "",
    ]
    remedy = "; ".join(r for r in remedies if r) or "no known machine is large enough"
    if fits_somewhere and not any(remedies):
        remedy = "ask for less in resource, or install a plugin that gets such a machine"
    return Problem(reasons, remedy, field="resource.instanceType")


def _only_dear(task: Task, wanted: Requirements, tried: Iterable[Candidate]) -> Offer | None:
    """The cheapest machine that a limit of cost alone keeps from being taken."""
    unlimited = replace(wanted, max_price_per_hour=None)
    priced = (c.offer for c in tried if c.offer.provisioner and c.offer.price)
    found = [c for c in (consider(task, offer, unlimited, None) for offer in priced) if not c.rejected]
    return in_order(found, unlimited, "cost")[0].offer if found else None


def _smallest_change(task: Task, wanted: Requirements, max_cost: float | None, tried: Iterable[Candidate]) -> str:
    """The least painful change with which it fits one of the machines that were considered and are too small."""
    here = [c.offer for c in tried if c.offer.provisioner and not c.fit.fits]
    for description, changed in task.smaller() if here else ():
        for offer in here:
            found = consider(changed, offer, wanted, max_cost)
            if not found.rejected:
                return f"{offer.instance_type} with {description}{_needs(found.fit)}"
    return ""


def _smallest_machine(
    task: Task, wanted: Requirements, max_cost: float | None, tried: Sequence[Candidate], installed: Collection[str]
) -> str:
    """The known machine with the least GPU memory that would be taken if it were named, of the same cloud where one is known."""
    anything = replace(wanted, instance_types=())
    cloud = tried[0].offer.cloud
    known = [
        offer
        for each in ([cloud] if cloud else catalogue.CLOUDS)
        for offer in catalogue.offers(each, wanted.regions, wanted.capacity_types)
    ]
    got = {c.offer.cloud for c in tried if c.offer.provisioner and not is_free(c.offer)}
    for offer in sorted(known, key=lambda o: (o.gpus * o.device_memory, o.cpus, o.instance_type)):
        found = consider(task, offer, anything, max_cost)
        if not found.rejected:
            how = "" if offer.cloud in got else unobtainable(offer, installed)
            return f"{offer}{_needs(found.fit)}" + (f": {how}" if how else "")
    return ""


def _needs(fit: Fit) -> str:
    return f" (needs {gib(fit.memory.total)} of {gib(fit.capacity)})" if fit.memory.total else ""
