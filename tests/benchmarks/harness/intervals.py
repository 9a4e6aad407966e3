"""Medians, and ratios of medians, with 95 % bootstrap intervals over repetitions (percentile method)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cloud_verifier.acceptance.bootstrap import CONFIDENCE, Interval

RESAMPLES = 2000


def median_interval(samples: Sequence[float]) -> Interval:
    """Return the median of at least one sample, with its interval."""
    return _interval(float(np.median(samples)), _resampled_medians(samples, seed=0))


def ratio_interval(new: Sequence[float], old: Sequence[float]) -> Interval:
    """Return the median of `new` divided by that of `old`, with its interval. The old median must not be 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _resampled_medians(new, seed=1) / _resampled_medians(old, seed=2)
    return _interval(float(np.median(new) / np.median(old)), ratios[np.isfinite(ratios)])


def _resampled_medians(samples: Sequence[float], seed: int) -> npt.NDArray[np.float64]:
    values = np.asarray(samples, np.float64)
    chosen = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    medians: npt.NDArray[np.float64] = np.median(values[chosen], axis=1)
    return medians


def _interval(value: float, resampled: npt.NDArray[np.float64]) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(value, float(low), float(high))
