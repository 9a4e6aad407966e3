"""Calibration of the predicted cost of drafted rounds."""

from __future__ import annotations

import pytest

from edge_runtime.planning.cost_calibration import MAX_FACTOR, MIN_FACTOR, PRIOR_ROUNDS, CostCalibration


def test_factor_moves_slowly_and_converges() -> None:
    calibration = CostCalibration()
    assert calibration.factor(0.1) == 1.0
    calibration.observe(0.12, 0.1)
    assert 1.0 < calibration.factor(0.1) < 1.01
    for _ in range(2000):
        calibration.observe(0.12, 0.1)
    assert calibration.factor(0.1) == pytest.approx(1.2, abs=0.02)


def test_counterfactual_rounds_count_like_executed_ones() -> None:
    executed, counterfactual = CostCalibration(), CostCalibration()
    executed.observe(PRIOR_ROUNDS * 0.11, PRIOR_ROUNDS * 0.1)
    counterfactual.observe_counterfactual(int(3 * PRIOR_ROUNDS), PRIOR_ROUNDS * 0.11, PRIOR_ROUNDS * 0.1)
    assert executed.factor(0.1) == counterfactual.factor(0.1) == pytest.approx(1.05)


def test_factor_is_bounded_and_fades_without_evidence() -> None:
    calibration = CostCalibration()
    for _ in range(100):
        calibration.observe(9.0, 0.1)
    assert calibration.factor(0.1) == MAX_FACTOR
    calibration.fade(30_000)
    assert calibration.factor(0.1) == pytest.approx(1.0)
    for _ in range(1000):
        calibration.observe(0.01, 0.1)
    assert calibration.factor(0.1) == MIN_FACTOR
