"""How plugins are found, and the only way to what they provide.

Bare pluggy drops a second plugin of the same name silently, dies on a failing import, and loses every result when one
implementation raises. Here each entry point is loaded and called on its own (`installed`), two providers of one name are
an error for whoever asks for that name and for nobody else, and asking for what is not there says what to do (`known`).

Nobody else touches hooks: the rest of kaito asks the `PluginManager` for typed records by name.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from kaito_core.plugins.behaviours import GuardedProvisioner, GuardedRuntime, GuardedTuner, guarded_command
from kaito_core.plugins.calls import collected
from kaito_core.plugins.discovery import entry_points
from kaito_core.plugins.installed import (
    COMMANDS,
    KINDS,
    PRESETS,
    PROVISIONERS,
    RUNTIMES,
    TUNERS,
    Installed,
    Kind,
    PluginStatus,
    is_own_name,
)
from kaito_core.plugins.known import canonical, unknown
from kaito_core.plugins.records import flaw, shown
from kaito_core.plugins.types import Command, InferenceRuntime, NodeProvisioner, Preset, Tuner, normalised
from kaito_core.problems import Problem, Severity, UserError

if TYPE_CHECKING:
    from kaito_core.api import Workspace
    from kaito_core.planning.plan import Plan
    from kaito_core.workloads.workload import Workload

__all__ = ["PluginManager", "PluginStatus", "load_plugins"]

GROUP = "kaito"
CORE = "kaito-core"

_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?\Z")
"""``org/name`` of a hub, which no preset's own name can look like."""

T = TypeVar("T")

_GUARDS: Mapping[str, Callable[[Any, Installed], Any]] = {
    TUNERS.name: GuardedTuner,
    PROVISIONERS.name: GuardedProvisioner,
    RUNTIMES.name: GuardedRuntime,
    COMMANDS.name: guarded_command,
}
"""What is called later, long after its hook, is given out with a guard around it."""


def load_plugins(
    names: Sequence[str] | None = None, *, environ: Mapping[str, str] = os.environ, external: bool = True
) -> PluginManager:
    """The installed plugins: those of kaito-core and, unless narrowed, every other.

    ``names`` are entry-point or distribution names; None takes them from ``$KAITO_PLUGINS`` (``a,b``; set but empty:
    none; unset: all). ``external=False`` leaves only kaito-core's own. Never raises because of a plugin: a broken one is
    logged as one warning line and shown by `PluginManager.statuses`. Loading happens once per process and choice.
    """
    if names is None and "KAITO_PLUGINS" in environ:
        names = environ["KAITO_PLUGINS"].split(",")
    chosen = None if names is None else tuple(n.strip() for n in names if n.strip())
    return _load(chosen if external else (), tuple(sys.path))


@functools.cache
def _load(chosen: tuple[str, ...] | None, path: tuple[str, ...]) -> PluginManager:
    """``path`` is part of the key because it decides what is installed."""
    plugins = [Installed(e, e.distribution, e.version) for e in entry_points(GROUP, path)]
    plugins.sort(key=lambda p: (canonical(p.distribution) != CORE, p.name, canonical(p.distribution)))
    wanted = None if chosen is None else {canonical(c) for c in chosen}
    for plugin in plugins:
        own = {canonical(plugin.name), canonical(plugin.distribution)}
        if wanted is None or CORE in own or own & wanted:
            plugin.load()
    there = {canonical(n) for p in plugins for n in (p.name, p.distribution)}
    missing = [c for c in chosen or () if canonical(c) not in there]
    return PluginManager(plugins, missing)


