"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import click

from kaito_core.planning import catalogue
from kaito_core.planning.choice import GIB, OVERHEAD, gib, is_free, money
from kaito_core.planning.placement import Candidate, Fit
from kaito_core.planning.plan import Plan, TuningPlan
from kaito_core.planning.serving import ServingPlan, machines
from kaito_core.plugins.types import Offer, Preset, ServingConfiguration, ServingFit, TuningFit

USABLE, REJECTED = 10, 5
"""Machines of a kind that are shown; the rest is counted."""


def show(plan: Plan) -> None:
    """Print the plan: what, with which data, how much memory, where, how long. Every computed figure is an estimate."""
    name = click.style(plan.workspace.name, bold=True)
    shown = plan.chosen or (plan.candidates[0] if plan.candidates else None)
    if isinstance(plan, TuningPlan):
        click.echo(f"{name}: tune {plan.preset.name} with {plan.method}")
        _tuning(plan, shown)
    elif isinstance(plan, ServingPlan):
        click.echo(f"{name}: serve {plan.preset.name} with {plan.runtime.name}")
        _serving(plan, shown)
    else:
        click.echo(f"{name}: serve with a pod template of your own; what it needs is not known")
    _machines(plan)
    if plan.refusal:
        click.echo()
        click.echo(click.style("nothing fits: ", fg="red") + plan.refusal.message)
        click.echo(f"    {plan.refusal.remedy}")


def _tuning(plan: TuningPlan, shown: Candidate | None) -> None:
    tuning = plan.workspace.tuning
    if tuning is None:
        return
    _model(plan.preset)
    _row("data", _data(plan))
    _row("output", tuning.output.image or f"volume {_volume(tuning.output.volume_source)}")
    if shown and isinstance(shown.fit, TuningFit):
        c = shown.fit.configuration
        rows = f"{c.micro_batch} × {c.accumulation}" + (f" × {c.processes} GPUs" if c.processes > 1 else "")
        _row("layout", f"{rows} sequences of {c.sequence} tokens a step, {c.dtype} on {_device(c.device)}")
        _row("work", _work(shown.fit))
        _memory(shown.fit)


def _serving(plan: ServingPlan, shown: Candidate | None) -> None:
    _model(plan.preset)
    _row("runtime", f"{plan.runtime.name}, {plan.why_runtime}")
    for number, adapter in enumerate(plan.adapters):
        where = adapter.image or f"volume {_volume(adapter.volume)}"
        strength = f", strength {adapter.strength:g}" if adapter.strength != 1 else ""
        _row("adapters" if number == 0 else "", f"{adapter.name} from {where}{strength}")
    if shown and isinstance(shown.fit, ServingFit):
        c = shown.fit.configuration
        requests = f"{c.requests} request{'s' if c.requests != 1 else ''} at once of up to {c.context:,} tokens"
        layout = ", ".join(_parallel(c, long=True))
        _row("layout", f"{requests}, {c.dtype} on {_device(c.device)}" + (f", {layout}" if layout else ""))
        if shown.fit.cache_tokens is not None:
            _row("cache", f"room for {shown.fit.cache_tokens:,} tokens of all requests together (estimate)")
        _memory(shown.fit)


def _model(preset: Preset) -> None:
    known = preset.architecture.parameters  # 0 where a preset's maker could not say
    parameters = f"{_count(known)} parameters" if known else "unknown number of parameters"
    _row("model", f"{preset.source}, {parameters}, licence {preset.licence}")
    if preset.gated:
        _row(
            "gated",
            "its hub gives it out on request: accept its terms there, then HF_TOKEN or presetOptions.modelAccessSecret",
        )


def _device(name: str) -> str:
    return "GPU" if name == "cuda" else "CPU"


def _parallel(layout: ServingConfiguration, *, long: bool = False) -> list[str]:
    """How a model is divided, in the field's own letters where there is little room."""
    parts = (
        (layout.tensor, "TP", "GPUs share every layer"),
        (layout.pipeline, "PP", "stages of layers follow one another"),
        (layout.data, "DP", "copies"),
    )
    return [f"{number} {words}" if long else f"{letters} {number}" for number, letters, words in parts if number > 1]


def _row(label: str, text: str) -> None:
    click.echo(f"  {label:8} {text}")


def _data(plan: TuningPlan) -> str:
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


def _work(fit: TuningFit) -> str:
    if fit.steps is None or fit.tokens is None:
        return "steps and time are known once the data is"
    time = f", about {duration(fit.seconds)} (estimate)" if fit.seconds else ""
    return f"{fit.steps:,} steps, {fit.tokens:,} tokens{time}"


def _memory(fit: Fit) -> None:
    where = "per GPU" if fit.configuration.device == "cuda" else "of RAM"
    click.echo(f"\n  memory {where} (estimate)")
    width = max(12, *(len(item.name) for item in fit.memory.items))
    for item in fit.memory.items:
        click.echo(f"    {item.name:{width}} {gib(item.bytes):>9}   {click.style(item.formula, dim=True)}")
    colour = "green" if fit.fits else "red"
    click.echo(
        f"    {'peak':{width}} {click.style(f'{gib(fit.memory.total):>9}', fg=colour)}   of {gib(fit.capacity)} usable"
    )


