"""What rows mean, without being told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.data.formats import Conversation, Text, WrongRow, detect, normalise, samples
from kaito_core.data.rows import Row
from kaito_core.problems import UserError

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row("f.jsonl", n, v) for n, v in enumerate(values, 1)]


def spoken(values: dict[str, Any], config: dict[str, Any] | None = None) -> list[tuple[str, str]] | str:
    _, found = samples(rows(values), config or {})
    ((_, sample),) = found
    return sample.text if isinstance(sample, Text) else [(m.role, m.content) for m in sample.messages]


QA = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"messages": [ASK, SAY]}, QA),
        ({"messages": json.dumps([ASK, SAY])}, QA),
        ({"messages": [{"role": "system", "content": "s"}, ASK, SAY]}, [("system", "s"), *QA]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, SAY]}, QA),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
        ({"instruction": "q", "input": "", "output": "a"}, QA),
        ({"instruction": "q", "input": "more", "output": "a"}, [("user", "q\n\nmore"), ("assistant", "a")]),
        ({"instruction": "q", "context": "more", "response": "a", "category": "x"}, [("user", "q\n\nmore"), ("assistant", "a")]),
        ({"prompt": "q", "completion": "a"}, QA),
        ({"prompt": [ASK], "completion": [SAY]}, QA),
        ({"question": "q", "answer": "a", "id": 3}, QA),
        ({"system": "s", "prompt": "q", "response": "a"}, [("system", "s"), *QA]),
        ({"text": "plain"}, "plain"),
    ],
)  # fmt: skip
def test_known_formats_are_found(values: dict[str, Any], expected: Any) -> None:
    """KAITO declares column settings and uses none of them (section 2.4)."""
    assert spoken(values) == expected


@pytest.mark.parametrize(
    ("config", "values", "expected"),
    [
        ({"response_column": "text"}, {"messages": [ASK, SAY], "text": "t"}, QA),
        ({"response_column": "text"}, {"text": "t"}, "t"),
        ({"response_column": "body"}, {"body": "t", "messages": []}, "t"),
        ({"messages_column": "chat"}, {"chat": [ASK, SAY]}, QA),
        ({"context_column": "x", "response_column": "y"}, {"x": "q", "y": "a"}, QA),
        ({"prompt_column": "x", "response_column": "y", "system_column": "z"}, {"x": "q", "y": "a", "z": "s"}, [("system", "s"), *QA]),
        ({"prompt_column": "x", "context_column": "c", "response_column": "y"}, {"x": "q", "y": "a", "c": "m"},
         [("user", "q\n\nm"), ("assistant", "a")]),
    ],
)  # fmt: skip
def test_columns_can_be_named(config: dict[str, str], values: dict[str, Any], expected: Any) -> None:
    assert spoken(values, config) == expected


def test_a_named_column_that_is_not_there_is_an_error_with_those_that_are() -> None:
    with pytest.raises(UserError, match="DatasetConfig names `y`, and the data has the columns `x`, `z`"):
        detect(rows({"x": "q", "z": "a"}), {"context_column": "x", "response_column": "y"})


def test_unknown_columns_are_listed_with_what_was_expected() -> None:
    with pytest.raises(UserError, match="columns `foo`; expected one of") as e:
        detect(rows({"foo": 1}), {})
    assert "messages_column" in e.value.problems[0].remedy


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "found nothing in 'messages'"),
        ("hello", "found a text"),
        ([], "found no message"),
        ([SAY["content"]], "found a text at messages[0]"),
        ([ASK], "no message of the assistant"),
        ([ASK, SAY, ASK], "the last message is the user's"),
        ([ASK, {"role": "system", "content": "s"}, SAY], "system message at place 2"),
        ([{"role": "tool", "content": "x"}, SAY], "role 'tool'"),
        ([ASK, {"role": "assistant", "content": None}], "found nothing as the content"),
        ([ASK, {"role": "assistant", "content": None, "tool_calls": [1]}], "tool call"),
        ([ASK, {"role": "assistant", "content": "\ud800"}], "half a character"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, SAY], "content part of type 'image_url'"),
    ],
)
def test_a_wrong_row_says_what_was_found_and_expected(messages: Any, words: str) -> None:
    with pytest.raises(WrongRow) as e:
        normalise({"messages": messages}, detect(rows({"messages": [ASK, SAY]}), {}))
    assert words in str(e.value)
    assert "expected" in str(e.value) or "kaito trains" in str(e.value)


def test_wrong_rows_are_collected_up_to_twenty() -> None:
    good, bad = {"messages": [ASK, SAY]}, {"messages": [ASK]}
    _, found = samples(rows(good, bad, good, bad), {})
    got = []
    with pytest.raises(UserError) as e:
        got.extend(found)
    assert len(got) == 2
    assert [(p.file, p.message[:5]) for p in e.value.problems] == [("f.jsonl", "row 2"), ("f.jsonl", "row 4")]
    with pytest.raises(UserError) as e:
        list(samples(rows(good, *[bad] * 50), {})[1])
    assert len(e.value.problems) == 21


def test_each_file_may_have_a_format_of_its_own() -> None:
    chat, alpaca = Row("a.jsonl", 1, {"messages": [ASK, SAY]}), Row("b.csv", 1, {"instruction": "q", "output": "a"})
    found, read = samples([chat, alpaca], {})
    assert [
        [(m.role, m.content) for m in sample.messages] for _, sample in read if isinstance(sample, Conversation)
    ] == [QA, QA]
    assert {file: form.name for file, form in found.forms.items()} == {"a.jsonl": "messages", "b.csv": "alpaca"}


def test_an_unknown_file_and_a_wrong_row_elsewhere_are_told_together() -> None:
    with pytest.raises(UserError) as e:
        list(samples([Row("a.csv", 1, {"foo": "x"}), Row("b.jsonl", 1, {"messages": [ASK]})], {})[1])
    assert [p.file for p in e.value.problems] == ["a.csv", "b.jsonl"]


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "type"]), x)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["messages", "conversations", "instruction", "output", "prompt", "completion", "text"]),
        json_like,
    )
)
def test_any_row_is_a_sample_or_a_user_error(values: dict[str, Any]) -> None:
    try:
        _, found = samples(rows(values), {})
        for _, sample in found:
            assert isinstance(sample, Conversation | Text)
    except UserError:
        pass
