"""Secrets on this machine: from Secret documents beside the workspace, or the user's own log-ins."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from kaito_core.problems import UserError
from kaito_core.workloads.workload import Workload


class Secret(Protocol):
    """A Secret document: its content by key, decoded."""

    @property
    def data(self) -> Mapping[str, bytes]: ...


@contextmanager
def environment(workload: Workload, secrets: Mapping[str, Any], folder: Path) -> Iterator[dict[str, str]]:
    """The environment that carries the workload's secrets while it runs; what was written is removed afterwards.

    A Secret that is not in the file is not an error: ``docker login`` and ``HF_TOKEN`` of the user serve instead.
    """
    env: dict[str, str] = {}
    auths: dict[str, Any] = {}
    for name in workload.registry_secrets:
        if name in secrets:
            auths.update(_auths(name, secrets[name]))
    if auths:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        descriptor = os.open(folder / "config.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as f:
            json.dump({"auths": auths}, f)
        env["DOCKER_CONFIG"] = str(folder)
    if workload.hub_secret in secrets:
        token = secrets[workload.hub_secret].data.get("HF_TOKEN")
        if not token:
            raise UserError(
                f"the Secret {workload.hub_secret!r} has no key HF_TOKEN", field="presetOptions.modelAccessSecret"
            )
        env["HF_TOKEN"] = token.decode().strip()
    try:
        yield env
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _auths(name: str, secret: Secret) -> dict[str, Any]:
    content = secret.data.get(".dockerconfigjson")
    if content is None:
        raise UserError(
            f"the Secret {name!r} has no key .dockerconfigjson",
            "make it with `kubectl create secret docker-registry`, type kubernetes.io/dockerconfigjson",
        )
    try:
        auths = json.loads(content)["auths"]
        if not isinstance(auths, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(f'.dockerconfigjson of the Secret {name!r} is not JSON of the form {{"auths": …}}') from None
    return auths
