"""Expected length of drafts: for every draft length K under every stop threshold, from one state of a text.

Let c_i be the confidence of the i-th draft token, p(c) the calibrated acceptance probability, and

    S(k) = p(c_1) * ... * p(c_k)

the prefix survival of a draft: the probability that its first k tokens are all accepted. The stop rule ends a draft
after the first token with S(k) < s. S never increases with k, so a draft has a (k+1)-th token iff S(k) >= s: the
distributions of S(0), S(1), ... give the expected drafted and accepted tokens for every K and every s at once. If the
confidences of successive tokens are independent, the distribution of log S(k) is the k-fold convolution of that of
log p(c), which is computed here on a grid of log-thresholds.

Successive confidences are not quite independent: text is harder than average right after a rejection, and after a long
run of accepted tokens it mostly stays easy, because the model is repeating itself or its prompt. Each token is
therefore modeled by its stage, which follows from its streak: the number of consecutive correct guesses before it.

S(k) is an empirical curve rather than alpha^k because acceptance is not geometric in k (arXiv 2606.20591).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

CONFIDENCE_BINS = 20
# Upper limits of the search: draft length, and siblings per draft token.
MAX_DRAFT_LENGTH = 31
MAX_SIBLINGS = 7
# Assumed draft length of a verifier that speculates on its own.
VERIFIER_DRAFT_LENGTH = 5
# Stop thresholds are exp(-LOG_THRESHOLD_STEP * i) for i < THRESHOLD_COUNT: from 1 down to 0.03.
LOG_THRESHOLD_STEP = 0.1
THRESHOLD_COUNT = 36
THRESHOLDS: FloatArray = np.exp(-LOG_THRESHOLD_STEP * np.arange(THRESHOLD_COUNT))
# The streak at which each stage begins.
STAGE_STREAKS = (0, 4, 16)
# Bounds of acceptance probabilities: no confidence bin is taken to be hopeless or certain.
MIN_ACCEPTANCE, MAX_ACCEPTANCE = 0.01, 0.999


class StageAcceptance(NamedTuple):
    """Confidence distribution and calibration of draft tokens in one stage.

    Attributes:
        confidence_shares: (CONFIDENCE_BINS,) share of tokens by confidence.
        calibration: (CONFIDENCE_BINS,) acceptance probability by confidence.
    """

    confidence_shares: Sequence[float]
    calibration: Sequence[float]


def stage_index(streak: int) -> int:
    """Return the index of the stage of a token that follows `streak` consecutive correct guesses."""
    return bisect_right(STAGE_STREAKS, streak) - 1


class AcceptanceTable:
    """Expected drafted and accepted tokens of drafts that begin at a given streak: an immutable snapshot.

    Arrays over drafts have the shape (MAX_DRAFT_LENGTH + 1, THRESHOLD_COUNT) and are indexed [K, threshold].

    Attributes:
        calibration: acceptance probability by confidence bin, in the stage in which drafts begin.
        acceptance: acceptance probability of the first token.
        drafted: expected number of drafted tokens of a draft of at most K tokens.
        accepted: expected number of accepted tokens of such a draft.
        reach: probability that the stop rule lets a draft continue after K tokens.
        survival: probability that it does and that all K tokens are accepted; S(K) at the lowest threshold.
        confidence_shares: (CONFIDENCE_BINS,) share of tokens by confidence bin.
        rejection: (CONFIDENCE_BINS,) probability of rejection by confidence bin.
        rejected_shares: the product of these two.
        sibling_hits: (MAX_SIBLINGS + 1,) probability that one of the first s siblings is the correct replacement of a
            rejected token.
        tokens_per_forward: tokens that a forward over VERIFIER_DRAFT_LENGTH draft tokens yields.
    """

    def __init__(self, stages: Sequence[StageAcceptance], sibling_hits: FloatArray, streak: int = 0) -> None:
        """
        Args:
            stages: one for each of `STAGE_STREAKS`.
            sibling_hits: see the attribute.
            streak: consecutive correct guesses before the drafts.
        """
        first = stage_index(streak)
        shares = np.array(stages[first].confidence_shares)
        calibration = np.clip(stages[first].calibration, MIN_ACCEPTANCE, MAX_ACCEPTANCE)
        self.calibration: tuple[float, ...] = tuple(calibration.tolist())
        self.confidence_shares = shares
        self.rejection: FloatArray = 1.0 - calibration
        self.rejected_shares: FloatArray = shares * self.rejection
        self.sibling_hits = sibling_hits
        # A token of each bin moves a draft's probability mass down the log-threshold grid by `drop` steps. Mass that
        # falls between two grid points is split so that its mean is kept. The drop always follows the first stage's
        # calibration, because that is the one that the board applies in its stop rule (`Plan.calibration`); the
        # probability of acceptance follows the stage of each token.
        drop = -np.log(calibration) / LOG_THRESHOLD_STEP
        lower = np.minimum(drop.astype(np.intp), THRESHOLD_COUNT - 1)
        upper_part = np.minimum(drop - lower, 1.0)
        # masses[0]: distribution of the stop rule's log S(k); masses[1]: the same, jointly with all k being accepted.
        masses = np.zeros((2, MAX_DRAFT_LENGTH + 1, THRESHOLD_COUNT))
        masses[:, 0, 0] = 1.0
        acceptance = np.empty((MAX_DRAFT_LENGTH, 1))
        ends = [min(max(begin - streak, 0), MAX_DRAFT_LENGTH) for begin in STAGE_STREAKS[1:]] + [MAX_DRAFT_LENGTH]
        begin = 0
        for stage, end in zip(stages, ends, strict=True):
            if begin == end:
                continue
            shares = np.array(stage.confidence_shares)
            hits = shares * np.clip(stage.calibration, MIN_ACCEPTANCE, MAX_ACCEPTANCE)
            acceptance[begin:end] = hits.sum()
            for mass, weights in zip(masses, (shares, hits), strict=True):
                kernel = np.bincount(lower, weights * (1.0 - upper_part), THRESHOLD_COUNT + 1)
                kernel += np.bincount(lower + 1, weights * upper_part, THRESHOLD_COUNT + 1)
                transition = kernel[_DROPS] * _DESCENDING
                for k in range(begin, end):
                    np.dot(mass[k], transition, out=mass[k + 1])
            begin = end
        self.acceptance = float(acceptance[0, 0])
        self.reach, self.survival = masses.cumsum(axis=2)
        self.drafted = np.zeros((MAX_DRAFT_LENGTH + 1, THRESHOLD_COUNT))
        self.drafted[1:] = self.reach[:-1].cumsum(axis=0)
        self.accepted = np.zeros((MAX_DRAFT_LENGTH + 1, THRESHOLD_COUNT))
        self.accepted[1:] = (acceptance * self.survival[:-1]).cumsum(axis=0)
        self.tokens_per_forward = 1.0 + float(self.accepted[VERIFIER_DRAFT_LENGTH, -1])


# _DROPS[i, j] = j - i, the drop that moves mass from grid point i down to j, for the pairs in _DESCENDING.
_DROPS = np.maximum(0, np.arange(THRESHOLD_COUNT)[None, :] - np.arange(THRESHOLD_COUNT)[:, None])
_DESCENDING = (np.arange(THRESHOLD_COUNT)[None, :] >= np.arange(THRESHOLD_COUNT)[:, None]).astype(np.float64)
