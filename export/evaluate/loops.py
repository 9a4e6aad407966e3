"""Where a text only repeats itself. Greedy decoding of small models ends in loops, and a loop flatters every draft.

A stretch is a loop of period p where every id equals the one p before it, p being at most LONGEST_PERIOD, and where
the stretch holds at least REPEATS periods and SHORTEST ids in all. What repeats counts; the first period does not, for
a draft had to guess it. Periods of one id are loops too (a line of dashes), and so are tables of zeros: what anybody
could guess says nothing of a draft.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

LONGEST_PERIOD = 64
REPEATS = 3
SHORTEST = 24


def looped(ids: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which of `ids` only repeat what stands before them, in a loop; shape (len(ids),)."""
    text = np.asarray(ids, np.int64)
    found = np.zeros(len(text), bool)
    for period in range(1, min(LONGEST_PERIOD, len(text) // 2) + 1):
        repeats = text[period:] == text[:-period]
        # Where runs of repeats begin and end: behind a first period, so all but one of a stretch's periods.
        edges = np.flatnonzero(np.diff(repeats, prepend=False, append=False))
        for start, end in edges.reshape(-1, 2).tolist():
            if end - start >= max((REPEATS - 1) * period, SHORTEST - period):
                found[start + period : end + period] = True
    return found
