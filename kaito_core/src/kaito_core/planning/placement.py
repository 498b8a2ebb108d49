"""Where a task can run: every machine that could be had with how the task fits there, best first, and what would help when none fits.

The same for a training and for an endpoint: what they need of a machine is the `Task`'s to say, which machine is better and why one is
not taken is decided here and in `kaito_core.planning.choice`.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from kaito_core.planning import catalogue
from kaito_core.planning.choice import (
    By,
    cost_of,
    gib,
    in_order,
    is_free,
    is_model,
    mismatch,
    money,
    only_known,
    too_dear,
    unobtainable,
)
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
        fit = task.fit(offer)
        cost = cost_of(offer, wanted.count, seconds_of(fit))
        if offer.is_local:
            why = "it is here, and costs nothing more"
        elif offer.instance_type.lower() in named:
            why = f"named in resource.instanceType{'s' if len(named) > 1 else ''}"
        else:
            why = "it can be had"
        rejected = _rejection(offer, fit, wanted, max_cost, cost) or unobtainable(offer, installed)
        if (
            rejected
            and offer.instance_type.lower() in named
            and _is_retired(offer)
            and (better := instead(offer.cloud))
        ):
            rejected += f"; the cheapest that fits instead is {better}"
        considered.append(Candidate(offer, fit, why, rejected, cost))
    return tuple(in_order(considered, wanted, by))


def _rejection(offer: Offer, fit: Fit, wanted: Requirements, max_cost: float | None, cost: float | None) -> str:
    reason = offer.retired or catalogue.obstacle(offer) or mismatch(offer, wanted)
    if not reason and not fit.fits:
        reason = why_not(fit)
    return reason or too_dear(offer, wanted, max_cost, cost)


def why_not(fit: Fit) -> str:
    """Why what does not fit does not. What cannot use a machine at all has no memory there, and says why."""
    if fit.capacity <= 0 and fit.notes:
        return fit.notes[0]
    return f"needs {gib(fit.memory.total)}, has {gib(fit.capacity)}"


def _is_retired(offer: Offer) -> bool:
    """Whether its cloud gives it up. One that is there already goes on being used."""
    known = catalogue.instance_types().get(offer.instance_type.lower())
    return not is_free(offer) and known is not None and bool(known.retired)


def _replacement(task: Task, wanted: Requirements, max_cost: float | None, cloud: str) -> str:
    """The cheapest machine of that cloud that could take the job in place of one that can no longer be had."""
    anything = replace(wanted, instance_types=())
    found = []
    for offer in catalogue.offers(cloud, wanted.regions, wanted.capacity_types):
        fit = task.fit(offer)
        cost = cost_of(offer, wanted.count, seconds_of(fit))
        if offer.price and not _rejection(offer, fit, anything, max_cost, cost):
            found.append(Candidate(offer, fit, "", "", cost))
    if not found:
        return ""
    return _priced(in_order(found, anything, "cost")[0].offer)


def _priced(offer: Offer) -> str:
    """``Standard_NC4as_T4_v3 (1×T4, $0.53 an hour in eastus)``."""
    if offer.price is None:
        return str(offer)
    where = f" in {offer.region}" if offer.region else ""
    spot = " as spot" if offer.capacity_type == "spot" else ""
    return f"{str(offer).removesuffix(')')}, {money(offer.price.per_hour)} an hour{where}{spot})"


SHOWN = 5
"""Reasons in a refusal; the rest is counted."""


def refusal(task: Task, wanted: Requirements, considered: Iterable[Candidate]) -> Problem:
    """Says that nothing fits, why, and the least that would have to change."""
    tried = list(considered)
    odd = _unheard_of(wanted)
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
    dear = next((c.offer for c in tried if c.fit.fits and c.offer.price and _only_dear(c, wanted)), None)
    smaller = _smallest_change(task, wanted, tried)
    fits_somewhere = any(c.fit.fits and c.offer.provisioner for c in tried)
    larger = "" if fits_somewhere or dear else _smallest_machine(task, tried[0].offer.cloud)
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


def _unheard_of(wanted: Requirements) -> str:
    """A GPU or a region that is asked for and that no cloud has, as far as is known; most likely a slip of the pen."""
    models = {o.gpu.model: o.gpu for o in catalogue.instance_types().values() if o.gpu}
    if wanted.gpu_model and not any(is_model(gpu, wanted.gpu_model) for gpu in models.values()):
        close = difflib.get_close_matches(wanted.gpu_model.upper(), models, n=2, cutoff=0.4)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        return f"no known GPU is called {wanted.gpu_model}{meant} (kaito catalog lists them)"
    for region in wanted.regions:
        if not any(catalogue.is_region(cloud, region) for cloud in catalogue.CLOUDS):
            close = difflib.get_close_matches(region, catalogue.known_regions(), n=2)
            meant = f"; did you mean {' or '.join(close)}?" if close else ""
            return f"no known region is called {region}{meant}"
    return ""


def _only_dear(candidate: Candidate, wanted: Requirements) -> bool:
    """Whether a limit of cost is all that keeps the machine from being taken."""
    offer = candidate.offer
    return not (offer.retired or not offer.provisioner or catalogue.obstacle(offer) or mismatch(offer, wanted))


def _smallest_change(task: Task, wanted: Requirements, tried: Iterable[Candidate]) -> str:
    """The least painful change with which it fits one of the machines that were considered and are too small."""
    here = [
        c.offer
        for c in tried
        if c.offer.provisioner and not c.offer.retired and not c.fit.fits and not mismatch(c.offer, wanted)
    ]
    for description, changed in task.smaller() if here else ():
        for offer in here:
            fit = changed.fit(offer)
            if fit.fits:
                return f"{offer.instance_type} with {description}{_needs(fit)}"
    return ""


def _smallest_machine(task: Task, cloud: str) -> str:
    """The known machine with the least GPU memory that fits, of the same cloud where one is known."""
    known = [
        m.offer
        for m in catalogue.machines().values()
        if not m.offer.retired and not m.obstacle and (not cloud or m.offer.cloud == cloud)
    ]
    for offer in sorted(known, key=lambda o: (o.gpus * o.device_memory, o.cpus, o.instance_type)):
        fit = task.fit(offer)
        if fit.fits:
            return f"{offer}{_needs(fit)}"
    return ""


def _needs(fit: Fit) -> str:
    return f" (needs {gib(fit.memory.total)} of {gib(fit.capacity)})" if fit.memory.total else ""
