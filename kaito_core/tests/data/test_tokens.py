"""Which tokens carry loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest

from kaito_core.data.formats import Conversation, Message, Text
from kaito_core.data.tokens import ChatTokenizer
from kaito_core.plugins.types import Preset
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
