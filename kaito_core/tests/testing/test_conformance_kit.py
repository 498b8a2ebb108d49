"""The conformance kit itself: its rule for overriding, what it costs, and that it finds what is wrong with a plugin."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kaito_core.problems import UserError
from kaito_core.testing.conformance import check, light

pytest_plugins = "pytester"

PRESET = """
from kaito_core.plugins import Architecture, ChatFormat, ModelSource, Preset, hookimpl

LINEARS = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64),
           "gate_proj": (64, 96), "up_proj": (64, 96), "down_proj": (96, 64)}
NUMBERS = dict(name="LlamaForCausalLM", parameters=78144, layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16,
               vocab=128, context=256, linears=LINEARS)
TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
SAYS = dict(name="tiny-llama", source=ModelSource(hub="me/tiny-llama", revision="0123456789abcdef" * 2 + "01234567"),
            licence="apache-2.0", architecture=Architecture(**NUMBERS), chat=ChatFormat(TEMPLATE, ("<|end|>",)),
            lora_targets=("q_proj", "v_proj"))


@hookimpl
def kaito_presets():
    yield Preset(**SAYS)
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(text, name)``: a distribution with one plugin module, found as an installed one is; gives the module's name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str, name: str = "some_plugin", needs: str = "kaito-core>=0.1,<0.2") -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\nRequires-Dist: {needs}\n"
        )
        (info / "entry_points.txt").write_text(f"[kaito]\n{name} = {name}\n")
        return name

    return write


def outcomes(report: check.Report, kind: str = "") -> dict[str, tuple[str, str]]:
    return {c.check: (c.outcome, c.reason) for c in report.checks if not kind or c.kind == kind}


# --- overriding


KIT_CLASS = """
    import pytest
    from kaito_core.testing.conformance import PresetTests

    class TestDemo(PresetTests):
        plugin = "kaito_preset_demo.plugin"
"""


def collected(pytester: pytest.Pytester, more: str, *arguments: str, head: str = "") -> pytest.RunResult:
    text = textwrap.dedent(KIT_CLASS) + textwrap.indent(textwrap.dedent(more), "    ")
    pytester.makepyfile(test_it=head + text)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


@pytest.mark.parametrize(
    "override",
    [
        "def test_its_licence_is_named(self): pass",
        "test_its_licence_is_named = None",
        "@pytest.mark.xfail\ndef test_its_licence_is_named(self): pass",
        "@pytest.mark.xfail(reason=' ')\ndef test_its_licence_is_named(self): pass",
        "@pytest.mark.skip(reason='no time')\ndef test_its_licence_is_named(self): pass",
    ],
    ids=["replaced", "removed", "without a reason", "with an empty one", "skipped"],
)
def test_an_override_without_a_reason_is_not_collected(pytester: pytest.Pytester, override: str) -> None:
    result = collected(pytester, override)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["*TestDemo overrides test_its_licence_is_named of kaito's conformance kit without saying why*"]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


def test_an_override_with_a_reason_stands_in_the_report(pytester: pytest.Pytester) -> None:
    override = "@pytest.mark.xfail(reason='the maker has none')\ndef test_its_licence_is_named(self): assert False"
    result = collected(pytester, override, "-rx", "-k", "licence")
    result.assert_outcomes(xfailed=1)
    result.stdout.fnmatch_lines(["XFAIL*test_its_licence_is_named*the maker has none*"])


def test_a_mixin_is_no_way_around_it(pytester: pytest.Pytester) -> None:
    head = textwrap.dedent("""
        class Quiet:
            def test_its_licence_is_named(self): pass
    """)
    result = collected(pytester, "class TestMine(Quiet, PresetTests):\n    plugin = 'x'", head=head)
    result.stdout.fnmatch_lines(["*TestMine overrides test_its_licence_is_named*"])


@pytest.mark.parametrize("mark", ["skip", "xfail"])
def test_a_class_is_not_switched_off_without_a_reason(pytester: pytest.Pytester, mark: str) -> None:
    arguments = ("-p", "kaito_core.testing.conformance.pytest_plugin") if not is_installed() else ()
    pytester.makepyfile(textwrap.dedent(KIT_CLASS).replace("class TestDemo", f"@pytest.mark.{mark}\nclass TestDemo"))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)
    result.stderr.fnmatch_lines([f"*is marked {mark} without a reason*"])


def test_tests_of_ones_own_are_added_as_one_likes(pytester: pytest.Pytester) -> None:
    result = collected(pytester, "def test_mine(self, preset): assert preset.name == 'demo-phi-3'", "-k", "mine")
    result.assert_outcomes(passed=1)


# --- what it costs


def is_installed() -> bool:
    from kaito_core.plugins.discovery import entry_points

    return any(e.name == "kaito" for e in entry_points("pytest11", sys.path))


