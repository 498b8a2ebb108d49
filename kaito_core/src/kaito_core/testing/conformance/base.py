"""What is the same for plugins of every kind, and the rule for overriding a standard test.

A test class names a plugin module; the standard tests are run for each of its records. An author who knows better overrides a
test with ``@pytest.mark.xfail(reason="…")``, so that the reason stands in every report; without it the tests are not collected.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import pytest

from kaito_core.plugins.discovery import EntryPoint, entry_points
from kaito_core.plugins.installed import KINDS, Installed, Kind, is_own_name
from kaito_core.plugins.known import canonical
from kaito_core.plugins.manager import GROUP, load_plugins
from kaito_core.plugins.types import normalised
from kaito_core.testing.conformance import light

PACKAGE = __package__ or ""


@functools.cache
def installed(module: str) -> Installed:
    """The plugin as the host loads it; what went wrong is in ``state`` and ``error``."""
    found = next((e for e in entry_points(GROUP, sys.path) if e.module == module), None)
    entry = found or EntryPoint(module.partition(".")[0], module, module.partition(".")[0].replace("_", "-"), "")
    plugin = Installed(entry, entry.distribution, entry.version)
    plugin.load()
    return plugin


def records(module: str, kind: Kind[Any]) -> dict[str, Any]:
    """The plugin's records of one kind, each under its own name alone."""
    return {n: r for n, r in installed(module).provided(kind).items() if is_own_name(kind, n, r)}


class Kit:
    """The base of the test classes."""

    plugin: ClassVar[str] = ""
    """The module that the entry point names."""
    only: ClassVar[tuple[str, ...]] = ()
    """The names that are tested, where a class is for some of the plugin's records; empty: all."""

    kind: ClassVar[Kind[Any] | None] = None
    """What is tested; None: the plugin as such."""
    kaito_kit: ClassVar[bool] = True
    """How the pytest plugin knows these classes without importing this module."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if not cls.__module__.startswith(PACKAGE):
            wrong = list(_overridden(cls))
            if wrong:
                raise pytest.Collector.CollectError(_complaint(cls, wrong))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every test that takes ``record`` is run for each of the plugin's records."""
        if "record" not in metafunc.fixturenames:
            return
        names = sorted(n for n in self.found() if not self.only or n in self.only)
        metafunc.parametrize("record", names or [""], indirect=True, ids=names or ["nothing"])

    @classmethod
    def found(cls) -> dict[str, Any]:
        """The records by name; nothing when the plugin does not load, which `test_it_loads` says."""
        return records(cls.plugin, cls.kind) if cls.plugin and cls.kind else {}

    @pytest.fixture
    def record(self, request: pytest.FixtureRequest) -> Any:
        """One of the plugin's records."""
        found = type(self).found()
        if request.param not in found:
            pytest.skip("the plugin provides nothing to be tested; test_it_loads says why")
        return found[request.param]

    # --- the standard tests of all kinds

    def test_it_loads(self) -> None:
        """As the host loads it, and with at least one record of the kind that is tested."""
        assert self.plugin, f'{type(self).__name__} needs `plugin = "…"`: the module that the entry point names'
        plugin = installed(self.plugin)
        assert plugin.state == "active", f"{self.plugin}: {plugin.error}\n{plugin.traceback}"
        if self.kind is None:
            assert plugin.status().provides, f"{self.plugin} implements no hook: nothing in it is marked with @hookimpl"
            return
        found = self.found()
        assert found, f"{self.plugin} provides no {self.kind.noun}: its hook is {self.kind.hook}"
        unknown = [n for n in self.only if n not in found]
        assert not unknown, f"`only` names {', '.join(unknown)}, and there is {', '.join(sorted(found))}"

    def test_kaito_finds_it(self) -> None:
        """Once it is installed: an entry point of its distribution names the module."""
        named = [e for e in entry_points(GROUP, sys.path) if e.module == self.plugin]
        assert named, (
            f"no installed distribution has an entry point for {self.plugin}: pyproject.toml needs\n"
            f'    [project.entry-points.{GROUP}]\n    my-plugin = "{self.plugin}"\nand then: pip install -e .'
        )

    def test_it_needs_kaito_core(self) -> None:
        """The distribution names the core among its dependencies, so that pip finds one that fits it."""
        named = [e for e in entry_points(GROUP, sys.path) if e.module == self.plugin]
        if not named:
            pytest.skip("it is not installed")
        if canonical(named[0].distribution) == "kaito-core":
            return
        needs = importlib.metadata.requires(named[0].distribution) or []
        about = {canonical(re.split(r"[\s<>=!~;\[(]", n, maxsplit=1)[0]): n for n in needs if "extra ==" not in n}
        assert "kaito-core" in about, f'{named[0].distribution} needs dependencies = ["kaito-core>=0.1,<0.2"]'

    def test_it_is_light(self) -> None:
        """Importing it, and asking its hooks, imports no engine, no trainer and no cloud SDK, and takes no network."""
        loaded = _light(self.plugin)
        assert not loaded.error, loaded.error
        assert not loaded.heavy, (
            f"loading {self.plugin} imports {', '.join(loaded.heavy)}, and every kaito command would wait for it: "
            "import it inside the functions that need it"
        )
        assert not loaded.network, f"loading {self.plugin} goes to the network: do that when something is asked of it"

    def test_its_names_are_free(self) -> None:
        """No other installed plugin has one of its names or aliases."""
        kinds = [self.kind] if self.kind else all_kinds()
        own = {n for k in kinds for n in installed(self.plugin).provided(k)}
        others: dict[str, list[str]] = {}
        for status in load_plugins().statuses():
            module = next((e.module for e in entry_points(GROUP, sys.path) if e.name == status.name), "")
            if module and module != self.plugin:
                for name in (n for k in kinds for n in installed(module).provided(k)):
                    others.setdefault(name, []).append(f"{status.distribution} {status.version}")
        taken = {n: others[n] for n in sorted(own & set(others))}
        assert not taken, "; ".join(f"{n} is also of {', '.join(who)}" for n, who in taken.items())


@functools.cache
def _light(module: str) -> light.Loaded:
    return light.load(module)


def standard_tests(cls: type) -> dict[str, Any]:
    """The tests of the kit that a class has by inheritance."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith(PACKAGE):
            found.update({n: f for n, f in vars(base).items() if n.startswith("test_") and callable(f)})
    return found


def _overridden(cls: type) -> Iterator[str]:
    for name, function in standard_tests(cls).items():
        own = getattr(cls, name, None)
        if own is not function and not _excused(own):
            yield name


def _excused(function: Any) -> bool:
    marks = getattr(function, "pytestmark", ())
    return any(m.name == "xfail" and str(m.kwargs.get("reason", "")).strip() for m in marks)


def _complaint(cls: type, names: Iterable[str]) -> str:
    return (
        f"{cls.__name__} overrides {', '.join(names)} of kaito's conformance kit without saying why.\n"
        'Mark the override with @pytest.mark.xfail(reason="…"), so that the reason stands in every report, or take it away.'
    )


def declared(given: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Every declared capability is one that the kit knows. Fails the test that asks otherwise."""
    import difflib

    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(known)}"
            pytest.fail(f"capabilities has {name!r}, which the kit does not know: {hint}", pytrace=False)


def proper_name(name: str) -> bool:
    """Whether it is in the form in which names are stored."""
    try:
        return normalised(name) == name
    except ValueError:
        return False


def all_kinds() -> tuple[Kind[Any], ...]:
    """The kinds that have tests, in the order of a report."""
    return tuple(k for k in KINDS if k.name != "commands")
