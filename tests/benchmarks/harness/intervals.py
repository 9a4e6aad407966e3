"""Quantiles, and ratios of medians and means, with 95 % bootstrap intervals over repetitions (percentile method)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cloud_verifier.acceptance.bootstrap import CONFIDENCE, Interval

RESAMPLES = 2000


def median_interval(samples: Sequence[float]) -> Interval:
    """Return the median of at least one sample, with its interval."""
    return quantile_interval(samples, 0.5)


def quantile_interval(samples: Sequence[float], quantile: float) -> Interval:
    """Return a quantile of at least one sample, with its interval."""
    resampled = np.quantile(np.asarray(samples, np.float64)[_choose(len(samples), seed=0)], quantile, axis=1)
    return _interval(float(np.quantile(samples, quantile)), resampled)


def paired_ratio_interval(new: Sequence[float], old: Sequence[float]) -> Interval:
    """Return the mean of `new` divided by that of `old`, whose samples belong together by index.

    Samples of one repetition are of the same prompt, so that what differs among prompts cancels out. The mean of `old`
    must not be 0.
    """
    chosen = _choose(len(new), seed=0)
    numerators, denominators = np.asarray(new, np.float64), np.asarray(old, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = numerators[chosen].mean(axis=1) / denominators[chosen].mean(axis=1)
    return _interval(float(numerators.mean() / denominators.mean()), ratios[np.isfinite(ratios)])


def ratio_interval(new: Sequence[float], old: Sequence[float]) -> Interval:
    """Return the median of `new` divided by that of `old`, with its interval. The old median must not be 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _resampled_medians(new, seed=1) / _resampled_medians(old, seed=2)
    return _interval(float(np.median(new) / np.median(old)), ratios[np.isfinite(ratios)])


def _resampled_medians(samples: Sequence[float], seed: int) -> npt.NDArray[np.float64]:
    medians: npt.NDArray[np.float64] = np.median(np.asarray(samples, np.float64)[_choose(len(samples), seed)], axis=1)
    return medians


def _choose(count: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices of all resamples: (RESAMPLES, count)."""
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def _interval(value: float, resampled: npt.NDArray[np.float64]) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(value, float(low), float(high))
