"""``kaito doctor``: what a cluster lacks to run Workspaces. Reads the cluster once; the checks are in `doctor_checks`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Final, TypeVar

import click

from kaito_core.cli.controller import LEASE_NAME
from kaito_core.cli.doctor_checks import CONTROLLERS, Found, Result, State, examine, lease_of, setting
from kaito_core.kube.errors import ApiError, Forbidden, Unreachable
from kaito_core.kube.kinds import (
    CRDS,
    DEPLOYMENTS,
    EVENTS,
    JOBS,
    LEASES,
    NODES,
    PODS,
    STORAGE_CLASSES,
    WORKSPACES,
    Kind,
    Object,
)

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

T = TypeVar("T")

MINE: Final = (
    ("create", WORKSPACES, ""),
    ("get", WORKSPACES, ""),
    ("get", JOBS, ""),
    ("list", PODS, ""),
    ("get", PODS, "log"),
    ("list", EVENTS, ""),
)
"""What a person needs who runs Workspaces and wants to see what becomes of them."""

REVIEWS: Final = Kind("authorization.k8s.io/v1", "SubjectAccessReview", "subjectaccessreviews", namespaced=False)

MARKS: Final[Mapping[State, tuple[str, str]]] = {
    "ok": ("✔", "green"),
    "warning": ("!", "yellow"),
    "problem": ("✘", "red"),
}


@click.command("doctor")
@click.option("--context", default="", help="A context of your kubeconfig; the current one when left out.")
@click.option("--kubeconfig", default="", help="Path of the kubeconfig.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(context: str, kubeconfig: str, as_json: bool) -> int:
    """Say what a cluster lacks to run Workspaces, and what to do about it.

    Changes nothing. Exits with 1 when something is a problem.
    """
    from kaito_core.kube.client import connect

    client = connect(context, kubeconfig, user_agent="doctor")
    try:
        said = examine(read(client))
    except (Unreachable, Forbidden) as e:
        problem = e.problems[0]
        said = [("API server", Result("problem", problem.message, problem.remedy))]
    count = sum(r.state == "problem" for _, r in said)
    if as_json:
        checks = [{"check": title, **asdict(result)} for title, result in said]
        click.echo(json.dumps({"cluster": client.host, "problems": count, "checks": checks}, indent=2))
    else:
        click.echo(f"{client.host} (context {client.context})\n")
        _show(said)
    return 1 if count else 0


def _show(said: Sequence[tuple[str, Result]]) -> None:
    width = max(len(title) for title, _ in said)
    before = ""
    for title, result in said:
        mark, colour = MARKS[result.state]
        click.echo(f"  {click.style(mark, fg=colour)} {title if title != before else '':{width}}  {result.message}")
        if result.remedy:
            click.echo(f"    {'':{width}}  → {result.remedy}")
        before = title


# --- reading


def read(client: Client) -> Found:
    """Ask the cluster. What may not be read is left out and noted; `Unreachable` when there is no answer at all."""
    unread: dict[str, str] = {}

    def attempt(name: str, ask: Callable[[], T], otherwise: T) -> T:
        try:
            return ask()
        except Unreachable:
            raise
        except ApiError as e:
            unread[name] = e.problems[0].message
            return otherwise

    def every(kind: Kind, labels: str = "") -> list[Object]:
        return client.list(kind, labels=labels)[0]

    none: list[Object] = []
    controllers = attempt("controllers", lambda: every(DEPLOYMENTS, labels=CONTROLLERS), none)
    return Found(
        version=client.version(),
        definition=attempt("definition", lambda: client.get(CRDS, "workspaces.kaito.sh"), None),
        controllers=controllers,
        controller_pods=attempt("controller_pods", lambda: every(PODS, labels=CONTROLLERS), none),
        leases=attempt("leases", lambda: _leases(client, controllers), none),
        nodes=attempt("nodes", lambda: every(NODES), none),
        pods=attempt("pods", lambda: every(PODS, labels="kaito.sh/workspace"), none),
        storage_classes=attempt("storage_classes", lambda: every(STORAGE_CLASSES), none),
        not_mine=attempt("not_mine", lambda: _not_mine(client), []),
        not_theirs=attempt("not_theirs", lambda: [m for c in controllers for m in _not_theirs(client, c)], []),
        provisioners=_provisioners(),
        namespace=client.namespace,
        unread=unread,
    )


def _leases(client: Client, controllers: Iterable[Object]) -> list[Object]:
    places = [lease_of(c) for c in controllers]
    if not places:  # a controller that runs elsewhere may have one anywhere
        return client.list(LEASES, fields=f"metadata.name={LEASE_NAME}")[0]
    return [lease for namespace, name in places if (lease := client.get(LEASES, name, namespace))]


def _not_mine(client: Client) -> list[str]:
    return [
        f"{verb} {'/'.join(filter(None, [str(kind), subresource]))}"
        for verb, kind, subresource in MINE
        if not client.allowed(verb, kind, client.namespace, subresource)
    ]


def _not_theirs(client: Client, deployment: Object) -> list[str]:
    """What the controller's service account may not do, of the rules that `kaito install` would make for it."""
    from kaito_core.install import objects

    metadata = deployment["metadata"]
    there, account = metadata["namespace"], deployment["spec"]["template"]["spec"].get("serviceAccountName", "default")
    watched = setting(deployment, "--namespace", "KAITO_NAMESPACE")
    missing = []
    for role in objects(there, "registry", "tag"):
        if role["kind"] != "ClusterRole":
            continue
        for rule in role["rules"]:
            for resource in rule["resources"]:
                where = "" if resource == "nodes" else watched
                group = rule["apiGroups"][0]
                verbs = [v for v in rule["verbs"] if not _may(client, (there, account), v, group, resource, where)]
                if verbs:
                    places = f"in {where}" if where else "in all namespaces"
                    missing.append(
                        f"the service account {there}/{account} may not {', '.join(verbs)} {resource} {places}"
                    )
    return missing


def _may(client: Client, account: tuple[str, str], verb: str, group: str, resource: str, namespace: str) -> bool:
    name, _, subresource = resource.partition("/")
    asked = {"verb": verb, "group": group, "resource": name, "subresource": subresource, "namespace": namespace}
    review: Object = {
        "apiVersion": REVIEWS.api_version,
        "kind": REVIEWS.kind,
        "metadata": {"name": ""},
        "spec": {
            "user": f"system:serviceaccount:{account[0]}:{account[1]}",
            "groups": ["system:serviceaccounts", f"system:serviceaccounts:{account[0]}", "system:authenticated"],
            "resourceAttributes": asked,
        },
    }
    return bool(client.create(REVIEWS, review)["status"].get("allowed"))


def _provisioners() -> list[str]:
    from kaito_core.plugins.manager import load_plugins

    return sorted(set(load_plugins().provisioners()) - {"local", "existing"})
