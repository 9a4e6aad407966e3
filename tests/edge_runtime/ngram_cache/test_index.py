"""The hash chains beside a plain dictionary of what followed what."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.ngram_cache import index
from edge_runtime.ngram_cache.index import BOUNDARY, LONGEST, ORDERS, Trace

texts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=6)
SIZE = 64


def filled(history: list[list[int]]) -> tuple[Trace, list[int]]:
    """A trace of these texts, and the tokens that it was given."""
    made, tokens = Trace(SIZE), []
    for text in history:
        made.add([BOUNDARY, *text])
        tokens += [BOUNDARY, *text]
    return made, tokens


def common(one: list[int], other: list[int]) -> int:
    """How many last ids they share, up to LONGEST."""
    length = 0
    while length < min(len(one), len(other), LONGEST) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length


@settings(max_examples=300, deadline=None)
@given(texts, st.lists(st.integers(0, 3), min_size=1, max_size=24))
def test_finds_what_a_dictionary_of_counts_finds(history: list[list[int]], end: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "PLACES", 10**6)
        made, tokens = filled(history)
        match = made.find(end)
    weights: dict[int, float] = {}
    longest: dict[int, int] = {}
    for place in range(max(0, len(tokens) - SIZE + LONGEST) + 1, len(tokens)):
        length, token = common(tokens[:place], end), tokens[place]
        if length >= ORDERS[-1] and token != BOUNDARY:
            weights[token] = weights.get(token, 0.0) + 4.0 ** min(length, 8)
            longest[token] = max(longest.get(token, 0), length)
    if match is None:
        assert not weights
    else:
        assert weights[match.token] == max(weights.values())
        assert match.length == longest[match.token]
        assert match.share == weights[match.token] / sum(weights.values())


@settings(max_examples=200, deadline=None)
@given(texts, st.lists(st.integers(0, 3), min_size=1, max_size=24))
def test_what_is_found_is_there(history: list[list[int]], end: list[int]) -> None:
    made, tokens = filled(history)
    match = made.find(end)
    if match:
        assert tokens[match.place] == match.token
        assert common(tokens[: match.place], end) == match.length
        assert len(tokens) - match.place <= SIZE


def test_the_latest_counts_and_the_old_is_forgotten() -> None:
    made = Trace(SIZE)
    made.add([1, 2, 3, 4, 5, 9])
    assert made.find([1, 2, 3, 4, 5]) == (9, 5, 1.0, 5)
    made.add(range(100, 100 + 3 * SIZE))
    assert made.find([1, 2, 3, 4, 5]) is None
    match = made.find([100 + 3 * SIZE - 5, 100 + 3 * SIZE - 4])
    assert match is not None
    assert match.token == 100 + 3 * SIZE - 3
    assert len(made._tokens) == SIZE


def test_a_text_too_short_for_a_match_has_none() -> None:
    made = Trace(SIZE)
    made.add([1, 2, 1, 2])
    assert made.find([]) is None
    assert made.find([1]) is None
    assert made.find([1, 2]) is not None
