"""kaito's own conformance kit, as anybody's plugin runs it."""

from __future__ import annotations

from kaito_core.testing.conformance import RuntimeTests


class TestTransformers(RuntimeTests):
    plugin = "kaito_runtime_transformers.plugin"
