"""Which NVIDIA GPUs an image can compute on: the lowest compute capability that its libraries have kernels for.

The person who runs the controller declares it for images of their own (``--compute-capability``, in the chart
``image.computeCapability``); for the project's images it stands here. Pure functions."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from kaito_core.planning import catalogue
from kaito_core.plugins.types import Gpu, Offer
from kaito_core.problems import UserError

Capability = tuple[int, int]
"""Major and minor: (7, 5) is 7.5."""

TORCH: Final = (7, 5)
"""``images/tuner`` has torch 2.13 as the package index has it: built for CUDA 13, which compiles for Turing (7.5) and newer (CUDA 13.0
release notes: Maxwell, Pascal and Volta are removed)."""

VLLM: Final = (7, 5)
"""``images/vllm``: vLLM 0.32's installation guide, GPU requirements."""

TUNER: Final = "tuner"
"""What the image that tunes is called where capabilities are declared."""

WITH_TUNER: Final = "transformers"
"""The runtime that is in the image that tunes."""

_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)\Z")


@dataclass(frozen=True, slots=True)
class Image:
    """What computes on a machine's GPUs."""

    words: str
    """As it is called in a sentence."""
    lowest: Capability | None
    """The lowest compute capability that it can use; None when it is not known, so that no GPU is held against it."""

    def obstacle(self, offer: Offer) -> str:
        """Why it cannot use the machine's GPUs; empty when it can, or when one of the two is not known."""
        gpu = offer.gpu if offer.gpus else None
        has = capability(gpu) if gpu else None
        if gpu is None or has is None or self.lowest is None or has >= self.lowest:
            return ""
        return f"its {gpu.model} has compute capability {text(has)}, and {self.words} needs {text(self.lowest)}"

    def doubt(self, offer: Offer) -> str:
        """What cannot be said of the machine's GPUs; empty when it can."""
        gpu = offer.gpu if offer.gpus else None
        if gpu is None or gpu.vendor != "nvidia" or self.lowest is None or capability(gpu) is not None:
            return ""
        return f"the compute capability of the {gpu.model} is not known; {self.words} needs {text(self.lowest)}"


@dataclass(frozen=True, slots=True)
class Images:
    """The lowest compute capability of each image that a plan may use, and of the PyTorch of this machine."""

    tuner: Capability | None = TORCH
    runtimes: Mapping[str, Capability] = field(default_factory=lambda: {"vllm": VLLM})
    """Of the runtimes that have an image of their own; nothing is known of others."""
    local: Capability | None = TORCH

    def tuning(self, offer: Offer) -> Image:
        """What trains on this machine."""
        return self._here() if offer.is_local else Image("the image that tunes", self.tuner)

    def serving(self, runtime: str, offer: Offer) -> Image:
        """What serves with this runtime on this machine."""
        if offer.is_local:
            return self._here()
        lowest = self.tuner if runtime == WITH_TUNER else self.runtimes.get(runtime)
        return Image(f"the image of the runtime {runtime}", lowest)

    def _here(self) -> Image:
        return Image("the PyTorch of this machine", self.local)


def declared(given: Mapping[str, str]) -> Images:
    """The project's images, but for those that are declared otherwise: ``tuner`` or a runtime, each with its ``MAJOR.MINOR``.
    UserError for what is neither."""
    found = {name: parse(value) for name, value in given.items()}
    if WITH_TUNER in found:
        raise UserError(
            f"{WITH_TUNER} has no image of its own, and so no compute capability",
            f"declare that of {TUNER}: it has both",
        )
    usual = Images()
    tuner = found.pop(TUNER, usual.tuner)
    return Images(tuner, {**usual.runtimes, **found})


def parse(value: str) -> Capability:
    """``7.5`` as numbers. UserError for what is no compute capability."""
    found = _CAPABILITY.match(value)
    if found is None:
        raise UserError(f"{value!r} is not a compute capability", "write it as NVIDIA does: 7.5")
    return int(found[1]), int(found[2])


def text(has: Capability) -> str:
    """As NVIDIA writes it: ``7.5``."""
    return f"{has[0]}.{has[1]}"


def capability(gpu: Gpu) -> Capability | None:
    """What is said of the GPU, else what the catalogue knows of its model; None when neither tells, and for other makers' GPUs."""
    if gpu.vendor != "nvidia":
        return None
    return gpu.compute_capability or _of_model(gpu.model)


@functools.cache
def _of_model(model: str) -> Capability | None:
    found = {known.compute_capability for known in catalogue.models_like(model)}
    return found.pop() if len(found) == 1 else None
