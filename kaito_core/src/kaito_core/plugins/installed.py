"""One installed plugin: loaded on its own, called on its own.

pluggy does what it is good at (marking functions and matching arguments, so that a hook can gain an argument without
breaking anybody), but it calls all plugins in one go: one that raises loses everybody's results. So each plugin gets a
pluggy manager of its own, and every touch of foreign code goes through `Installed._try`, which turns whatever goes wrong into
this plugin's state. What a plugin hands over to work with later is watched over by `kaito_core.plugins.behaviours`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import pluggy

from kaito_core.plugins import calls, hookspecs
from kaito_core.plugins.calls import Broke, Calls, Hangs, collected, words
from kaito_core.plugins.discovery import EntryPoint
from kaito_core.plugins.records import flaw, own_copy, shown
from kaito_core.plugins.types import API_VERSION, Command, InferenceRuntime, NodeProvisioner, Preset, Tuner, normalised
from kaito_core.problems import Problem, UserError

T = TypeVar("T")
State = Literal["active", "disabled", "failed", "incompatible"]

HOOKS = tuple(n for n in vars(hookspecs) if n.startswith("kaito_"))

HEAVY = (
    "azure", "bitsandbytes", "boto3", "botocore", "google.cloud", "googleapiclient", "kubernetes", "oci", "openstack", "peft",
    "sglang", "tensorflow", "torch", "transformers", "vllm",
)  # fmt: skip
"""Engines, trainers and SDKs, which take long to import: no plugin does so before it has to."""

REASONS = 2000
"""Characters of ``error`` after which no further reason is added: a controller calls a broken rule for months."""


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
    heavy: tuple[str, ...] = ()
    """What it imported before anything was asked of it, and should not have: ``("torch",)``. What somebody else had imported by then
    is not seen."""


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
    heavy: tuple[str, ...] = ()
    _hooks: pluggy.PluginManager | None = None
    """None until it is loaded, and for good when that failed."""
    _provided: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calls = Calls(str(self))

    @property
    def name(self) -> str:
        return self.entry_point.name

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"

    def load(self) -> None:
        """Import the module and check it against the contract."""
        self.state = "active"
        self._hooks = self._lightly(f"importing {self.entry_point.module}", self._loaded)

    def _loaded(self) -> pluggy.PluginManager:
        module = self.entry_point.load()
        self._check_version(getattr(module, "KAITO_API_VERSION", "1.0"))
        hooks = pluggy.PluginManager("kaito")
        hooks.add_hookspecs(hookspecs)
        _check_marks(module)
        hooks.register(module, self.name)
        _check_hooks(hooks, module)
        return hooks

    def provided(self, kind: Kind[T]) -> dict[str, T]:
        """Its records of one kind by every name and alias. The hook is called once; a broken one provides nothing."""
        if kind.name not in self._provided:
            found: dict[str, T] | None = None
            if self._implements(kind.hook):
                found = self._lightly(kind.hook, lambda: self._checked(kind))
            self._provided[kind.name] = found or {}
        return self._provided[kind.name]

    def call(self, hook: str, check: Callable[[Any], T], otherwise: T, **arguments: Any) -> T | None:
        """What its implementation of ``hook`` returns, after ``check``; ``otherwise`` without one; None when it fails.

        It gets copies of the arguments: what it does to them is seen by nobody else, and noted as its fault."""
        if not self._implements(hook):
            return otherwise
        copies = {n: own_copy(v) for n, v in arguments.items()}

        def asked() -> T:
            results = getattr(self._hooks.hook, hook)(**copies)  # type: ignore[union-attr]
            return check(results[0]) if results else otherwise

        result = self._try(hook, asked)
        changed = [n for n, v in arguments.items() if copies[n] != v and result is not None and result is not copies[n]]
        if changed:
            remedy = "it works on a copy: hand back what is changed, made with dataclasses.replace()"
            self._fail(hook, _Fault(f"{hook} changed the {' and the '.join(changed)} that it was given", remedy))
        return result

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
        said = (self.error, self.remedy, self.traceback, self.heavy)
        return PluginStatus(self.name, self.distribution, self.version, self.state, provides, *said)

    def _implements(self, hook: str) -> bool:
        return self._hooks is not None and bool(getattr(self._hooks.hook, hook).get_hookimpls())

    def _checked(self, kind: Kind[T]) -> dict[str, T]:
        found: dict[str, T] = {}
        for record in self._records(kind):
            if isinstance(record, type):
                raise _Fault(f"{kind.hook} gave the class {record.__name__}, not an instance: {record.__name__}()")
            if not isinstance(record, kind.record):
                raise _Fault(f"{kind.hook} gave {shown(record)}, not a {kind.record.__name__}")
            wrong = flaw(record, kind.record)
            if wrong:
                raise _Fault(f"{kind.hook} gave a {kind.noun} whose {wrong}")
            for name in map(normalised, kind.names(record)):
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
            records += collected(result, kind.hook)
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

    def _lightly(self, what: str, function: Callable[[], T]) -> T | None:
        """`_try`, and note which heavy modules came with it."""
        before = {m for m in HEAVY if m in sys.modules}
        result = self._try(what, function)
        self.heavy += tuple(m for m in HEAVY if m in sys.modules and m not in before)
        return result

    def _try(self, what: str, function: Callable[[], T]) -> T | None:
        """What ``function`` returns; None when it fails, which is noted. Only a real Ctrl-C passes."""
        try:
            return self.calls.run(what, function, calls.HOOK_SECONDS)
        except Broke as e:
            self._fail(what, e.error, e.trace)
            return None

    def _fail(self, what: str, error: BaseException, trace: str = "") -> None:
        first = self.state == "active"
        self.state = error.state if isinstance(error, _Fault) else "failed"
        reason, remedy = self._explain(what, error)
        if reason not in self.error and len(self.error) < REASONS:
            self.error = f"{self.error}; {reason}" if self.error else reason
        if first:
            import logging

            self.remedy = remedy
            if not isinstance(error, _Fault):
                self.traceback = trace
            # Logging reaches stderr even where nobody has set it up, as one plain line.
            logging.getLogger("kaito_core.plugins").warning("warning: %s", self.problem().message)

    def _explain(self, what: str, error: BaseException) -> tuple[str, str]:
        leave_out = (
            f"`kaito plugins --json` has the traceback for its author; `pip uninstall {self.distribution}` ends it"
        )
        if isinstance(error, ModuleNotFoundError) and error.name:
            if error.name == self.entry_point.module or self.entry_point.module.startswith(error.name + "."):
                reason = f"its module {self.entry_point.module} is not there: the installation is broken"
                return reason, f"pip install --force-reinstall {self.distribution}"
            return f"it needs the Python module {error.name}, which is missing", f"pip install {self.distribution}"
        if isinstance(error, _Fault):
            return str(error), error.remedy or leave_out
        if isinstance(error, Hangs):
            return str(error), f"{leave_out}, `kaito --no-plugins` does without"
        if isinstance(error, UserError):
            return f"{what}: {error.problems[0].message}", error.problems[0].remedy or leave_out
        return f"{what} raised {words(error)}", leave_out

    def problem(self) -> Problem:
        """Why it does not work, as a warning: a broken plugin costs nobody else anything."""
        how = "does not work and is left out" if self._hooks is None else "works only in part"
        return Problem(f"the plugin {self.name} ({self}) {how}: {self.error}", self.remedy, severity="warning")

    def weight(self) -> Problem | None:
        """That it imports something heavy, as a warning."""
        if not self.heavy:
            return None
        message = f"the plugin {self.name} ({self}) imports {' and '.join(self.heavy)} when it is loaded"
        remedy = "every kaito command waits for that; tell its author: import it inside the functions that need it"
        return Problem(message, remedy, severity="warning")


def is_own_name(kind: Kind[T], name: str, record: T) -> bool:
    """False for an alias. A tuner's methods are all its own."""
    return kind.name == TUNERS.name or name == normalised(next(iter(kind.names(record))))


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
