"""kaito's own conformance kit, as anybody's plugin runs it."""

from __future__ import annotations

from kaito_core.testing.conformance import PresetTests


class TestPhi(PresetTests):
    plugin = "kaito_preset_phi3.plugin"
