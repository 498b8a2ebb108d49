"""An endpoint: where it is, what can be asked there, and how."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import click

from kaito_core.local.state import RunFolder, Served
from kaito_core.problems import UserError


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


def endpoint_of(name: str) -> Endpoint:
    """The endpoint that a person means: a URL, or the name of a Workspace that is served on this machine.

    UserError when nothing of that name is served here."""
    if re.match(r"https?://", name, re.IGNORECASE):
        return Endpoint(base_url(name))
    folder = RunFolder.existing(name)
    for each in folder.both:
        state = each.read()
        if state and state.task == "inference" and each.is_running():
            if state.served is None:
                raise UserError(f"{name!r} does not answer yet", f"it is starting: kaito logs -f {name}")
            there = state.served
            return Endpoint(there.url, there.base, there.model, tuple(there.adapters))
    served = any((s := each.read()) and s.task == "inference" for each in folder.both)
    raise UserError(
        f"{name!r} is not served now",
        f"serve it: kaito run --local FILE{'' if served else ' --serve'}, in another terminal",
    )


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
