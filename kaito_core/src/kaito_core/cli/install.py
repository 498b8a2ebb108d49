"""``kaito install``: the controller into a cluster, without Helm. The same objects as the chart's at its defaults."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from kaito_core import __version__
from kaito_core.install import KINDS, MANAGED_BY, OURS, definitions, kind_of, namespace, objects
from kaito_core.kube.errors import ApiError
from kaito_core.kube.kinds import CRDS, DEPLOYMENTS, NAMESPACES, PODS, Kind, Object
from kaito_core.problems import Failure, UserError

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

MANAGER = "kaito-install"
"""The field manager of server-side apply: what an earlier version set and this one does not is taken back."""
PATIENCE = 300.0
"""Seconds that the controller may take to get ready: its image is pulled in this time."""


@click.command("install")
@click.option("--registry", required=True, metavar="HOST/PATH", help="Where images/build.py pushed the images to.")
@click.option("--tag", default=__version__, show_default=True, help="The tag of the images.")
@click.option("--namespace", "where", default="kaito-system", show_default=True, help="Where the controller runs.")
@click.option("--context", default="", help="A context of your kubeconfig; the current one when left out.")
@click.option("--dry-run", is_flag=True, help="Ask the cluster what would change; change nothing.")
@click.option("--print", "show", is_flag=True, help="Print the objects as YAML; needs no cluster.")
def command(registry: str, tag: str, where: str, context: str, dry_run: bool, show: bool) -> None:
    """Install the controller in a cluster, or upgrade it.

    For other settings than the defaults use the Helm chart (charts/kaito).
    """
    _readable(registry, tag)
    wanted = objects(where, registry, tag)
    if show:
        _print([*definitions(), namespace(where), *wanted])
        return
    from kaito_core.kube.client import connect

    client = connect(context)
    refuse_helm(client)
    _refuse_elsewhere(client, where)
    click.echo(f"{'would install' if dry_run else 'installing'} kaito {tag} in {where} of {client.host}")
    new = client.get(NAMESPACES, where) is None
    for each in definitions():
        _apply(client, each, dry_run)
    if not dry_run:
        _wait_served(client)
    if new:
        _apply(client, namespace(where), dry_run)
    for obj in wanted:
        if dry_run and new and kind_of(obj).namespaced:
            click.echo(f"  would create  {_name(obj)}")  # the server could not say: its namespace is not there yet
        else:
            _apply(client, obj, dry_run)
    _prune(client, wanted, dry_run)
    if not dry_run:
        _wait(client, next(o for o in wanted if o["kind"] == "Deployment"))
        click.echo("the controller is ready\n\n  kubectl apply -f workspace.yaml\n  kubectl get workspaces --watch")


def _readable(registry: str, tag: str) -> None:
    from kaito_core.oci_reference import Reference

    try:
        Reference.parse(f"{registry}/kaito-controller:{tag}")
    except ValueError as e:
        raise UserError(
            f"{registry}/kaito-controller:{tag} is not an image reference: {e}",
            "give --registry as HOST or HOST/PATH, and --tag as the part after the colon",
            field="--registry",
        ) from None


def refuse_helm(client: Client) -> None:
    """Two programs that look after the same objects undo each other's work."""
    for found in client.list(DEPLOYMENTS, labels="app.kubernetes.io/name=kaito,app.kubernetes.io/component=controller")[
        0
    ]:
        metadata = found["metadata"]
        if metadata["labels"].get(MANAGED_BY) == "Helm":
            release, there = metadata["labels"].get("app.kubernetes.io/instance", "kaito"), metadata["namespace"]
            raise UserError(
                f"kaito was installed in {there} by Helm, as the release {release}",
                f"go on with Helm: helm upgrade {release} charts/kaito -n {there}, or helm uninstall {release} -n {there}",
            )


def _refuse_elsewhere(client: Client, where: str) -> None:
    for found in client.list(DEPLOYMENTS, labels=OURS)[0]:
        there = found["metadata"]["namespace"]
        if there != where:
            raise UserError(
                f"kaito is installed in {there} already",
                f"upgrade it there with --namespace {there}, or remove it with kaito uninstall --keep-workspaces",
                field="--namespace",
            )


def _print(wanted: list[Object]) -> None:
    import yaml

    click.echo(yaml.safe_dump_all(wanted, sort_keys=False, width=120), nl=False)


def _apply(client: Client, obj: Object, dry_run: bool) -> None:
    kind = kind_of(obj)
    metadata = obj["metadata"]
    before = client.get(kind, metadata["name"], metadata.get("namespace", ""))
    after = client.apply(kind, obj, manager=MANAGER, dry_run=dry_run)
    done = "create" if before is None else "keep" if _essence(before) == _essence(after) else "change"
    click.echo(f"  {'would ' if dry_run else ''}{done}  {_name(obj)}")


