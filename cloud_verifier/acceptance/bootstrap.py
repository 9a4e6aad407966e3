"""Ratios measured over several texts, and how far chance may have moved them: the bootstrap over texts.

Positions of one text are alike, so texts are what is drawn with replacement. A ratio is that of sums over texts; two
ratios over the same texts are compared on the same draws, which takes out what the texts have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Share of draws within an interval.
CONFIDENCE = 0.95

Floats = npt.NDArray[np.float64]
# Of each text: what is counted, and out of how much.
Counts = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """A measured figure, and between which figures CONFIDENCE of the draws lie."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class Bootstrap:
    """Draws of texts, the same for every figure over as many texts.

    Args:
        resamples: draws.
        seed: of all of them.
    """

    def __init__(self, resamples: int, seed: int) -> None:
        self._resamples, self._seed = resamples, seed
        self._weights: dict[int, Floats] = {}

    def ratio(self, counts: Counts) -> Interval | None:
        """Sum over sum; None where there is nothing to divide by."""
        if not counts:
            return None
        values = np.array(counts, np.float64)
        return self._interval(_ratio(values.sum(0)), _ratio(self._draws(len(values)) @ values))

    def of_ratios(self, above: Counts, below: Counts) -> Interval | None:
        """One ratio divided by another, over the same texts, at least one, in the same order; None as above."""
        first, second = np.array(above, np.float64), np.array(below, np.float64)
        draws = self._draws(len(first))
        with np.errstate(divide="ignore", invalid="ignore"):
            value = _ratio(first.sum(0)) / _ratio(second.sum(0))
            return self._interval(value, _ratio(draws @ first) / _ratio(draws @ second))

    def _draws(self, texts: int) -> Floats:
        """How often each text is in each draw, (resamples, texts)."""
        if texts not in self._weights:
            random = np.random.default_rng(self._seed)
            shares = np.full(texts, 1.0 / texts)
            self._weights[texts] = random.multinomial(texts, shares, self._resamples).astype(np.float64)
        return self._weights[texts]

    @staticmethod
    def _interval(value: Floats, drawn: Floats) -> Interval | None:
        # A draw may miss every text that has a position to count.
        drawn = drawn[np.isfinite(drawn)]
        if not np.isfinite(value) or not drawn.size:
            return None
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.percentile(drawn, [tail, 100 - tail])
        return Interval(round(float(value), 5), round(float(low), 5), round(float(high), 5))


def _ratio(sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Floats = np.asarray(sums[..., 0] / sums[..., 1])
    return ratio
