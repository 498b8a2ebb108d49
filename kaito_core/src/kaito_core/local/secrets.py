"""Secrets on this machine: from Secret documents beside the workspace, or the user's own log-ins."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from kaito_core.problems import UserError
from kaito_core.stages.registry_secrets import KEY, auths, write_docker_config
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
    merged: dict[str, Any] = {}
    for name in workload.registry_secrets:
        if name in secrets:
            merged.update(auths(name, secrets[name].data.get(KEY)))
    if merged:
        shutil.rmtree(folder, ignore_errors=True)
        write_docker_config(folder, merged)
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
