"""Where a command works: on this machine or in a cluster, and why. What decides is pure; `current` and what follows it are its edges.

A cluster that was chosen and cannot be used is an error: nothing ever runs silently somewhere else."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kaito_core.problems import Failure, KaitoError, Problem, UserError

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

HERE_INSTEAD = "or use this machine: --local"


@dataclass(frozen=True)
class Current:
    """What the kubeconfig says without any server being asked."""

    context: str = ""
    """Its current context; empty when there is none."""
    lack: str = ""
    """Why there is none, in words."""


@dataclass(frozen=True)
class Target:
    """Where, and why there."""

    why: str
    context: str = ""
    """The kubeconfig context of a cluster; empty for this machine."""
    kubeconfig: str = ""

    @property
    def in_cluster(self) -> bool:
        return bool(self.context)

    @property
    def options(self) -> str:
        """What another command needs to be told to work there too."""
        said = (("--context", self.context if self.why == "--context" else ""), ("--kubeconfig", self.kubeconfig))
        return "".join(f"{option} {value} " for option, value in said if value)

    def __str__(self) -> str:
        place = f"the cluster of the context {self.context!r}" if self.in_cluster else "this machine"
        return f"{place} ({self.why})"


@dataclass(frozen=True)
class Readiness:
    """Whether a cluster can run a Workspace."""

    knows_workspaces: bool
    controller: bool | None
    """Whether a controller looks after them; None when these credentials may not find out."""


def choose(current: Current, *, local: bool = False, context: str = "", kubeconfig: str = "") -> Target:
    """What was said on the command line, else the current context of the kubeconfig, else this machine.

    ``current`` is that of ``kubeconfig`` when one is given. UserError when the wishes contradict each other."""
    if local and (context or kubeconfig):
        raise UserError("--local is this machine, --context and --kubeconfig are a cluster", "give one of them")
    if local:
        return Target("--local")
    if context:
        return Target("--context", context, kubeconfig)
    if current.context:
        why = f"the current one of {kubeconfig}" if kubeconfig else "the current one of your kubeconfig"
        return Target(why, current.context, kubeconfig)
    if kubeconfig:
        raise UserError(current.lack, "name one of its contexts with --context", field="--kubeconfig")
    return Target(current.lack)


def obstacle(target: Target, found: Readiness, *, standalone: bool = False) -> Problem | None:
    """Why a Workspace cannot be run there; None when it can. What ``standalone`` brings along is no obstacle."""
    where = f"the cluster of the context {target.context!r}"
    instead = f"install the controller (kaito install), do without one (--standalone), {HERE_INSTEAD}"
    if standalone:
        if found.controller:
            return Problem(f"{where} has a controller, and two would undo each other's work", "leave --standalone out")
        if found.controller is None:
            return Problem(
                f"these credentials may not find out whether {where} has a controller, and two would undo each other's work",
                "leave --standalone out, or ask for the right to list deployments and leases",
            )
        return None
    if not found.knows_workspaces:
        return Problem(f"{where} does not know Workspaces", instead)
    if found.controller is False:
        return Problem(f"nobody looks after Workspaces in {where}: no controller has renewed its Lease lately", instead)
    return None


# --- the edges


def cluster_options(command: F) -> F:
    """``--local``, ``--context`` and ``--kubeconfig``, which say the same in every command."""
    options = (
        click.option("--local", is_flag=True, help="This machine."),
        click.option("--context", default="", metavar="NAME", help="The cluster of this kubeconfig context."),
        click.option("--kubeconfig", default="", metavar="FILE", help="Another kubeconfig than yours."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def target_of(local: bool, context: str, kubeconfig: str) -> Target:
    """`choose` with the user's kubeconfig, which is only read where it matters."""
    return choose(
        Current() if local or context else current(kubeconfig), local=local, context=context, kubeconfig=kubeconfig
    )


def current(kubeconfig: str = "") -> Current:
    """The current context of this kubeconfig, of ``$KUBECONFIG`` (the first that names one, as kubectl does), or of
    ``~/.kube/config``. UserError for one that cannot be read."""
    named = [kubeconfig] if kubeconfig else (os.environ.get("KUBECONFIG") or "~/.kube/config").split(os.pathsep)
    files = [p for p in (Path(n).expanduser() for n in named if n) if p.is_file()]
    if not files:
        if kubeconfig:
            raise UserError(f"there is no file {kubeconfig}", "check the path", field="--kubeconfig")
        return Current(lack="there is no kubeconfig")
    import yaml

    for path in files:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            context = content.get("current-context")
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as e:
            words = " ".join(str(e).split())
            raise UserError(f"the kubeconfig {path} cannot be read: {words}", f"mend it, {HERE_INSTEAD}") from None
        if context:
            return Current(str(context))
    return Current(lack=f"the kubeconfig {files[0]} has no current context")


def connected(target: Target) -> Client:
    """The cluster, not spoken to yet. UserError when the kubeconfig does not lead to one."""
    from kaito_core.kube.client import connect

    with way_out():
        return connect(target.context, target.kubeconfig)


@contextmanager
def way_out() -> Iterator[None]:
    """Errors of a cluster that was chosen, with the way out added."""
    from kaito_core.kube.errors import Forbidden, Unreachable

    try:
        yield
    except (UserError, Unreachable, Forbidden) as e:
        problem = e.problems[0]
        remedy = f"{problem.remedy}; {HERE_INSTEAD}" if problem.remedy else HERE_INSTEAD
        raise (UserError if isinstance(e, UserError) else Failure)(problem.message, remedy) from e


def within(seconds: float, client: Client, ask: Callable[[], T]) -> T:
    """What is asked of the cluster, if it answers in time; `Unreachable` when it does not."""
    from kaito_core.kube.errors import Unreachable

    answers: queue.SimpleQueue[T | KaitoError] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put(ask())
        except KaitoError as e:
            answers.put(e)

    threading.Thread(target=run, name="ask", daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise Unreachable(f"{client.host} (context {client.context}) has not answered within {seconds:g} s") from None
    if isinstance(answer, KaitoError):
        raise answer
    return answer


def readiness(client: Client) -> Readiness:
    """Look whether the cluster knows Workspaces and has a controller."""
    from kaito_core.kube.kinds import WORKSPACES

    with way_out():
        return Readiness(client.serves(WORKSPACES), _has_controller(client))


def _has_controller(client: Client) -> bool | None:
    """A Lease that is renewed says so; without one, a controller's pod that is ready (it may elect nobody)."""
    from datetime import UTC, datetime

    from kaito_core.cli.controller import LEASE_NAME
    from kaito_core.cli.doctor_checks import CONTROLLERS, SILENT, lease_of
    from kaito_core.kube.errors import Forbidden
    from kaito_core.kube.kinds import DEPLOYMENTS, LEASES

    def fresh(lease: dict[str, Any] | None) -> bool:
        spec = (lease or {}).get("spec") or {}
        try:
            age = datetime.now(UTC) - datetime.fromisoformat(str(spec.get("renewTime")))
        except ValueError:
            return False
        return bool(spec.get("holderIdentity")) and age.total_seconds() < SILENT

    try:
        deployments = client.list(DEPLOYMENTS, labels=CONTROLLERS)[0]
        if any(d.get("status", {}).get("readyReplicas") for d in deployments):
            return True
        # One that runs outside of the cluster has its Lease anywhere.
        leases = client.list(LEASES, fields=f"metadata.name={LEASE_NAME}")[0]
        leases += [e for d in deployments if (e := client.get(LEASES, *reversed(lease_of(d))))]
        return any(fresh(lease) for lease in leases)
    except Forbidden:
        return None
