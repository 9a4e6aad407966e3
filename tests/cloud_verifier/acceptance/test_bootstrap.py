"""Ratios over texts and their intervals."""

from __future__ import annotations

import numpy as np

from cloud_verifier.acceptance.bootstrap import Bootstrap


def test_a_ratio_is_that_of_sums_and_lies_in_its_interval() -> None:
    counts = [(float(i % 7), 10.0 + i) for i in range(30)]
    found = Bootstrap(500, 0).ratio(counts)
    assert found is not None
    assert found.value == round(sum(a for a, _ in counts) / sum(b for _, b in counts), 5)
    assert found.low < found.value < found.high
    assert Bootstrap(500, 0).ratio(counts) == found
    assert Bootstrap(500, 1).ratio(counts) != found


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        counts = [(float(random.binomial(20, 0.7)), 20.0) for _ in range(40)]
        found = Bootstrap(200, seed).ratio(counts)
        assert found is not None
        hits += found.low <= 0.7 <= found.high
    assert 175 <= hits <= 199


def test_two_ratios_over_the_same_texts_are_compared_on_the_same_draws() -> None:
    easy_and_hard = [(99, 100), (10, 100), (95, 100), (20, 100)]
    found = Bootstrap(500, 0).of_ratios([(0.9 * a, b) for a, b in easy_and_hard], easy_and_hard)
    assert found is not None
    # Texts differ widely, the two do not: each text is a tenth worse.
    assert (found.value, found.low, found.high) == (0.9, 0.9, 0.9)


def test_nothing_counted_is_no_figure() -> None:
    bootstrap = Bootstrap(50, 0)
    assert bootstrap.ratio([(0, 0), (0, 0)]) is None
    assert bootstrap.ratio([]) is None
    assert bootstrap.of_ratios([(1, 2)], [(0, 2)]) is None
