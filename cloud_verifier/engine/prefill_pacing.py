"""Limits how many prompt tokens one forward prefills: by the time that they take, not by their number.

A round that arrives during a forward waits for its end. Chunks of prompts make forwards long; how long depends on the
model, the machine and the length of the text before them. The pacer finds the number of rows that take a set time by
watching forwards, as congestion control does: down at once if a forward took longer, up if it took all rows and less
time.
"""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

from cloud_verifier.model.batch import SegmentRunner
from cloud_verifier.model.general_tier import UNBOUNDED

log = logging.getLogger(__name__)

# How long a forward with a chunk may take while rounds of other sessions are running or expected. Chosen: as long as a
# few rounds of a 7B model on a GPU, and enough for it to prefill at its full rate.
CHUNK_SECONDS = 0.05
# Where nothing else runs, a chunk may have this many times the rows. Chosen: 0.25 s until a new session's turn.
ALONE_FACTOR = 5
# The fewest rows of a chunk, however long they take, and the rows of a chunk before the first measurement. Chosen: on a
# CPU a row costs little more in a smaller chunk; a GPU is measured at start.
MIN_CHUNK_ROWS, FIRST_CHUNK_ROWS = 16, 32
# From one forward to the next the number of rows changes at most by this factor, so that a forward that was slow for
# another reason does little harm.
MAX_STEP = 2.0


class PrefillPacer:
    """Paces prefill on each runner.

    Args:
        seconds: that a forward with a chunk may take.
    """

    def __init__(self, seconds: float = CHUNK_SECONDS) -> None:
        self._seconds = seconds
        self._rows: WeakKeyDictionary[SegmentRunner, float] = WeakKeyDictionary()

    def limit(self, runner: SegmentRunner, *, alone: bool) -> int:
        """How many rows the next forward of `runner` may prefill.

        Args:
            alone: no round of another session is running or expected.
        """
        most = runner.max_prefill_rows
        if runner.exact or most >= UNBOUNDED:
            # All forwards take equally long, or a prompt can be read only at once.
            return most
        rows = self._rows.get(runner, FIRST_CHUNK_ROWS) * (ALONE_FACTOR if alone else 1)
        return min(most, max(MIN_CHUNK_ROWS, int(rows)))

    def observe(self, runner: SegmentRunner, rows: int, seconds: float) -> None:
        """Record a forward that prefilled `rows` rows, perhaps beside rounds, in `seconds`."""
        if not rows:
            return
        known = self._rows.get(runner, FIRST_CHUNK_ROWS)
        # The rows that would have taken the set time, if all of the forward's time was theirs.
        fitting = rows * self._seconds / max(seconds, 1e-6)
        if fitting < known and seconds > self._seconds:
            self._rows[runner] = max(fitting, known / MAX_STEP, 1.0)
        elif fitting > known and rows >= int(known):
            self._rows[runner] = min(fitting, known * MAX_STEP, float(runner.max_prefill_rows))

    def calibrate(self, runner: SegmentRunner, rows: int, seconds: float) -> None:
        """Set what is known of a runner by a forward at start that prefilled `rows` rows in `seconds`."""
        self._rows[runner] = max(1.0, min(rows * self._seconds / max(seconds, 1e-6), runner.max_prefill_rows))
        log.info("%d rows of prefill take %.0f ms; %d at once", rows, 1e3 * seconds, self.limit(runner, alone=False))
