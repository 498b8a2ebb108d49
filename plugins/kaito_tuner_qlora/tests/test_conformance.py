"""kaito's own conformance kit, as anybody's plugin runs it."""

from __future__ import annotations

from typing import ClassVar

from kaito_core.testing.conformance import TunerTests


class TestQlora(TunerTests):
    plugin = "kaito_tuner_qlora.plugin"
    quick: ClassVar = {
        "TrainingArguments": {"max_steps": 40, "save_steps": 4, "eval_strategy": "no", "max_length": 128}
    }
