"""What a plugin hands over to work with: whatever its methods do, who asked gets an answer or the name of who is to blame."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import click
import pytest
from click.testing import CliRunner

from kaito_core.plugins import calls
from kaito_core.plugins.behaviours import GuardedProvisioner, GuardedRuntime, GuardedTuner, guarded_command
from kaito_core.plugins.discovery import EntryPoint
from kaito_core.plugins.installed import Installed
from kaito_core.plugins.types import (
    Command,
    Held,
    InsufficientCapacity,
    NodeProvisioner,
    NodeRequest,
    NodeStatus,
    Offer,
    Requirements,
)
from kaito_core.problems import Failure, UserError
from kaito_core.testing.planning import GIB, PRESET, Sized
from kaito_core.testing.serving import Echo

MACHINE = Offer("m1", 4, 16 * GIB, provisioner="cloud")


def plugin() -> Installed:
    return Installed(EntryPoint("acme", "acme.plugin", "acme-cloud", "1.2"), "acme-cloud", "1.2")


class Cloud(NodeProvisioner):
    """Does in every method what it is told."""

    name: ClassVar[str] = "cloud"

    def __init__(self, does: Callable[[], Any]) -> None:
        self.does = does

    def offers(self, requirements: Requirements) -> Any:
        return self.does()

    def ensure(self, request: NodeRequest) -> Any:
        return self.does()

    def observe(self, request_id: str) -> Any:
        return self.does()

    def release(self, request_id: str) -> Any:
        return self.does()

    def held(self) -> Any:
        return self.does()


def guarded(does: Callable[[], Any]) -> GuardedProvisioner:
    return GuardedProvisioner(Cloud(does), plugin())


ASKING: Mapping[str, Callable[[NodeProvisioner], Any]] = {
    "offers": lambda p: p.offers(Requirements()),
    "ensure": lambda p: p.ensure(NodeRequest("r", MACHINE, Requirements())),
    "observe": lambda p: p.observe("r"),
    "release": lambda p: p.release("r"),
    "held": lambda p: p.held(),
}


def raises(error: BaseException) -> Callable[[], Any]:
    def does() -> Any:
        raise error

    return does


@pytest.mark.parametrize("guard", [GuardedProvisioner, GuardedTuner, GuardedRuntime])
def test_every_method_of_the_contract_has_a_guard(guard: type) -> None:
    contract = guard.__mro__[1]
    methods = {n for n, f in vars(contract).items() if inspect.isfunction(f)}
    assert methods <= set(vars(guard))
    for name in methods:
        assert list(inspect.signature(getattr(guard, name)).parameters) == list(
            inspect.signature(getattr(contract, name)).parameters
        )


@pytest.mark.parametrize("method", ASKING)
@pytest.mark.parametrize(
    "error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), MemoryError(), RecursionError()]
)
def test_whatever_a_method_raises_is_a_failure_that_says_whose_it_is(method: str, error: BaseException) -> None:
    with pytest.raises(Failure) as e:
        ASKING[method](guarded(raises(error)))
    (problem,) = e.value.problems
    broke = f"the node provisioner 'cloud' of acme-cloud 1.2 broke: {method} raised {type(error).__name__}"
    assert problem.message.startswith(broke)
    assert "(test_behaviours.py:" in problem.message  # and where, for its author
    assert "this is a fault of acme-cloud 1.2" in problem.remedy


@pytest.mark.parametrize("error", [InsufficientCapacity("none left"), UserError("no such region")])
def test_words_for_people_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as e:
        guarded(raises(error)).observe("r")
    assert e.value is error


def forever() -> Iterator[Offer]:
    while True:
        yield MACHINE


WRONG: Mapping[str, tuple[Callable[[], Any], str]] = {
    "no offers": (lambda: None, "offers gave None (NoneType), not an iterable of Offer"),
    "names": (lambda: ["m1"], "offers gave 'm1' (str), not a Offer"),
    "a price in words": (
        lambda: [replace(MACHINE, price="1 $")],  # type: ignore[arg-type]
        "offers gave a Offer whose price is '1 $' (str), not a Price",
    ),
    "no number of CPUs": (
        lambda: [replace(MACHINE, cpus=float("nan"))],
        "whose cpus is nan (float), not a whole number",
    ),  # type: ignore[arg-type]
    "another's machine": (
        lambda: [replace(MACHINE, provisioner="aks")],
        "whose provisioner is 'aks' and not 'cloud'",
    ),
    "no end": (forever, "offers raised OverflowError: Offer gave more than 100000 of them"),
}


@pytest.mark.parametrize("case", WRONG)
def test_offers_that_are_none_are_refused_before_anybody_plans_with_them(case: str) -> None:
    does, said = WRONG[case]
    with pytest.raises(Failure) as e:
        guarded(does).offers(Requirements())
    assert said in e.value.problems[0].message


@pytest.mark.parametrize("method", ["ensure", "observe", "release"])
def test_an_answer_that_is_no_status_is_refused(method: str) -> None:
    with pytest.raises(Failure, match=f"{method} gave 'ready' \\(str\\), not a NodeStatus"):
        ASKING[method](guarded(lambda: "ready"))
    with pytest.raises(Failure, match="a NodeStatus whose phase is 'up' \\(str\\), not 'absent' or 'pending'"):
        ASKING[method](guarded(lambda: NodeStatus("r", "up")))  # type: ignore[arg-type]
    assert ASKING[method](guarded(lambda: NodeStatus("r", "ready"))).phase == "ready"


def test_what_is_held_is_looked_at_too() -> None:
    assert guarded(lambda: [Held("r", {}, 3)]).held() == (Held("r", {}, 3),)
    with pytest.raises(Failure, match="a Held whose age is '3' \\(str\\), not a number"):
        guarded(lambda: [Held("r", {}, "3")]).held()  # type: ignore[arg-type]


def test_one_that_cannot_be_attached_fails_who_asks_it_and_not_the_host() -> None:
    class Unattached(Cloud):
        def attach(self, cluster: Any) -> None:
            raise OSError("no certificate")

    cloud = GuardedProvisioner(Unattached(lambda: []), plugin())
    cloud.attach(None)  # type: ignore[arg-type]
    for asking in ASKING.values():
        with pytest.raises(Failure, match=r"of acme-cloud 1.2 broke: attach raised OSError: no certificate"):
            asking(cloud)


def test_one_that_hangs_is_not_asked_again_until_it_returns_but_may_give_machines_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "PROVISIONER_SECONDS", 0.1)
    go, asked = threading.Event(), []

    class Slow(Cloud):
        def ensure(self, request: NodeRequest) -> NodeStatus:
            asked.append("ensure")
            go.wait()
            return NodeStatus("r", "ready")

        def release(self, request_id: str) -> NodeStatus:
            return NodeStatus("r", "absent")

    cloud = GuardedProvisioner(Slow(list), plugin())
    with pytest.raises(Failure, match="'cloud' of acme-cloud 1.2: ensure did not return within 0.1 seconds"):
        ASKING["ensure"](cloud)
    for method in ("ensure", "offers", "observe"):
        with pytest.raises(Failure, match=f"acme-cloud 1.2: {method} is not asked while ensure has not returned"):
            ASKING[method](cloud)
    assert cloud.release("r").phase == "absent"  # a machine costs money for as long as it is not asked
    assert asked == ["ensure"]
    go.set()
    while True:
        try:
            assert ASKING["ensure"](cloud).phase == "ready"
            break
        except Failure:
            continue


# --- tuners and runtimes


def test_a_tuner_that_changes_what_it_is_given_changes_only_its_own_copy() -> None:
    class Greedy(Sized):
        def resolve(self, preset: Any, method: str, user: Any) -> Any:
            preset.tuning.setdefault("qlora", {})["lr"] = 9
            user["gib"] = 1
            return user

        def fit(self, preset: Any, method: str, config: Any, offer: Any, data: Any) -> Any:
            preset.tuning["qlora"] = config
            config["gib"] = 99
            return super().fit(preset, method, {"gib": 1}, offer, data)

    preset, user, config = replace(PRESET, tuning={}), {"gib": 8}, {"gib": 8}
    tuner = GuardedTuner(Greedy(), plugin())
    assert tuner.resolve(preset, "qlora", user) == {"gib": 1}
    assert tuner.fit(preset, "qlora", config, MACHINE, None).fits
    assert (preset.tuning, user, config) == ({}, {"gib": 8}, {"gib": 8})


class Nonsense(Sized, Echo):  # type: ignore[misc]
    """A tuner and a runtime, and neither."""

    resolve = fit = smaller = workload = schema = missing = serves = lambda self, *arguments: 7  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("guard", "method", "arguments"),
    [
        (GuardedTuner, "resolve", (PRESET, "qlora", None)),
        (GuardedTuner, "fit", (PRESET, "qlora", {}, MACHINE, None)),
        (GuardedTuner, "smaller", (PRESET, "qlora", {})),
        (GuardedTuner, "workload", (None,)),
        (GuardedTuner, "schema", ()),
        (GuardedTuner, "missing", ()),
        (GuardedRuntime, "serves", (PRESET,)),
        (GuardedRuntime, "resolve", (PRESET, None, ())),
        (GuardedRuntime, "fit", (PRESET, {}, MACHINE, 1, ())),
        (GuardedRuntime, "workload", (None,)),
        (GuardedRuntime, "missing", ()),
    ],
)
def test_wrong_types_are_the_plugins_fault_wherever_they_come_out(guard: Any, method: str, arguments: Any) -> None:
    with pytest.raises(Failure, match=r"of acme-cloud 1.2 broke: .* gave 7 \(int\), not a"):
        getattr(guard(Nonsense(), plugin()), method)(*arguments)


def test_the_name_and_the_settings_of_the_class_are_those_of_the_plugins() -> None:
    cloud, tuner, runtime = guarded(list), GuardedTuner(Sized(), plugin()), GuardedRuntime(Echo(), plugin())
    assert (cloud.name, cloud.holds, cloud.patience, cloud.watches) == ("cloud", True, 1800.0, ())
    assert (tuner.name, tuner.methods, runtime.name, runtime.priority) == ("sized", ("qlora",), "echo", 5)


# --- commands


def invoked(command: Any) -> Any:
    loaded = guarded_command(Command("hello", "Says hello.", lambda: command), plugin()).load()
    return CliRunner().invoke(loaded, [], standalone_mode=False)


def test_a_command_that_breaks_is_said_to_be_its_plugins() -> None:
    @click.command()
    def hello() -> None:
        raise ValueError("no one there")

    error = invoked(hello).exception
    assert isinstance(error, Failure)
    assert "the command 'hello' of acme-cloud 1.2 broke: ValueError: no one there (test_behaviours.py:" in str(error)


@pytest.mark.parametrize("error", [SystemExit(3), UserError("no"), click.UsageError("no"), click.Abort()])
def test_a_command_may_end_as_commands_do(error: BaseException) -> None:
    @click.command()
    def hello() -> None:
        raise error

    result = invoked(hello)
    assert not isinstance(result.exception, Failure)
    assert (result.exit_code, result.exception) in ((3, error), (1, error))


@pytest.mark.parametrize("loaded", [lambda: None, lambda: sys.exit(3), lambda: 1 / 0])
def test_a_command_that_cannot_be_loaded_is_a_failure_with_its_name(loaded: Callable[[], Any]) -> None:
    command = guarded_command(Command("hello", "Says hello.", loaded), plugin())
    with pytest.raises(Failure, match=r"the command 'hello' of acme-cloud 1\.2 cannot be loaded"):
        command.load()


def test_what_a_plugin_says_is_made_fit_for_a_terminal() -> None:
    with pytest.raises(Failure) as e:
        guarded(raises(ValueError("\udcff no\n\x1b[31m way" + "x" * 10_000))).held()
    message = e.value.problems[0].message
    assert message.isprintable()
    assert "ValueError: no [31m wayx" in message
    assert len(message) < 1000
