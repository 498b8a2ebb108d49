"""kaito's own conformance kit, as anybody's plugin runs it."""

from __future__ import annotations

from typing import ClassVar

from kaito_core.testing.conformance import RuntimeTests


class TestVllm(RuntimeTests):
    plugin = "kaito_runtime_vllm.plugin"
    quick: ClassVar = {"vllm": {"enforce-eager": True, "kv-cache-memory-bytes": "64M"}}
