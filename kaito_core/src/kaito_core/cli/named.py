"""What a name means that was given to ``status``, ``logs`` or ``delete``: a run on this machine, or a Workspace in a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kaito_core.cli.target import cluster_options, connected, target_of, way_out, within
from kaito_core.local.state import RunFolder
from kaito_core.problems import Failure, KaitoError, UserError

if TYPE_CHECKING:
    from kaito_core.kube.client import Client
    from kaito_core.kube.kinds import Object

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

PATIENCE = 2.0
"""Seconds that a cluster has to answer which nobody asked for by name."""


@dataclass(frozen=True)
class Where:
    """Where to look, as the command line says it."""

    local: bool = False
    context: str = ""
    kubeconfig: str = ""
    namespace: str = ""

    @property
    def must_be_cluster(self) -> bool:
        return bool(self.context or self.kubeconfig or self.namespace)


@dataclass(frozen=True)
class Remote:
    """A Workspace, and the cluster that it is in."""

    client: Client
    workspace: Object

    @property
    def name(self) -> str:
        return str(self.workspace["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.workspace["metadata"]["namespace"])


def where_options(command: F) -> F:
    """The options of `Where`."""
    command = click.option("-n", "--namespace", default="", help="The namespace; default: the context's.")(command)
    return cluster_options(command)


def named(name: str, where: Where) -> RunFolder | Remote:
    """The one thing of this name. UserError when there is none, or one here and one in the cluster."""
    if where.local:
        return RunFolder.existing(name)
    here = None if where.must_be_cluster else _here(name)
    there, silent = None, None
    client = None
    try:
        client = cluster(where)
        there = _get(client, name, where) if client else None
    except KaitoError as e:
        if where.must_be_cluster:
            raise
        silent = e
    if here and there and client:
        raise UserError(
            f"{name!r} is a run on this machine and a Workspace in the cluster of the context {client.context!r}",
            f"say which one: --local, or --context {client.context}",
        )
    if there and client:
        return Remote(client, there)
    if here:
        if silent:
            warn(silent)
        return here
    if silent:
        problem = silent.problems[0]
        raise Failure(
            f"there is no run named {name!r} on this machine, and the cluster cannot be asked: {problem.message}",
            problem.remedy,
        )
    if client is None:
        return RunFolder.existing(name)  # says what there is
    also = "" if where.must_be_cluster else f"no run named {name!r} on this machine, and "
    raise UserError(
        f"there is {also}no Workspace {name!r} in the namespace {where.namespace or client.namespace} of {client.context}",
        "kaito status lists what there is; -n looks in another namespace",
    )


def cluster(where: Where) -> Client | None:
    """The cluster to look at; None when there is none to think of."""
    target = target_of(where.local, where.context, where.kubeconfig)
    if target.in_cluster:
        return connected(target)
    if where.namespace:
        raise UserError(f"--namespace is of a cluster, and the target is {target}", "name a cluster with --context")
    return None


def ask_for(client: Client, where: Where, question: Callable[[], T]) -> T:
    """An answer of the cluster; in a moment, when it was not asked for by name."""
    if where.must_be_cluster:
        with way_out():
            return question()
    return within(PATIENCE, client, question)


def warn(error: KaitoError) -> None:
    """A cluster that cannot be asked is one line, as long as nobody insists on it."""
    click.echo(f"warning: only this machine is shown: {error.problems[0].message}", err=True)


def _here(name: str) -> RunFolder | None:
    folder = RunFolder.of(name)
    return folder if "/" not in name and name not in (".", "..") and folder.read() is not None else None


def _get(client: Client, name: str, where: Where) -> Object | None:
    from kaito_core.kube.errors import NotFound
    from kaito_core.kube.kinds import WORKSPACES

    try:
        return ask_for(client, where, lambda: client.get(WORKSPACES, name, where.namespace or client.namespace))
    except NotFound:
        return None
