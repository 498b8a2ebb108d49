"""One installed plugin: loaded on its own, called on its own.

pluggy does what it is good at (marking functions and matching arguments, so that a hook can gain an argument without
breaking anybody), but it calls all plugins in one go: one that raises loses everybody's results. So each plugin gets a
pluggy manager of its own, and every touch of foreign code happens inside `_guard`, which turns whatever goes wrong into
this plugin's state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import pluggy

from kaito_core.plugins import hookspecs
from kaito_core.plugins.discovery import EntryPoint
from kaito_core.plugins.types import API_VERSION, Command, InferenceRuntime, NodeProvisioner, Preset, Tuner, normalised
from kaito_core.problems import Problem, UserError

T = TypeVar("T")
State = Literal["active", "disabled", "failed", "incompatible"]

HOOKS = tuple(n for n in vars(hookspecs) if n.startswith("kaito_"))


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """One kind of thing that plugins provide by name."""

    name: str
    """The key in `PluginStatus.provides`."""
    noun: str
    hook: str
    record: type
    names: Callable[[T], Iterable[str]]
    """The names of a record: the first is its own, the others are aliases."""


PRESETS: Kind[Preset] = Kind("presets", "preset", "kaito_presets", Preset, lambda p: (p.name, *p.aliases))
TUNERS: Kind[Tuner] = Kind("methods", "tuning method", "kaito_tuners", Tuner, lambda t: t.methods)
PROVISIONERS: Kind[NodeProvisioner] = Kind(
    "provisioners", "node provisioner", "kaito_node_provisioners", NodeProvisioner, lambda p: (p.name,)
)
RUNTIMES: Kind[InferenceRuntime] = Kind(
    "runtimes", "inference runtime", "kaito_runtimes", InferenceRuntime, lambda r: (r.name,)
)
COMMANDS: Kind[Command] = Kind("commands", "command", "kaito_commands", Command, lambda c: (c.name,))
KINDS: tuple[Kind[Any], ...] = (PRESETS, TUNERS, PROVISIONERS, RUNTIMES, COMMANDS)


@dataclass(frozen=True, slots=True)
class PluginStatus:
    """What `kaito plugins` shows of one entry point."""

    name: str
    distribution: str
    version: str
    state: State
    provides: Mapping[str, tuple[str, ...]]
    """Names by kind, ``{"presets": ("phi-4", …)}``; under ``hooks`` those hooks that provide no names."""
    error: str = ""
    remedy: str = ""
    traceback: str = ""


class _Fault(Exception):
    """The plugin broke the contract; the message says how, and a traceback would say nothing more."""

    def __init__(self, message: str, remedy: str = "", state: State = "failed") -> None:
        super().__init__(message)
        self.remedy = remedy
        self.state = state


@dataclass(eq=False)
class Installed:
    """An entry point, and how far it got."""

    entry_point: EntryPoint
    distribution: str
    version: str
    state: State = "disabled"
    error: str = ""
    remedy: str = ""
    traceback: str = ""
    _hooks: pluggy.PluginManager | None = None
    """None until it is loaded, and for good when that failed."""
    _provided: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.entry_point.name

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"

    def load(self) -> None:
        """Import the module and check it against the contract."""
        self.state = "active"
        with self._guard():
            module = self.entry_point.load()
            self._check_version(getattr(module, "KAITO_API_VERSION", "1.0"))
            hooks = pluggy.PluginManager("kaito")
            hooks.add_hookspecs(hookspecs)
            _check_marks(module)
            hooks.register(module, self.name)
            _check_hooks(hooks, module)
            self._hooks = hooks

    def provided(self, kind: Kind[T]) -> dict[str, T]:
        """Its records of one kind by every name and alias. The hook is called once; a broken one provides nothing."""
        if kind.name not in self._provided:
            found: dict[str, T] = {}
            with self._guard():
                found = self._checked(kind)
            self._provided[kind.name] = found
        return self._provided[kind.name]

    def call(self, hook: str, check: Callable[[Any], T], otherwise: T, **arguments: Any) -> T | None:
        """What its implementation of ``hook`` returns, after ``check``; ``otherwise`` without one; None when it fails."""
        with self._guard():
            results = getattr(self._hooks.hook, hook)(**arguments) if self._hooks is not None else []
            return check(results[0]) if results else otherwise
        return None

    def status(self) -> PluginStatus:
        """Calls the hooks that provide names, if they have not been called."""
        provides: dict[str, tuple[str, ...]] = {}
        for kind in KINDS:
            own = tuple(n for n, r in self.provided(kind).items() if is_own_name(kind, n, r))
            if own:
                provides[kind.name] = own
        others = tuple(h for h in HOOKS if h not in {k.hook for k in KINDS} and self._implements(h))
        if others:
            provides["hooks"] = others
        return PluginStatus(
            self.name, self.distribution, self.version, self.state, provides, self.error, self.remedy, self.traceback
        )

    def _implements(self, hook: str) -> bool:
        return self._hooks is not None and bool(getattr(self._hooks.hook, hook).get_hookimpls())

    def _checked(self, kind: Kind[T]) -> dict[str, T]:
        found: dict[str, T] = {}
        for record in self._records(kind):
            if isinstance(record, type):
                raise _Fault(f"{kind.hook} gave the class {record.__name__}, not an instance: {record.__name__}()")
            if not isinstance(record, kind.record):
                raise _Fault(f"{kind.hook} gave {shown(record)}, not a {kind.record.__name__}")
            names = kind.names(record)
            if isinstance(names, str):
                raise _Fault(f"the names of a {kind.noun} are a tuple of strings, not the string {names!r}")
            for name in map(normalised, names):
                if found.setdefault(name, record) is not record:
                    raise _Fault(f"{kind.hook} gave two {kind.noun}s of the name {name!r}")
        return found

    def _records(self, kind: Kind[T]) -> list[T]:
        """The hook's records. A generator is run here, so that it fails inside the caller's guard and not later."""
        if self._hooks is None:
            return []
        records: list[T] = []
        for result in getattr(self._hooks.hook, kind.hook)():
            if not isinstance(result, Iterable):
                raise _Fault(f"{kind.hook} gave {shown(result)}, not an iterable of {kind.record.__name__}")
            records.extend(result)
        return records

    def _check_version(self, theirs: Any) -> None:
        match = re.fullmatch(r"(\d+)\.(\d+)", theirs) if isinstance(theirs, str) else None
        if match is None:
            raise _Fault(f"KAITO_API_VERSION is {theirs!r}, not 'MAJOR.MINOR'")
        ours = tuple(int(n) for n in API_VERSION.split("."))
        major, minor = int(match[1]), int(match[2])
        if major == ours[0] and minor <= ours[1]:
            return
        newer = (major, minor) > ours
        raise _Fault(
            f"it is made for version {theirs} of the plugin contract, this kaito-core has {API_VERSION}",
            f"pip install --upgrade {'kaito-core' if newer else self.distribution}",
            "incompatible",
        )

    @contextmanager
    def _guard(self) -> Iterator[None]:
        # BaseException: a plugin that calls sys.exit() on import must not take kaito with it. Only Ctrl-C passes.
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            self._fail(e)

    def _fail(self, error: BaseException) -> None:
        first = self.state == "active"
        self.state = error.state if isinstance(error, _Fault) else "failed"
        words, remedy = self._explain(error)
        if words not in self.error:
            self.error = f"{self.error}; {words}" if self.error else words
        if first:
            import logging
            import traceback

            self.remedy = remedy
            if not isinstance(error, _Fault):
                self.traceback = "".join(traceback.format_exception(error))
            # Logging reaches stderr even where nobody has set it up, as one plain line.
            logging.getLogger("kaito_core.plugins").warning("warning: %s", self.problem().message)

    def _explain(self, error: BaseException) -> tuple[str, str]:
        leave_out = (
            f"`kaito plugins --json` has the traceback for its author; `pip uninstall {self.distribution}` ends it"
        )
        if isinstance(error, ModuleNotFoundError) and error.name:
            if error.name == self.entry_point.module or self.entry_point.module.startswith(error.name + "."):
                words = f"its module {self.entry_point.module} is not there: the installation is broken"
                return words, f"pip install --force-reinstall {self.distribution}"
            return f"it needs the Python module {error.name}, which is missing", f"pip install {self.distribution}"
        if isinstance(error, _Fault):
            return str(error), error.remedy or leave_out
        if isinstance(error, UserError):
            return error.problems[0].message, error.problems[0].remedy or leave_out
        said = " ".join(str(error).split())
        return f"{type(error).__name__}: {said}" if said else type(error).__name__, leave_out

    def problem(self) -> Problem:
        """Why it does not work, as a warning: a broken plugin costs nobody else anything."""
        message = f"the plugin {self.name} ({self}) does not work and is left out: {self.error}"
        return Problem(message, self.remedy, severity="warning")


def is_own_name(kind: Kind[T], name: str, record: T) -> bool:
    """False for an alias. A tuner's methods are all its own."""
    return kind.name == TUNERS.name or name == normalised(next(iter(kind.names(record))))


def shown(value: object) -> str:
    """A value that is not what it should be, as an error shows it."""
    return f"{value!r:.60} ({type(value).__name__})"


def _check_marks(module: Any) -> None:
    found = {h: getattr(module, h) for h in HOOKS if callable(getattr(module, h, None))}
    unmarked = [h for h, function in found.items() if not hasattr(function, "kaito_impl")]
    if unmarked:
        raise _Fault(f"{', '.join(unmarked)} is not marked with @hookimpl, so nothing would call it")


def _check_hooks(hooks: pluggy.PluginManager, module: Any) -> None:
    for caller in hooks.get_hookcallers(module) or ():
        if len(caller.get_hookimpls()) > 1:
            raise _Fault(f"it implements {caller.name} twice")
        if caller.spec is None:
            import difflib

            close = difflib.get_close_matches(caller.name, HOOKS, n=1)
            hint = f", did you mean {close[0]}?" if close else f"; the hooks are {', '.join(HOOKS)}"
            raise _Fault(f"it implements {caller.name}, which is not a hook of kaito{hint}")
