"""What one principal may have, and whether a board's drafts are worth their place in the forward."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from cloud_verifier.engine.auth import Principal
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, OpenRequest

# What may be said at once after a silence, in seconds of the rate.
BURST_SECONDS = 10.0
# By how much a text that goes on may be longer than a prompt may.
ANSWER_TOKENS = 8192
# Tokens of a prompt that weigh as one that is said: so many are read by about one forward's work.
READ_TOKENS = 16

# A row of a forward (a draft token or a sibling) costs some 1.6 % of what one token costs (7B on an H200: 17 rows
# 8.5 ms, one 6.8): drafts of which a smaller share comes true are verified at a loss. Half of that, as chance is wide.
FLOOR = 0.01
# How far back the share looks: so many drafted rounds, or so many rows where that is longer. Fewer rows prove nothing.
WINDOW_ROUNDS, WINDOW_ROWS = 20, 200
ENOUGH_ROWS = 100
# Drafts that are ignored before one is tried again: twice as many after every vain attempt. After so many seconds one
# is in any case: a board whose planner has learned that drafts are in vain hardly sends any.
FIRST_REST, LONGEST_REST = 8, 256
REST_SECONDS = 30.0


class Acceptance:
    """Keeps account of what drafts brought, and says which to ignore. The text does not depend on it.

    Attributes:
        resting: drafts are ignored, but for one now and then.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.resting = False
        self._clock = clock
        self._tried_at = 0.0
        self._rounds = 0
        self._rows = self._gained = 0.0
        self._rest = FIRST_REST // 2
        self._ignored = 0

    def worthwhile(self) -> bool:
        """Whether to verify the draft that comes now; to be asked once for each."""
        if not self.resting:
            return True
        self._ignored += 1
        if self._ignored <= self._rest and self._clock() - self._tried_at < REST_SECONDS:
            return False
        self._ignored, self._tried_at = 0, self._clock()
        return True

    def add(self, rows: int, gained: int) -> None:
        """Counts a draft that was verified.

        Args:
            rows: its tokens and siblings.
            gained: tokens that it saved the target from saying one by one.
        """
        if self.resting:
            if gained < FLOOR * rows:
                self._rest = min(2 * self._rest, LONGEST_REST)
            else:
                # The account begins anew; how long it rests the next time is forgotten once this has gone well.
                self.resting, self._rounds, self._rows, self._gained = False, 0, 0.0, 0.0
            return
        keep = 1.0 - min(1 / WINDOW_ROUNDS, rows / WINDOW_ROWS)
        self._rounds += 1
        self._rows, self._gained = keep * self._rows + rows, keep * self._gained + gained
        if self._rounds < WINDOW_ROUNDS or self._rows < ENOUGH_ROWS:
            return
        if self._gained < FLOOR * self._rows:
            self.resting, self._ignored, self._tried_at = True, 0, self._clock()
            self._rest = min(2 * self._rest, LONGEST_REST)
        else:
            self._rest = FIRST_REST // 2


class Bucket:
    """Tokens at a rate in the long run, and a burst after a silence. What is said is paid afterwards."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._level = rate * BURST_SECONDS
        self._at = clock()

    @property
    def wait_seconds(self) -> float:
        """Until there is something in it; 0 where there is."""
        self._fill()
        return 0.0 if self._level > 0 else -self._level / self.rate

    def take(self, tokens: float) -> None:
        self._fill()
        self._level -= tokens

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self.rate * BURST_SECONDS, self._level + self.rate * (now - self._at))
        self._at = now


class Standing:
    """What is known of one principal while the process lives.

    Attributes:
        acceptance: of all its sessions' drafts together; None where principals are not told apart.
    """

    def __init__(self, principal: Principal) -> None:
        self.acceptance = Acceptance() if principal.name else None
        self._bucket: Bucket | None = None
        self.limit(principal)

    def limit(self, principal: Principal) -> None:
        """From now on with the limits of `principal`, which is the same one as before."""
        rate = principal.tokens_per_second
        if rate is None:
            self._bucket = None
        elif self._bucket is None or self._bucket.rate != rate:
            self._bucket = Bucket(rate)

    def check_rate(self) -> None:
        """Raises VerifierRefused (`rate_limited`) while it has had more tokens than its rate allows."""
        wait = self._bucket.wait_seconds if self._bucket else 0.0
        if self._bucket and wait:
            raise VerifierRefused(
                ErrorCode.RATE_LIMITED,
                f"this token's holder has had its {self._bucket.rate:g} tokens per second; wait {wait:.1f} s",
                429,
                {"tokens_per_second": self._bucket.rate},
                retry_after=math.ceil(wait) or 1,
            )

    def pay(self, said: int, read: int = 0) -> None:
        """Counts tokens that were said to it, and those of a prompt that was read for it."""
        if self._bucket:
            self._bucket.take(said + read / READ_TOKENS)


class Standings:
    """All principals' standings, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Standing] = {}

    def of(self, principal: Principal) -> Standing:
        """As many as there are principals in the file: nobody else gets this far."""
        standing = self._by_name.get(principal.name)
        if standing is None:
            standing = self._by_name[principal.name] = Standing(principal)
        standing.limit(principal)
        return standing


def check_prompt_length(principal: Principal, opening: OpenRequest) -> None:
    """Raises VerifierRefused (`context_overflow`) if the prompt is longer than its token's holder may send."""
    if principal.max_prompt is None:
        return
    # A text whose session was lost is opened with all ids so far, on the very version that it began with.
    limit = principal.max_prompt + (ANSWER_TOKENS if "@" in opening.model else 0)
    tokens = len(opening.prompt)
    if tokens > limit:
        raise VerifierRefused(
            ErrorCode.CONTEXT_OVERFLOW,
            f"the prompt has {tokens} tokens and {principal.name} may send {principal.max_prompt}; shorten it",
            413,
            {"limit": principal.max_prompt},
        )