def test_the_pytest_plugin_imports_nothing_of_weight() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import kaito_core.testing.conformance.pytest_plugin;"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {m for m in done.stdout.split() if not m.startswith("kaito_core")} <= {"importlib", "typing", "__future__"}
    assert not {"kaito_core.plugins", "kaito_core.testing.conformance.base"} & set(done.stdout.split())


def test_the_kit_for_presets_imports_neither_hypothesis_nor_torch() -> None:
    code = (
        "import sys; from kaito_core.testing.conformance import PresetTests;"
        "print({'hypothesis', 'torch', 'transformers', 'pydantic', 'kubernetes'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- weight


def test_a_plugin_that_imports_torch_is_refused(install: Install, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    module = install("import torch\n" + PRESET)
    assert light.load(module).heavy == ("torch",)
    outcome, reason = outcomes(check.run(check.targets("some-plugin")))["it is light"]
    assert outcome == "failed"
    assert "imports torch, and every kaito command would wait for it" in reason


def test_a_hook_that_imports_torch_is_refused(install: Install, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    assert light.load(install(PRESET.replace("yield", "import torch\n    yield"))).heavy == ("torch",)


def test_a_plugin_that_goes_to_the_network_is_refused(install: Install) -> None:
    asks = "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 80), 1)\nexcept OSError:\n    pass\n"
    loaded = light.load(install(asks + PRESET))
    assert loaded.network
    assert not loaded.error


@pytest.mark.parametrize(
    ("text", "words"),
    [("import no_such_module", "No module named 'no_such_module'"), ("import os; os._exit(7)", "ended with 7"),
     ("import sys; sys.exit('bye')", "SystemExit: bye")],
)  # fmt: skip
def test_a_plugin_that_does_not_load_is_told(install: Install, text: str, words: str) -> None:
    assert words in light.load(install(text)).error


# --- presets


@pytest.fixture
def checked(install: Install, tmp_path: Path, pytester: pytest.Pytester) -> Callable[..., dict[str, str]]:
    """``checked(old, new, …)``: what the kit says against the preset with these changes to its text; test by words."""

    def run(*changes: str, config: dict[str, Any] | None = None, tokenizer: str = "") -> dict[str, str]:
        text = PRESET
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text
            text = text.replace(old, new)
        install(text)
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
        pytester.makepyfile(
            f"from kaito_core.testing.conformance import PresetTests\n\n\nclass TestIt(PresetTests):\n"
            f"    plugin = 'some_plugin'\n    model_folder = {str(folder)!r}\n"
        )
        environ = os.pathsep.join([str(tmp_path), *sys.path])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--tb=line", "-rf", "-k",
             "not light and not finds and not planned"],
            cwd=pytester.path, env={**os.environ, "PYTHONPATH": environ}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "passed" in done.stdout, done.stdout + done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        return {line.partition("::test_")[2].partition("[")[0]: line + done.stdout for line in lines}

    return run


def test_a_good_preset_passes(checked: Callable[..., dict[str, str]]) -> None:
    assert checked() == {}


@pytest.mark.parametrize(
    ("changes", "fails", "words"),
    [
        (("vocab=128", "vocab=129"), {"its_numbers_agree_with_config_json"}, "vocab is 129, and the files say 128"),
        (("parameters=78144", "parameters=100"), {"its_numbers_agree_with_each_other", "its_numbers_agree_with_config_json"},
         "the linear modules of all layers"),
        (('"k_proj": (64, 32)', '"k_proj": (64, 16)'), {"its_numbers_agree_with_config_json"}, "linears are"),
        (('"v_proj": (64, 32)', '"v_proj": (64, 16)'),
         {"its_numbers_agree_with_config_json", "lora_targets_are_in_the_model"}, "v_proj is"),
        (('licence="apache-2.0"', 'licence="unknown"'), {"its_licence_is_named"}, "licence is 'unknown'"),
        (('revision="0123456789abcdef" * 2 + "01234567"', 'revision="main"'), {"its_revision_is_pinned"}, "'main'"),
        (('("<|end|>",)', '("</s>",)'), {"a_stop_token_is_trained"}, "ends with none of"),
        (("{% if add_generation_prompt %}<|assistant|>{% endif %}", ""),
         {"the_template_has_a_generation_prompt", "what_the_assistant_says_is_found", "a_stop_token_is_trained",
          "the_template_renders_a_system_turn", "the_template_renders_several_turns"}, ""),
        (("{{ m.content }}", "{{ m.content | upper }}"),
         {"the_template_has_a_generation_prompt", "what_the_assistant_says_is_found", "a_stop_token_is_trained",
          "the_template_renders_a_system_turn", "the_template_renders_several_turns"}, ""),
    ],
    ids=["config.json", "parameters", "a module", "a target", "licence", "revision", "stop token", "no prompt", "other words"],
)  # fmt: skip
def test_what_is_wrong_with_a_preset_is_named(
    checked: Callable[..., dict[str, str]], changes: tuple[str, ...], fails: set[str], words: str
) -> None:
    found = checked(*changes)
    assert set(found) == fails
    assert any(words in text for text in found.values())


# --- kaito plugins check


def kaito(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "kaito_core", "plugins", "check", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=120)


def test_a_distribution_is_checked_without_a_test_file(install: Install) -> None:
    install(PRESET)
    done = kaito("some-plugin")
    assert done.returncode == 0, done.stdout
    assert "some-plugin 1.0, some_plugin" in done.stdout
    assert "✓ preset tiny-llama: " in done.stdout
    assert "model_folder is not given" in done.stdout


def test_as_json_every_check_is_there(install: Install) -> None:
    install(PRESET.replace('licence="apache-2.0"', 'licence="other"'))
    done = kaito("some_plugin", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["failed"], told["passed"]) == (1, False)
    assert told["plugins"] == [
        {"module": "some_plugin", "plugin": "some_plugin", "distribution": "some-plugin", "version": "1.0"}
    ]
    (preset,) = [o for o in told["objects"] if o["kind"] == "preset"]
    (failed,) = [c for c in preset["checks"] if c["outcome"] == "failed"]
    assert (preset["name"], failed["check"]) == ("tiny-llama", "its licence is named")
    assert "licence is 'other'" in failed["reason"]


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("kaito-preset-dmo", "did you mean kaito-preset-demo?"),
        ("pytest", "is installed, and has no plugin"),
        ("../../etc/passwd", "there is no installed distribution"),
        ("os.path; import os", "there is no installed distribution"),
        ("", "there is no installed distribution"),
        ("x" * 10_000, "there is no installed distribution"),
    ],
)
def test_what_there_is_not_is_said(named: str, words: str) -> None:
    with pytest.raises(UserError) as e:
        check.targets(named)
    assert words in str(e.value)
    assert len(str(e.value)) < 2000


