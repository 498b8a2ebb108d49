"""What planning needs, as small as it can be: one preset, and a tuner that needs as much memory as it is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from kaito_core.plugins.types import (
    Architecture,
    Change,
    ChatFormat,
    Configuration,
    DataFacts,
    MemoryEstimate,
    MemoryItem,
    ModelSource,
    Offer,
    Preset,
    Tuner,
    TuningFit,
)
from kaito_core.problems import UserError
from kaito_core.workloads.job import TuningJob
from kaito_core.workloads.tuning import tuning_workload
from kaito_core.workloads.workload import Workload

GIB = 1 << 30

PRESET = Preset(
    name="tiny",
    source=ModelSource(hub="me/tiny", revision="abc"),
    licence="mit",
    architecture=Architecture("LlamaForCausalLM", 1000, 1, 8, 16, 1, 1, 8, 64, 128, linears={"q_proj": (8, 8)}),
    chat=ChatFormat("{{ messages }}", ("<|end|>",)),
    lora_targets=("q_proj",),
)


class Sized(Tuner):
    """Needs as many GiB as its configuration says, and can be halved down to one."""

    name: ClassVar[str] = "sized"
    methods: ClassVar[tuple[str, ...]] = ("qlora",)

    def resolve(self, preset: Preset, method: str, user: Mapping[str, Any] | None) -> Mapping[str, Any]:
        config = {"gib": 8, **(user or {})}
        if "bad" in config:
            raise UserError("there is no such setting", field="training_config.bad")
        return config

    def fit(
        self, preset: Preset, method: str, config: Mapping[str, Any], offer: Offer, data: DataFacts | None
    ) -> TuningFit:
        memory = MemoryEstimate((MemoryItem("base", config["gib"] * GIB),))
        return TuningFit(Configuration("cpu", "float32", 1, 1, 64), memory, offer.device_memory)

    def smaller(self, preset: Preset, method: str, config: Mapping[str, Any]) -> Iterable[Change]:
        gib = config["gib"]
        while gib > 1:
            gib //= 2
            yield Change(f"gib {gib} instead of {config['gib']}", method, {**config, "gib": gib})

    def workload(self, job: TuningJob) -> Workload:
        return tuning_workload(job, train=("train",), verify=("verify",))

    def schema(self) -> Mapping[str, Any]:
        return {}


class OneOfEach:
    """A registry with that preset and that tuner."""

    def preset(self, name: str) -> Preset:
        if name != PRESET.name:
            raise UserError(f"unknown preset {name}", field="tuning.preset.name")
        return PRESET

    def tuner(self, method: str) -> Tuner:
        if method != "qlora":
            raise UserError(f"unknown method {method}", field="tuning.method")
        return Sized()
