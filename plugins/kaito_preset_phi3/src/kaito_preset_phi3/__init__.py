"""Phi-3, Phi-3.5 and Phi-4 presets. The data is in ``presets.toml`` and ``templates/``; `plugin` hands it over."""

__version__ = "0.1.0"
