"""``kaito new``: a complete package, from nothing or from a model's files, and what is refused.

That it installs and passes its own tests as it stands is shown by ``tests/test_outside.py``."""

from __future__ import annotations

import ast
import json
import re
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaito_core.cli import main
from kaito_core.cli.new import PROVIDES
from kaito_core.models.files import Model
from kaito_core.models.folder import read_folder
from kaito_core.plugins.types import ChatFormat, ModelSource, Preset
from kaito_core.problems import UserError
from kaito_core.scaffold import preset as scaffold_preset
from kaito_core.scaffold import tiny_model
from kaito_core.scaffold.described import described, literal
from kaito_core.scaffold.package import EXTRAS, KINDS, Kind, Names, core_range, rendered

Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """``kaito new …`` in an empty folder: the exit code, and all that was printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as e:
            main(["new", *arguments])
        said = capsys.readouterr()
        return int(e.value.code or 0), said.out + said.err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, its card included."""
    folder = tmp_path_factory.mktemp("models") / "Tiny-Llama"
    tiny_model.make(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    return folder


def presets_of(package: Path, module: str) -> list[Preset]:
    """What the plugin of a package yields."""
    path = package / "src" / module / "plugin.py"
    names: dict[str, Any] = {"__name__": f"{module}.plugin", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), names)
    return list(names["kaito_presets"]())


