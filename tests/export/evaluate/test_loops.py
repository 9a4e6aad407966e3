"""The loop detector, compared with its definition position by position."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.evaluate.loops import MAX_PERIOD_TOKENS, MIN_LOOP_TOKENS, MIN_PERIODS, find_loops


def find_by_definition(ids: list[int]) -> list[bool]:
    """Check every stretch of every period."""
    in_loop = [False] * len(ids)
    for period in range(1, MAX_PERIOD_TOKENS + 1):
        for start in range(len(ids)):
            end = start + period
            while end < len(ids) and ids[end] == ids[end - period]:
                end += 1
            if end - start >= max(MIN_PERIODS * period, MIN_LOOP_TOKENS) and end > start + period:
                in_loop[start + period : end] = [True] * (end - start - period)
    return in_loop


pieces = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@pytest.mark.slow
@given(st.lists(st.tuples(pieces, st.integers(1, 12)), max_size=4))
def test_matches_the_definition(parts: list[tuple[list[int], int]]) -> None:
    ids = [token for piece, count in parts for token in piece * count]
    assert find_loops(ids).tolist() == find_by_definition(ids)


@pytest.mark.parametrize(
    ("ids", "repeating"),
    [
        ([], 0),
        ([7], 0),
        (list(range(100)), 0),
        # A line of dashes: all ids but the first.
        ([5] * MIN_LOOP_TOKENS, MIN_LOOP_TOKENS - 1),
        ([5] * (MIN_LOOP_TOKENS - 1), 0),
        # Three periods make a loop, two do not, however long the period is.
        (list(range(10)) * 3, 20),
        (list(range(40)) * 2, 0),
        (list(range(MAX_PERIOD_TOKENS)) * 3, 2 * MAX_PERIOD_TOKENS),
        (list(range(MAX_PERIOD_TOKENS + 1)) * 3, 0),
    ],
)
def test_size_limits_of_loops(ids: list[int], repeating: int) -> None:
    assert find_loops(ids).sum() == repeating


def test_the_text_after_a_loop_is_not_part_of_it() -> None:
    ids = [*range(50, 80), *[1, 2, 3] * 10, *range(100, 130)]
    inside = find_loops(ids)
    assert inside.sum() == 27
    assert not inside[:33].any() and inside[33:60].all() and not inside[60:].any()
