"""Ratios over texts and their bootstrap intervals."""

from __future__ import annotations

import numpy as np

from cloud_verifier.acceptance.bootstrap import Bootstrap


def test_ratio_of_sums_lies_in_its_interval() -> None:
    counts = [(float(i % 7), 10.0 + i) for i in range(30)]
    interval = Bootstrap(500, 0).ratio(counts)
    assert interval is not None
    assert interval.value == round(sum(a for a, _ in counts) / sum(b for _, b in counts), 5)
    assert interval.low < interval.value < interval.high
    assert Bootstrap(500, 0).ratio(counts) == interval
    assert Bootstrap(500, 1).ratio(counts) != interval


def test_coverage_is_close_to_the_stated_confidence() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        counts = [(float(random.binomial(20, 0.7)), 20.0) for _ in range(40)]
        interval = Bootstrap(200, seed).ratio(counts)
        assert interval is not None
        covered += interval.low <= 0.7 <= interval.high
    assert 175 <= covered <= 199


def test_two_ratios_are_compared_on_the_same_resamples() -> None:
    easy_and_hard = [(99, 100), (10, 100), (95, 100), (20, 100)]
    interval = Bootstrap(500, 0).ratio_of_ratios([(0.9 * a, b) for a, b in easy_and_hard], easy_and_hard)
    assert interval is not None
    # The texts differ widely, but each text is exactly a tenth worse, so the interval is a point.
    assert (interval.value, interval.low, interval.high) == (0.9, 0.9, 0.9)


def test_no_counts_give_no_ratio() -> None:
    bootstrap = Bootstrap(50, 0)
    assert bootstrap.ratio([(0, 0), (0, 0)]) is None
    assert bootstrap.ratio([]) is None
    assert bootstrap.ratio_of_ratios([(1, 2)], [(0, 2)]) is None
