"""Tokens as text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaito_preset_demo import MODEL_DIR
from kaito_runtime_transformers.text import Text

tokenizers = pytest.importorskip("tokenizers")
TOKENIZER = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
words = st.text(st.sampled_from("ab .\n<|é🙂"), max_size=30)


@settings(max_examples=200)
@given(words, st.lists(st.text(st.sampled_from("ab ."), min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_the_pieces_are_the_text_up_to_the_stop_string_that_is_complete_first(
    text: str, stops: list[str], step: int
) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    answer = Text(TOKENIZER, stops)
    pieces = []
    for at in range(0, len(ids), step):
        pieces.append(answer.feed(ids[at : at + step]))
        if answer.stopped:
            break
    pieces.append(answer.end())
    whole = TOKENIZER.decode(ids)
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    assert "".join(pieces) == (whole[: min(ends)[1]] if ends else whole)
    assert answer.stopped == bool(ends)


def test_a_character_of_several_tokens_is_given_out_whole() -> None:
    ids = TOKENIZER.encode("🙂!", add_special_tokens=False).ids
    answer = Text(TOKENIZER)
    pieces = [answer.feed([i]) for i in ids]
    assert "".join(pieces) == "🙂!"
    assert "\ufffd" not in "".join(pieces)
