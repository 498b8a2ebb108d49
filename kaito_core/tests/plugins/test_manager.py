"""What a plugin can do wrong, and that it costs nobody else anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kaito_core.plugins import calls, manager
from kaito_core.plugins.discovery import entry_points
from kaito_core.plugins.manager import PluginManager, PluginStatus, _load, load_plugins
from kaito_core.problems import Problem, UserError
from kaito_core.workloads.workload import Workload

PRESET = """
    from kaito_core.plugins import *

    def preset(name, **more):
        shape = Architecture("X", 1000, 1, 8, 16, 1, 1, 8, 32, 64, linears={"q_proj": (8, 8)})
        return Preset(name, ModelSource(hub="a/b", revision="c"), "mit", shape, ChatFormat("", ("</s>",)), ("q_proj",), **more)
"""
"""What most of the test plugins begin with."""


def install(site: Path, distribution: str, code: str, *, version: str = "1.0", name: str = "") -> None:
    """Write a distribution with one plugin module; ``name`` is its entry point's."""
    module = "fixture_" + distribution.replace("-", "_")  # no name of a real package, which may be imported already
    name = name or distribution.rpartition("-")[2]
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[kaito]\n{name} = {module}\n")
    (site / f"{module}.py").write_text(textwrap.dedent(code))


def preset_plugin(*names: str, then: str = "") -> str:
    """The code of a plugin that provides these presets."""
    body = "".join(f"    yield preset({n!r})\n" for n in names)
    return textwrap.dedent(PRESET) + f"\n@hookimpl\ndef kaito_presets():\n{body}\n{textwrap.dedent(then)}\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which alone plugins are looked for, whatever this machine has installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("KAITO_PLUGINS", raising=False)

    monkeypatch.setattr(manager, "entry_points", lambda group, path: entry_points(group, [str(folder)]))
    before = set(sys.modules)
    _load.cache_clear()
    yield folder
    _load.cache_clear()
    for module in set(sys.modules) - before:
        if (folder / f"{module}.py").exists():
            del sys.modules[module]


def status(plugins: PluginManager, name: str) -> PluginStatus:
    return next(s for s in plugins.statuses() if s.name == name)


def refusal(plugins: PluginManager, name: str) -> Problem:
    with pytest.raises(UserError) as e:
        plugins.preset(name)
    (problem,) = e.value.problems
    assert problem.field == "tuning.preset.name"
    return problem


def test_a_plugin_provides_presets_by_name_and_alias_in_any_case(site: Path) -> None:
    install(site, "acme-models", preset_plugin() + "    yield preset('Tiny', aliases=('Little',))")
    plugins = load_plugins()
    assert plugins.preset("TINY") is plugins.preset("little")
    assert list(plugins.presets()) == ["tiny"]
    assert status(plugins, "models") == PluginStatus("models", "acme-models", "1.0", "active", {"presets": ("tiny",)})
    assert plugins.problems() == []


