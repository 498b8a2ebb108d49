"""What a plugin hands over to work with – node provisioners, tuners, runtimes, commands – with a guard around every call.

The `PluginManager` gives out these in place of the plugin's own objects. A method that raises, hangs, or gives something that the
contract does not know ends as a `Failure` that names the distribution and the method; what it is given it may change as it likes,
since that is a copy. `KaitoError` and `ProvisioningError`, which are words for people, pass as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from kaito_core.plugins import calls
from kaito_core.plugins.calls import Broke, Hangs, collected, words
from kaito_core.plugins.installed import Installed
from kaito_core.plugins.records import flaw, own_copy, shown
from kaito_core.plugins.types import (
    Change,
    Cluster,
    Command,
    DataFacts,
    Held,
    InferenceRuntime,
    NodeProvisioner,
    NodeRequest,
    NodeStatus,
    Offer,
    Preset,
    ProvisioningError,
    Requirements,
    ServedAdapter,
    ServingFit,
    Tuner,
    TuningFit,
)
from kaito_core.problems import Failure, KaitoError, Problem

if TYPE_CHECKING:
    from kaito_core.workloads.workload import Workload

T = TypeVar("T")

RELEASING = "release"
"""The line of `kaito_core.plugins.calls.Calls` on which machines are given back: they cost money while some other call hangs."""


class _Guard:
    """Asks one object of a plugin."""

    def __init__(self, plugin: Installed, noun: str, name: str, seconds: Callable[[], float]) -> None:
        self._plugin = plugin
        self._who = f"the {noun} {name!r} of {plugin}"
        self._seconds = seconds
        self._copies: dict[int, tuple[Any, Any]] = {}
        """The last value of each argument, and its copy."""

    def ask(
        self,
        method: Callable[..., Any],
        *arguments: Any,
        gives: Callable[[Any], T],
        line: str = "",
        often: bool = False,
    ) -> T:
        """What the method says to copies of the arguments, after ``gives`` has looked at it. ``often``: it is asked about hundreds of
        machines in one plan, so the copies are made once for the same arguments."""
        copies = tuple(self._copy(i, a) if often else own_copy(a) for i, a in enumerate(arguments))
        name = getattr(method, "__name__", "it")
        try:
            return self._plugin.calls.run(name, lambda: gives(method(*copies)), self._seconds(), line=line)
        except Broke as e:
            if isinstance(e.error, KaitoError | ProvisioningError):
                raise e.error from None
            raise self.failure(name, e.error) from e.error

    def _copy(self, place: int, value: Any) -> Any:
        known = self._copies.get(place)
        if known is None or known[0] is not value:
            known = self._copies[place] = (value, own_copy(value))
        return known[1]

    def failure(self, method: str, error: BaseException) -> Failure:
        """Who is to blame, and for what."""
        if isinstance(error, Hangs):
            said = f"{self._who}: {error}"
        elif isinstance(error, _Wrong):
            said = f"{self._who} broke: {method} gave {error}"
        else:
            said = f"{self._who} broke: {method} raised {words(error)}{_place(error)}"
        leave_out = f"`pip uninstall {self._plugin.distribution}` does without it"
        return Failure(said, f"this is a fault of {self._plugin}: tell its author; {leave_out}")


class _Wrong(TypeError):
    """What a method gave is not what the contract says."""


def _place(error: BaseException) -> str:
    """Where it was raised, for the author."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""


def one(cls: type[T]) -> Callable[[Any], T]:
    """Passes what is a ``cls`` with the right fields."""

    def check(value: Any) -> T:
        if not isinstance(value, cls):
            raise _Wrong(f"{shown(value)}, not a {cls.__name__}")
        if wrong := flaw(value, cls):
            raise _Wrong(f"a {cls.__name__} whose {wrong}")
        return value

    return check


_STATUS = one(NodeStatus)
_TUNING_FIT = one(TuningFit)
_SERVING_FIT = one(ServingFit)


def many(cls: type[T]) -> Callable[[Any], tuple[T, ...]]:
    """Passes an iterable of them, as a tuple. A generator is run here, inside the guard."""
    each = one(cls)

    def check(value: Any) -> tuple[T, ...]:
        if not isinstance(value, Iterable):
            raise _Wrong(f"{shown(value)}, not an iterable of {cls.__name__}")
        return tuple(each(v) for v in collected(value, cls.__name__))

    return check


def plain(value: Any) -> Mapping[str, Any]:
    """Passes a mapping with names for keys."""
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise _Wrong(f"{shown(value)}, not a mapping with texts for keys")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong(f"{shown(value)}, not a text")
    return value


def _problem(value: Any) -> Problem | None:
    return None if value is None else one(Problem)(value)


def _workload(value: Any) -> Workload:
    # By name: plugins stand below workloads, and an import never goes up.
    if not any(
        (c.__module__, c.__qualname__) == ("kaito_core.workloads.workload", "Workload") for c in type(value).__mro__
    ):
        raise _Wrong(f"{shown(value)}, not a Workload")
    if wrong := flaw(value, type(value)):
        raise _Wrong(f"a Workload whose {wrong}")
    return value  # type: ignore[no-any-return]


