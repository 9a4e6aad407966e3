"""Ratios measured over several texts, with confidence intervals by the bootstrap over texts.

Positions of one text are correlated, so texts are resampled with replacement, not positions. A ratio is a ratio of sums
over texts. Two ratios over the same texts are compared on the same resamples, which removes the variance that the texts
have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Share of resamples inside an interval.
CONFIDENCE = 0.95

Floats = npt.NDArray[np.float64]
# (numerator, denominator) of each text, such as (accepted, judged positions).
Counts = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """A measured value and the bounds of its confidence interval (see CONFIDENCE)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class Bootstrap:
    """Resamples texts; every figure over the same number of texts uses the same resamples.

    Args:
        seed: seed of all resamples.
    """

    def __init__(self, resamples: int, seed: int) -> None:
        self._resamples, self._seed = resamples, seed
        self._weights: dict[int, Floats] = {}

    def ratio(self, counts: Counts) -> Interval | None:
        """Sum of numerators over sum of denominators; None if the denominators sum to 0."""
        if not counts:
            return None
        values = np.array(counts, np.float64)
        return self._interval(_divide_sums(values.sum(0)), _divide_sums(self._text_weights(len(values)) @ values))

    def ratio_of_ratios(self, numerator: Counts, denominator: Counts) -> Interval | None:
        """One ratio divided by another over the same texts (at least one, in the same order); None as for `ratio`."""
        first, second = np.array(numerator, np.float64), np.array(denominator, np.float64)
        weights = self._text_weights(len(first))
        with np.errstate(divide="ignore", invalid="ignore"):
            value = _divide_sums(first.sum(0)) / _divide_sums(second.sum(0))
            return self._interval(value, _divide_sums(weights @ first) / _divide_sums(weights @ second))

    def _text_weights(self, texts: int) -> Floats:
        """How often each text occurs in each resample, (resamples, texts)."""
        if texts not in self._weights:
            random = np.random.default_rng(self._seed)
            shares = np.full(texts, 1.0 / texts)
            self._weights[texts] = random.multinomial(texts, shares, self._resamples).astype(np.float64)
        return self._weights[texts]

    @staticmethod
    def _interval(value: Floats, resampled: Floats) -> Interval | None:
        # A resample may contain only texts without positions to count.
        resampled = resampled[np.isfinite(resampled)]
        if not np.isfinite(value) or not resampled.size:
            return None
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.percentile(resampled, [tail, 100 - tail])
        return Interval(round(float(value), 5), round(float(low), 5), round(float(high), 5))


def _divide_sums(sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Floats = np.asarray(sums[..., 0] / sums[..., 1])
    return ratio