BROKEN = {
    "raises on import": ("1 / 0", "ZeroDivisionError: division by zero"),
    "exits on import": ("import sys; sys.exit('bye')", "SystemExit: bye"),
    "needs a missing module": ("import not_installed_anywhere", "it needs the Python module not_installed_anywhere"),
    "is no Python": ("def (", "SyntaxError"),
    "raises in its hook": (preset_plugin("a") + "    1 / 0", "ZeroDivisionError"),
    "exits in its hook": (preset_plugin("a") + "    raise SystemExit", "kaito_presets raised SystemExit"),
    "pretends to be Ctrl-C": (
        preset_plugin("a") + "    raise KeyboardInterrupt",
        "kaito_presets raised KeyboardInterrupt",
    ),
    "recurses without end": ("def f(): f()\nf()", "raised RecursionError: maximum recursion depth"),
    "has no memory": (preset_plugin("a") + "    raise MemoryError", "kaito_presets raised MemoryError"),
    "yields forever": (preset_plugin("a") + "    while True: yield 1", "gave more than 100000 of them"),
    "cannot even say what is wrong": (
        "class Mute(Exception):\n    def __str__(self): raise SystemExit\nraise Mute",
        "raised Mute",
    ),
    "yields what cannot be shown": (
        preset_plugin("a") + "    yield type('Odd', (), {'__repr__': lambda self: 1 / 0})()",
        "kaito_presets gave something that cannot be shown (Odd), not a Preset",
    ),
    "gives a field of another type": (
        preset_plugin("a").replace('"mit"', "None"),
        "kaito_presets gave a preset whose licence is None (NoneType), not a str",
    ),
    "gives a text for a tuple": (
        preset_plugin("a").replace('("</s>",)', '"</s>"'),
        "kaito_presets gave a preset whose chat.stop_tokens is '</s>' (str), not a tuple",
    ),
    "gives nothing for a record": (
        preset_plugin("a").replace('ChatFormat("", ("</s>",))', "None"),
        "kaito_presets gave a preset whose chat is None (NoneType), not a ChatFormat",
    ),
    "has a provisioner without a name": (
        """
        from kaito_core.plugins import *
        class Cloud(NodeProvisioner):
            offers = ensure = observe = release = None
        @hookimpl
        def kaito_node_provisioners(): yield Cloud()
        """,
        "kaito_node_provisioners gave a node provisioner whose name is missing",
    ),
    "yields a str": (preset_plugin("a") + "    yield 'b'", "kaito_presets gave 'b' (str), not a Preset"),
    "returns a str": (
        "from kaito_core.plugins import hookimpl\n@hookimpl\ndef kaito_presets(): return 'ab'",
        "kaito_presets gave 'a' (str), not a Preset",
    ),
    "returns one preset": (
        preset_plugin("a").replace("yield", "return"),
        "not an iterable of Preset",
    ),
    "yields a class": (
        "from kaito_core.plugins import *\n@hookimpl\ndef kaito_tuners(): yield Tuner",
        "kaito_tuners gave the class Tuner, not an instance: Tuner()",
    ),
    "gives one name twice": (preset_plugin("a", "a"), "kaito_presets gave two presets of the name 'a'"),
    "misspells a hook": (
        "from kaito_core.plugins import hookimpl\n@hookimpl\ndef kaito_preset(): return []",
        "it implements kaito_preset, which is not a hook of kaito, did you mean kaito_presets?",
    ),
    "forgets the mark": ("def kaito_presets(): return []", "kaito_presets is not marked with @hookimpl"),
    "wants an unknown argument": (
        "from kaito_core.plugins import hookimpl\n@hookimpl\ndef kaito_presets(cluster): return []",
        "cluster",
    ),
    "says nonsense of its contract": ("KAITO_API_VERSION = 2", "KAITO_API_VERSION is 2, not 'MAJOR.MINOR'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_reported_once_and_costs_the_others_nothing(
    site: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    code, reason = BROKEN[case]
    install(site, "acme-broken", code)
    install(site, "acme-good", preset_plugin("good"))
    plugins = load_plugins()
    broken = status(plugins, "broken")
    assert broken.state == "failed"
    assert reason in broken.error
    assert broken.provides == {}  # never half of what it would have given
    assert broken.remedy
    assert plugins.preset("good").name == "good"
    plugins.statuses()
    assert [r.getMessage() for r in caplog.records] == [f"warning: {plugins.problems()[0].message}"]
    assert "\n" not in caplog.text.strip()


def test_a_traceback_is_kept_for_the_author(site: Path) -> None:
    install(site, "acme-broken", "1 / 0")
    assert "fixture_acme_broken.py" in status(load_plugins(), "broken").traceback


def test_one_broken_hook_leaves_the_plugins_other_hooks_working(site: Path) -> None:
    install(
        site,
        "acme-half",
        preset_plugin("half", then="@hookimpl\ndef kaito_runtimes():\n    raise OSError('no socket')"),
    )
    plugins = load_plugins()
    assert plugins.preset("half").name == "half"
    half = status(plugins, "half")
    assert (half.state, half.error, half.provides) == (
        "failed",
        "kaito_runtimes raised OSError: no socket",
        {"presets": ("half",)},
    )
    assert plugins.problems()[0].message.startswith("the plugin half (acme-half 1.0) works only in part: ")


def test_a_hook_that_asks_for_its_own_answer_gets_none_and_an_end(site: Path) -> None:
    asks = "    from kaito_core.plugins.manager import load_plugins; assert not load_plugins().presets()"
    install(site, "acme-round", preset_plugin("a") + asks)
    plugins = load_plugins()
    assert plugins.preset("a")
    assert status(plugins, "round").error == "kaito_presets raised RecursionError: kaito_presets asks for itself"


@pytest.mark.parametrize(
    ("theirs", "remedy"),
    [("1.1", "pip install --upgrade kaito-core"), ("2.0", "pip install --upgrade kaito-core"), ("0.9", "acme-models")],
)
def test_another_contract_is_refused_with_the_package_to_upgrade(site: Path, theirs: str, remedy: str) -> None:
    install(site, "acme-models", f"KAITO_API_VERSION = {theirs!r}\n" + preset_plugin("models-a"))
    plugins = load_plugins()
    found = status(plugins, "models")
    assert found.state == "incompatible"
    assert remedy in found.remedy
    assert theirs in refusal(plugins, "models-a").message


# --- two of one name --------------------------------------------------------------------------------------------------


def test_two_providers_of_a_name_are_an_error_for_who_asks_for_it_and_for_nobody_else(site: Path) -> None:
    install(site, "acme-one", preset_plugin("shared", "mine"))
    install(site, "acme-two", preset_plugin("Shared"), version="2.0")
    plugins = load_plugins()
    assert refusal(plugins, "shared").message == "the preset 'shared' is provided by acme-one 1.0 and acme-two 2.0"
    assert plugins.preset("mine").name == "mine"
    assert list(plugins.presets()) == ["mine"]
    (problem,) = plugins.problems()
    assert problem.severity == "warning"
    assert "acme-two" in problem.message
    assert load_plugins(["one"]).preset("shared")


# --- which ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "loaded"),
    [
        (None, {"core", "one", "two"}),
        ("", {"core"}),
        ("one", {"core", "one"}),
        ("acme_two", {"core", "two"}),
        (" one , Acme-Two ", {"core", "one", "two"}),
    ],
)
def test_kaito_plugins_narrows_to_entry_points_or_distributions(
    site: Path, wanted: str | None, loaded: set[str]
) -> None:
    install(site, "kaito-core", preset_plugin("built-in"), name="core")
    install(site, "acme-one", preset_plugin("a"))
    install(site, "acme-two", preset_plugin("b"))
    plugins = load_plugins(environ={} if wanted is None else {"KAITO_PLUGINS": wanted})
    assert {s.name for s in plugins.statuses() if s.state == "active"} == loaded
    assert {s.name for s in plugins.statuses() if s.state == "disabled"} == {"core", "one", "two"} - loaded


def test_a_plugin_that_is_left_out_is_not_even_imported(site: Path) -> None:
    install(site, "acme-slow", "import time; time.sleep(3600)")
    plugins = load_plugins(external=False)
    assert status(plugins, "slow").state == "disabled"
    problem = refusal(plugins, "slow-model")
    assert "acme-slow 1.0, which KAITO_PLUGINS or --no-plugins leaves out" in problem.message


def test_a_name_in_kaito_plugins_that_is_not_installed_is_reported(site: Path) -> None:
    install(site, "acme-models", preset_plugin("a"))
    (problem,) = load_plugins(environ={"KAITO_PLUGINS": "modles"}).problems()
    assert "'modles'" in problem.message
    assert problem.remedy == "did you mean models?"


def test_plugins_are_loaded_once(site: Path) -> None:
    install(site, "acme-models", preset_plugin("a"))
    assert load_plugins() is load_plugins()


# --- asking for what is not there -------------------------------------------------------------------------------------


def test_asking_for_what_a_broken_plugin_would_provide_says_why_and_what_to_do(site: Path) -> None:
    install(site, "kaito-preset-phi3", "import not_installed_anywhere")
    problem = refusal(load_plugins(), "phi-3-mini-4k-instruct")
    assert "kaito-preset-phi3 1.0, which does not work" in problem.message
    assert "not_installed_anywhere" in problem.message
    assert problem.remedy == "pip install kaito-preset-phi3"


@pytest.mark.parametrize(
    ("preset", "package"),
    [
        ("phi-4-mini-instruct", "kaito-preset-phi3"),
        ("demo-phi-3", "kaito-preset-demo"),
        ("llama-3.1-8b-instruct", "kaito-preset-community"),
    ],
)
def test_a_name_of_a_public_plugin_says_what_to_install(site: Path, preset: str, package: str) -> None:
    assert refusal(load_plugins(), preset).remedy == f"you need `pip install {package}`"


def test_a_method_without_its_tuner_says_what_to_install(site: Path) -> None:
    with pytest.raises(UserError, match="pip install kaito-tuner-qlora") as e:
        load_plugins().tuner("qlora")
    assert e.value.problems[0].field == "tuning.method"


def test_a_misspelt_name_is_guessed_and_the_others_are_listed(site: Path) -> None:
    install(site, "kaito-preset-phi3", preset_plugin("phi-3-mini-4k-instruct", "phi-4"))
    problem = refusal(load_plugins(), "phi-3-mini-4k-instrct")
    assert problem.remedy == "did you mean phi-3-mini-4k-instruct?"
    assert problem.message.endswith("there is phi-3-mini-4k-instruct, phi-4")


def test_what_cannot_be_a_name_is_a_user_error_too(site: Path) -> None:
    assert "is not a name" in refusal(load_plugins(), "../etc/passwd").message


# --- hooks that are called on everybody -------------------------------------------------------------------------------

RULES = """
    from kaito_core.plugins import hookimpl
    from kaito_core.problems import Problem

    @hookimpl
    def kaito_validate(workspace):
        yield Problem(f"{workspace.name} has no team")
"""


def test_rules_of_all_plugins_are_collected_and_a_broken_rule_is_said_each_time(site: Path) -> None:
    install(site, "acme-a", RULES + "        1 / 0\n")
    install(site, "acme-b", RULES)
    plugins = load_plugins()
    for _ in range(2):
        broken, rule = plugins.validate(SimpleNamespace(name="mine"), None)  # type: ignore[arg-type]
        assert broken.severity == "warning"
        assert "acme-a 1.0 could not be checked: kaito_validate raised ZeroDivisionError" in broken.message
        assert rule == Problem("mine has no team")


WRAP = """
    import dataclasses
    from kaito_core.plugins import hookimpl

    @hookimpl
    def kaito_workload(workload):
        return {}
"""


def test_every_plugin_has_its_word_on_the_workload_and_a_wrong_one_is_ignored(site: Path) -> None:
    install(site, "acme-a", WRAP.format("dataclasses.replace(workload, image=workload.image + 'a')"))
    install(site, "acme-b", WRAP.format("{'image': 'mine'}"))
    install(site, "acme-c", WRAP.format("None"))
    install(site, "acme-d", WRAP.format("dataclasses.replace(workload, image=workload.image + 'd')"))
    plugins = load_plugins()
    changed = plugins.workload(None, Workload("w", "", (), ()))  # type: ignore[arg-type]
    assert changed.image == "ad"
    assert "kaito_workload gave {'image': 'mine'} (dict), not a Workload" in status(plugins, "b").error


def test_events_reach_every_listener_and_a_broken_one_is_warned_of_once(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard = (
        "from kaito_core.plugins import hookimpl\nheard = []\n@hookimpl\ndef kaito_events(event): heard.append(event)"
    )
    install(site, "acme-a", heard.replace("heard.append(event)", "1 / 0"))
    install(site, "acme-b", heard)
    plugins = load_plugins()
    plugins.notify({"event": "started"})
    plugins.notify({"event": "finished"})
    assert [e["event"] for e in sys.modules["fixture_acme_b"].heard] == ["started", "finished"]
    assert len(caplog.records) == 1


def test_what_a_hook_does_to_what_it_is_given_is_seen_by_nobody_and_said(site: Path) -> None:
    install(site, "acme-a", WRAP.format("workload.env.update(LEAK='1')"))
    install(site, "acme-b", WRAP.format("workload.env.update(MINE='1') or workload"))
    workload = Workload("w", "", (), (), env={"A": "1"})
    plugins = load_plugins()
    changed = plugins.workload(None, workload)  # type: ignore[arg-type]
    assert (workload.env, changed.env) == ({"A": "1"}, {"A": "1", "MINE": "1"})
    assert status(plugins, "a").error == "kaito_workload changed the workload that it was given"
    assert "dataclasses.replace" in status(plugins, "a").remedy
    assert status(plugins, "b").state == "active"  # it handed back what it changed: that is its right


def test_a_listener_cannot_change_what_the_next_one_hears(site: Path) -> None:
    listens = "from kaito_core.plugins import hookimpl\nheard = []\n@hookimpl\ndef kaito_events(event): {}"
    install(site, "acme-a", listens.format("event['results']['loss'] = 0; event.clear()"))
    install(site, "acme-b", listens.format("heard.append(event)"))
    event = {"event": "finished", "results": {"loss": 2.5}}
    load_plugins().notify(event)
    assert sys.modules["fixture_acme_b"].heard == [event] == [{"event": "finished", "results": {"loss": 2.5}}]


def test_one_distribution_that_gives_a_name_by_two_entry_points_is_told_which(site: Path) -> None:
    install(site, "acme-twice", preset_plugin("a"), name="first")
    info = site / "acme_twice-1.0.dist-info" / "entry_points.txt"
    info.write_text("[kaito]\nfirst = fixture_acme_twice\nsecond = fixture_acme_twice\n")
    said = refusal(load_plugins(), "a").message
    assert said == "the preset 'a' is provided by first (acme-twice 1.0) and second (acme-twice 1.0)"


# --- heavy, loud and slow ones ----------------------------------------------------------------------------------------


def test_a_plugin_that_imports_something_heavy_works_and_is_warned_of(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    (site / "torch.py").write_text("")
    install(site, "acme-heavy", "import torch\n" + preset_plugin("a"))
    plugins = load_plugins()
    assert plugins.preset("a")
    assert (status(plugins, "heavy").state, status(plugins, "heavy").heavy) == ("active", ("torch",))
    (problem,) = plugins.problems()
    assert problem.message == "the plugin heavy (acme-heavy 1.0) imports torch when it is loaded"
    assert "import it inside the functions that need it" in problem.remedy


def test_a_hook_that_imports_something_heavy_is_warned_of_too(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    (site / "torch.py").write_text("")
    install(site, "acme-heavy", preset_plugin("a") + "    import torch")
    assert status(load_plugins(), "heavy").heavy == ("torch",)


def test_what_a_plugin_prints_is_logged_and_not_in_the_output(
    site: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    install(site, "acme-loud", "print('hello')\n" + preset_plugin("a") + "    import click; click.echo('ex', nl=False)")
    assert load_plugins().preset("a")
    print("answer")
    assert capsys.readouterr().out == "answer\n"
    said = [r.getMessage() for r in caplog.records]
    assert said == ["warning: acme-loud 1.0 prints: hello", "warning: acme-loud 1.0 prints: ex"]


def test_a_plugin_that_hangs_is_left_to_itself_and_not_called_again_meanwhile(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "HOOK_SECONDS", 0.2)
    install(site, "acme-hangs", "import threading\nthreading.Event().wait()")
    install(
        site,
        "acme-slow",
        """
        import threading
        from kaito_core.plugins import hookimpl
        go, heard = threading.Event(), []

        @hookimpl
        def kaito_events(event):
            heard.append(event)
            go.wait()
        """,
    )
    install(site, "acme-good", preset_plugin("good"))
    plugins = load_plugins()
    assert plugins.preset("good")
    hangs = status(plugins, "hangs")
    assert hangs.error == "importing fixture_acme_hangs did not return within 0.2 seconds"
    assert "kaito --no-plugins" in hangs.remedy
    assert "fixture_acme_hangs.py" in hangs.traceback  # where it is, for its author
    for _ in range(3):
        plugins.notify({"event": "started"})
    slow = sys.modules["fixture_acme_slow"]
    assert len(slow.heard) == 1
    assert "kaito_events is not asked while kaito_events has not returned" in status(plugins, "slow").error
    slow.go.set()
    while len(slow.heard) == 1:
        plugins.notify({"event": "finished"})
    assert slow.heard[-1] == {"event": "finished"}


# --- kaito plugins ----------------------------------------------------------------------------------------------------


def kaito(site: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *sys.path])
    return subprocess.run(
        [sys.executable, "-m", "kaito_core", *arguments],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_kaito_plugins_lists_what_works_and_what_does_not_and_succeeds(tmp_path: Path) -> None:
    install(tmp_path, "acme-models", preset_plugin("acme-tiny"))
    install(tmp_path, "acme-broken", "raise OSError('[bold]no licence server')")
    shown = kaito(tmp_path, "plugins", KAITO_PLUGINS="acme-models,acme-broken")
    assert shown.returncode == 0
    assert "presets: acme-tiny" in shown.stdout
    assert "OSError: [bold]no licence server" in shown.stdout
    assert shown.stderr == ""
    answer = json.loads(kaito(tmp_path, "plugins", "--json", KAITO_PLUGINS="acme-models,acme-broken").stdout)
    found = {p["name"]: p for p in answer["plugins"]}
    assert found["models"]["provides"] == {"presets": ["acme-tiny"]}
    assert "Traceback" in found["broken"]["traceback"]


def test_other_commands_warn_in_one_line_and_go_on(tmp_path: Path) -> None:
    install(tmp_path, "acme-broken", "raise SystemExit(3)")
    shown = kaito(tmp_path, "--help", KAITO_PLUGINS="acme-broken")
    assert shown.returncode == 0
    (line,) = shown.stderr.splitlines()
    who = "the plugin broken (acme-broken 1.0) does not work and is left out"
    assert line == f"warning: {who}: importing fixture_acme_broken raised SystemExit: 3"
