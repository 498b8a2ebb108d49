"""What to say when nothing provides a name: who would but does not work, what to install, or what there is instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from kaito_core.plugins.installed import Installed, Kind
from kaito_core.problems import UserError

KNOWN: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "kaito-preset-phi3": {"presets": ("phi-3*", "phi-4*")},
    "kaito-preset-demo": {"presets": ("demo-phi-3",)},
    "kaito-preset-community": {
        "presets": (
            "deepseek-*",
            "gemma-*",
            "glm-*",
            "gpt-oss-*",
            "granite-*",
            "kimi-*",
            "llama-*",
            "minimax-*",
            "ministral-*",
            "mistral-*",
            "nemotron-*",
            "nvidia-nemotron-*",
            "qwen*",
        )
    },
    "kaito-tuner-qlora": {"methods": ("lora", "qlora")},
    "kaito-provisioner-aks": {"provisioners": ("aks",)},
    "kaito-provisioner-karpenter": {"provisioners": ("karpenter",)},
    "kaito-runtime-vllm": {"runtimes": ("vllm",)},
    "kaito-runtime-transformers": {"runtimes": ("transformers",)},
}
"""Public plugins, and patterns of the names that each provides."""


def knows(distribution: str, kind: str, name: str) -> bool:
    """Whether this public distribution is known to provide the name."""
    return any(fnmatchcase(name, p) for p in KNOWN.get(canonical(distribution), {}).get(kind, ()))


def canonical(distribution: str) -> str:
    """A distribution's name in the form in which names are the same (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def unknown(kind: Kind[Any], name: str, field: str, there: Collection[str], plugins: Iterable[Installed]) -> UserError:
    """The error for a name that no working plugin provides; ``there`` are the names that are."""
    import difflib

    plugins = tuple(plugins)
    broken = [p for p in plugins if p.state != "active"]
    for plugin in broken:
        if knows(plugin.distribution, kind.name, name) or _looks_like(plugin, name):
            return _unavailable(kind, name, field, plugin)
    close = difflib.get_close_matches(name, there, n=2, cutoff=0.7)
    installed = {canonical(p.distribution) for p in plugins}
    packages = [d for d in KNOWN if d not in installed and knows(d, kind.name, name)]
    if packages:
        return UserError(
            f"the {kind.noun} {name!r} is not installed", f"you need `pip install {packages[0]}`", field=field
        )
    message = f"there is no {kind.noun} {name!r}; "
    message += f"there is {', '.join(sorted(there))}" if there else f"no installed plugin provides a {kind.noun}"
    failed = [p for p in broken if p.state != "disabled"]
    if failed:
        message += f" (left out, because broken: {', '.join(map(str, failed))}; see `kaito plugins`)"
    remedy = f"did you mean {' or '.join(close)}?" if close else ""
    if not there and not remedy:
        remedy = f"install one: {', '.join(d for d, provides in KNOWN.items() if kind.name in provides)}"
    return UserError(message, remedy, field=field)


def _unavailable(kind: Kind[Any], name: str, field: str, plugin: Installed) -> UserError:
    if plugin.state == "disabled":
        message = f"the {kind.noun} {name!r} would come from {plugin}, which KAITO_PLUGINS or --no-plugins leaves out"
        return UserError(message, f"add {plugin.name!r} to KAITO_PLUGINS, or unset it", field=field)
    message = f"the {kind.noun} {name!r} would come from {plugin}, which does not work: {plugin.error}"
    return UserError(message, plugin.remedy, field=field)


def _looks_like(plugin: Installed, name: str) -> bool:
    """``phi3`` of ``kaito-preset-phi3`` looks as if it provided ``phi-3-mini``."""
    short = {_letters(plugin.name), _letters(canonical(plugin.distribution).rpartition("-")[2])}
    return any(len(s) > 2 and _letters(name).startswith(s) for s in short)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
