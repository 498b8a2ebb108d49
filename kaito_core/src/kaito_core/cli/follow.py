"""A run as it goes: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import click

from kaito_core.cli.show import duration
from kaito_core.local.state import RunFolder, RunState

QUIET = 10.0
"""Seconds between two plain step lines: a log is read by people."""


class Follower:
    """Shows the events of a run. On a terminal the training is a bar that moves; elsewhere it is a line now and then."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.live = sys.stdout.isatty()
        self._bar: Any = None
        self._task: Any = None
        self._said = 0.0

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_event(self, event: dict[str, Any]) -> None:
        kind, stage = event["event"], event["stage"]
        if kind == "started":
            self.say(click.style(f"{stage}", bold=True))
        elif kind == "skipped":
            self.say(f"{click.style(stage, bold=True)} done before")
        elif kind == "message":
            self.say("\n".join("  " + line for line in str(event["text"]).splitlines()))
        elif kind == "step":
            self._step(event)
        elif kind == "eval":
            self.say(f"  step {event.get('step')}: held-out loss {_figure(event.get('loss'))}")
        elif kind in ("finished", "failed"):
            self.close()

    def _step(self, event: dict[str, Any]) -> None:
        if not all(isinstance(event.get(k), int | float) for k in ("step", "steps", "loss")):
            return  # a tuner of a newer version, in a pod
        text = f"loss {event['loss']:.4f}  {event.get('tokens_per_second', 0):,.0f} tokens/s"
        if self.live:
            self._move(event, text)
        elif time.monotonic() - self._said >= QUIET or event["step"] == event["steps"]:
            self._said = time.monotonic()
            left = duration(event.get("seconds_left"))
            click.echo(f"  step {event['step']}/{event['steps']}  {text}  {left} left")

    def _move(self, event: dict[str, Any], text: str) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn("  {task.fields[step]}"),
                BarColumn(30),
                TextColumn("{task.fields[text]}  {task.fields[left]} left"),
            )
            self._bar = Progress(*columns, transient=True)
            self._task = self._bar.add_task("train", total=event["steps"], step="", text="", left="")
            self._bar.start()
        step = f"step {event['step']}/{event['steps']}"
        self._bar.update(
            self._task, completed=event["step"], step=step, text=text, left=duration(event.get("seconds_left"))
        )

    def say(self, text: str) -> None:
        """A line, above the bar where there is one."""
        if self._bar is not None:
            # Rich keeps the bar below what is printed; its own markup must not read the data's brackets.
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text)


def result(folder: RunFolder, state: RunState) -> None:
    """What a finished run made, and what to type next."""
    pushed = state.stages["push"].result if "push" in state.stages else {}
    verified = _json(folder, "verify.json")
    headline(state.name, verified.get("eval_loss_before"), verified.get("eval_loss_after"))
    for sample in verified.get("samples", [])[:3]:
        click.echo(f"  asked          {_line(sample.get('question'))}")
        click.echo(f"    before       {_line(sample.get('before'))}")
        click.echo(f"    after        {click.style(_line(sample.get('after')), fg='green')}")
    made(pushed)
    click.echo(f"  report         {folder.results / 'report.html'}")
    if "image" not in pushed:
        click.echo(f"  next           kaito push {folder.path.name} --to REGISTRY/NAME:TAG")


def headline(name: str, before: object, after: object) -> None:
    """That it succeeded, and the loss on held-out rows without and with the adapter."""
    click.echo()
    click.echo(click.style(f"{name} succeeded", fg="green", bold=True))
    if isinstance(before, int | float) and isinstance(after, int | float):
        click.echo(f"  held-out loss  {before:.4f} before, {after:.4f} after")


def made(pushed: Mapping[str, Any]) -> None:
    """Where the adapter is."""
    for label, key in (
        ("adapter", "adapter"),
        ("OCI layout", "layout"),
        ("volume", "volume"),
        ("image", "image"),
        ("digest", "digest"),
    ):
        if pushed.get(key):
            click.echo(f"  {label:14} {pushed[key]}")


def _figure(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "unknown"


def _line(text: object) -> str:
    flat = " ".join(str(text).split())
    return flat if len(flat) <= 100 else flat[:99] + "…"


def _json(folder: RunFolder, name: str) -> dict[str, Any]:
    try:
        data = json.loads((folder.results / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
