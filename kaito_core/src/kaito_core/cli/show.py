"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import click

from kaito_core.planning import catalogue
from kaito_core.planning.choice import GIB, OVERHEAD, gib, is_free, money
from kaito_core.planning.plan import Candidate, Plan
from kaito_core.plugins.types import Offer

USABLE, REJECTED = 10, 5
"""Machines of a kind that are shown; the rest is counted."""


def show(plan: Plan) -> None:
    """Print the plan: what, with which data, how much memory, where, how long. Every computed figure is an estimate."""
    tuning = plan.workspace.tuning
    if tuning is None:
        return
    architecture = plan.preset.architecture
    click.echo(click.style(plan.workspace.name, bold=True) + f": tune {plan.preset.name} with {plan.method}")
    _row("model", f"{plan.preset.source}, {_count(architecture.parameters)} parameters, licence {plan.preset.licence}")
    _row("data", _data(plan))
    _row("output", tuning.output.image or f"volume {_volume(tuning.output.volume_source)}")
    shown = plan.chosen or (plan.candidates[0] if plan.candidates else None)
    if shown:
        c = shown.fit.configuration
        rows = f"{c.micro_batch} × {c.accumulation}" + (f" × {c.processes} GPUs" if c.processes > 1 else "")
        _row(
            "layout",
            f"{rows} sequences of {c.sequence} tokens a step, {c.dtype} on {'GPU' if c.device == 'cuda' else 'CPU'}",
        )
        _row("work", _work(shown))
        _memory(shown)
    _machines(plan)
    if plan.refusal:
        click.echo()
        click.echo(click.style("nothing fits: ", fg="red") + plan.refusal.message)
        click.echo(f"    {plan.refusal.remedy}")


def _row(label: str, text: str) -> None:
    click.echo(f"  {label:8} {text}")


def _data(plan: Plan) -> str:
    tuning = plan.workspace.tuning
    if tuning is None:
        return ""
    source = tuning.input
    what = source.image or (f"volume {_volume(source.volume_source)}" if source.volume_source else "")
    what = what or f"{len(source.urls)} file{'s' if len(source.urls) != 1 else ''}"
    facts = plan.data
    if facts is None:
        return f"{what}; fetched and checked before a GPU is used, steps are known then"
    share = facts.trained_tokens / facts.tokens if facts.tokens else 0
    about = "about " if facts.estimated else ""
    return (
        f"{what}, {facts.rows:,} rows ({facts.format}), {about}{facts.tokens:,} tokens, {share:.0%} of them carry loss"
    )


def _volume(source: object) -> str:
    if isinstance(source, dict) and source:
        kind, value = next(iter(source.items()))
        return str(value.get("path") or value.get("claimName") or kind) if isinstance(value, dict) else str(kind)
    return ""


def _work(candidate: Candidate) -> str:
    fit = candidate.fit
    if fit.steps is None or fit.tokens is None:
        return "steps and time are known once the data is"
    time = f", about {duration(fit.seconds)} (estimate)" if fit.seconds else ""
    return f"{fit.steps:,} steps, {fit.tokens:,} tokens{time}"


def _memory(candidate: Candidate) -> None:
    fit = candidate.fit
    where = "per GPU" if fit.configuration.device == "cuda" else "of RAM"
    click.echo(f"\n  memory {where} (estimate)")
    for item in fit.memory.items:
        click.echo(f"    {item.name:12} {gib(item.bytes):>9}   {click.style(item.formula, dim=True)}")
    colour = "green" if fit.fits else "red"
    click.echo(
        f"    {'peak':12} {click.style(f'{gib(fit.memory.total):>9}', fg=colour)}   of {gib(fit.capacity)} usable"
    )


