"""JSON of strangers: a value, or words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.foreign_json import CUT_DEPTH, MAX_DEPTH, TOO_DEEP, deeper, loads, loads_cut

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(VALUES)
def test_whatever_is_json_is_read(value: Any) -> None:
    text = json.dumps(value)
    assert loads(text) == value
    assert loads(text.encode()) == value
    assert loads_cut(text) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than 64 deep"),
        ("9" * 5000, "a number with too many digits"),
        ("[1,", "Expecting value"),
        (b"\xff", "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_what_is_none_is_said_in_words(text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says) as e:
        loads(text)
    assert "sys." not in str(e.value)


def test_sixty_four_levels_are_not_too_many() -> None:
    assert deeper(loads("[" * MAX_DEPTH + "]" * MAX_DEPTH), MAX_DEPTH - 1)
    assert not deeper(loads("[" * MAX_DEPTH + "]" * MAX_DEPTH), MAX_DEPTH)


@given(VALUES, st.integers(20_000, 21_000), st.sampled_from(['[["}]', '{"a\\"[": [', "["]))
def test_a_deep_part_takes_nothing_else_with_it(other: Any, depth: int, opening: str) -> None:
    opening = {'[["}]': '["}]", ['}.get(opening, opening)
    closing = {'["}]", [': "]]", '{"a\\"[": [': "]}", "[": "]"}[opening]
    text = f'{{"items": [{json.dumps(other)}, {opening * depth}1{closing * depth}, {json.dumps(other)}]}}'
    first, deep, last = loads_cut(text)["items"]
    assert first == last == other
    assert deeper(deep, MAX_DEPTH)
    assert not deeper(deep, CUT_DEPTH)
    assert TOO_DEEP in json.dumps(deep)
