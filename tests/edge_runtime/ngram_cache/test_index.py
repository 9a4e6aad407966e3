"""The hash chains of `NgramIndex`, compared with a brute-force search."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.ngram_cache import index
from edge_runtime.ngram_cache.index import BOUNDARY, MAX_MATCH_TOKENS, NGRAM_ORDERS, NgramIndex

texts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=6)
SIZE = 64


def filled(history: list[list[int]]) -> tuple[NgramIndex, list[int]]:
    """Return an index of these texts, and all tokens added to it."""
    ngrams, tokens = NgramIndex(SIZE), []
    for text in history:
        ngrams.add([BOUNDARY, *text])
        tokens += [BOUNDARY, *text]
    return ngrams, tokens


def common_suffix_length(one: list[int], other: list[int]) -> int:
    """Length of their common suffix in ids, at most MAX_MATCH_TOKENS."""
    length = 0
    while length < min(len(one), len(other), MAX_MATCH_TOKENS) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length


@pytest.mark.slow
@settings(max_examples=300)
@given(texts, st.lists(st.integers(0, 3), min_size=1, max_size=24))
def test_find_equals_a_brute_force_search(history: list[list[int]], end: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MAX_CHAIN_STEPS", 10**6)
        ngrams, tokens = filled(history)
        match = ngrams.find(end)
    weights: dict[int, float] = {}
    longest: dict[int, int] = {}
    for position in range(max(0, len(tokens) - SIZE + MAX_MATCH_TOKENS) + 1, len(tokens)):
        length, token = common_suffix_length(tokens[:position], end), tokens[position]
        if length >= NGRAM_ORDERS[-1] and token != BOUNDARY:
            weights[token] = weights.get(token, 0.0) + 4.0 ** min(length, 8)
            longest[token] = max(longest.get(token, 0), length)
    if match is None:
        assert not weights
    else:
        assert weights[match.token] == max(weights.values())
        assert match.length == longest[match.token]
        assert match.share == weights[match.token] / sum(weights.values())


@pytest.mark.slow
@settings(max_examples=200)
@given(texts, st.lists(st.integers(0, 3), min_size=1, max_size=24))
def test_a_match_occurs_at_its_position(history: list[list[int]], end: list[int]) -> None:
    ngrams, tokens = filled(history)
    match = ngrams.find(end)
    if match:
        assert tokens[match.position] == match.token
        assert common_suffix_length(tokens[: match.position], end) == match.length
        assert len(tokens) - match.position <= SIZE


def test_overwritten_tokens_are_forgotten() -> None:
    ngrams = NgramIndex(SIZE)
    ngrams.add([1, 2, 3, 4, 5, 9])
    assert ngrams.find([1, 2, 3, 4, 5]) == (9, 5, 1.0, 5)
    ngrams.add(range(100, 100 + 3 * SIZE))
    assert ngrams.find([1, 2, 3, 4, 5]) is None
    match = ngrams.find([100 + 3 * SIZE - 5, 100 + 3 * SIZE - 4])
    assert match is not None
    assert match.token == 100 + 3 * SIZE - 3
    assert len(ngrams._tokens) == SIZE


def test_a_text_too_short_for_a_match_has_none() -> None:
    ngrams = NgramIndex(SIZE)
    ngrams.add([1, 2, 1, 2])
    assert ngrams.find([]) is None
    assert ngrams.find([1]) is None
    assert ngrams.find([1, 2]) is not None
