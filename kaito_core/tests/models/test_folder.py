"""A folder with a model: its preset, or why there is none."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from kaito_core.models.folder import read_folder
from kaito_core.plugins.types import ModelSource
from kaito_core.problems import UserError

from .conftest import llama, model_files, weights, write


def test_a_shipped_model_gives_the_numbers_of_its_own_preset() -> None:
    demo = pytest.importorskip("kaito_preset_demo")
    from kaito_preset_demo.plugin import kaito_presets

    (shipped,) = kaito_presets()
    found = read_folder(demo.MODEL_DIR)
    assert found.preset.architecture == shipped.architecture
    assert found.preset.chat == shipped.chat
    assert found.preset.lora_targets == shipped.lora_targets
    assert found.preset.dtype == shipped.dtype
    assert found.preset.weights_bytes == shipped.weights_bytes
    assert found.folder == str(demo.MODEL_DIR)
    assert found.not_tunable == ""


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    found = read_folder(write(tmp_path / "My Model v2", model_files()))
    preset = found.preset
    assert preset.name == "my-model-v2"
    assert preset.licence == "apache-2.0"
    assert preset.chat.stop_tokens == ("</s>",)
    assert preset.source == ModelSource(folder=str(tmp_path / "My Model v2"), revision=preset.source.revision)
    assert str(preset.source) == f"the folder {tmp_path / 'My Model v2'}"
    assert not preset.gated


def test_what_has_changed_in_the_folder_can_be_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", model_files())
    before = read_folder(folder).preset.source.revision
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", before)  # no commit of a hub, and it does not look like one
    assert read_folder(folder).preset.source.revision == before
    write(folder, model_files(max_position_embeddings=512))
    assert read_folder(folder).preset.source.revision != before


def test_a_copy_of_the_folder_is_the_same_model(tmp_path: Path) -> None:
    here, there = (read_folder(write(tmp_path / name / "m", model_files())).preset for name in ("here", "there"))
    assert here.source.revision == there.source.revision
    assert here.name == there.name


@pytest.mark.parametrize(
    "given", [{}, {"hub": "a/b", "package": "p"}, {"hub": "a/b", "folder": "/m"}, {"package": "p", "folder": "/m"}]
)
def test_a_model_comes_from_one_place(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="exactly one of them"):
        ModelSource(**given)


def sharded() -> dict[str, bytes]:
    shapes = llama()
    first = {n: s for n, s in shapes.items() if ".1." not in n}
    second = {n: s for n, s in shapes.items() if ".1." in n}
    files = {"model-00001-of-00002.safetensors": weights(first), "model-00002-of-00002.safetensors": weights(second)}
    places = {n: file for file, part in zip(files, (first, second), strict=True) for n in part}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    without = {n: b for n, b in model_files().items() if n != "model.safetensors"}
    return {**without, **files, "model.safetensors.index.json": json.dumps(index).encode()}


def test_several_weight_files_and_another_copy_of_them(tmp_path: Path) -> None:
    whole = read_folder(write(tmp_path / "whole", model_files())).preset.architecture
    folder = write(tmp_path / "m", {**sharded(), "consolidated.safetensors": b"the same weights in another form"})
    assert read_folder(folder).preset.architecture == whole


BAD: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no config": ({"config.json": None}, "there is no config.json"),
    "no tokenizer": ({"tokenizer.json": None}, "fast tokenizers only"),
    "adapter": (
        {"config.json": None, "adapter_config.json": b"{}", "model.safetensors": None},
        "an adapter and not a model",
    ),
    "pickles": ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "kaito never loads them"),
    "gguf": ({"model.safetensors": None, "model.gguf": b"x"}, "GGUF"),
    "no weights": ({"model.safetensors": None}, r"no \*.safetensors file"),
    "config not JSON": ({"config.json": b"{"}, "config.json is not JSON"),
    "config a list": ({"config.json": b"[]"}, "config.json is not a JSON object"),
    "config not UTF-8": ({"config.json": b"\xff\xfe"}, "config.json is not UTF-8"),
    "config deep": ({"config.json": b'{"a":' * 50_000 + b"1" + b"}" * 50_000}, "config.json is not JSON"),
    "weights empty": ({"model.safetensors": b""}, "only 0 bytes"),
    "weights huge header": (
        {"model.safetensors": b"\xff" * 7 + b"\0" + b"{}"},
        "model.safetensors: the header would be",
    ),
    "weights cut off": ({"model.safetensors": weights(llama())[:-1]}, "cut off, or another file"),
    "weights of another model": ({"model.safetensors": weights(llama(3))}, "says 2 layers, and the weights have 3"),
    "index elsewhere": (
        {"model.safetensors.index.json": b'{"weight_map": {"a": "../../etc/passwd.safetensors"}}'},
        "no weight file beside it",
    ),
    "index names what is missing": (
        {"model.safetensors.index.json": b'{"weight_map": {"a": "other.safetensors"}}'},
        "names other.safetensors, which is not there",
    ),
    "index names another tensor": (
        {"model.safetensors.index.json": b'{"weight_map": {"a": "model.safetensors"}}'},
        "says that 'a' is in model.safetensors, and it is not",
    ),
    "index empty": ({"model.safetensors.index.json": b"{}"}, "has no weight_map"),
}


@pytest.mark.parametrize(("changes", "says"), BAD.values(), ids=BAD)
def test_a_folder_that_cannot_be_used(tmp_path: Path, changes: dict[str, bytes | None], says: str) -> None:
    files = {n: b for n, b in {**model_files(), **changes}.items() if b is not None}
    with pytest.raises(UserError, match=says) as e:
        read_folder(write(tmp_path / "m", files), field="tuning.preset.name")
    (problem,) = e.value.problems
    assert problem.field == "tuning.preset.name"
    assert str(tmp_path / "m") in problem.message
    assert problem.remedy


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, says in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "file", "this is a file")):
        with pytest.raises(UserError, match=says):
            read_folder(path)


def test_a_pipe_or_a_dead_link_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", model_files())
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(UserError, match="config.json is not a file"):
        read_folder(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="config.json is a link that leads nowhere"):
        read_folder(folder)


def test_a_model_without_an_end_of_an_answer_is_served_and_not_tuned(tmp_path: Path) -> None:
    files = {**model_files(eos_token_id=None), "tokenizer_config.json": b"{}"}
    assert "which token ends an answer" in read_folder(write(tmp_path / "m", files)).not_tunable