def _machines(plan: Plan) -> None:
    if not plan.candidates:
        return
    usable = [c for c in plan.candidates if not c.rejected]
    rejected = [c for c in plan.candidates if c.rejected]
    shown = [*usable[:USABLE], *rejected[:REJECTED]]
    tuning = isinstance(plan, TuningPlan)
    task = ("TIME", "$/H", "$ JOB") if tuning else ("RUNTIME", "$/H")
    head = ("MACHINE", "HAS", "WHERE", "FIT", "CONFIGURATION", *task)
    rows = [head, *(_cells(c, plan) for c in shown)]
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
    best = best if tuning else "the cheapest hour first"
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
    money_at = 6
    left = [f"{text:{width}}" for text, width in zip(cells[:money_at], widths, strict=False)]
    sums = zip(cells[money_at:], widths[money_at:], strict=True)
    return "  ".join([*left, *(f"{text:>{width}}" for text, width in sums)])


def _more(number: int, mark: str = "") -> None:
    if number > 0:
        click.echo(f"    {mark}… {number} more (--json has all)")


def _cells(candidate: Candidate, plan: Plan) -> tuple[str, ...]:
    offer, fit = candidate.offer, candidate.fit
    price = _per_hour(offer, plan.workspace.resource.count)
    where = (offer.instance_type, has(offer), _where(offer))
    memory = f"~{fit.memory.total / GIB:.1f} of {fit.capacity / GIB:.1f} GiB"
    if isinstance(fit, TuningFit):
        c = fit.configuration
        gpus = f" × {c.processes} GPUs" if c.processes > 1 else ""
        layout = f"{c.micro_batch}×{c.accumulation}{gpus}, {c.sequence} tokens, {c.dtype}"
        cost = "none" if is_free(offer) else _about(candidate.cost)
        return *where, memory, layout, _time(fit.seconds), price, cost
    if not candidate.runtime:
        return *where, "unknown", "", "", price
    s, count = fit.configuration, machines(plan.workspace, offer)
    several = [f"{count} machines"] if count > 1 else []
    layout = ", ".join([f"{s.requests} at once, {s.context} tokens, {s.dtype}", *_parallel(s), *several])
    return *where, memory, layout, candidate.runtime, price


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
    per_hour: float = 0.0
    """US dollars that the endpoints cost for each hour in which they are served; what runs on machines that are there costs
    nothing more."""
    endpoints: int = 0
    unknown_prices: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data; a sum is null while a part of it is not known."""
        return {
            "cost": None if self.unknown_costs else self.cost,
            "seconds": None if self.unknown_times else self.seconds,
            "atLeast": {"cost": self.cost, "seconds": self.seconds},
            "unknownCosts": self.unknown_costs,
            "unknownTimes": self.unknown_times,
            "withoutMachine": self.without_machine,
            "endpoints": self.endpoints,
            "perHour": None if self.unknown_prices else self.per_hour,
            "estimates": ["cost", "seconds"],
        }


def sum_of(plans: Sequence[Plan]) -> Sum:
    """What the chosen machines of these plans cost together."""
    chosen = [p.chosen for p in plans if p.chosen and isinstance(p, TuningPlan)]
    costs = [0.0 if is_free(c.offer) else c.cost for c in chosen]
    times = [c.seconds for c in chosen]
    serving = [(p.chosen.offer, p) for p in plans if p.chosen and not isinstance(p, TuningPlan)]
    hours = [_hour(offer, p.workspace.resource.count) for offer, p in serving]
    return Sum(
        cost=sum(c for c in costs if c is not None),
        seconds=sum(t for t in times if t is not None),
        unknown_costs=costs.count(None),
        unknown_times=times.count(None),
        without_machine=len(plans) - len(chosen) - len(serving),
        per_hour=sum(h for h in hours if h is not None),
        endpoints=len(serving),
        unknown_prices=hours.count(None),
    )


def _hour(offer: Offer, count: int) -> float | None:
    if is_free(offer):
        return 0.0
    return offer.price.per_hour * count if offer.price else None


def show_sum(plans: Sequence[Plan]) -> None:
    """Print what all of them cost together, and how long they take one after the other."""
    total = sum_of(plans)
    served = _served(total)
    left = f"; {total.without_machine} without a machine" if total.without_machine else ""
    if not any(isinstance(p, TuningPlan) for p in plans):
        click.echo()
        click.echo(f"{len(plans)} workspaces: {served}{left} (estimate)")
        return
    free = all(is_free(p.chosen.offer) for p in plans if p.chosen and isinstance(p, TuningPlan))
    cost = "nothing more" if free else f"~{money(total.cost)}"
    if total.unknown_costs:
        cost = f"{cost} and {total.unknown_costs} of unknown cost" if total.cost else "unknown cost"
    time = f"~{duration(total.seconds)}" if total.seconds else "unknown"
    if total.seconds and total.unknown_times:
        time += f" and {total.unknown_times} of unknown time"
    also = f"; {served}" if served else ""
    click.echo()
    click.echo(f"{len(plans)} workspaces: costs {cost}; training one after the other: {time}{also}{left} (estimate)")


def _served(total: Sum) -> str:
    if not total.endpoints:
        return ""
    what = f"{total.endpoints} endpoint{'s' if total.endpoints > 1 else ''}"
    if total.unknown_prices:
        return f"{what}: {money(total.per_hour)} an hour and {total.unknown_prices} of unknown price"
    return f"{what}: {money(total.per_hour)} an hour" if total.per_hour else f"{what}: nothing more"


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
