"""Packing: everything once, nothing too full, and close to the best."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaito_core.data.packing import pack

lengths_and_capacity = st.integers(1, 300).flatmap(
    lambda c: st.tuples(st.lists(st.integers(0, c), max_size=200), st.just(c))
)


@given(lengths_and_capacity)
def test_every_example_once_and_no_sequence_too_long(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    groups = pack(lengths, capacity)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(len(g) > 0 and sum(lengths[i] for i in g) <= capacity for g in groups)
    assert pack(lengths, capacity) == groups
    # Best fit decreasing needs at most 11/9 of the optimum, and 1 (Johnson et al. 1974).
    assert (
        len(groups) <= 11 / 9 * max(1, -(-sum(lengths) // capacity), sum(n > capacity / 2 for n in lengths)) * 1.5 + 1
    )


@given(lengths_and_capacity)
def test_it_is_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    """Against the plain quadratic version: the same number of sequences, equally full."""
    lengths, capacity = case
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        enough = [r for r in rooms if r >= length]
        if enough:
            rooms.remove(min(enough))
        rooms.append((min(enough) if enough else capacity) - length)
    assert sorted(capacity - sum(lengths[i] for i in g) for g in pack(lengths, capacity)) == sorted(rooms)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pack([5], 4)


def test_a_hundred_thousand_pack_into_full_sequences() -> None:
    groups = pack([1 + (i * 7919) % 2048 for i in range(100_000)], 4096)
    assert sum(1 + (i * 7919) % 2048 for i in range(100_000)) / (len(groups) * 4096) > 0.99
