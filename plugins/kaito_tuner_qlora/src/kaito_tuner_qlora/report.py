"""``report.html``: one file that can be mailed or opened from a bucket: inline SVG, no script, light and dark.

Everything that comes from data or configuration is escaped; the page loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from kaito_core.workloads.job import TuningJob

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #667; --paper: #fff; --line: #d6dae0; --a: #1f6feb; --b: #d1495b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --dim: #99a; --paper: #14171a; --line: #343a42; --a: #6cb0ff; --b: #ff8d9b; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
td:first-child { color: var(--dim); white-space: nowrap; } .warning { border-left: 4px solid var(--b); padding-left: .8rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-size: .9rem; } figure { margin: 1rem 0; }
figcaption, .dim { color: var(--dim); } svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 12px; }
.grid { stroke: var(--line); } .a { stroke: var(--a); fill: none; stroke-width: 2; } .b { stroke: var(--b); fill: none; stroke-width: 2; }
.dot-b { fill: var(--b); } .key-a { color: var(--a); } .key-b { color: var(--b); }
"""

Points = Sequence[tuple[float, float]]


def render(job: TuningJob, metrics: Mapping[str, Any], doctor: Mapping[str, Any], verified: Mapping[str, Any]) -> str:
    """The page. ``verified`` is empty until the `verify` stage has run; then its part says so."""
    history = metrics.get("history", [])
    loss, held_out, rate, speed = (
        [(float(e["step"]), float(e[key])) for e in history if key in e]
        for key in ("loss", "eval_loss", "learning_rate", "tokens_per_second")
    )
    body = [
        f"<h1>{escape(job.name)}</h1>",
        f'<p class="dim">{escape(job.method)} of {escape(job.preset.name)}</p>',
        *(f'<p class="warning">{escape(w)}</p>' for w in verified.get("warnings", [])),
        _result(metrics, verified),
        "<h2>Loss</h2>",
        _chart(
            loss,
            held_out,
            'nats per learned token: <span class="key-a">training</span>, <span class="key-b">held out</span>',
        ),
        _samples(verified),
        "<h2>Training data</h2>",
        _table(_data(metrics, doctor)),
        "<h2>Speed and memory</h2>",
        _table(_machine(job, metrics)),
        _chart(speed, [], "tokens per second, mean since the start"),
        "<h2>Configuration</h2>",
        _chart(rate, [], "learning rate"),
        *(
            f"<h3>{escape(name)}</h3>{_table((k, v) for k, v in fields.items() if v is not None)}"
            for name, fields in job.config.items()
            if isinstance(fields, Mapping)
        ),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(job.name)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _result(metrics: Mapping[str, Any], verified: Mapping[str, Any]) -> str:
    summary = metrics.get("summary", {})
    rows: list[tuple[str, Any]] = [("steps", summary.get("steps")), ("epochs", metrics.get("epochs")),
                                   ("last training loss", summary.get("loss")), ("held-out loss", summary.get("eval_loss"))]  # fmt: skip
    if summary.get("adapter_of_step") != summary.get("steps"):
        rows.append(("adapter of step", summary.get("adapter_of_step")))
    if verified:
        stops = verified["stops"]
        rows += [
            (f"loss on {verified['examples']} {verified['measured_on']}",
             f"{verified['eval_loss_before']:.4f} before, {verified['eval_loss_after']:.4f} after"),
            ("answers that end", f"{stops['before']} of {stops['of']} before, {stops['after']} after"),
        ]  # fmt: skip
    return _table((k, v) for k, v in rows if v is not None)


def _samples(verified: Mapping[str, Any]) -> str:
    if not verified:
        return '<h2>Answers before and after</h2><p class="dim">Not yet: the verify stage has not run.</p>'
    parts = ["<h2>Answers before and after</h2>"]
    for sample in verified.get("samples", []):
        rows = "".join(
            f"<tr><td>{name}</td><td><pre>{escape(str(sample.get(name, '')))}</pre></td></tr>"
            for name in ("prompt", "expected", "before", "after")
        )
        parts.append(f"<table>{rows}</table><br>")
    return "\n".join(parts)


def _data(metrics: Mapping[str, Any], doctor: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    data = metrics.get("data", {})
    yield from ((k.replace("_", " "), f"{v:,}" if isinstance(v, int) else v) for k, v in data.items())
    yield from ((k, v) for k, v in doctor.items() if isinstance(v, str | int | float) and k not in data)
    if doctor.get("columns_not_used"):
        yield "columns not used", ", ".join(doctor["columns_not_used"])


def _machine(job: TuningJob, metrics: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    c, parameters = job.configuration, metrics.get("parameters", {})
    yield "device", f"{c.device}, {c.dtype}, {c.processes} process{'es' if c.processes > 1 else ''}"
    yield "rows per step", f"{c.micro_batch * c.accumulation} of {c.sequence} tokens"
    yield "tokens per forward pass", f"at most {metrics.get('budget', 0):,}"
    yield "trained parameters", f"{parameters.get('trained', 0):,} of {parameters.get('total', 0):,}"
    yield (
        "training",
        f"{metrics.get('seconds', 0):,.0f} s, and {metrics.get('load_seconds', 0):,.0f} s to load the model",
    )
    yield "tokens", f"{metrics.get('tokens', 0):,} at {metrics.get('tokens_per_second', 0):,} a second"
    yield "memory", f"at most {metrics.get('memory', 0) / 2**30:.2f} GiB"


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    return (
        "<table>"
        + "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(_shown(v))}</td></tr>" for k, v in rows)
        + "</table>"
    )


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _chart(line: Points, dots: Points, caption: str) -> str:
    """One or two series over steps as SVG; ``caption`` is HTML of ours."""
    points = [p for p in [*line, *dots] if math.isfinite(p[1])]
    if not points:
        return ""
    width, height, left, bottom, top = 900, 260, 70, 28, 10
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    if y1 - y0 < 1e-12:
        y0, y1 = y0 - abs(y0 or 1) * 0.1, y1 + abs(y1 or 1) * 0.1

    def place(p: tuple[float, float]) -> str:
        x = left + (p[0] - x0) / ((x1 - x0) or 1) * (width - left - 10)
        y = top + (y1 - p[1]) / (y1 - y0) * (height - top - bottom)
        return f"{x:.1f},{y:.1f}"

    grid = ""
    for i in range(5):
        value = y0 + (y1 - y0) * i / 4
        y = top + (4 - i) / 4 * (height - top - bottom)
        grid += f'<line class="grid" x1="{left}" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}"/>'
        grid += f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
    grid += f'<text x="{left}" y="{height - 6}">step {x0:.0f}</text><text x="{width - 10}" y="{height - 6}" text-anchor="end">{x1:.0f}</text>'
    drawn = ""
    for series, kind in ((line, "a"), (dots, "b")):
        finite = [p for p in series if math.isfinite(p[1])]
        drawn += f'<polyline class="{kind}" points="{" ".join(map(place, finite))}"/>' if finite else ""
        if kind == "b":
            for x, y in (place(p).split(",") for p in finite):
                drawn += f'<circle class="dot-b" cx="{x}" cy="{y}" r="3.5"/>'
    return f'<figure><svg viewBox="0 0 {width} {height}" role="img">{grid}{drawn}</svg><figcaption>{caption}</figcaption></figure>'
