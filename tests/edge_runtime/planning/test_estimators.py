"""Robust estimators: bounds, step changes, drift, outliers, regimes and load curves."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.estimators import (
    MAX_X,
    PIECE_CENTERS,
    MonotoneCurve,
    RecentValues,
    RobustMean,
    TwoRegimeMean,
)

POSITIVE = st.floats(1e-6, 1e4)


@given(st.floats(0.0, 1e4), st.lists(st.tuples(POSITIVE, st.floats(0.5, 200.0)), min_size=1, max_size=60))
def test_mean_stays_within_the_observed_range(guess: float, observed: list[tuple[float, float]]) -> None:
    mean = RobustMean(guess)
    for value, weight in observed:
        mean.observe(value, weight)
    values = [value for value, _ in observed]
    assert mean.known
    assert math.isfinite(mean.value) and math.isfinite(mean.deviation) and mean.deviation >= 0
    rounding = 1e-9 * max(values)
    assert min(values) - rounding <= mean.value <= max(values) + rounding


def test_first_observation_replaces_the_guess() -> None:
    mean = RobustMean(30.0)
    mean.observe(7.0)
    assert mean.value == 7.0


def test_outlier_is_uncertain_at_once_and_a_change_after_a_long_gap() -> None:
    link, time = TwoRegimeMean(0.04), 0.0
    # Good for 8 s and bad for 2 s, observed ten times per second.
    for _ in range(300):
        link.observe(0.04 if time % 10.0 < 8.0 else 0.25, time)
        time += 0.1
    assert link.now.value == pytest.approx(0.25, rel=0.1) and link.persistence(time) > 0.8
    link.observe(0.04, time)
    assert link.now.value == pytest.approx(0.25, rel=0.1) and link.persistence(time) <= 0.5
    link.observe(0.04, time + 0.1)
    assert link.now.value == pytest.approx(0.04)
    link.observe(0.25, time + 30.0)
    assert link.now.value == pytest.approx(0.25)


def test_follows_a_step_change_within_two_observations() -> None:
    noise = random.Random(1)
    mean = RobustMean(1.0)
    for _ in range(50):
        mean.observe(0.055 + noise.uniform(-0.02, 0.02))
    changes = mean.changes
    for _ in range(2):
        mean.observe(0.120 + noise.uniform(-0.01, 0.01))
    assert mean.changes == changes + 1
    assert mean.value == pytest.approx(0.12, rel=0.1)


def test_single_outlier_hardly_moves_the_mean() -> None:
    mean = RobustMean(1.0)
    for _ in range(30):
        mean.observe(0.05)
    mean.observe(2.0)
    for _ in range(5):
        mean.observe(0.05)
    assert mean.changes == 0
    assert mean.value == pytest.approx(0.05, rel=0.05)


def test_link_that_never_changed_is_expected_to_persist() -> None:
    link = TwoRegimeMean(1.0)
    for index in range(40):
        link.observe(0.05, index * 0.1)
    assert link.forecast(1e6) == link.now.value
    assert link.persistence(1e6) == 1.0


def test_bursty_link_is_expected_to_return() -> None:
    link = TwoRegimeMean(1.0)
    time = 0.0
    for _ in range(6):
        for seconds, value in ((8.0, 0.04), (2.0, 0.25)):
            for _ in range(int(seconds / 0.2)):
                link.observe(value, time)
                time += 0.2
    # The link is in its bad regime and expected to recover soon.
    assert link.now.value == pytest.approx(0.25, rel=0.05)
    assert link.forecast(time) > link.forecast(time + 2.0) > link.forecast(time + 20.0)
    assert link.forecast(time + 20.0) == pytest.approx(0.04 * 0.8 + 0.25 * 0.2, rel=0.25)
    assert 1.0 <= link.expected_duration <= 4.0
    assert link.other_level == pytest.approx(0.04, rel=0.05)


@given(st.lists(st.tuples(POSITIVE, st.floats(0.0, 30.0)), max_size=60), st.floats(0.0, 100.0))
def test_forecasts_stay_within_the_observed_range(observed: list[tuple[float, float]], later: float) -> None:
    link = TwoRegimeMean(0.05)
    time = 0.0
    for value, pause in observed:
        time += pause
        link.observe(value, time)
    values = [value for value, _ in observed] or [0.05]
    assert 0.0 <= link.persistence(time + later) <= 1.0
    assert min(values) * (1 - 1e-6) <= link.forecast(time + later) <= max(values) * (1 + 1e-6)


def test_quantiles_of_recent_values() -> None:
    values = RecentValues(4)
    assert values.quantile(0.5, 7.0) == 7.0
    for value in (9.0, 1.0, 2.0, 3.0, 4.0):
        values.observe(value)
    assert values.quantile(0.0, 7.0) == 1.0
    assert values.quantile(0.99, 7.0) == 4.0
    values.keep_last(1)
    assert values.quantile(0.0, 7.0) == 4.0


@given(st.lists(st.tuples(st.integers(1, 72), st.floats(1e-4, 10.0)), max_size=40))
def test_curve_is_non_decreasing_and_positive(points: list[tuple[int, float]]) -> None:
    curve = MonotoneCurve(0.03, 0.02)
    for x, y in points:
        curve.observe(x, y)
    heights = [curve.at(x) for x in range(1, int(MAX_X) + 1)]
    assert all(math.isfinite(height) and height > 0 for height in heights)
    assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(heights))


def test_curve_learns_a_bent_line_without_detecting_load_changes() -> None:
    def true(x: float) -> float:
        return 12.4 + 3.4 * (x - 1) if x <= 5 else 26.0 + 1.575 * (x - 5)

    curve = MonotoneCurve(0.03, 0.02)
    for x in [1, 1, 2, 3, 9, 1, 5, 13, 4, 8, 22, 16] * 4:
        curve.observe(x, true(x))
    assert curve.changes == 0
    for x in (1, 2, 5, 8, 13, 20):
        assert curve.at(x) == pytest.approx(true(x), rel=0.12)


def test_load_change_scales_the_whole_curve() -> None:
    curve = MonotoneCurve(0.03, 0.02)
    for _ in range(5):
        for x in PIECE_CENTERS[:4]:
            curve.observe(x, 10.0 + x)
    for _ in range(2):
        curve.observe(PIECE_CENTERS[2], 3 * (10.0 + PIECE_CENTERS[2]))
    assert curve.changes == 1
    assert curve.change_factor == pytest.approx(3.0, rel=0.05)
    assert curve.at(1) == pytest.approx(33.0, rel=0.1)


def test_observation_that_outweighs_all_previous_ones_is_no_outlier() -> None:
    """A heavy observation is not held back because of a light one before it."""
    mean = RobustMean(1.0, memory=100.0, patience=50.0)
    mean.observe(1.0, 2.0)
    mean.observe(2.0, 20.0)
    assert not mean.uncertain and mean.value > 1.8


def test_long_run_on_one_side_is_a_drift() -> None:
    mean = RobustMean(1.0)
    for index in range(30):
        mean.observe((0.9, 1.1)[index % 2])
    for _ in range(10):
        mean.observe(0.87)
    assert mean.value == pytest.approx(0.87, abs=0.01)


def test_drift_within_the_noise_is_detected_at_its_fourth_observation() -> None:
    mean = RobustMean(0.12)
    for index in range(30):
        mean.observe((0.07, 0.11, 0.17, 0.13)[index % 4])
    assert mean.value == pytest.approx(0.12, abs=0.02)
    changes = mean.changes
    for value in (0.05, 0.07, 0.06, 0.06):
        mean.observe(value)
    assert mean.value == pytest.approx(0.06, abs=0.012)
    # None of them was an outlier.
    assert mean.changes == changes
    assert mean.deviation < 0.05
