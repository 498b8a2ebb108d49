"""What a name in a workspace means: a plugin's preset, a model of the hub, or a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kaito_core.api import read_workspace
from kaito_core.models.files import Model, preset_name
from kaito_core.models.presets import SERVED, TUNED, Reader, is_folder, is_model, named_models, with_models
from kaito_core.plugins.manager import PluginManager
from kaito_core.plugins.types import ModelSource, Preset, normalised
from kaito_core.problems import UserError
from kaito_core.testing.planning import PRESET, OneOfEach

from .conftest import COMMIT, REPO, Hub, model_files, write

BARE = replace(PRESET, name="bare", source=ModelSource(hub="org/Bare", revision=COMMIT), lora_targets=(),
               architecture=replace(PRESET.architecture, linears={}), inference={"vllm": {"tool-call-parser": "hermes"}})  # fmt: skip


class Plugins(PluginManager):
    """The presets of a plugin, without one."""

    def __init__(self, *presets: Preset) -> None:
        super().__init__(())
        self._given = {p.name: p for p in presets}

    def presets(self) -> dict[str, Preset]:
        return self._given


def never(name: str, field: str) -> Model:
    raise AssertionError(f"{name} is read")


def read(preset: Preset = PRESET, why_not: str = "") -> Any:
    asked: list[str] = []

    def reader(name: str, field: str) -> Model:
        asked.append(name)
        return Model(preset, not_tunable=why_not)

    reader.asked = asked  # type: ignore[attr-defined]
    return reader


@pytest.mark.parametrize("name", ["me/tiny", "me/tiny@abc", " me/Tiny ", "ME/TINY"])
def test_a_plugin_that_has_the_model_is_not_asked_twice(name: str) -> None:
    registry = with_models(Plugins(PRESET), {TUNED: name, SERVED: name}, never)
    assert registry.preset(name) is PRESET
    assert registry.folders == {}


def test_another_revision_than_the_plugins_is_read() -> None:
    reader = read()
    assert with_models(Plugins(PRESET), {TUNED: "me/tiny@def"}, reader).preset("me/tiny@def") is PRESET
    assert reader.asked == ["me/tiny@def"]


def test_a_preset_without_shapes_is_served_as_it_is_and_read_to_be_tuned() -> None:
    assert with_models(Plugins(BARE), {SERVED: "org/bare"}, never).preset("org/bare") is BARE
    reader = read(replace(PRESET, name="org-bare"))
    found = with_models(Plugins(BARE), {TUNED: "org/bare"}, reader).preset("org/bare")
    assert reader.asked == [f"org/Bare@{COMMIT}"]
    assert (found.name, found.architecture, found.inference) == ("bare", PRESET.architecture, BARE.inference)


def test_a_model_that_cannot_be_tuned_is_refused_before_planning_and_served() -> None:
    reader = read(BARE, "its weights are quantised already (awq)")
    with pytest.raises(UserError, match=r"other/model cannot be tuned: its weights are quantised") as e:
        with_models(Plugins(), {TUNED: "other/model"}, reader)
    assert e.value.problems[0].field == TUNED
    assert with_models(Plugins(), {SERVED: "other/model"}, reader).preset("other/model") is BARE


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UserError) as e:
        with_models(Plugins(), {TUNED: "a/b/c", SERVED: "x@y/z"}, Reader(Path("/")))
    assert [p.field for p in e.value.problems] == [TUNED, SERVED]


def test_presets_by_name_stay_the_registrys_own() -> None:
    registry = with_models(OneOfEach(), {}, never)  # type: ignore[arg-type]
    assert registry.preset("tiny") is PRESET
    assert registry.tuner("qlora").name == "sized"


def test_two_presets_of_one_model_are_an_error_that_names_both() -> None:
    twin = replace(PRESET, name="twin")
    with pytest.raises(UserError, match="that of the presets tiny and twin"):
        Plugins(PRESET, twin).preset("me/tiny")


def test_the_registry_alone_says_that_it_has_no_such_model() -> None:
    with pytest.raises(UserError, match="no installed plugin has a preset for the model 'other/model'"):
        Plugins(PRESET).preset("other/model")


@pytest.mark.parametrize(
    ("name", "model", "folder"),
    [
        ("phi-4", False, False), ("org/name", True, False), ("org/name@main", True, False), ("/models/x", True, True),
        ("./x", True, True), ("../x", True, True), ("~/x", True, True), (".", True, True), ("models/x", True, False),
    ],
)  # fmt: skip
def test_what_a_name_is(name: str, model: bool, folder: bool) -> None:
    assert (is_model(name), is_folder(name)) == (model, folder)


def test_the_names_of_a_workspace() -> None:
    workspace, _ = read_workspace({
        "apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": "w"},
        "resource": {"labelSelector": {"matchLabels": {"a": "b"}}},
        "inference": {"preset": {"name": "org/name@v1"}},
    })  # fmt: skip
    assert workspace is not None
    assert named_models(workspace) == {SERVED: "org/name@v1"}


@pytest.mark.parametrize(
    "name",
    ["a/b/c", "org/", "/".join(["x" * 200] * 2), "org/na me", "org/name@", "org/name@../x", "org/-x", "o--x/y", "a/..", "a/b\x00", "ö/ü",
     "org/name@" + "v" * 101, "https://huggingface.co/org/name", "org/name\nx"],
)  # fmt: skip
def test_what_is_no_name_at_all(name: str) -> None:
    with pytest.raises(UserError, match="neither a preset nor a model") as e:
        Reader(Path("/"))(name, "tuning.preset.name")
    assert "org/name@revision" in e.value.problems[0].remedy


def test_a_folder_is_read_from_where_the_file_is(tmp_path: Path) -> None:
    write(tmp_path / "models" / "tiny", model_files())
    registry = with_models(Plugins(), {SERVED: "./models/tiny"}, Reader(tmp_path))
    assert registry.preset("./models/tiny").name == "tiny"
    assert registry.folders == {"tiny": str(tmp_path / "models" / "tiny")}


def test_a_cluster_has_no_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a cluster cannot read the folder"):
        Reader(None)(str(tmp_path), SERVED)


def test_paths_with_anything_in_them() -> None:
    for name in ("~nobody-of-this-name/x", "/a\x00b", "./" + "x" * 5000):
        with pytest.raises(UserError):
            Reader(Path("/nonexistent"))(name, SERVED)


def test_a_model_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    reader = Reader(None, tmp_path, "hf_x")
    registry = with_models(Plugins(), {TUNED: f"{REPO}@{COMMIT}"}, reader)
    assert registry.preset(f"{REPO}@{COMMIT}").source == ModelSource(hub=REPO, revision=COMMIT)
    assert "hf_x" not in repr(reader)


@pytest.mark.parametrize(
    ("text", "name"),
    [("Qwen/Qwen3-8B", "qwen-qwen3-8b"), ("org/a_b.c", "org-a_b.c"), ("My Model", "my-model"), ("___", "model"), ("a..b", "a-b"),
     ("org/_x", "org-x"), ("x-._y", "x-y"), ("Ünter", "nter")],
)  # fmt: skip
def test_names_that_presets_can_have(text: str, name: str) -> None:
    assert preset_name(text) == name == normalised(name)


def test_a_path_is_no_model_for_a_plugin() -> None:
    with pytest.raises(UserError, match="is not a name"):
        Plugins(PRESET).preset("../etc/passwd")
