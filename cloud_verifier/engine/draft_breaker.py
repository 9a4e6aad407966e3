"""Circuit breaker for drafts that are almost never accepted.

Verifying a draft costs rows of a forward. When a board's drafts save fewer target tokens than their rows cost, the
breaker opens and the verifier ignores its drafts, except for a probe now and then. The text is the same either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# Lowest worthwhile ratio of saved tokens to verified rows (draft tokens and siblings). Measured (7B, H200: 17 rows take
# 8.5 ms, one takes 6.8 ms): a row costs about 1.6 % of a target token. Half of that, because the estimate is noisy.
MIN_SAVED_PER_ROW = 0.01
# Exponential window of the estimate: this many drafted rounds, or this many rows if that is longer.
WINDOW_ROUNDS, WINDOW_ROWS = 20, 200
# The breaker does not open on fewer rows in the window.
MIN_ROWS = 100
# Drafts ignored between two probes: doubles after each failed probe, from the first number to the second.
MIN_BACKOFF_DRAFTS, MAX_BACKOFF_DRAFTS = 8, 256
# A probe is allowed after this time in any case: a planner that has learned that drafting fails hardly sends drafts.
MAX_BACKOFF_SECONDS = 30.0


class DraftCircuitBreaker:
    """Tracks what drafts save and decides which drafts are verified.

    Attributes:
        is_open: drafts are ignored, except for probes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_open = False
        self._clock = clock
        self._probed_at = 0.0
        self._rounds = 0
        self._rows = self._saved_tokens = 0.0
        self._backoff_drafts = MIN_BACKOFF_DRAFTS // 2
        self._ignored = 0

    def allows_draft(self) -> bool:
        """Whether to verify the next draft. Call exactly once per draft: it counts ignored drafts."""
        if not self.is_open:
            return True
        self._ignored += 1
        if self._ignored <= self._backoff_drafts and self._clock() - self._probed_at < MAX_BACKOFF_SECONDS:
            return False
        self._ignored, self._probed_at = 0, self._clock()
        return True

    def record(self, rows: int, saved_tokens: int) -> None:
        """Record a verified draft.

        Args:
            rows: its draft tokens and siblings.
            saved_tokens: target tokens that did not need a forward of their own.
        """
        if self.is_open:
            if saved_tokens < MIN_SAVED_PER_ROW * rows:
                self._double_backoff()
            else:
                # The window starts anew. The backoff resets only after a whole window has gone well.
                self.is_open, self._rounds, self._rows, self._saved_tokens = False, 0, 0.0, 0.0
            return
        decay = 1.0 - min(1 / WINDOW_ROUNDS, rows / WINDOW_ROWS)
        self._rounds += 1
        self._rows = decay * self._rows + rows
        self._saved_tokens = decay * self._saved_tokens + saved_tokens
        if self._rounds < WINDOW_ROUNDS or self._rows < MIN_ROWS:
            return
        if self._saved_tokens < MIN_SAVED_PER_ROW * self._rows:
            self.is_open, self._ignored, self._probed_at = True, 0, self._clock()
            self._double_backoff()
        else:
            self._backoff_drafts = MIN_BACKOFF_DRAFTS // 2

    def _double_backoff(self) -> None:
        self._backoff_drafts = min(2 * self._backoff_drafts, MAX_BACKOFF_DRAFTS)
