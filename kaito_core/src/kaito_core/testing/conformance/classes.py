"""The test classes that fit a plugin, made without its author."""

from __future__ import annotations

from typing import Any

from kaito_core.plugins.installed import PRESETS, PROVISIONERS, RUNTIMES, TUNERS, Kind
from kaito_core.testing import conformance
from kaito_core.testing.conformance.base import Kit, records

_CLASSES: dict[Kind[Any], str] = {
    PRESETS: "PresetTests",
    PROVISIONERS: "NodeProvisionerTests",
    TUNERS: "TunerTests",
    RUNTIMES: "RuntimeTests",
}


def classes_of(module: str) -> dict[str, Any]:
    """By name: one for the module as such, and one for each kind of thing that it provides."""
    found: dict[str, Any] = {"TestPlugin": type("TestPlugin", (Kit,), {"plugin": module, "__module__": __name__})}
    for kind, name in _CLASSES.items():
        if records(module, kind):
            base = getattr(conformance, name)
            found[f"Test{name}"] = type(f"Test{name}", (base,), {"plugin": module, "__module__": __name__})
    return found
