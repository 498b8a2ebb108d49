"""Where a model's files say how a conversation is written and where an answer ends."""

from __future__ import annotations

from typing import Any

import pytest

from kaito_core.data.chat_format import chat_format, unnamed

DECODER = {
    "32000": {"content": "<|endoftext|>"},
    "32007": {"content": "<|end|>"},
    "32001": {"content": "<|assistant|>"},
}


def test_phi_3_ends_its_turns_with_the_token_that_its_template_writes() -> None:
    """Its tokenizer calls <|endoftext|> the end, and three tokens end an answer; <|end|> is what a conversation teaches."""
    tokenizer = {
        "eos_token": {"content": "<|endoftext|>"},
        "added_tokens_decoder": DECODER,
        "chat_template": "{{ m }}<|end|>{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    }
    found = chat_format(tokenizer, {"eos_token_id": [32000, 32001, 32007]}, {})
    assert found.stop_tokens == ("<|end|>", "<|endoftext|>", "<|assistant|>")
    assert found.template == tokenizer["chat_template"]


def test_a_template_of_its_own_file_counts_first() -> None:
    assert chat_format({"chat_template": "old"}, {}, {}, "new").template == "new"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "rag", "template": "r"}], ""),  # transformers takes none of several by itself but the one called so
        ([], ""), (None, ""), (3, ""), ([3, {"name": "x"}], ""),
    ],
)  # fmt: skip
def test_several_templates(template: Any, expected: str) -> None:
    assert chat_format({"chat_template": template}, {}, {}).template == expected


def test_the_stop_token_may_be_in_any_of_the_files() -> None:
    assert chat_format({"eos_token": "</s>"}, {}, {}).stop_tokens == ("</s>",)
    assert chat_format({}, {}, {"eos_token_id": 7}, "", {7: "<|im_end|>"}).stop_tokens == ("<|im_end|>",)
    assert chat_format({}, {}, {}).stop_tokens == ()


def test_when_tokenizer_json_has_to_be_asked() -> None:
    assert not unnamed({"added_tokens_decoder": DECODER}, [32007])
    assert unnamed({"added_tokens_decoder": DECODER}, [5])
    assert not unnamed({}, [])


@pytest.mark.parametrize(
    "value", [None, 3, "x", [1], {"a": 1}, {"1": None}, {"-1": {"content": "x"}}, {"²": {"content": "x"}}]
)
def test_files_with_anything_in_them(value: Any) -> None:
    chat_format(
        {"added_tokens_decoder": value, "eos_token": value, "chat_template": value}, {"eos_token_id": value}, {}
    )
