"""The conformance kit: what a plugin of each kind must do, as tests that its author runs.

    from kaito_core.testing.conformance import PresetTests

    class TestMyModel(PresetTests):
        plugin = "my_preset.plugin"

base.py           what is the same for all kinds: the plugin loads, is light, is found, and how tests may be overridden
presets.py        PresetTests; shrunken.py a small copy of a model's architecture, with weights
provisioners.py   NodeProvisionerTests; cloud.py what it asks of a cloud; asking.py requests; contract.py any order of calls
tuners.py         TunerTests; tuning.py a real tuning
runtimes.py       RuntimeTests; serving.py a real server, asked over HTTP
plain.py          laws of configurations and workloads that tuners and runtimes share
machines.py       the usual GPUs, and the presets that tuners and runtimes are asked about
stages.py         a workload's stages as processes, watched
light.py          what a plugin imports, found out in a process of its own
pytest_plugin.py  what pytest loads in every run: no more than it must
check.py          the kit without a test file, for ``kaito plugins check``; classes.py and recorder.py are its other process

What a test class takes is imported with it and not before: hypothesis with the provisioners, nothing else for presets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kaito_core.testing.conformance.cloud import Cloud
    from kaito_core.testing.conformance.presets import PresetTests
    from kaito_core.testing.conformance.provisioners import NodeProvisionerTests
    from kaito_core.testing.conformance.runtimes import RuntimeTests
    from kaito_core.testing.conformance.tuners import TunerTests

__all__ = ["Cloud", "NodeProvisionerTests", "PresetTests", "RuntimeTests", "TunerTests"]

_WHERE = {
    "Cloud": "cloud",
    "NodeProvisionerTests": "provisioners",
    "PresetTests": "presets",
    "RuntimeTests": "runtimes",
    "TunerTests": "tuners",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
