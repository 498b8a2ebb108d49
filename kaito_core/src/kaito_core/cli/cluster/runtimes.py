"""The runtimes that a cluster's controller has images for: it serves with no others, whatever is installed here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from kaito_core.cli.doctor_checks import CONTROLLERS
from kaito_core.controller.planner import WithImages
from kaito_core.kube.errors import ApiError
from kaito_core.kube.kinds import DEPLOYMENTS, Object

if TYPE_CHECKING:
    from kaito_core.kube.client import Client
    from kaito_core.planning.plan import Registry

OPTION, VARIABLE = "--runtime-image", "KAITO_RUNTIME_IMAGE"
"""How ``kaito controller`` is told, as RUNTIME=IMAGE."""


def as_the_controller(registry: Registry, client: Client) -> Registry:
    """The registry without the runtimes that no controller of the cluster has an image for; as it is where that cannot be seen, since
    the controller runs elsewhere or these credentials may not look."""
    try:
        found = client.list(DEPLOYMENTS, labels=CONTROLLERS)[0]
    except ApiError:
        return registry
    return WithImages(registry, {"transformers", *runtime_images(found)}) if found else registry


def runtime_images(deployments: Iterable[Object]) -> set[str]:
    """The names of the runtimes that these controllers are given images for."""
    return {text.partition("=")[0] for d in deployments for text in _given(d) if "=" in text}


def _given(deployment: Object) -> Iterator[str]:
    for container in deployment["spec"]["template"]["spec"].get("containers", ()):
        arguments = [*(container.get("command") or ()), *(container.get("args") or ())]
        for number, argument in enumerate(arguments):
            if argument.startswith(f"{OPTION}="):
                yield argument.removeprefix(f"{OPTION}=")
            elif argument == OPTION:
                yield from arguments[number + 1 : number + 2]
        for variable in container.get("env") or ():
            if variable["name"] == VARIABLE:
                yield from str(variable.get("value") or "").split()
