"""Many ways to ask one thing, written once.

A model that has seen each question in one wording only learns the wording. `(a|b)` in a pattern stands for a choice, so
three short patterns give a dozen real questions, and the openings below give each of them a hundred.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

_CHOICE = re.compile(r"\(([^()]*)\)")

#: What people put before a question. The empty ones keep half of the questions plain.
OPENINGS = (
    *[""] * 9,
    "Hi! ",
    "Hello. ",
    "Good morning. ",
    "Excuse me, ",
    "Please tell me: ",
    "A quick question: ",
    "I would like to know: ",
    "One more thing: ",
    "Can you help me? ",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question with the one answer that is right."""

    text: str
    answer: str


def expand(pattern: str) -> list[str]:
    """All sentences that a pattern with `(a|b)` choices stands for, in a fixed order.

    >>> expand("(What|Which) colour is it?")
    ['What colour is it?', 'Which colour is it?']
    """
    parts = _CHOICE.split(pattern)  # plain text at even places, choices at odd ones
    picks = itertools.product(*(part.split("|") if i % 2 else [part] for i, part in enumerate(parts)))
    sentences = ["".join(pick) for pick in picks]
    return [s.rstrip("?") + "." if s.startswith(("Tell me ", "Name ", "Calculate ")) else s for s in sentences]


def words(text: str) -> list[str]:
    """A list of words, written as a sentence is."""
    return text.split()


def decapitalise(text: str) -> str:
    """Lower the first letter, for a question that goes on after a comma or a colon; "I" stays."""
    return text if text.startswith(("I ", "I'")) else text[:1].lower() + text[1:]


def as_people_type(rng: random.Random, text: str, openings: tuple[str, ...] = OPENINGS) -> str:
    """The question with an opening and, now and then, without its question mark or in lower case."""
    opening = rng.choice(openings)
    if opening.endswith((", ", ": ")):
        text = decapitalise(text)
    text = opening + text
    roll = rng.random()
    if roll < 0.06:
        return text.lower()
    if roll < 0.12:
        return text.rstrip("?.")
    return text
