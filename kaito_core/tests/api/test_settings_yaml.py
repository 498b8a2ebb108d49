"""The settings inside a ConfigMap: read as KAITO reads them, in Python, and what is wrong is said with its place."""

from __future__ import annotations

import math
from datetime import date
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from kaito_core.api.yaml_source import parse_settings

WORDS = ("yes", "No", "on", "OFF", "y", "n", "true", "False", "null", "~", "", "0o17", "017", "08", "0x1F", "0b101", "1_000", "+3", "-0",
         "1e-4", "1e4", "1.0e-4", "1.5e3", "1.", ".5", "-.5", "1.5e+3", "=", "<", "0_", "1:30x", "3.0.1", "NaN", "inf", "2e", "text")  # fmt: skip


def as_pyyaml(text: str) -> Any:
    """What ``yaml.safe_load`` makes of it; the text itself where we differ on purpose."""
    try:
        value = yaml.safe_load(f"a: {text}")["a"]
    except (yaml.YAMLError, ValueError):
        return None
    return text if isinstance(value, date) or (":" in text and isinstance(value, int | float)) else value


@given(st.one_of(st.sampled_from(WORDS), st.text("0123456789_.eE+-:xbo", min_size=1, max_size=8)))
@example("2024-01-01")
@example("1:30")
@example("12:30:45.5")
def test_a_plain_value_is_what_python_takes_it_for(text: str) -> None:
    expected = as_pyyaml(text)
    value, problems = parse_settings(f"a: {text}\n")
    if isinstance(expected, float) and not math.isfinite(expected):
        assert problems
    elif expected is not None and not problems:
        assert value == {"a": expected}
        assert type(value["a"]) is type(expected)
    elif expected is not None:
        assert "_" in text  # 0b_ and the like, on which PyYAML itself breaks


@pytest.mark.parametrize(("text", "value"), [
    ("a: 1:30", "1:30"), ("a: 190:20:30", "190:20:30"), ("a: 1:30.5", "1:30.5"), ("a: 2024-01-01", "2024-01-01"), ("a: 1e-4", "1e-4"),
    ("a: yes", True), ("a: y", "y"), ("a: 010", 8), ("a: !!str 1", "1"), ("a: !!float 1", 1.0), ("b: &b {c: 1}\na: {<<: *b}", {"c": 1}),
])  # fmt: skip
def test_values(text: str, value: object) -> None:
    found, problems = parse_settings(text)
    assert not problems
    assert found["a"] == value
    assert type(found["a"]) is type(value)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null", "---\na: 1\n---\n"])
def test_one_document_or_none(text: str) -> None:
    value, problems = parse_settings(text)
    assert not problems
    assert value == (yaml.safe_load(text) if text.count("---") < 2 else {"a": 1})


@pytest.mark.parametrize(("text", "says", "place"), [
    ("a: 1\nb: .inf", "has no place in JSON", (2, 4)),
    ("a: 1\na: 2", r"given twice \(first in line 1\)", (2, 1)),
    ("a: 1\n---\nb: 2", "more than one document", (3, 1)),
    ("a: [1", "is not YAML", (1, 4)),
    ("a: *b", "is not YAML", (1, 4)),
    ("a: !!binary QQ==", "the tag !!binary is not allowed", (1, 4)),
    ("a:\n  b: " + "9" * 65, "too many digits", (2, 6)),
    ("a: " + "[" * 65 + "]" * 65, "nested more than 64 deep", (1, 67)),
    ("a: [" + "1," * 5000 + "]", "too many values", (1, 9999)),
])  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(text: str, says: str, place: tuple[int, int]) -> None:
    import re

    _, problems = parse_settings(text)
    assert re.search(says, problems[0].message)
    assert (problems[0].line, problems[0].column) == place
    assert problems[0].remedy
