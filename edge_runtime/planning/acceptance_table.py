"""How far drafts get: what is expected of every draft length under every stop rule, for one state of a text.

Under the stop rule, let c be a confidence, p(c) its chance of being accepted and M_k = p(c_1) ... p(c_k) the chance
that the first k tokens all are. A draft that stops behind a token with M < s has a (k+1)-th token iff M_k >= s, since M
only falls. So the distributions of M_0, M_1, ... answer for every draft length and every threshold at once; they are
the convolutions of that of log p(c), confidences of neighbouring tokens being nearly independent.

Nearly: behind a miss text is harder than the average, and where many guesses in a row were right, it mostly goes on
like that, because it repeats itself or what it has read. So each token is judged by the stage that it is in, which is
how many right guesses in a row stand before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BINS = 20
# Longest draft that is considered, and the most siblings beside a token.
LONGEST = 31
MOST_SIBLINGS = 7
# Tokens that a verifier speculating by itself is taken to draft for a forward.
SPECULATED = 5
# Thresholds of survival are exp(-GRAIN * level): from 1 down to 0.03.
GRAIN = 0.1
LEVELS = 36
THRESHOLDS: Floats = np.exp(-GRAIN * np.arange(LEVELS))
# Right guesses in a row from which each stage begins.
STAGES = (0, 4, 16)
# No guess is hopeless, and none is certain.
LEAST_RIGHT, MOST_RIGHT = 0.01, 0.999


class Stage(NamedTuple):
    """How good a draft is at one stage.

    Attributes:
        sure: (BINS,) share of tokens by confidence.
        right: (BINS,) chance of being accepted by confidence.
    """

    sure: Sequence[float]
    right: Sequence[float]


def stage_of(streak: int) -> int:
    """Index of the stage that a token with `streak` right guesses before it is in."""
    return bisect_right(STAGES, streak) - 1


class Table:
    """How far drafts get; a snapshot of what was known when it was made.

    Attributes:
        calibration: chance of being accepted by confidence bin, at the stage in which drafts begin.
        acceptance: chance that the first token is accepted.
        drafted: (LONGEST + 1, LEVELS): expected tokens of a draft of at most K under each threshold.
        accepted: the same of accepted tokens.
        going: chance that more tokens than K would be drafted, were K no bound.
        intact: chance of that and that all K are accepted.
        sureness: share of tokens whose confidence is in each bin.
        missed: chance of not being accepted by confidence bin.
        first_missed: the product of the two.
        sibling_hits: (MOST_SIBLINGS + 1,): chance that one of the first s siblings is what a missed token should have
            been.
        speculated: tokens that a forward over SPECULATED drafted ones brings.
    """

    def __init__(self, stages: Sequence[Stage], sibling_hits: Floats, streak: int = 0) -> None:
        """
        Args:
            stages: one for each of `STAGES`.
            sibling_hits: see above.
            streak: right guesses in a row in front of the drafts.
        """
        first = stage_of(streak)
        sure = np.array(stages[first].sure)
        calibration = np.clip(stages[first].right, LEAST_RIGHT, MOST_RIGHT)
        self.calibration: tuple[float, ...] = tuple(calibration.tolist())
        self.sureness = sure
        self.missed: Floats = 1.0 - calibration
        self.first_missed: Floats = sure * self.missed
        self.sibling_hits = sibling_hits
        # Each bin moves a draft's mass down the levels; between two levels it is split so that the mean is right.
        fall = -np.log(calibration) / GRAIN
        low = np.minimum(fall.astype(np.intp), LEVELS - 1)
        part = np.minimum(fall - low, 1.0)
        masses = np.zeros((2, LONGEST + 1, LEVELS))
        masses[:, 0, 0] = 1.0
        rates = np.empty((LONGEST, 1))
        ends = [min(max(begin - streak, 0), LONGEST) for begin in STAGES[1:]] + [LONGEST]
        begin = 0
        for stage, end in zip(stages, ends, strict=True):
            if begin == end:
                continue
            sure = np.array(stage.sure)
            hits = sure * np.clip(stage.right, LEAST_RIGHT, MOST_RIGHT)
            rates[begin:end] = hits.sum()
            for mass, moved in zip(masses, (sure, hits), strict=True):
                kernel = np.bincount(low, moved * (1.0 - part), LEVELS + 1)
                kernel += np.bincount(low + 1, moved * part, LEVELS + 1)
                step = kernel[_SHIFTS] * _FALLING
                for k in range(begin, end):
                    np.dot(mass[k], step, out=mass[k + 1])
            begin = end
        self.acceptance = float(rates[0, 0])
        self.going, self.intact = masses.cumsum(axis=2)
        self.drafted = np.zeros((LONGEST + 1, LEVELS))
        self.drafted[1:] = self.going[:-1].cumsum(axis=0)
        self.accepted = np.zeros((LONGEST + 1, LEVELS))
        self.accepted[1:] = (rates * self.intact[:-1]).cumsum(axis=0)
        self.speculated = 1.0 + float(self.accepted[SPECULATED, -1])


# _SHIFTS[i, j] = j - i where a mass at level i can fall to level j.
_SHIFTS = np.maximum(0, np.arange(LEVELS)[None, :] - np.arange(LEVELS)[:, None])
_FALLING = (np.arange(LEVELS)[None, :] >= np.arange(LEVELS)[:, None]).astype(np.float64)
