"""Log-ins for registries, from where ``docker login`` and Kubernetes secrets put them.

The file is ``config.json`` of Docker, which is also what a Secret of type ``kubernetes.io/dockerconfigjson`` holds
(https://docs.docker.com/reference/cli/docker/login/, "Credential stores" for the helpers' protocol).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kaito_core.oci_reference import DOCKER_HUB, Reference
from kaito_core.problems import UserError

HELPER_SECONDS = 30.0
"""How long a credential helper may take; one that waits for a key ring to be unlocked must not hang the job."""

_HUB_KEY = "https://index.docker.io/v1/"
_HUB_NAMES = (DOCKER_HUB, "index.docker.io", "registry-1.docker.io")
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user name and password, or an identity token to trade for access tokens. Secrets do not show in its repr."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)


def credentials_for(reference: Reference, config: Path | None = None) -> Credentials | None:
    """What to log in with at the reference's registry; None if nothing is known, which means anonymously.

    ``config`` is a file or a folder with ``config.json`` or ``.dockerconfigjson``; without it the folder in
    ``$DOCKER_CONFIG``, else ``~/.docker``. As in Docker a helper for the host comes first, then the entry in the file with
    the longest matching path, then the general store. Raises `UserError` for a file or a helper that cannot be used.
    """
    path = _config_file(config)
    if path is None:
        return None
    document = _read(path)
    helper = _match(_section(document, "credHelpers", path), reference)
    if isinstance(helper, str):
        return _ask_helper(helper, reference, path)
    entry = _match(_section(document, "auths", path), reference)
    if entry and (found := _from_entry(entry, reference, path)):
        return found
    if store := document.get("credsStore"):
        return _ask_helper(str(store), reference, path)
    return None


def _config_file(config: Path | None) -> Path | None:
    given = config or (Path(os.environ["DOCKER_CONFIG"]) if os.environ.get("DOCKER_CONFIG") else None)
    place = given or Path("~/.docker").expanduser()
    if place.is_file():
        return place
    for name in ("config.json", ".dockerconfigjson"):
        if (place / name).is_file():
            return place / name
    if config is not None:
        raise UserError(f"there is no docker config in {config}", "name a config.json, or the folder that holds it")
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", "mend its permissions") from e
    except (ValueError, RecursionError):  # the original error carries the file's content, and with it the secrets
        raise UserError(f"{path} is not JSON", "mend it, or remove it and run `docker login`") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a docker config: it must be a JSON object", "mend it, or run `docker login`")
    return document


def _section(document: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    section = {} if document.get(name) is None else document[name]
    if not isinstance(section, dict):
        raise UserError(
            f"{path} is not a docker config: {name!r} must be an object of hosts", "mend it, or run `docker login`"
        )
    return section


def _match(entries: Mapping[str, Any], reference: Reference) -> Any:
    """The entry whose key is the longest path that the image lies under; None if there is none."""
    wanted = reference.name
    found = {n: v for k, v in entries.items() if wanted == (n := _normal(k)) or wanted.startswith(n + "/")}
    return found[max(found, key=len)] if found else None


def _normal(key: str) -> str:
    """A key without scheme and API version: ``https://index.docker.io/v1/`` is ``docker.io``."""
    key = re.sub(r"^https?://", "", key.strip()).rstrip("/")
    host, slash, path = re.sub(r"/v[12]$", "", key).partition("/")
    host = host.lower()
    return (DOCKER_HUB if host in _HUB_NAMES else host) + slash + path


def _from_entry(entry: Any, reference: Reference, path: Path) -> Credentials | None:
    """Credentials that stand in the file itself; an empty entry only says that a store has them."""
    if not isinstance(entry, dict):
        raise UserError(f"{path}: the entry for {reference.registry} must be an object", "run `docker login` again")
    username, password, token = (entry.get(k) or "" for k in ("username", "password", "identitytoken"))
    if auth := entry.get("auth"):
        try:
            username, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
        except (binascii.Error, ValueError, TypeError):
            colon = ""
        if not colon:
            raise UserError(
                f"{path}: `auth` for {reference.registry} is not base64 of `user:password`",
                f"run `docker login {reference.registry}` again, or make the secret anew",
            ) from None
    if not all(isinstance(v, str) for v in (username, password, token)):
        raise UserError(f"{path}: the log-in for {reference.registry} must be text", "run `docker login` again")
    if token:
        return Credentials(username=username, identity_token=token)
    # Docker pads what it encodes with zero bytes in old versions.
    return Credentials(username, password.rstrip("\0")) if username or password else None


def _ask_helper(name: str, reference: Reference, path: Path) -> Credentials | None:
    """Run ``docker-credential-NAME get``: the host goes in on stdin, JSON with the secret comes out."""
    program = f"docker-credential-{name}"
    if not _HELPER_NAME.fullmatch(name):
        raise UserError(
            f"{path} names a credential helper {name!r}, which is not a program's name",
            "mend credsStore or credHelpers",
        )
    host = _HUB_KEY if reference.registry == DOCKER_HUB else reference.registry
    try:
        done = subprocess.run(
            [program, "get"], input=host.encode(), capture_output=True, timeout=HELPER_SECONDS, check=False
        )
    except FileNotFoundError:
        raise UserError(
            f"{path} names the credential helper {program}, which is not installed",
            f"install it, or remove credsStore/credHelpers from {path} and run `docker login {reference.registry}`",
        ) from None
    except (OSError, subprocess.TimeoutExpired) as e:
        cause = (
            f"gave no answer within {HELPER_SECONDS:g} s" if isinstance(e, subprocess.TimeoutExpired) else e.strerror
        )
        raise UserError(
            f"the credential helper {program} failed: {cause}", f"try `echo {host} | {program} get`"
        ) from None
    if done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        if "not found" in said.lower():  # the protocol's way to say that it has nothing for the host
            return None
        raise UserError(
            f"the credential helper {program} failed: {said[:300] or done.returncode}",
            f"try `echo {host} | {program} get`",
        )
    try:
        answer = json.loads(done.stdout)
        username, secret = answer["Username"], answer["Secret"]
        if not (isinstance(username, str) and isinstance(secret, str)):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"the credential helper {program} did not answer with Username and Secret", "update the helper"
        ) from None
    if username == "<token>":
        return Credentials(identity_token=secret)
    return Credentials(username, secret)
