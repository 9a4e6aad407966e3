"""Running levels: bounded by what was observed, quick after a step, patient with outliers."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.estimators import CENTRES, WIDEST, Curve, Level, Recent, Wandering

POSITIVE = st.floats(1e-6, 1e4)


@given(st.floats(0.0, 1e4), st.lists(st.tuples(POSITIVE, st.floats(0.5, 200.0)), min_size=1, max_size=60))
def test_a_level_stays_within_what_was_observed(guess: float, observed: list[tuple[float, float]]) -> None:
    level = Level(guess)
    for value, weight in observed:
        level.observe(value, weight)
    values = [value for value, _ in observed]
    assert level.known
    assert math.isfinite(level.value) and math.isfinite(level.deviation) and level.deviation >= 0
    rounding = 1e-9 * max(values)
    assert min(values) - rounding <= level.value <= max(values) + rounding


def test_what_is_seen_first_replaces_the_guess() -> None:
    level = Level(30.0)
    level.observe(7.0)
    assert level.value == 7.0


def test_an_odd_observation_leaves_it_open_and_after_a_long_silence_it_is_a_change() -> None:
    link, time = Wandering(0.04), 0.0
    # Good for 8 s and bad for 2 s, seen ten times a second.
    for _ in range(300):
        link.observe(0.04 if time % 10.0 < 8.0 else 0.25, time)
        time += 0.1
    assert link.now.value == pytest.approx(0.25, rel=0.1) and link.still(time) > 0.8
    link.observe(0.04, time)
    assert link.now.value == pytest.approx(0.25, rel=0.1) and link.still(time) <= 0.5
    link.observe(0.04, time + 0.1)
    assert link.now.value == pytest.approx(0.04)
    link.observe(0.25, time + 30.0)
    assert link.now.value == pytest.approx(0.25)


def test_a_step_change_is_followed_within_two_observations() -> None:
    noise = random.Random(1)
    level = Level(1.0)
    for _ in range(50):
        level.observe(0.055 + noise.uniform(-0.02, 0.02))
    changes = level.changes
    for _ in range(2):
        level.observe(0.120 + noise.uniform(-0.01, 0.01))
    assert level.changes == changes + 1
    assert level.value == pytest.approx(0.12, rel=0.1)


def test_one_outlier_hardly_moves_it() -> None:
    level = Level(1.0)
    for _ in range(30):
        level.observe(0.05)
    level.observe(2.0)
    for _ in range(5):
        level.observe(0.05)
    assert level.changes == 0
    assert level.value == pytest.approx(0.05, rel=0.05)


def test_a_link_that_never_changed_is_expected_to_stay() -> None:
    link = Wandering(1.0)
    for index in range(40):
        link.observe(0.05, index * 0.1)
    assert link.at(1e6) == link.now.value
    assert link.still(1e6) == 1.0


def test_a_link_that_comes_and_goes_is_expected_to_come_back() -> None:
    link = Wandering(1.0)
    time = 0.0
    for _ in range(6):
        for seconds, value in ((8.0, 0.04), (2.0, 0.25)):
            for _ in range(int(seconds / 0.2)):
                link.observe(value, time)
                time += 0.2
    # It is bad just now, and soon will not be.
    assert link.now.value == pytest.approx(0.25, rel=0.05)
    assert link.at(time) > link.at(time + 2.0) > link.at(time + 20.0)
    assert link.at(time + 20.0) == pytest.approx(0.04 * 0.8 + 0.25 * 0.2, rel=0.25)
    assert 1.0 <= link.stays <= 4.0
    assert link.other == pytest.approx(0.04, rel=0.05)


@given(st.lists(st.tuples(POSITIVE, st.floats(0.0, 30.0)), max_size=60), st.floats(0.0, 100.0))
def test_a_wandering_level_is_always_a_number(observed: list[tuple[float, float]], later: float) -> None:
    link = Wandering(0.05)
    time = 0.0
    for value, pause in observed:
        time += pause
        link.observe(value, time)
    values = [value for value, _ in observed] or [0.05]
    assert 0.0 <= link.still(time + later) <= 1.0
    assert min(values) * (1 - 1e-6) <= link.at(time + later) <= max(values) * (1 + 1e-6)


def test_quantiles() -> None:
    recent = Recent(4)
    assert recent.quantile(0.5, 7.0) == 7.0
    for value in (9.0, 1.0, 2.0, 3.0, 4.0):
        recent.observe(value)
    assert recent.quantile(0.0, 7.0) == 1.0
    assert recent.quantile(0.99, 7.0) == 4.0
    recent.forget(1)
    assert recent.quantile(0.0, 7.0) == 4.0


@given(st.lists(st.tuples(st.integers(1, 72), st.floats(1e-4, 10.0)), max_size=40))
def test_a_curve_never_falls_and_is_positive(points: list[tuple[int, float]]) -> None:
    curve = Curve(0.03, 0.02)
    for x, y in points:
        curve.observe(x, y)
    heights = [curve.at(x) for x in range(1, int(WIDEST) + 1)]
    assert all(math.isfinite(height) and height > 0 for height in heights)
    assert all(low <= high * (1 + 1e-9) for low, high in itertools.pairwise(heights))


def test_a_curve_learns_a_bent_line_and_does_not_take_width_for_load() -> None:
    def true(x: float) -> float:
        return 12.4 + 3.4 * (x - 1) if x <= 5 else 26.0 + 1.575 * (x - 5)

    curve = Curve(0.03, 0.02)
    for x in [1, 1, 2, 3, 9, 1, 5, 13, 4, 8, 22, 16] * 4:
        curve.observe(x, true(x))
    assert curve.changes == 0
    for x in (1, 2, 5, 8, 13, 20):
        assert curve.at(x) == pytest.approx(true(x), rel=0.12)


def test_a_change_of_load_moves_the_whole_curve() -> None:
    curve = Curve(0.03, 0.02)
    for _ in range(5):
        for x in CENTRES[:4]:
            curve.observe(x, 10.0 + x)
    for _ in range(2):
        curve.observe(CENTRES[2], 3 * (10.0 + CENTRES[2]))
    assert curve.changes == 1
    assert curve.factor == pytest.approx(3.0, rel=0.05)
    assert curve.at(1) == pytest.approx(33.0, rel=0.1)


def test_what_weighs_more_than_all_before_is_never_odd() -> None:
    """A long observation is not held up by a short one that came first."""
    level = Level(1.0, memory=100.0, patience=50.0)
    level.observe(1.0, 2.0)
    level.observe(2.0, 20.0)
    assert not level.doubtful and level.value > 1.8


def test_a_long_run_on_one_side_is_a_change_however_noisy() -> None:
    level = Level(1.0)
    for index in range(30):
        level.observe((0.9, 1.1)[index % 2])
    for _ in range(10):
        level.observe(0.87)
    assert level.value == pytest.approx(0.87, abs=0.01)


def test_a_change_within_the_noise_is_known_by_its_fourth_observation() -> None:
    level = Level(0.12)
    for index in range(30):
        level.observe((0.07, 0.11, 0.17, 0.13)[index % 4])
    assert level.value == pytest.approx(0.12, abs=0.02)
    changes = level.changes
    for value in (0.05, 0.07, 0.06, 0.06):
        level.observe(value)
    assert level.value == pytest.approx(0.06, abs=0.012)
    # None of them was odd.
    assert level.changes == changes
    assert level.deviation < 0.05