def test_a_plugin_that_does_not_load_fails_with_the_reason(install: Install) -> None:
    install("import no_such_module")
    done = kaito("some-plugin")
    assert done.returncode == 1
    assert "it needs the Python module no_such_module, which is missing" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_module_without_hooks_is_no_plugin(install: Install) -> None:
    found = outcomes(check.run((check.Target(install("x = 1")),)))
    assert found["it loads"][0] == "failed"
    assert "implements no hook" in found["it loads"][1]


TUNER = """
    import os, time
    from kaito_core.plugins import hookimpl
    from kaito_core.testing.planning import Sized

    class Bad(Sized):
        methods = ("bad",)
        def smaller(self, preset, method, config):
            {act}

    @hookimpl
    def kaito_tuners():
        yield Bad()
"""


@pytest.mark.parametrize(
    ("act", "words"),
    [("time.sleep(600)", "it hangs"), ("os._exit(3)", "ended with exit code 3"), ("os.abort()", "killed by signal 6")],
)
def test_a_plugin_that_takes_its_process_with_it_is_told_by_the_test(
    install: Install, monkeypatch: pytest.MonkeyPatch, act: str, words: str
) -> None:
    install(TUNER.format(act=act))
    monkeypatch.setattr(check, "PATIENCE", 5.0)
    report = check.run(check.targets("some-plugin"))
    (failed,) = [c for c in report.checks if words in c.reason]
    assert (failed.outcome, failed.kind, failed.name) == ("failed", "tuning method", "bad")
    assert any(c.outcome == "ok" for c in report.checks)


def test_two_plugins_of_a_name_are_told(install: Install) -> None:
    install(PRESET)
    install(PRESET, "other_plugin")
    outcome, reason = outcomes(check.run(check.targets("some-plugin")))["its names are free"]
    assert outcome == "failed"
    assert "tiny-llama is also of other-plugin 1.0" in reason


def test_a_distribution_that_does_not_need_the_core_is_told(install: Install) -> None:
    install(PRESET, needs="requests")
    assert outcomes(check.run(check.targets("some-plugin")))["it needs kaito core"][0] == "failed"


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "NEEDED", ("no_such_module",))
    with pytest.raises(UserError, match=r"pip install 'kaito-core\[test\]'"):
        check.ready()


# --- its page


def test_every_standard_test_is_on_the_kits_page() -> None:
    page = Path(__file__).parents[3] / "docs" / "plugins" / "conformance.md"
    if not page.is_file():
        pytest.skip("the documentation is in the repository alone")
    from kaito_core.testing.conformance import NodeProvisionerTests, PresetTests, RuntimeTests, TunerTests
    from kaito_core.testing.conformance.base import standard_tests

    there = {n for c in (PresetTests, NodeProvisionerTests, TunerTests, RuntimeTests) for n in standard_tests(c)}
    told = set(re.findall(r"`([a-z_]+)`", page.read_text("utf-8")))
    assert there - {f"test_{n}" for n in told} == set()
