"""A plan as people read it."""

from __future__ import annotations

import click

from kaito_core.planning.catalogue import provisioner_package
from kaito_core.planning.plan import Candidate, Plan, gib


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
    rows = []
    for candidate in plan.candidates:
        offer, fit = candidate.offer, candidate.fit
        mark = (
            click.style("✔", fg="green")
            if candidate is plan.chosen
            else click.style("✘", fg="red")
            if candidate.rejected
            else " "
        )
        has = f"{offer.gpus}×{offer.gpu.model}" if offer.gpu and offer.gpus else f"{offer.cpus} CPUs"
        need = f"{gib(fit.memory.total)} of {gib(fit.capacity)}"
        rows.append((mark, offer.instance_type, has, need, candidate.rejected or _why(candidate)))
    widths = [max(len(r[i]) for r in [*rows, ("", "MACHINE", "HAS", "NEEDS", "")]) for i in (1, 2, 3)]
    click.echo()
    click.echo(f"    {'MACHINE':{widths[0]}}  {'HAS':{widths[1]}}  {'NEEDS':{widths[2]}}  WHY")
    for mark, name, has, need, why in rows:
        click.echo(f"  {mark} {name:{widths[0]}}  {has:{widths[1]}}  {need:{widths[2]}}  {why}")
    for note in dict.fromkeys(n for c in plan.candidates if not c.rejected for n in c.fit.notes):
        click.echo(f"  note: {note}")


def _why(candidate: Candidate) -> str:
    offer = candidate.offer
    if offer.provisioner:
        return candidate.why
    package = provisioner_package(offer.cloud)
    return f"{candidate.why}; no installed plugin can get it" + (f" (pip install {package})" if package else "")


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
