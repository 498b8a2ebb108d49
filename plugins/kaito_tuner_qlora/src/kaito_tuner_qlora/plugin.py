"""The tuner as kaito sees it: names to functions. Nothing here, and nothing that it imports at the top, imports torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

from kaito_core.plugins import Change, DataFacts, Offer, Preset, Tuner, TuningFit, hookimpl

if TYPE_CHECKING:
    from kaito_core.workloads.job import TuningJob
    from kaito_core.workloads.workload import Workload

KAITO_API_VERSION = "1.0"

SHORTEST = 512
"""Tokens: cutting examples further would leave nothing to learn from most data."""

LOWEST_RANK = 8

SMALL_OPTIMIZER = "paged_adamw_8bit"

NEEDED = ("accelerate", "bitsandbytes", "peft", "torch", "transformers")


class QloraTuner(Tuner):
    """LoRA over a model in 16 bit (``lora``) or in 4 or 8 (``qlora``)."""

    name: ClassVar[str] = "qlora"
    methods: ClassVar[tuple[str, ...]] = ("qlora", "lora")

    def resolve(self, preset: Preset, method: str, user: Mapping[str, Any] | None) -> Mapping[str, Any]:
        from kaito_tuner_qlora import config

        return config.resolve(preset, method, user)

    def schema(self) -> Mapping[str, Any]:
        from kaito_tuner_qlora import config

        return config.schema()

    def fit(
        self, preset: Preset, method: str, config: Mapping[str, Any], offer: Offer, data: DataFacts | None
    ) -> TuningFit:
        from kaito_tuner_qlora import estimate

        return estimate.fit(preset, config, offer, data)

    def smaller(self, preset: Preset, method: str, config: Mapping[str, Any]) -> Iterable[Change]:
        """One change first, the least painful first; then two at once, and so on. The micro-batch is always small enough."""
        axes = [
            _optimizers(config),
            _ranks(config),
            _lengths(config),
            _methods(method, config),
            _checkpointing(config),
        ]
        choices = list(product(*([None, *axis] for axis in axes)))
        for chosen in sorted(choices, key=lambda c: sum(step is not None for step in c)):
            steps = [step for step in reversed(chosen) if step is not None]
            if steps:
                yield _changed(method, config, steps)

    def workload(self, job: TuningJob) -> Workload:
        from kaito_core.workloads.tuning import tuning_workload

        command = ("python", "-m", "kaito_tuner_qlora")
        return tuning_workload(job, train=(*command, "train"), verify=(*command, "verify"))

    def missing(self) -> str:
        absent = [m for m in NEEDED if importlib.util.find_spec(m) is None]
        return "pip install 'kaito-tuner-qlora[train]'" if absent else ""


@hookimpl
def kaito_tuners() -> Iterator[Tuner]:
    """The one tuner of this package."""
    yield QloraTuner()


# --- what can be made smaller: (words, method, section, fields) -------------------------------------------------------

_Step = tuple[str, str, str, Mapping[str, Any]]
"""In words; the method after it (empty: as it is); the section that changes, and its new fields."""


def _checkpointing(config: Mapping[str, Any]) -> Iterator[_Step]:
    if not config["TrainingArguments"]["gradient_checkpointing"]:
        yield "gradient_checkpointing true", "", "TrainingArguments", {"gradient_checkpointing": True}


def _lengths(config: Mapping[str, Any]) -> Iterator[_Step]:
    now = length = config["TrainingArguments"]["max_length"]
    while length // 2 >= SHORTEST:
        length //= 2
        words = f"examples cut at max_length {length} instead of {now}"
        yield words, "", "TrainingArguments", {"max_length": length}


def _methods(method: str, config: Mapping[str, Any]) -> Iterator[_Step]:
    quantization = config["QuantizationConfig"]
    if method == "lora":
        yield "method qlora instead of lora", "qlora", "QuantizationConfig", {"load_in_4bit": True}
    elif quantization["load_in_8bit"]:
        words = "load_in_4bit instead of load_in_8bit"
        yield words, "", "QuantizationConfig", {"load_in_4bit": True, "load_in_8bit": False}


def _ranks(config: Mapping[str, Any]) -> Iterator[_Step]:
    lora = config["LoraConfig"]
    now = rank = lora["r"]
    while rank // 2 >= LOWEST_RANK:
        rank //= 2
        words, fields = f"r {rank} instead of {now}", {"r": rank}
        if not lora["use_rslora"]:  # the adapter's scale, alpha / r, stays what was asked for
            fields["lora_alpha"] = max(1, round(lora["lora_alpha"] * rank / now))
            words += f" with lora_alpha {fields['lora_alpha']}"
        yield words, "", "LoraConfig", fields


def _optimizers(config: Mapping[str, Any]) -> Iterator[_Step]:
    now = config["TrainingArguments"]["optim"]
    if "8bit" not in now and "4bit" not in now:
        yield f"optim {SMALL_OPTIMIZER} instead of {now}", "", "TrainingArguments", {"optim": SMALL_OPTIMIZER}


def _changed(method: str, config: Mapping[str, Any], steps: Iterable[_Step]) -> Change:
    changed, words = dict(config), []
    for description, other_method, section, fields in steps:
        words.append(description)
        method = other_method or method
        changed[section] = {**changed[section], **fields}
    return Change(" and ".join(words), method, changed)
