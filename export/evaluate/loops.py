"""Detects loops in token ids. Greedy decoding of small models ends in loops, which inflate the acceptance of any draft.

A loop of period p <= MAX_PERIOD_TOKENS is a stretch in which every id equals the id p positions earlier, and which is
at least MIN_PERIODS periods and MIN_LOOP_TOKENS ids long. The repeats count as loop, the first period does not: a draft
had to predict it. Periods of one id (a line of dashes) and tables of zeros are loops too, because predicting them says
nothing about a draft.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Chosen: short enough to leave repeated code alone, long enough for the loops that small models end in.
MAX_PERIOD_TOKENS = 64
MIN_PERIODS = 3
MIN_LOOP_TOKENS = 24


def find_loops(ids: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Mark the ids that only repeat earlier ids in a loop; shape (len(ids),)."""
    text = np.asarray(ids, np.int64)
    in_loop = np.zeros(len(text), bool)
    for period in range(1, min(MAX_PERIOD_TOKENS, len(text) // 2) + 1):
        repeats = text[period:] == text[:-period]
        # Start and end of each run of repeats: all periods of a stretch but the first.
        edges = np.flatnonzero(np.diff(repeats, prepend=False, append=False))
        for start, end in edges.reshape(-1, 2).tolist():
            if end - start >= max((MIN_PERIODS - 1) * period, MIN_LOOP_TOKENS - period):
                in_loop[start + period : end + period] = True
    return in_loop