def _machines(plan: Plan) -> None:
    if not plan.candidates:
        return
    usable = [c for c in plan.candidates if not c.rejected]
    rejected = [c for c in plan.candidates if c.rejected]
    shown = [*usable[:USABLE], *rejected[:REJECTED]]
    head = ("MACHINE", "HAS", "WHERE", "FIT", "CONFIGURATION", "TIME", "$/H", "$ JOB")
    rows = [head, *(_cells(c, plan.workspace.resource.count) for c in shown)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    click.echo()
    click.echo("    " + _line(head, widths))
    for number, candidate in enumerate(shown):
        if number == min(len(usable), USABLE):
            _more(len(usable) - USABLE)
        mark = click.style("✔", fg="green") if candidate is plan.chosen else " "
        if candidate.rejected:
            mark = click.style("✘", fg="red")
        click.echo(f"  {mark} {_line(rows[number + 1], widths)}")
        if candidate.rejected:
            click.echo(click.style(f"      {candidate.rejected}", dim=True))
    if len(shown) <= USABLE and not rejected:
        _more(len(usable) - USABLE)
    _more(len(rejected) - REJECTED, "✘ ")
    best = "the earliest end first" if plan.by == "time" else "the cheapest job first"
    paid = any(c.cost is not None and not is_free(c.offer) for c in shown)
    start = f"; $ JOB counts {duration(OVERHEAD)} beside the training" if paid else ""
    click.echo(f"  ~ is an estimate; {best}{start}")
    prices = [c.offer.price for c in shown if c.offer.price]
    if prices:
        click.echo("  prices: " + "; ".join(dict.fromkeys(f"{p.source}, {p.date}" for p in prices)))
    for note in dict.fromkeys(n for c in usable[:USABLE] for n in c.fit.notes):
        click.echo(f"  note: {note}")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The cells side by side, money to the right."""
    texts, sums = cells[:-2], cells[-2:]
    left = [f"{text:{width}}" for text, width in zip(texts, widths, strict=False)]
    return "  ".join([*left, *(f"{text:>{width}}" for text, width in zip(sums, widths[-2:], strict=True))])


def _more(number: int, mark: str = "") -> None:
    if number > 0:
        click.echo(f"    {mark}… {number} more (--json has all)")


def _cells(candidate: Candidate, count: int) -> tuple[str, ...]:
    offer, fit = candidate.offer, candidate.fit
    layout = fit.configuration
    gpus = f" × {layout.processes} GPUs" if layout.processes > 1 else ""
    return (
        offer.instance_type,
        has(offer),
        _where(offer),
        f"~{fit.memory.total / GIB:.1f} of {fit.capacity / GIB:.1f} GiB",
        f"{layout.micro_batch}×{layout.accumulation}{gpus}, {layout.sequence} tokens, {layout.dtype}",
        _time(fit.seconds),
        _per_hour(offer, count),
        "none" if is_free(offer) else _about(candidate.cost),
    )


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else "<1 s" if seconds < 1 else f"~{duration(seconds)}"


def _about(dollars: float | None) -> str:
    return "unknown" if dollars is None else f"~{money(dollars)}"


def has(offer: Offer) -> str:
    """What a machine computes with: ``2×T4``, ``1/6 A10``, ``4 CPUs``."""
    if not (offer.gpu and offer.gpus):
        return f"{offer.cpus} CPUs"
    part = catalogue.share(offer.gpu)
    return (
        f"{offer.gpus}×{offer.gpu.model}" if part == 1 else f"{Fraction(part).limit_denominator(8)} {offer.gpu.model}"
    )


def _where(offer: Offer) -> str:
    if offer.is_local:
        return "here"
    if is_free(offer):
        return "cluster"
    place = "/".join(p for p in (offer.cloud, offer.zone or offer.region) if p) or offer.provisioner
    return f"{place} spot" if offer.capacity_type == "spot" else place


def _per_hour(offer: Offer, count: int) -> str:
    if is_free(offer):
        return "none"
    return money(offer.price.per_hour * count) if offer.price else "unknown"


# --- several workspaces


@dataclass(frozen=True)
class Sum:
    """What several jobs cost together, an estimate. What is not known is counted, and never taken for 0."""

    cost: float
    """US dollars of those whose cost is known; what runs on machines that are there costs nothing more."""
    seconds: float
    """Of those whose time is known, one after the other."""
    unknown_costs: int
    unknown_times: int
    without_machine: int

    def to_json(self) -> dict[str, Any]:
        """Plain data; a sum is null while a part of it is not known."""
        return {
            "cost": None if self.unknown_costs else self.cost,
            "seconds": None if self.unknown_times else self.seconds,
            "atLeast": {"cost": self.cost, "seconds": self.seconds},
            "unknownCosts": self.unknown_costs,
            "unknownTimes": self.unknown_times,
            "withoutMachine": self.without_machine,
            "estimates": ["cost", "seconds"],
        }


def sum_of(plans: Sequence[Plan]) -> Sum:
    """What the chosen machines of these plans cost together."""
    chosen = [p.chosen for p in plans if p.chosen]
    costs = [0.0 if is_free(c.offer) else c.cost for c in chosen]
    times = [c.fit.seconds for c in chosen]
    return Sum(
        cost=sum(c for c in costs if c is not None),
        seconds=sum(t for t in times if t is not None),
        unknown_costs=costs.count(None),
        unknown_times=times.count(None),
        without_machine=len(plans) - len(chosen),
    )


def show_sum(plans: Sequence[Plan]) -> None:
    """Print what all of them cost together, and how long they take one after the other."""
    total = sum_of(plans)
    free = all(is_free(p.chosen.offer) for p in plans if p.chosen)
    cost = "nothing more" if free else f"~{money(total.cost)}"
    if total.unknown_costs:
        cost = f"{cost} and {total.unknown_costs} of unknown cost" if total.cost else "unknown cost"
    time = f"~{duration(total.seconds)}" if total.seconds else "unknown"
    if total.seconds and total.unknown_times:
        time += f" and {total.unknown_times} of unknown time"
    left = f"; {total.without_machine} without a machine" if total.without_machine else ""
    click.echo()
    click.echo(f"{len(plans)} workspaces: costs {cost}; training one after the other: {time}{left} (estimate)")


def duration(seconds: float | None) -> str:
    """Seconds as people read them: ``40 s``, ``12 min``, ``3 h 20 min``."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _count(n: int) -> str:
    return f"{n / 1e9:.1f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"
