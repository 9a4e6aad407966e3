"""How much dearer rounds are than was told."""

from __future__ import annotations

import pytest

from edge_runtime.planning.cost_calibration import LEAST, MOST, ROUNDS, Bias


def test_a_few_rounds_say_little_and_many_say_all() -> None:
    bias = Bias()
    assert bias.factor(0.1) == 1.0
    bias.observe(0.12, 0.1)
    assert 1.0 < bias.factor(0.1) < 1.01
    for _ in range(2000):
        bias.observe(0.12, 0.1)
    assert bias.factor(0.1) == pytest.approx(1.2, abs=0.02)


def test_what_would_have_been_counts_like_what_was() -> None:
    drafted, watched = Bias(), Bias()
    drafted.observe(ROUNDS * 0.11, ROUNDS * 0.1)
    watched.watch(int(3 * ROUNDS), ROUNDS * 0.11, ROUNDS * 0.1)
    assert drafted.factor(0.1) == watched.factor(0.1) == pytest.approx(1.05)


def test_nobody_looking_it_fades_and_it_never_runs_away() -> None:
    bias = Bias()
    for _ in range(100):
        bias.observe(9.0, 0.1)
    assert bias.factor(0.1) == MOST
    bias.fade(30_000)
    assert bias.factor(0.1) == pytest.approx(1.0)
    for _ in range(1000):
        bias.observe(0.01, 0.1)
    assert bias.factor(0.1) == LEAST
