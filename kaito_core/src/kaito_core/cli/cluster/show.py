"""Workspaces of a cluster as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from kaito_core.api import labels
from kaito_core.cli.cluster import endpoint
from kaito_core.cli.cluster.workspace import attempt_words, attempts, is_current, phase
from kaito_core.cli.show import duration
from kaito_core.kube.errors import ApiError
from kaito_core.kube.kinds import EVENTS, SERVICES, WORKSPACES, Object
from kaito_core.kube.ownership import is_controlled_by

if TYPE_CHECKING:
    from kaito_core.kube.client import Client


def table(client: Client, namespace: str, workspaces: Sequence[Object]) -> None:
    """One line each."""
    click.echo(f"Workspaces in the namespace {namespace} of {client.context}")
    width = max(len(w["metadata"]["name"]) for w in workspaces)
    click.echo(f"{'NAME':{width}}  {'STATE':9}  {'STAGE':7}  PRESET")
    for each in workspaces:
        served = f"  {phase(each)} {endpoint.url(each)}".rstrip() if phase(each) else ""
        click.echo(f"{each['metadata']['name']:{width}}  {state(each):9}  {_stage(each):7}  {_what(each)}{served}")


def state(workspace: Object) -> str:
    """In one word."""
    if "deletionTimestamp" in workspace["metadata"]:
        return "Deleting"
    return str(workspace.get("status", {}).get("state") or "New")


def summary(client: Client, workspace: Object) -> dict[str, Any]:
    """As plain data, for ``--json``."""
    metadata = workspace["metadata"]
    return {
        "name": metadata["name"],
        "namespace": metadata["namespace"],
        "context": client.context,
        "phase": state(workspace),
        "endpoint": endpoint.summary(workspace),
        "status": workspace.get("status", {}),
    }


def _stage(workspace: Object) -> str:
    return str(workspace.get("status", {}).get("progress", {}).get("stage") or "-")


def _what(workspace: Object) -> str:
    tuning = workspace.get("tuning") or {}
    preset = (tuning or workspace.get("inference") or {}).get("preset", {}).get("name", "-")
    return f"{preset} ({tuning['method']})" if tuning.get("method") else str(preset)


def full(client: Client, workspace: Object, options: str = "") -> None:
    """Everything that is known of one. ``options`` are what other commands need to be told to find the cluster."""
    metadata, status = workspace["metadata"], workspace.get("status", {})
    click.echo(f"{metadata['name']}: {state(workspace)}, {_what(workspace)}")
    _row("place", f"the namespace {metadata['namespace']} of {client.context}")
    _row("progress", _progress(status.get("progress", {})))
    _row("nodes", ", ".join(status.get("workerNodes", ())))
    adapter = status.get("adapter", {})
    _row("image", "@".join(v for v in (adapter.get("image"), adapter.get("digest")) if v))
    if "evalLossBefore" in adapter and "evalLossAfter" in adapter:
        _row("loss", f"{adapter['evalLossBefore']:.4f} before, {adapter['evalLossAfter']:.4f} after, on held-out data")
    _endpoint(client, workspace, options)
    _conditions(workspace, status.get("conditions", ()))
    _attempts(attempts(workspace))
    _events(client, workspace)


def _row(label: str, text: str) -> None:
    if text:
        click.echo(f"  {label:9} {text}")


def _progress(progress: Mapping[str, Any]) -> str:
    parts = [str(progress.get("stage", ""))]
    if "step" in progress:
        parts.append(f"step {progress['step']}/{progress.get('steps', '?')}")
    parts += [
        f"{word} {progress[k]:.4f}" for k, word in (("loss", "loss"), ("evalLoss", "held-out loss")) if k in progress
    ]
    if "secondsLeft" in progress:
        parts.append(f"{duration(progress['secondsLeft'])} left")
    if "costSoFar" in progress:
        parts.append(f"${progress['costSoFar']:.2f} so far (estimate)")
    return ", ".join(p for p in parts if p)


def _endpoint(client: Client, workspace: Object, options: str) -> None:
    known = endpoint.summary(workspace)
    if known is None:
        return
    since = f" for {_ago(known['since'])}" if known["since"] else ""
    asked = f", last asked {_ago(known['lastRequest'])} ago" if known["lastRequest"] else ""
    _row("endpoint", f"{known['phase']}{since}{asked}")
    _row("outside", _outside(client, workspace))
    click.echo(endpoint.how_to_call(workspace, options))


def _outside(client: Client, workspace: Object) -> str:
    """Where its load balancer is, if it asks for one."""
    metadata = workspace["metadata"]
    asked = str((metadata.get("annotations") or {}).get(labels.ENABLE_LOAD_BALANCER, "")).lower() == "true"
    if not asked or not endpoint.url(workspace):
        return ""
    try:
        found = client.get(SERVICES, metadata["name"], metadata["namespace"])
    except ApiError as e:
        return e.problems[0].message
    service = found if found and is_controlled_by(found, workspace) else {}
    given = service.get("status", {}).get("loadBalancer", {}).get("ingress") or []
    hosts = [str(i.get("hostname") or i.get("ip")) for i in given]
    return (
        ", ".join(f"http://[{h}]" if ":" in h else f"http://{h}" for h in hosts)
        or "the cloud has not given an address yet"
    )


def _conditions(workspace: Object, conditions: Sequence[Mapping[str, Any]]) -> None:
    if not conditions:
        click.echo("  no controller has looked at it yet")
        return
    click.echo("\n  conditions")
    width = max(len(c["type"]) for c in conditions)
    for each in conditions:
        old = "" if is_current(workspace, each) else " (of an earlier state of the Workspace)"
        reason = f"{each.get('reason', '')}: {each['message']}" if each.get("message") else each.get("reason", "")
        click.echo(f"    {each['type']:{width}}  {each['status']:7}  {reason}{old}")


def _attempts(tried: Iterable[Mapping[str, Any]]) -> None:
    lines = []
    for each in tried:
        how = ": ".join(v for v in (each.get("reason"), each.get("message")) if v)
        end = f" until {each['ended']}: {how}" if each.get("ended") else ", going on"
        lines.append(f"    {each.get('started', '')}  {attempt_words(each)}{end}")
    if lines:
        click.echo("\n  attempts")
        click.echo("\n".join(lines))


def _events(client: Client, workspace: Object) -> None:
    metadata = workspace["metadata"]
    selection = f"involvedObject.kind={WORKSPACES.kind},involvedObject.name={metadata['name']}"
    try:
        found = client.list(EVENTS, metadata["namespace"], fields=selection)[0]
    except ApiError as e:
        click.echo(f"\n  events: {e.problems[0].message}")
        return
    # An earlier Workspace of this name has left its own.
    ours = [e for e in found if e["involvedObject"].get("uid", metadata["uid"]) == metadata["uid"]]
    if ours:
        click.echo("\n  events")
    for each in sorted(ours, key=_when):
        count = f" (×{each['count']})" if each.get("count", 1) > 1 else ""
        ago = f"{_ago(_when(each))} ago"
        click.echo(
            f"    {ago:>16}  {each.get('type', ''):7}  {each.get('reason', '')}: {each.get('message', '')}{count}"
        )


def _when(event: Object) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"])


def _ago(when: str) -> str:
    return duration(max(0.0, (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()))
