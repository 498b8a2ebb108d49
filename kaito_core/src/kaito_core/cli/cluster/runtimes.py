"""The images that a cluster's controller has: it serves with no others, whatever is installed here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from kaito_core.cli.doctor_checks import CONTROLLERS
from kaito_core.controller.planner import WithImages
from kaito_core.kube.errors import ApiError
from kaito_core.kube.kinds import DEPLOYMENTS, Object
from kaito_core.planning.images import Images, declared

if TYPE_CHECKING:
    from kaito_core.kube.client import Client
    from kaito_core.planning.plan import Registry

RUNTIME_IMAGE = ("--runtime-image", "KAITO_RUNTIME_IMAGE")
COMPUTE_CAPABILITY = ("--compute-capability", "KAITO_COMPUTE_CAPABILITY")
"""How ``kaito controller`` is told: an option and its environment variable, as NAME=VALUE."""


def as_the_controller(registry: Registry, client: Client) -> tuple[Registry, Images]:
    """The registry without the runtimes that no controller of the cluster has an image for, and what its images can compute on.

    Where that cannot be seen, since the controller runs elsewhere or these credentials may not look, the registry as it is and what the
    environment says, as for a controller in this process. UserError for a compute capability that is none."""
    try:
        found = client.list(DEPLOYMENTS, labels=CONTROLLERS)[0]
    except ApiError:
        found = []
    if not found:
        return registry, declared(_pairs(os.environ.get(COMPUTE_CAPABILITY[1], "").split()))
    return WithImages(registry, {"transformers", *runtime_images(found)}), declared(_told(found, *COMPUTE_CAPABILITY))


def runtime_images(deployments: Iterable[Object]) -> set[str]:
    """The names of the runtimes that these controllers are given images for."""
    return set(_told(deployments, *RUNTIME_IMAGE))


def _told(deployments: Iterable[Object], option: str, variable: str) -> dict[str, str]:
    return _pairs(text for d in deployments for text in _given(d, option, variable))


def _pairs(texts: Iterable[str]) -> dict[str, str]:
    return {name: value for name, separator, value in (text.partition("=") for text in texts) if separator}


def _given(deployment: Object, option: str, variable: str) -> Iterator[str]:
    for container in deployment["spec"]["template"]["spec"].get("containers", ()):
        arguments = [*(container.get("command") or ()), *(container.get("args") or ())]
        for number, argument in enumerate(arguments):
            if argument.startswith(f"{option}="):
                yield argument.removeprefix(f"{option}=")
            elif argument == option:
                yield from arguments[number + 1 : number + 2]
        for told in container.get("env") or ():
            if told["name"] == variable:
                yield from str(told.get("value") or "").split()
