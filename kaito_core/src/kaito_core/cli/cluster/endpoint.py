"""The endpoint of a Workspace in a cluster: where it is, how it is, and what to type. Pure functions of plain dicts."""

from __future__ import annotations

from typing import Any

import click

from kaito_core.api import conditions, labels
from kaito_core.cli.cluster.workspace import is_trained, is_tuned, message, phase, policy
from kaito_core.kube.kinds import Object
from kaito_core.problems import UserError

KEY = "KAITO_API_KEY"


def title(workspace: Object) -> str:
    """``team-a/small``."""
    return f"{workspace['metadata']['namespace']}/{workspace['metadata']['name']}"


def url(workspace: Object) -> str:
    """Where programs in the cluster ask it; empty when it has no Service, as with a pod template of the user's own."""
    metadata = workspace["metadata"]
    return "" if has_template(workspace) else f"http://{metadata['name']}.{metadata['namespace']}"


def has_template(workspace: Object) -> bool:
    return (workspace.get("inference") or {}).get("template") is not None


def key_secret(workspace: Object) -> str:
    """The Secret with its API key; empty when it wants none."""
    return str((workspace["metadata"].get("annotations") or {}).get(labels.API_KEY_SECRET) or "")


def summary(workspace: Object) -> dict[str, Any] | None:
    """As plain data, for ``--json``; None when nothing is served."""
    if not phase(workspace):
        return None
    said = workspace["status"]["serving"]
    return {
        "phase": phase(workspace),
        "since": said.get("since"),
        "url": url(workspace) or None,
        "lastRequest": said.get("lastRequest"),
    }


def how_to_call(workspace: Object, options: str = "") -> str:
    """The endpoint and what to type, for people. ``options`` are what other commands need to be told to find the cluster."""
    metadata = workspace["metadata"]
    name, there = metadata["name"], f"{options}-n {metadata['namespace']}"
    if has_template(workspace):
        head = f"{name} is served with a pod template of your own, and its Service is yours too"
        return "\n".join([click.style(head, bold=True), f"  end it     kaito delete {there} {name}"])
    at = f"{url(workspace)} inside the cluster"
    state = phase(workspace)
    head = f"{name} starts, and will answer at {at}; requests wait for it"
    if state == "Ready":
        head = f"{name} answers at {at}"
    elif state == "Asleep":
        head = f"{name} is asleep: the first request gets a machine, at {at}"
    elif state == "Failed":
        head = f"{name} does not answer: {message(workspace, conditions.INFERENCE_READY)}; it is tried again, at {at}"
    forward = f"kubectl {there} port-forward service/{name} 5000:80"
    key, chat = "", f"kaito chat {there} {name}"
    if key_secret(workspace):
        key, chat = (
            f' -H "Authorization: Bearer ${KEY}"',
            f"{KEY}=… kaito chat http://localhost:5000, through the port-forward",
        )
    body = """-H 'Content-Type: application/json' -d '{"prompt": "Hello"}'"""
    return "\n".join(
        [
            click.style(head, fg="green" if state in ("Ready", "Asleep") else None, bold=True),
            f"  curl       curl {url(workspace)}/chat{key} {body}",
            f"  from here  {forward}" + (" (while it is awake)" if policy(workspace) != "always" else ""),
            f"  chat       {chat}",
            f"  end it     kaito delete {there} {name}; it runs until then"
            + (", and sleeps while nobody asks" if policy(workspace) != "always" else ""),
        ]
    )


def refuse_unaskable(workspace: Object, options: str = "") -> None:
    """UserError when it cannot be asked from here, whatever one waits for."""
    metadata = workspace["metadata"]
    name, there = metadata["name"], f"{options}-n {metadata['namespace']}"
    named = title(workspace)
    if "deletionTimestamp" in metadata:
        raise UserError(f"{named} is being deleted", "kaito status lists what there is")
    if has_template(workspace):
        raise UserError(
            f"{named} is served with a pod template of your own, and kaito does not know where that answers",
            f"kubectl {there} port-forward pod/{name}-0 5000:PORT, then kaito chat http://localhost:5000",
        )
    if is_tuned(workspace) and not is_trained(workspace):
        raise UserError(f"{named} is not tuned yet", f"follow it: kaito logs -f {there} {name}")
    if is_tuned(workspace) and "adapter" not in workspace.get("status", {}):
        raise UserError(
            f"the tuning of {named} has failed, so nothing is served", f"kaito status {there} {name} says why"
        )
    if policy(workspace) == "never":
        how = (
            "set inference.policy"
            if (workspace.get("inference") or {}).get("policy")
            else "set the annotation kaito.sh/serve-after-tuning"
        )
        raise UserError(
            f"{named} is not served: its policy is never", f"{how} to onDemand or always, and apply it again"
        )
    if key_secret(workspace):
        raise needs_key(workspace, options)


def needs_key(workspace: Object, options: str = "") -> UserError:
    """Why an endpoint with an API key cannot be asked through the API server."""
    metadata = workspace["metadata"]
    name, there = metadata["name"], f"{options}-n {metadata['namespace']}"
    wake = ""
    if phase(workspace) != "Ready" and policy(workspace) != "always":
        wake = f"wake it: kubectl {there} annotate --overwrite workspace/{name} {labels.WAKE}=$(date -u +%FT%TZ), wait until it is Ready; then "
    return UserError(
        f"{title(workspace)} wants an API key, and the API server, through which kaito would ask, keeps the header that it is in for itself",
        f"{wake}kubectl {there} port-forward service/{name} 5000:80, and in another terminal "
        f"{KEY}=… kaito chat http://localhost:5000",
    )