def _essence(obj: Object) -> Object:
    """What people mean when they ask whether an object has changed."""
    metadata = {k: v for k, v in obj["metadata"].items() if k in ("labels", "annotations")}
    return {**{k: v for k, v in obj.items() if k != "status"}, "metadata": metadata}


def _name(obj: Object) -> str:
    return f"{kind_of(obj)}/{obj['metadata']['name']}"


def installed(client: Client) -> list[tuple[Kind, Object]]:
    """Everything that `kaito install` of any version made, in the order of `KINDS`."""
    return [(kind, obj) for kind in KINDS for obj in client.list(kind, labels=OURS)[0]]


def _prune(client: Client, wanted: list[Object], dry_run: bool) -> None:
    """Remove what an earlier version had and this one has not."""
    kept = {(kind_of(o), o["metadata"]["name"]) for o in wanted}
    for kind, obj in installed(client):
        name, there = obj["metadata"]["name"], obj["metadata"].get("namespace", "")
        if (kind, name) not in kept:
            if not dry_run:
                client.delete(kind, name, there)
            click.echo(f"  {'would ' if dry_run else ''}remove  {kind}/{name}")


def _wait_served(client: Client) -> None:
    """Until the API server serves what was defined; the controller lists it as soon as it starts."""
    for name in (d["metadata"]["name"] for d in definitions()):
        until(
            lambda name=name: _established(client, name),  # type: ignore[misc]
            30.0,
            lambda name=name: Failure(  # type: ignore[misc]
                f"the API server does not serve {name}", f"see: kubectl describe crd {name}"
            ),
        )


def _established(client: Client, name: str) -> bool:
    found = client.get(CRDS, name) or {}
    conditions = found.get("status", {}).get("conditions", ())
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


def _wait(client: Client, wanted: Object) -> None:
    name, there = wanted["metadata"]["name"], wanted["metadata"]["namespace"]
    click.echo("waiting for the controller")
    said: list[str] = []

    def ready() -> bool:
        if is_ready(client.get(DEPLOYMENTS, name, there)):
            return True
        trouble = _trouble(client, wanted)
        if trouble and trouble not in said:
            said.append(trouble)
            click.echo(f"  {trouble}")
        return False

    until(
        ready,
        PATIENCE,
        lambda: Failure(
            f"the controller in {there} is not ready after {PATIENCE:.0f} s: {_trouble(client, wanted) or 'no reason is known'}",
            f"look closer: kubectl -n {there} describe pods; mend it, and run the same command again",
        ),
    )


def is_ready(deployment: Object | None) -> bool:
    """Whether all its pods are of the present version and ready."""
    if deployment is None:
        return False
    status, wanted = deployment.get("status", {}), deployment["spec"]["replicas"]
    seen = status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
    counts = {status.get(which, 0) for which in ("replicas", "updatedReplicas", "availableReplicas")}
    return bool(seen and counts == {wanted})


def until(done: Callable[[], bool], seconds: float, late: Callable[[], Failure]) -> None:
    """Look every second until it is ``done``; raise what ``late`` says when that takes more than ``seconds``."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise late()
        time.sleep(1.0)


def _trouble(client: Client, deployment: Object) -> str:
    """Why its pods are not ready, in the words of the kubelet or the last words of the controller; empty if nobody says."""
    labels = ",".join(f"{k}={v}" for k, v in deployment["spec"]["selector"]["matchLabels"].items())
    there = deployment["metadata"]["namespace"]
    pods = client.list(PODS, there, labels=labels)[0]
    # The newest first: those of an earlier version are on their way out.
    for pod in sorted(pods, key=lambda p: str(p["metadata"]["creationTimestamp"]), reverse=True):
        for condition in pod.get("status", {}).get("conditions", ()):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return str(condition.get("message") or condition.get("reason"))
        for container in pod.get("status", {}).get("containerStatuses", ()):
            waiting = container.get("state", {}).get("waiting", {})
            if container.get("restartCount", 0) and not container.get("ready"):
                return f"it ends as soon as it has started: {_last_words(client, pod, container['name'])}"
            if waiting.get("message"):
                return f"{waiting.get('reason', '')}: {waiting['message']}"
    return ""


def _last_words(client: Client, pod: Object, container: str) -> str:
    metadata = pod["metadata"]
    try:
        lines = list(client.logs(metadata["name"], metadata["namespace"], container, tail=3, previous=True))
    except ApiError as e:  # the kubelet has thrown the log away
        return str(e)
    return " / ".join(lines) or "without a word"
