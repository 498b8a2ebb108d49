"""Names of models in a workspace, and the registry that knows the models behind them.

``tuning.preset.name`` and ``inference.preset.name`` may hold a preset's name, ``org/name`` or ``org/name@revision`` of a hub, or
the path of a folder (``/…``, ``./…``, ``../…``, ``~/…``). Planning is pure, so that what has to be read is read before it:

    registry = with_models(plugins, named_models(workspace), Reader(base, cache, token))
    plan(workspace, Catalog(registry, …, model_folders={**…, **registry.folders}))
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kaito_core.models.files import Model
from kaito_core.problems import KaitoError, Problem, UserError

if TYPE_CHECKING:
    from kaito_core.api import Workspace
    from kaito_core.planning.plan import Registry
    from kaito_core.plugins.types import InferenceRuntime, Preset, Tuner

TUNED = "tuning.preset.name"
SERVED = "inference.preset.name"

_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_HUB = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w][\w./-]{{0,99}}))?\Z")

ReadModel = Callable[[str, str], Model]
"""Reads the model of a name; the second text is the field that errors name. Raises `UserError` or `Failure`."""


def named_models(workspace: Workspace) -> dict[str, str]:
    """The names in a workspace that are models and no presets, by the field that they are in."""
    found = {}
    if workspace.tuning is not None:
        found[TUNED] = workspace.tuning.preset.name
    if workspace.inference is not None and workspace.inference.preset is not None:
        found[SERVED] = workspace.inference.preset.name
    return {where: name for where, name in found.items() if is_model(name)}


def is_model(name: str) -> bool:
    """Whether it is ``org/name`` or a folder: no preset's name has a slash."""
    return "/" in name or name.strip() in (".", "..", "~")


def is_folder(name: str) -> bool:
    """Whether it is the path of a folder, and not ``org/name``."""
    return name.strip() in (".", "..", "~") or name.strip().startswith(("/", "./", "../", "~/"))


@dataclass(frozen=True)
class Reader:
    """Reads models by name: the `ReadModel` of this machine."""

    base: Path | None
    """Where relative paths begin; None where folders mean nothing, as in a cluster."""
    cache: Path | None = None
    """A folder for what was read of the hub."""
    token: str = field(default="", repr=False)
    """The user's hub token."""

    def __call__(self, name: str, where: str = "") -> Model:
        name = name.strip()
        if is_folder(name):
            from kaito_core.models.folder import read_folder

            if self.base is None:
                raise UserError(
                    f"a cluster cannot read the folder {name!r}",
                    "give org/name, put the model into an image (presetOptions.image), or run it with `kaito run --local`",
                    field=where,
                )
            try:
                # pathlib's expanduser raises for an unknown ~name
                path = Path(os.path.normpath(self.base / os.path.expanduser(name)))  # noqa: PTH111
                return read_folder(path, field=where)
            except ValueError as e:  # a NUL in the name
                raise UserError(f"{name!r} is not a path: {e}", field=where) from None
        found = _HUB.match(name)
        if found is None or re.search(r"--|\.\.", name):
            raise UserError(
                f"{name!r:.200} is neither a preset nor a model",
                "write a preset's name, org/name or org/name@revision of the hub, or a folder as /path or ./path",
                field=where,
            )
        from kaito_core.models.hub import read_hub

        return read_hub(found["repo"], found["revision"] or "", cache=self.cache, token=self.token, field=where)


@dataclass(frozen=True)
class WithModels:
    """A registry that also knows models that were read. Everything else is the registry's own."""

    registry: Registry
    models: Mapping[str, Model] = field(default_factory=dict)
    """By the name that the workspace gives them."""

    @property
    def folders(self) -> dict[str, str]:
        """Folders of the models that lie on this machine, by preset name: for `Catalog.model_folders`."""
        return {m.preset.name: m.folder for m in self.models.values() if m.folder}

    def preset(self, name: str, **more: Any) -> Preset:
        """The model that was read for this name, else the registry's preset."""
        model = self.models.get(name)
        return model.preset if model else self.registry.preset(name, **more)

    def tuner(self, method: str, **more: Any) -> Tuner:
        return self.registry.tuner(method, **more)

    def runtimes(self) -> Mapping[str, InferenceRuntime]:
        return self.registry.runtimes()


def with_models(registry: Registry, names: Mapping[str, str], read: ReadModel) -> WithModels:
    """``registry``, and the models of ``names`` (`named_models`: by field) that it does not know itself.

    A preset of a plugin that has this hub id is that preset; where it lacks the shapes that tuning needs, the model is read for
    a tuning all the same, and keeps the preset's name and defaults. Raises `UserError` with everything that is wrong with the
    names, and `Failure` when a hub does not answer."""
    models: dict[str, Model] = {}
    problems: list[Problem] = []
    for where, name in names.items():
        known = _known(registry, name)
        tuned = where.startswith("tuning.")
        if known is not None and (known.architecture.linears or not tuned):
            continue
        try:
            model = models.get(name) or read(_pinned(known) or name, where)
        except UserError as e:
            problems.extend(e.problems)
            continue
        if known is not None:
            preset = replace(
                model.preset, name=known.name, aliases=known.aliases, inference=known.inference, licence=known.licence
            )
            model = replace(model, preset=preset)
        if tuned and model.not_tunable:
            text = f"{name} cannot be tuned: {model.not_tunable}"
            problems.append(Problem(text, "docs/models.md says which models can", where))
        models[name] = model
    if problems:
        raise UserError(problems)
    return WithModels(registry, models)


def _known(registry: Registry, name: str) -> Preset | None:
    if is_folder(name):
        return None
    try:
        return registry.preset(name)
    except KaitoError:
        return None


def _pinned(preset: Preset | None) -> str:
    if preset is None or not preset.source.hub:
        return ""
    revision = preset.source.revision
    return f"{preset.source.hub}@{revision}" if revision else preset.source.hub