class PluginManager:
    """The typed face of everything that plugins provide. Names are compared in lower case; a preset's aliases count."""

    def __init__(self, plugins: Iterable[Installed], missing: Iterable[str] = ()) -> None:
        self._plugins = tuple(plugins)
        self._missing = tuple(missing)
        self._guarded: dict[tuple[int, str], tuple[Any, Any]] = {}
        """What is guarded and what guards it: one guard for one object, since a provisioner's knows whether it is attached."""
        if self._missing:
            import logging

            for problem in self._not_installed():
                logging.getLogger("kaito_core.plugins").warning("warning: %s", problem.message)

    # --- by name ---

    def presets(self) -> dict[str, Preset]:
        """Every preset by its own name; names with two providers are left out."""
        return self._all(PRESETS)

    def preset(self, name: str, *, field: str = "tuning.preset.name") -> Preset:
        """The preset of this name or alias, or whose model is ``org/name`` (and at this revision, with ``@revision``).
        UserError with ``field`` when there is none, or more than one."""
        return self._of_model(name, field) if _MODEL.match(name.strip()) else self._one(PRESETS, name, field)

    def methods(self) -> dict[str, Tuner]:
        """Every tuning method, and who knows it."""
        return self._all(TUNERS)

    def tuner(self, method: str, *, field: str = "tuning.method") -> Tuner:
        """The tuner of this method. UserError with ``field`` when there is none, or more than one."""
        return self._one(TUNERS, method, field)

    def provisioners(self) -> dict[str, NodeProvisioner]:
        """Every source of machines by name."""
        return self._all(PROVISIONERS)

    def runtimes(self) -> dict[str, InferenceRuntime]:
        """Every inference runtime by name."""
        return self._all(RUNTIMES)

    def commands(self) -> dict[str, Command]:
        """More ``kaito …`` commands, by name."""
        return self._all(COMMANDS)

    # --- called on every plugin, in plugin order ---

    def validate(self, workspace: Workspace, plan: Plan | None) -> list[Problem]:
        """What the rules of all plugins say. A rule that itself fails is a warning: nobody shall think it was checked."""
        found = []
        for plugin in self._plugins:
            none: list[Problem] = []
            said = plugin.call("kaito_validate", _problems, none, workspace=workspace, plan=plan)
            if said is None:
                message = f"the rules of {plugin} could not be checked: {plugin.error}"
                said = [Problem(message, plugin.remedy, severity="warning")]
            found.extend(said)
        return found

    def workload(self, workspace: Workspace, workload: Workload) -> Workload:
        """The workload after every plugin had its say, each on what the one before it made."""
        for plugin in self._plugins:
            check = functools.partial(_same_type, workload)
            changed = plugin.call("kaito_workload", check, workload, workspace=workspace, workload=workload)
            workload = changed or workload
        return workload

    def notify(self, event: Mapping[str, Any]) -> None:
        """Tell every plugin that listens."""
        for plugin in self._plugins:
            plugin.call("kaito_events", bool, False, event=event)

    # --- about the plugins themselves ---

    def statuses(self) -> list[PluginStatus]:
        """Every installed plugin, kaito-core's first. Calls the hooks that provide names, so that what is broken shows."""
        return [p.status() for p in self._plugins]

    def problems(self) -> list[Problem]:
        """What is wrong with the plugins, as far as they were used: broken ones, heavy ones, two of one name, names not installed."""
        found = [p.problem() for p in self._plugins if p.error]
        found += filter(None, (p.weight() for p in self._plugins))
        found += self._not_installed()
        for kind in KINDS:
            for name, providers in self._owners(kind).items():
                if len(providers) > 1:
                    found.append(_conflict(kind, name, [p for p, _ in providers], "", "warning"))
        return found

    def _owners(self, kind: Kind[T]) -> dict[str, list[tuple[Installed, T]]]:
        owners: dict[str, list[tuple[Installed, T]]] = {}
        for plugin in self._plugins:
            for name, record in plugin.provided(kind).items():
                owners.setdefault(name, []).append((plugin, self._with_guard(kind, plugin, record)))
        return owners

    def _with_guard(self, kind: Kind[T], plugin: Installed, record: T) -> T:
        guard = _GUARDS.get(kind.name)
        if guard is None:
            return record
        key = (id(record), kind.name)
        if key not in self._guarded or self._guarded[key][0] is not record:
            self._guarded[key] = (record, guard(record, plugin))
        return self._guarded[key][1]  # type: ignore[no-any-return]

    def _all(self, kind: Kind[T]) -> dict[str, T]:
        found = {n: providers[0][1] for n, providers in self._owners(kind).items() if len(providers) == 1}
        return {n: record for n, record in found.items() if is_own_name(kind, n, record)}

    def _one(self, kind: Kind[T], name: str, field: str) -> T:
        try:
            wanted = normalised(name)
        except ValueError as e:
            raise UserError(str(e), field=field) from e
        owners = self._owners(kind)
        providers = owners.get(wanted, [])
        if not providers:
            raise unknown(kind, wanted, field, self._all(kind), self._plugins)
        if len(providers) > 1:
            raise UserError(_conflict(kind, wanted, [p for p, _ in providers], field))
        return providers[0][1]

    def _of_model(self, model: str, field: str) -> Preset:
        wanted, _, revision = model.strip().partition("@")
        found = [
            p
            for p in self.presets().values()
            if p.source.hub.lower() == wanted.lower() and revision in ("", p.source.revision)
        ]
        if len(found) == 1:
            return found[0]
        if found:
            names = " and ".join(sorted(p.name for p in found))
            raise UserError(f"the model {model!r:.200} is that of the presets {names}", "name one of them", field=field)
        remedy = "`kaito plugins` says which presets there are"
        raise UserError(f"no installed plugin has a preset for the model {model!r:.200}", remedy, field=field)

    def _not_installed(self) -> list[Problem]:
        import difflib

        there = [n for p in self._plugins for n in (p.name, p.distribution)]
        found = []
        for name in self._missing:
            close = difflib.get_close_matches(name, there, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"there is {', '.join(p.name for p in self._plugins)}"
            found.append(
                Problem(f"KAITO_PLUGINS names {name!r}, which is not an installed plugin", remedy, severity="warning")
            )
        return found


def _problems(result: Any) -> list[Problem]:
    if not isinstance(result, Iterable):
        raise TypeError(f"kaito_validate gave {shown(result)}, not an iterable of Problem")
    found = collected(result, "kaito_validate")
    for each in found:
        if not isinstance(each, Problem):
            raise TypeError(f"kaito_validate gave {shown(each)}, not a Problem")
        if wrong := flaw(each, Problem):
            raise TypeError(f"kaito_validate gave a Problem whose {wrong}")
    return found


def _same_type(before: T, after: Any) -> T:
    if not isinstance(after, type(before)):
        raise TypeError(f"kaito_workload gave {shown(after)}, not a {type(before).__name__}")
    if wrong := flaw(after, type(before)):
        raise TypeError(f"kaito_workload gave a {type(before).__name__} whose {wrong}")
    return after


def _conflict(
    kind: Kind[Any], name: str, owners: Sequence[Installed], field: str, severity: Severity = "error"
) -> Problem:
    who = [str(o) for o in owners]
    if len(set(who)) < len(who):  # two entry points of one distribution
        who = [f"{o.name} ({o})" for o in owners]
    return Problem(
        f"the {kind.noun} {name!r} is provided by {' and '.join(who)}",
        f"uninstall one of them, or choose with KAITO_PLUGINS={owners[0].name}",
        field,
        severity=severity,
    )