class GuardedProvisioner(NodeProvisioner):
    """See the module."""

    def __init__(self, inner: NodeProvisioner, plugin: Installed) -> None:
        self.inner = inner
        self.plugin = plugin
        vars(self).update(name=inner.name, holds=inner.holds, patience=inner.patience, watches=inner.watches)
        self._guard = _Guard(plugin, "node provisioner", inner.name, lambda: calls.PROVISIONER_SECONDS)
        self._unattached: KaitoError | ProvisioningError | None = None

    def attach(self, cluster: Cluster) -> None:
        """Never raises: one that cannot be attached fails whoever asks it for something, and nobody else."""
        self._unattached = None
        try:
            self._guard.ask(self.inner.attach, cluster, gives=lambda nothing: None)
        except (KaitoError, ProvisioningError) as e:
            self._unattached = e

    def offers(self, requirements: Requirements) -> tuple[Offer, ...]:
        return self._ask(self.inner.offers, requirements, gives=self._own_offers)

    def ensure(self, request: NodeRequest) -> NodeStatus:
        return self._ask(self.inner.ensure, request, gives=_STATUS)

    def observe(self, request_id: str) -> NodeStatus:
        return self._ask(self.inner.observe, request_id, gives=_STATUS)

    def release(self, request_id: str) -> NodeStatus:
        return self._ask(self.inner.release, request_id, gives=_STATUS, line=RELEASING)

    def held(self) -> tuple[Held, ...]:
        return self._ask(self.inner.held, gives=many(Held))

    def _ask(self, method: Callable[..., Any], *arguments: Any, gives: Callable[[Any], T], line: str = "") -> T:
        if self._unattached is not None:
            raise self._unattached
        return self._guard.ask(method, *arguments, gives=gives, line=line)

    def _own_offers(self, value: Any) -> tuple[Offer, ...]:
        found = many(Offer)(value)
        stranger = next((o for o in found if o.provisioner not in ("", self.name)), None)
        if stranger is not None:
            raise _Wrong(f"{stranger}, whose provisioner is {stranger.provisioner!r} and not {self.name!r}")
        return found


class GuardedTuner(Tuner):
    """See the module."""

    def __init__(self, inner: Tuner, plugin: Installed) -> None:
        self.inner = inner
        self.plugin = plugin
        vars(self).update(name=inner.name, methods=inner.methods)
        self._ask = _Guard(plugin, "tuner", inner.name, lambda: calls.HOOK_SECONDS).ask

    def resolve(self, preset: Preset, method: str, user: Mapping[str, Any] | None) -> Mapping[str, Any]:
        return self._ask(self.inner.resolve, preset, method, user, gives=plain)

    def fit(
        self, preset: Preset, method: str, config: Mapping[str, Any], offer: Offer, data: DataFacts | None
    ) -> TuningFit:
        return self._ask(self.inner.fit, preset, method, config, offer, data, gives=_TUNING_FIT, often=True)

    def smaller(self, preset: Preset, method: str, config: Mapping[str, Any]) -> tuple[Change, ...]:
        return self._ask(self.inner.smaller, preset, method, config, gives=many(Change))

    def workload(self, job: Any) -> Workload:
        return self._ask(self.inner.workload, job, gives=_workload)

    def schema(self) -> Mapping[str, Any]:
        return self._ask(self.inner.schema, gives=plain)

    def missing(self) -> str:
        return self._ask(self.inner.missing, gives=_text)


class GuardedRuntime(InferenceRuntime):
    """See the module."""

    def __init__(self, inner: InferenceRuntime, plugin: Installed) -> None:
        self.inner = inner
        self.plugin = plugin
        vars(self).update(name=inner.name, priority=inner.priority)
        self._ask = _Guard(plugin, "runtime", inner.name, lambda: calls.HOOK_SECONDS).ask

    def serves(self, preset: Preset) -> Problem | None:
        return self._ask(self.inner.serves, preset, gives=_problem)

    def resolve(
        self, preset: Preset, user: Mapping[str, Any] | None, adapters: tuple[ServedAdapter, ...]
    ) -> Mapping[str, Any]:
        return self._ask(self.inner.resolve, preset, user, adapters, gives=plain)

    def fit(
        self,
        preset: Preset,
        config: Mapping[str, Any],
        offer: Offer,
        machines: int,
        adapters: tuple[ServedAdapter, ...],
    ) -> ServingFit:
        return self._ask(self.inner.fit, preset, config, offer, machines, adapters, gives=_SERVING_FIT, often=True)

    def workload(self, job: Any) -> Workload:
        return self._ask(self.inner.workload, job, gives=_workload)

    def missing(self) -> str:
        return self._ask(self.inner.missing, gives=_text)


def guarded_command(command: Command, plugin: Installed) -> Command:
    """The same command. It runs in the thread that calls it, as long as it likes, and ends the program as it likes; what breaks in
    it is said to be its own."""

    def load() -> Any:
        import click

        try:
            loaded = command.load()
        except (KaitoError, KeyboardInterrupt):
            raise
        except BaseException as e:
            raise _broken(command, plugin, "cannot be loaded", e) from e
        if not isinstance(loaded, click.Command):
            fault = f"load() gave {shown(loaded)}, not a click command"
            raise Failure(f"the command {command.name!r} of {plugin} cannot be loaded: {fault}", _tell(plugin))
        invoke = loaded.invoke

        def invoked(ctx: click.Context) -> Any:
            try:
                return invoke(ctx)
            except (KaitoError, click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
                raise
            except Exception as e:
                raise _broken(command, plugin, "broke", e) from e

        loaded.invoke = invoked  # type: ignore[method-assign]
        return loaded

    return replace(command, load=load)


def _broken(command: Command, plugin: Installed, how: str, error: BaseException) -> Failure:
    return Failure(f"the command {command.name!r} of {plugin} {how}: {words(error)}{_place(error)}", _tell(plugin))


def _tell(plugin: Installed) -> str:
    return f"this is a fault of {plugin}: tell its author"
