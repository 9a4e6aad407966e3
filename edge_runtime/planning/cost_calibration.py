"""Calibrates the cost model: the ratio of measured to predicted cost of drafted rounds over the last few hundred.

With decayed sums of measured and predicted costs and a prior of PRIOR_ROUNDS rounds that cost what was predicted:

    factor = (measured + PRIOR_ROUNDS * cost) / (predicted + PRIOR_ROUNDS * cost)
"""

from __future__ import annotations

# Weight of the prior (factor 1), in rounds. Chosen: a few rounds hardly move the factor, a hundred decide it.
PRIOR_ROUNDS = 30.0
# Share of the evidence that is kept per drafted round, per streamed token without shadow drafting (nothing is learned
# about drafting meanwhile), and per shadow-drafted token. Chosen: an effective window of a few hundred rounds.
DECAY_PER_ROUND = 0.997
DECAY_PER_STREAMED_TOKEN = 0.999
DECAY_PER_SHADOW_TOKEN = 0.999
# Bounds of the factor (chosen).
MIN_FACTOR, MAX_FACTOR = 0.8, 1.3


class CostCalibration:
    """Decayed sums of the measured and the predicted cost of drafted rounds."""

    def __init__(self) -> None:
        self._measured = self._predicted = 0.0

    def observe(self, measured: float, predicted: float) -> None:
        """Add a drafted round."""
        self._add(DECAY_PER_ROUND, measured, predicted)

    def observe_counterfactual(self, tokens: int, measured: float, predicted: float) -> None:
        """Add the rounds that would have drafted `tokens` streamed tokens (see `counterfactual`)."""
        self._add(DECAY_PER_SHADOW_TOKEN**tokens, measured, predicted)

    def fade(self, tokens: int) -> None:
        """Decay the evidence over `tokens` streamed tokens for which the cost of drafting is unknown."""
        self._add(DECAY_PER_STREAMED_TOKEN**tokens, 0.0, 0.0)

    def factor(self, round_cost: float) -> float:
        """Return the calibration factor of predicted costs.

        Args:
            round_cost: typical cost of a round, which gives the prior its unit.
        """
        prior = PRIOR_ROUNDS * round_cost
        return min(max((self._measured + prior) / (self._predicted + prior), MIN_FACTOR), MAX_FACTOR)

    def _add(self, decay: float, measured: float, predicted: float) -> None:
        self._measured = decay * self._measured + measured
        self._predicted = decay * self._predicted + predicted
