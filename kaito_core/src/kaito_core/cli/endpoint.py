"""An endpoint: where it is, what can be asked there, and how."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from kaito_core.cli.named import Remote, Where, ask_for, cluster, warn
from kaito_core.cli.target import Current, current, way_out
from kaito_core.local.state import RunFolder, Served
from kaito_core.problems import Failure, KaitoError, UserError

if TYPE_CHECKING:
    import httpx

    from kaito_core.kube.client import Client
    from kaito_core.kube.kinds import Object


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and what is known of what answers there."""

    url: str
    """Without ``/v1``."""
    base: str = ""
    """The model without any adapter; empty when only the endpoint itself can say."""
    model: str = ""
    """What answers when nothing else is asked for; empty when only the endpoint itself can say."""
    adapters: tuple[str, ...] = ()
    name: str = ""
    """What people call it when that is not its URL."""
    place: str = ""
    """Which one of several places it was found in, in words; empty when there is nothing to say of that."""
    via: httpx.BaseTransport | None = field(default=None, repr=False)
    """Another way to it than the network."""


def endpoint_of(name: str, where: Where | None = None, say: Callable[[str], None] = click.echo) -> Endpoint:
    """The endpoint that a person means: a URL, or the name of a Workspace that is served here or in a cluster. What is served on this
    machine comes first where ``where`` does not say. ``say`` is told of what is being waited for.

    UserError when nothing of that name is served."""
    where = where or Where()
    if re.match(r"https?://", name, re.IGNORECASE):
        if where.local or where.must_be_cluster:
            raise UserError(
                "a URL says by itself where the endpoint is", "leave --local, --context, --kubeconfig and -n out"
            )
        return Endpoint(base_url(name))
    if where.must_be_cluster:
        client = cluster(where)
        assert client is not None, "a cluster was named"
        return _in_cluster(_workspace(client, name, where), where, say)
    if where.local or _is_served_here(name):
        return _here(name, where)
    there = _elsewhere(name, where)
    return _in_cluster(there, where, say) if there else _here(name, where)


def _here(name: str, where: Where) -> Endpoint:
    folder = RunFolder.existing(name)
    for each in folder.both:
        state = each.read()
        if state and state.task == "inference" and each.is_running():
            if state.served is None:
                raise UserError(f"{name!r} does not answer yet", f"it is starting: kaito logs -f {name}")
            there = state.served
            place = "" if where.local or not _kubeconfig().context else f"{name} on this machine"
            return Endpoint(there.url, there.base, there.model, tuple(there.adapters), place=place)
    served = any((s := each.read()) and s.task == "inference" for each in folder.both)
    raise UserError(
        f"{name!r} is not served now",
        f"serve it: kaito run --local FILE{'' if served else ' --serve'}, in another terminal",
    )


def _kubeconfig() -> Current:
    try:
        return current()
    except UserError:
        return Current()


def _is_served_here(name: str) -> bool:
    folder = _folder(name)
    return folder is not None and any(
        state.task == "inference" and each.is_running() for each in folder.both if (state := each.read())
    )


def _folder(name: str) -> RunFolder | None:
    folder = RunFolder.of(name)
    return folder if "/" not in name and name not in (".", "..") and folder.read() is not None else None


def _elsewhere(name: str, where: Where) -> Remote | None:
    """The Workspace of this name in the cluster that nobody named; None when there is none, and this machine has something to say."""
    here = _folder(name) is not None
    try:
        client = cluster(where)
        return _workspace(client, name, where, at_once=here) if client else None
    except KaitoError as e:
        if here:
            if not isinstance(e, UserError):
                warn(e)
            return None
        problem = e.problems[0]
        kind = UserError if isinstance(e, UserError) else Failure
        raise kind(f"{name!r} is not served on this machine, and {problem.message}", problem.remedy) from e


def _workspace(client: Client, name: str, where: Where, *, at_once: bool = False) -> Remote:
    """The Workspace of this name. With ``at_once`` nobody waits long for a cluster that was not asked for by name. UserError when there
    is none."""
    from kaito_core.kube.errors import NotFound
    from kaito_core.kube.kinds import WORKSPACES

    namespace = where.namespace or client.namespace

    def ask() -> Object | None:
        return client.get(WORKSPACES, name, namespace)

    try:
        if at_once:
            found = ask_for(client, where, ask)
        else:
            with way_out():
                found = ask()
    except NotFound:
        found = None
    if found is None:
        raise UserError(
            f"there is no Workspace {name!r} in the namespace {namespace} of {client.context}",
            "kaito status lists what there is; -n looks in another namespace",
        )
    return Remote(client, found)


def _in_cluster(found: Remote, where: Where, say: Callable[[str], None]) -> Endpoint:
    """An endpoint in a cluster, asked through its API server. UserError when it cannot be asked that way."""
    from kaito_core.cli.cluster.endpoint import refuse_unaskable, title
    from kaito_core.cli.cluster.proxy import ThroughApiServer, proxy_path
    from kaito_core.cli.cluster.waking import Waking

    options = options_of(where)
    refuse_unaskable(found.workspace, options)
    waking = Waking(found.client, found.name, found.namespace, say, options=options)
    named = title(found.workspace)
    return Endpoint(
        # Which API server, the client knows.
        f"http://cluster{proxy_path(found.workspace)}",
        name=named,
        place=f"{named} in the cluster of the context {found.client.context!r}, through its API server",
        via=ThroughApiServer(found.client, waking.until_ready, options),
    )


def options_of(where: Where) -> str:
    """What another command needs to be told to look at the same cluster."""
    said = (("--context", where.context), ("--kubeconfig", where.kubeconfig))
    return "".join(f"{option} {value} " for option, value in said if value)


def base_url(url: str) -> str:
    """``http://host:5000/v1/`` as ``http://host:5000``. UserError for what is no URL of a server."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError as e:
        raise UserError(f"this is not a URL: {e}", "write http://HOST:PORT") from None
    if not host or parts.query or parts.fragment:
        raise UserError("this is not the URL of an endpoint", "write http://HOST:PORT")
    if parts.username or parts.password:
        raise UserError("a URL must not hold a password", "put the API key into KAITO_API_KEY")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
    return f"{parts.scheme.lower()}://{parts.netloc}{path}"


def how_to_call(name: str, served: Served) -> str:
    """An endpoint on this machine and what to type, for people."""
    body = json.dumps({"model": served.model, "messages": [{"role": "user", "content": "Hello"}]})
    return "\n".join(
        [
            click.style(f"{name} answers at {served.url}", fg="green", bold=True),
            f"  models  {', '.join([served.base, *served.adapters])}",
            f"  curl    curl {served.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
            f"  chat    kaito chat {name}",
        ]
    )
