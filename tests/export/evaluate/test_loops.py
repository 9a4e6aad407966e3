"""The loop detector: against its definition, position by position."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.evaluate.loops import LONGEST_PERIOD, REPEATS, SHORTEST, looped


def by_definition(ids: list[int]) -> list[bool]:
    """Every stretch of every period, written out."""
    found = [False] * len(ids)
    for period in range(1, LONGEST_PERIOD + 1):
        for start in range(len(ids)):
            end = start + period
            while end < len(ids) and ids[end] == ids[end - period]:
                end += 1
            if end - start >= max(REPEATS * period, SHORTEST) and end > start + period:
                found[start + period : end] = [True] * (end - start - period)
    return found


pieces = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(st.lists(st.tuples(pieces, st.integers(1, 12)), max_size=4))
def test_it_finds_what_the_definition_says(parts: list[tuple[list[int], int]]) -> None:
    ids = [token for piece, count in parts for token in piece * count]
    assert looped(ids).tolist() == by_definition(ids)


@pytest.mark.parametrize(
    ("ids", "repeating"),
    [
        ([], 0),
        ([7], 0),
        (list(range(100)), 0),
        # A line of dashes: all but the first.
        ([5] * SHORTEST, SHORTEST - 1),
        ([5] * (SHORTEST - 1), 0),
        # Ten ids three times make a loop, twice do not, however long the period.
        (list(range(10)) * 3, 20),
        (list(range(40)) * 2, 0),
        (list(range(LONGEST_PERIOD)) * 3, 2 * LONGEST_PERIOD),
        (list(range(LONGEST_PERIOD + 1)) * 3, 0),
    ],
)
def test_what_counts_as_a_loop(ids: list[int], repeating: int) -> None:
    assert looped(ids).sum() == repeating


def test_a_text_may_leave_a_loop_again() -> None:
    ids = [*range(50, 80), *[1, 2, 3] * 10, *range(100, 130)]
    inside = looped(ids)
    assert inside.sum() == 27
    assert not inside[:33].any() and inside[33:60].all() and not inside[60:].any()