def test_every_kind_is_the_same_everywhere() -> None:
    assert set(get_args(Kind)) == set(KINDS) == set(EXTRAS) == set(PROVIDES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_is_complete(kind: Kind, say: Say, tmp_path: Path) -> None:
    code, said = say(kind, "My.New_one")
    assert code == 0
    package = tmp_path / f"kaito-{kind}-my-new-one"
    module = f"kaito_{kind}_my_new_one"
    found = {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file()}
    assert {
        "pyproject.toml", "README.md", "LICENSE", ".gitignore", ".github/workflows/test.yml", "tests/test_conformance.py",
        f"src/{module}/plugin.py", f"src/{module}/py.typed",
    } <= found  # fmt: skip
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["name"] == package.name
    assert project["dependencies"] == [f"kaito-core{core_range('0.1.0')}"]
    assert project["entry-points"] == {"kaito": {"my.new_one": f"{module}.plugin"}}
    assert "kaito-core[data,test]>=0.1,<0.2" in project["optional-dependencies"]["test"]
    for path in package.rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"))
    assert "next:" in said
    assert "pip install -e" in said
    assert not [p for p in tmp_path.iterdir() if p != package]


# --- from a model


def test_a_small_model_becomes_part_of_the_package(say: Say, tmp_path: Path, model: Path) -> None:
    code, said = say("preset", "lamb", "--from", str(model))
    assert code == 0, said
    (preset,) = presets_of(tmp_path / "kaito-preset-lamb", "kaito_preset_lamb")
    read = read_folder(model).preset
    assert preset.architecture == read.architecture
    assert (preset.chat, preset.lora_targets, preset.dtype) == (read.chat, read.lora_targets, read.dtype)
    assert preset.licence == "apache-2.0"
    assert preset.source == ModelSource(package="kaito_preset_lamb", path="model")
    assert (tmp_path / "kaito-preset-lamb/src/kaito_preset_lamb/model/model.safetensors").is_file()
    assert "description" in said
    assert str(model.parent) not in "".join(
        p.read_text(errors="replace") for p in (tmp_path / "kaito-preset-lamb").rglob("*") if p.is_file()
    )


def test_a_large_model_stays_where_it_is_and_that_is_said(
    say: Say, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaffold_preset, "SHIPPED", 1000)
    code, said = say("preset", "lamb", "--from", str(model))
    assert code == 0, said
    (preset,) = presets_of(tmp_path / "kaito-preset-lamb", "kaito_preset_lamb")
    assert preset.source.folder == str(model)
    assert "publish them" in said
    tests = tmp_path / "kaito-preset-lamb" / "tests"
    assert {p.name for p in (tests / "model").iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert 'model_folder = "model"' in (tests / "test_conformance.py").read_text()


def test_what_the_files_do_not_say_is_listed_and_marked(say: Say, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    tiny_model.make(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None, "eos_token": None}))
    (folder / "generation_config.json").unlink()
    settings = json.loads((folder / "config.json").read_text())
    del settings["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(settings))
    code, said = say("preset", "bare", "--from", "bare")
    assert code == 0
    source = (tmp_path / "kaito-preset-bare/src/kaito_preset_bare/plugin.py").read_text()
    readme = (tmp_path / "kaito-preset-bare/README.md").read_text()
    for field, words in {
        "licence": "which licence the model has",
        "chat": "how a conversation becomes text",
        "stop_tokens": "which token ends an answer",
        "lora_targets": "what LoRA could target",
    }.items():
        assert re.search(rf"^  {field} +{words}", said, re.MULTILINE)
        assert f"# unknown: {words}" in source
        assert f"* `{field}`: {words}" in readme
    assert presets_of(tmp_path / "kaito-preset-bare", "kaito_preset_bare")[0].licence == "unknown"


COMMIT = "0a67737cc96d2554230f90338b163bc6380a2a85"


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub with one model, ``me/Tiny-Llama``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/api/models/me/Tiny-Llama/revision/"):
                about = {
                    "sha": COMMIT,
                    "gated": "manual",
                    "cardData": {"license": "apache-2.0"},
                    "siblings": [{"rfilename": p.name} for p in model.iterdir()],
                }
                self.answer(200, json.dumps(about).encode())
            elif self.path.startswith(f"/me/Tiny-Llama/resolve/{COMMIT}/"):
                body = (model / self.path.rpartition("/")[2]).read_bytes()
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if asked:
                    start, end = int(asked[1]), min(int(asked[2]) + 1, len(body))
                    self.answer(206, body[start:end], f"bytes {start}-{end - 1}/{len(body)}")
                else:
                    self.answer(200, body)
            else:
                self.answer(404, b"{}")

        def answer(self, status: int, body: bytes, content_range: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("hub")
def test_a_model_of_the_hub_is_pinned(say: Say, tmp_path: Path, model: Path) -> None:
    code, said = say("preset", "lamb", "--from", "me/Tiny-Llama")
    assert code == 0, said
    (preset,) = presets_of(tmp_path / "kaito-preset-lamb", "kaito_preset_lamb")
    assert preset.source == ModelSource(hub="me/Tiny-Llama", revision=COMMIT)
    assert preset.architecture == read_folder(model).preset.architecture
    assert preset.gated
    held_against = tmp_path / "kaito-preset-lamb/tests/model"
    assert (held_against / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert not list(held_against.glob("*.safetensors"))


@pytest.mark.usefixtures("hub")
def test_a_model_that_the_hub_does_not_have_writes_nothing(say: Say, tmp_path: Path) -> None:
    code, said = say("preset", "lamb", "--from", "me/other")
    assert code == 2
    assert "me/other" in said
    assert not list(tmp_path.iterdir())


# --- what is refused, in words, and without leaving anything


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["preset", "../up"], "'../up' is not a name"),
        (["preset", "my model"], "'my model' is not a name"),
        (["preset", ""], "'' is not a name"),
        (["preset", "né"], "is not a name"),
        (["tuner", "a" * 41], "41 characters long"),
        (["tuner", "kaito-tuner-mine"], "`kaito new tuner mine`"),
        (["tuner", "existing"], "kaito-core 0.1.0 is the plugin 'existing' already"),
        (["provisioner", "Local"], "the provisioner 'local' is provided by kaito-core 0.1.0 already"),
        (["preset", "phi3"], "kaito-preset-phi3"),
        (["preset", "x", "--from", "./nowhere"], "there is no folder ./nowhere"),
        (
            ["preset", "x", "--from", "nowhere"],
            "there is no folder 'nowhere', and it is not org/name of the hub either",
        ),
        (["tuner", "x", "--from", "org/name"], "--from describes a model, and a tuner is none"),
        (["preset", "x", "--into", "there"], "there is there already"),
        (["model", "x"], "'model' is not one of"),
        (["preset"], "Missing argument 'NAME'"),
    ],
)
def test_refused(arguments: list[str], words: str, say: Say, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    code, said = say(*arguments)
    assert code == 2
    assert words in said
    assert "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_a_name_that_an_installed_plugin_has(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own name, another name of it, and that of its distribution."""
    say("preset", "fresh")
    source = tmp_path / "kaito-preset-fresh" / "src"
    info = source / "kaito_preset_fresh-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kaito-preset-fresh\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[kaito]\nanother = kaito_preset_fresh.plugin\n")
    plugin = source / "kaito_preset_fresh" / "plugin.py"
    plugin.write_text(plugin.read_text().replace('name="fresh",', 'name="pie", aliases=("tart",),'))
    monkeypatch.syspath_prepend(str(source))
    for name, words in {
        "pie": "the preset 'pie' is provided by kaito-preset-fresh 0.1.0 already",
        "tart": "'tart' is another name of the preset 'pie'",
        "fresh": "kaito-preset-fresh 0.1.0 is installed already",
        "another": "KAITO_PLUGINS=another would mean both",
    }.items():
        code, said = say("preset", name, "--into", "elsewhere")
        assert (code, words in said) == (2, True), said


def test_a_link_and_a_folder_that_is_there_are_left_alone(say: Say, tmp_path: Path) -> None:
    (tmp_path / "kaito-tuner-mine").symlink_to(tmp_path / "nowhere")
    code, said = say("tuner", "mine")
    assert code == 2
    assert "is there already" in said
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_cannot_be_written(say: Say, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, said = say("tuner", "mine", "--into", "file/new")
    assert code == 1
    assert "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- foreign text stays text


@given(st.text() | st.integers() | st.booleans() | st.none() | st.lists(st.text()).map(tuple))
def test_a_value_is_written_as_itself(value: object) -> None:
    assert ast.literal_eval(literal(value)) == value


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=3), st.text(min_size=1), st.text(), st.text())
def test_whatever_a_model_says_the_package_is_python_that_says_the_same(
    model: Path, stops: list[str], licence: str, template: str, reason: str
) -> None:
    read = read_folder(model)
    foreign = replace(
        read.preset, licence=licence, chat=ChatFormat(template, tuple(stops)), description=licence, gated=True
    )
    try:
        made = described(Model(foreign, read.folder, not_tunable=reason), ModelSource(folder=licence))
    except UserError:
        assert any("\ud800" <= c <= "\udfff" for c in template)
        return
    values = {"source": made.source, "preset": made.preset, "about": licence, "still": "", "folder": ""}
    text = rendered(Names("preset", "x"), values)["src/kaito_preset_x/plugin.py"]
    names: dict[str, Any] = {"__name__": "x", "__file__": "x"}
    exec(compile(text, "plugin.py", "exec"), names)
    names["_template"] = lambda: template
    (preset,) = names["kaito_presets"]()
    assert preset.source.folder == licence
    assert replace(preset, name=foreign.name, source=foreign.source) == foreign
