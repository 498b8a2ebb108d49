"""The runtime as kaito sees it: names to functions. Nothing here, and nothing that it imports at the top, imports torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from kaito_core.plugins import InferenceRuntime, Offer, Preset, ServedAdapter, ServingFit, hookimpl
from kaito_core.problems import Problem

if TYPE_CHECKING:
    from kaito_core.workloads.serving import ServingJob
    from kaito_core.workloads.workload import Workload

KAITO_API_VERSION = "1.0"

NEEDED = ("accelerate", "peft", "torch", "transformers", "uvicorn")

LOADABLE = frozenset({"", "bitsandbytes"})
"""Formats of published weights. The others need kernels that are neither in transformers nor on every machine (gptq, awq: gptqmodel;
fp8: a GPU of compute capability 8.9; mxfp4: triton kernels from the hub)."""


class TransformersRuntime(InferenceRuntime):
    """transformers with continuous batching, on CPUs and GPUs of one machine."""

    name: ClassVar[str] = "transformers"
    priority: ClassVar[int] = 0

    def serves(self, preset: Preset) -> Problem | None:
        name, known = preset.architecture.name, architectures()
        if name not in known:
            return Problem(
                f"transformers {version()} has no causal language model {name!r}",
                "models whose code is in their own repository are not run",
            )
        if preset.quantization not in LOADABLE:
            return Problem(
                f"the weights of {preset.name} are quantised as {preset.quantization}, which this runtime does not load",
                "serve it with the runtime vllm",
            )
        return None

    def resolve(
        self, preset: Preset, user: Mapping[str, Any] | None, adapters: tuple[ServedAdapter, ...]
    ) -> Mapping[str, Any]:
        from kaito_runtime_transformers import config

        return config.resolve(preset, user, adapters)

    def fit(
        self,
        preset: Preset,
        config: Mapping[str, Any],
        offer: Offer,
        machines: int,
        adapters: tuple[ServedAdapter, ...],
    ) -> ServingFit:
        from kaito_runtime_transformers import estimate

        return estimate.fit(preset, config, offer, machines, adapters)

    def workload(self, job: ServingJob) -> Workload:
        from kaito_core.workloads.serving import serving_workload

        return serving_workload(job, serve=("python", "-m", "kaito_runtime_transformers"))

    def missing(self) -> str:
        absent = [m for m in NEEDED if importlib.util.find_spec(m) is None]
        return "pip install 'kaito-runtime-transformers[serve]'" if absent else ""


@cache
def _known() -> Mapping[str, Any]:
    import json
    from importlib.resources import files

    text = files("kaito_runtime_transformers").joinpath("data/architectures.json").read_text(encoding="utf-8")
    known: Mapping[str, Any] = json.loads(text)
    return known


def architectures() -> frozenset[str]:
    """Classes of causal language models that transformers knows; made by scripts/known_architectures.py."""
    return frozenset(_known()["causal"])


def version() -> str:
    """The version of transformers that they are from."""
    return str(_known()["transformers"])


@hookimpl
def kaito_runtimes() -> Iterator[InferenceRuntime]:
    """The one runtime of this package."""
    yield TransformersRuntime()
