"""Presets of open models. The data is in ``presets.json``, made by a script; `plugin` hands it over."""

__version__ = "0.1.0"
