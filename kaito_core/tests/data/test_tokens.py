"""Which tokens carry loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest

from kaito_core.data.chat import completed, model_template
from kaito_core.data.formats import Conversation, Message, Text
from kaito_core.data.tokens import ChatTokenizer
from kaito_core.plugins.types import ChatFormat, Preset
from kaito_core.problems import UserError

TALK = Conversation((Message("user", "What is a workspace?"), Message("assistant", "A workspace names a model. 🎈"),
                     Message("user", "And then?"), Message("assistant", "")))  # fmt: skip


@pytest.mark.parametrize("marked", [True, False])
def test_exactly_the_answers_and_their_stop_tokens_are_trained(
    model_folder: Path, preset_with: Callable[..., Preset], unmarked: str, marked: bool
) -> None:
    chat = (preset_with() if marked else preset_with(unmarked)).chat
    tokenizer = ChatTokenizer(model_folder, chat)
    (example,) = tokenizer.encode([tokenizer.render(TALK)])
    runs = groupby(zip(example.input_ids, example.trained, strict=True), key=lambda pair: pair[1])
    said = [tokenizer.decode([i for i, _ in run]).strip() for trained, run in runs if trained]
    assert said == ["A workspace names a model. 🎈<|end|>", "<|end|>"]
    assert example.trained_tokens == sum(example.trained)


def test_a_conversation_gets_no_token_that_its_template_does_not_write(model_folder: Path, preset: Preset) -> None:
    """As `apply_chat_template` and the chat endpoints do it; the tokenizer by itself would begin with <s>."""
    tokenizer = ChatTokenizer(model_folder, preset.chat)
    (example,) = tokenizer.encode([tokenizer.render(TALK)])
    assert tokenizer.decode(example.input_ids[:1]) == "<|user|>"


def test_a_text_is_trained_whole_and_ends_with_the_stop_token(model_folder: Path, preset: Preset) -> None:
    tokenizer = ChatTokenizer(model_folder, preset.chat)
    example, empty, ended = tokenizer.encode([Text("the data"), Text(""), Text("the data<|endoftext|>")])
    assert example.input_ids[0] == 1
    assert example.input_ids[-1] == tokenizer.stop_ids["<|end|>"]
    assert all(example.trained)
    assert example.trained_tokens == len(example) - 1
    assert len(empty) == 0
    assert list(ended.input_ids) == list(example.input_ids)


def test_a_tokenizer_without_the_stop_token_is_refused(model_folder: Path, preset_with: Callable[..., Preset]) -> None:
    with pytest.raises(UserError, match=r"stop tokens \(<\|eot\|>\)"):
        ChatTokenizer(model_folder, preset_with(stop=("<|eot|>",)).chat)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, preset: Preset) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        ChatTokenizer(tmp_path, preset.chat)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match="not a tokenizer"):
        ChatTokenizer(tmp_path, preset.chat)


# --- a preset that leaves template or stop tokens to the model's own files

OWN = ChatFormat("", ())


@pytest.fixture
def demo_folder(tmp_path: Path) -> Path:
    """The demo model without its weights: a real tokenizer, its template in tokenizer_config.json, <|end|> among its ends."""
    demo = pytest.importorskip("kaito_preset_demo")
    skip = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(demo.MODEL_DIR, tmp_path / "demo", ignore=skip))


def changed(folder: Path, name: str = "tokenizer_config.json", **values: object) -> None:
    path = folder / name
    config = {**json.loads(path.read_bytes()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_what_the_preset_leaves_empty_is_the_models_own(demo_folder: Path) -> None:
    from kaito_preset_demo.plugin import kaito_presets

    (shipped,) = kaito_presets()
    own = ChatTokenizer(demo_folder, OWN)
    assert own.chat == shipped.chat
    written = ChatTokenizer(demo_folder, shipped.chat)
    assert own.encode([own.render(TALK)]) == written.encode([written.render(TALK)])


def test_what_the_preset_says_counts_before_the_models_own(demo_folder: Path) -> None:
    (demo_folder / "tokenizer_config.json").write_text("never read")
    said = ChatFormat("{{ messages }}", ("<|end|>",))
    assert completed(said, demo_folder) is said


@pytest.mark.parametrize(
    ("in_config", "in_file", "expected"),
    [
        ("old", "new", "new"),
        ("old", "", "old"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], None, "d"),
        ([{"name": "rag", "template": "r"}], None, ""),
        (None, None, ""),
        (3, None, ""),
    ],
)
def test_where_a_models_template_is(demo_folder: Path, in_config: object, in_file: str | None, expected: str) -> None:
    changed(demo_folder, chat_template=in_config)
    if in_file is not None:
        (demo_folder / "chat_template.jinja").write_text(in_file)
    assert model_template(demo_folder) == expected


def test_without_any_template_texts_are_examples_and_conversations_are_refused(demo_folder: Path) -> None:
    changed(demo_folder, chat_template=None)
    tokenizer = ChatTokenizer(demo_folder, OWN)
    (example,) = tokenizer.encode([tokenizer.render(Text("Harbour Lights is open."))])
    assert example.input_ids[-1] == next(iter(tokenizer.stop_ids.values()))
    with pytest.raises(UserError, match="the model has no chat template") as e:
        tokenizer.render(TALK)
    assert "plain text" in e.value.problems[0].remedy


def test_without_any_stop_token_nothing_can_be_learnt(demo_folder: Path) -> None:
    changed(demo_folder, eos_token=None)
    changed(demo_folder, "config.json", eos_token_id=None)
    tokenizer = ChatTokenizer(demo_folder, OWN)  # generation_config.json names them by number, tokenizer.json by text
    assert tokenizer.chat.stop_tokens == ("<|end|>", "<|endoftext|>")
    (demo_folder / "generation_config.json").unlink()
    with pytest.raises(UserError, match="which token ends an answer"):
        ChatTokenizer(demo_folder, OWN)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000], ids=["cut off", "not UTF-8", "deep"])
def test_a_file_that_cannot_be_read_is_named(demo_folder: Path, name: str, content: bytes) -> None:
    (demo_folder / name).write_bytes(content)
    with pytest.raises(UserError, match="not JSON") as e:
        ChatTokenizer(demo_folder, OWN)
    assert e.value.problems[0].file == str(demo_folder / name)


def test_a_template_that_is_no_text_is_refused(demo_folder: Path) -> None:
    for content, says in ((b"\xff\xfe", "not UTF-8"), (b"x" * (5 << 20), "larger than")):
        (demo_folder / "chat_template.jinja").write_bytes(content)
        with pytest.raises(UserError, match=says):
            ChatTokenizer(demo_folder, OWN)
