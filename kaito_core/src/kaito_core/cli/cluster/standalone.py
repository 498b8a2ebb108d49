"""A controller inside this process, for the Workspaces of one run: for clusters in which nobody installs anything."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from kaito_core.problems import Failure, UserError

if TYPE_CHECKING:
    from kaito_core.controller.settings import Settings
    from kaito_core.kube.client import Client
    from kaito_core.plugins.manager import PluginManager

WORKERS = 2
DRAIN = 10.0
"""Seconds that what is going on has to end in; the rest is found again by whoever goes on."""


def settings(tuner_image: str) -> Settings:
    """What ``kaito controller`` takes from its environment, for those who need more than an image. UserError without one."""
    from kaito_core.api.pod_security import PodSecurity
    from kaito_core.cli.controller import _pairs, _pod_env
    from kaito_core.controller.settings import Settings
    from kaito_core.planning.images import declared

    if not tuner_image:
        raise UserError(
            "there is no image for the pods that tune",
            "give --tuner-image, or set KAITO_TUNER_IMAGE",
            field="--standalone",
        )
    return Settings(
        tuner_image=tuner_image,
        image_pull_secrets=tuple(os.environ.get("KAITO_IMAGE_PULL_SECRET", "").split()),
        checkpoint_storage_class=os.environ.get("KAITO_CHECKPOINT_STORAGE_CLASS", ""),
        checkpoint_size=os.environ.get("KAITO_CHECKPOINT_SIZE", "20Gi"),
        pod_env=_pod_env(()),
        pod_security=PodSecurity(
            frozenset(os.environ.get("KAITO_ALLOW_VOLUME", "").split()),
            os.environ.get("KAITO_ALLOW_ANY_TEMPLATE", "").lower() in ("1", "true"),
        ),
        images=declared(
            _pairs("KAITO_COMPUTE_CAPABILITY", tuple(os.environ.get("KAITO_COMPUTE_CAPABILITY", "").split()))
        ),
    )


@contextmanager
def looking_after(
    client: Client, plugins: PluginManager, settings: Settings, namespace: str, names: Iterable[str]
) -> Iterator[None]:
    """As long as this lasts, the Workspaces of these names are reconciled here."""
    from kaito_core.controller.workspaces import WorkspaceController

    controller = WorkspaceController(client, plugins, settings, namespace=namespace, names=tuple(names))
    warnings = _Warnings(logging.WARNING)
    log = logging.getLogger("kaito_core")
    log.addHandler(warnings)
    controller.start_watching()
    controller.start_workers(WORKERS)
    try:
        yield
    finally:
        controller.stop(DRAIN)
        log.removeHandler(warnings)


class _Warnings(logging.Handler):
    """What the controller would have in its log, as a line on the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"  controller: {record.getMessage()}", err=True)


def install_definition(client: Client) -> None:
    """Teach the cluster what a Workspace is, as ``kaito install`` does, and wait until it knows."""
    from kaito_core.cli.install import MANAGER, until
    from kaito_core.install import definition
    from kaito_core.kube.kinds import CRDS, WORKSPACES

    name = definition()["metadata"]["name"]
    client.apply(CRDS, definition(), manager=MANAGER)
    until(
        lambda: client.serves(WORKSPACES),
        30.0,
        lambda: Failure(f"the API server does not serve {name}", f"see: kubectl describe crd {name}"),
    )
