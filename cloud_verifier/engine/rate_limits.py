"""Limits of one principal: token rate and prompt length."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from cloud_verifier.engine.draft_breaker import DraftCircuitBreaker
from cloud_verifier.engine.principals import Principal
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, OpenRequest

# Capacity of the token bucket, in seconds of its rate.
BURST_SECONDS = 10.0
# A reopened session may exceed the prompt limit by this many tokens: its prompt includes the answer so far.
MAX_ANSWER_TOKENS = 8192
# Prompt tokens that count as one generated token: prefilling this many is about as much work as one forward.
PROMPT_TOKENS_PER_TOKEN = 16


class TokenBucket:
    """A token bucket that may be overdrawn: generated tokens are charged afterwards.

    Attributes:
        rate: tokens per second.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._level = rate * BURST_SECONDS
        self._filled_at = clock()

    @property
    def wait_seconds(self) -> float:
        """Seconds until the level is positive again; 0 if it is."""
        self._fill()
        return 0.0 if self._level > 0 else -self._level / self.rate

    def take(self, tokens: float) -> None:
        self._fill()
        self._level -= tokens

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self.rate * BURST_SECONDS, self._level + self.rate * (now - self._filled_at))
        self._filled_at = now


class PrincipalAccount:
    """State of one principal for the lifetime of the process.

    Attributes:
        draft_breaker: circuit breaker for the drafts of all its sessions; None for anonymous requests, which cannot be
            attributed.
    """

    def __init__(self, principal: Principal) -> None:
        self.draft_breaker = DraftCircuitBreaker() if principal.name else None
        self._bucket: TokenBucket | None = None
        self.update_limits(principal)

    def update_limits(self, principal: Principal) -> None:
        """Apply the limits of `principal`, which may have changed since the token file was read again."""
        rate = principal.tokens_per_second
        if rate is None:
            self._bucket = None
        elif self._bucket is None or self._bucket.rate != rate:
            self._bucket = TokenBucket(rate)

    def check_rate(self) -> None:
        """Raises VerifierRefused (`rate_limited`) while the principal has exceeded its token rate."""
        wait = self._bucket.wait_seconds if self._bucket else 0.0
        if self._bucket and wait:
            raise VerifierRefused(
                ErrorCode.RATE_LIMITED,
                f"the holder of this token has used up its {self._bucket.rate:g} tokens per second; wait {wait:.1f} s",
                detail={"tokens_per_second": self._bucket.rate},
                retry_after=math.ceil(wait) or 1,
            )

    def charge(self, generated: int, prompt: int = 0) -> None:
        """Charge generated tokens and prefilled prompt tokens."""
        if self._bucket:
            self._bucket.take(generated + prompt / PROMPT_TOKENS_PER_TOKEN)


def check_prompt_length(principal: Principal, opening: OpenRequest) -> None:
    """Raises VerifierRefused (`context_overflow`) if the prompt is longer than the principal may send."""
    if principal.max_prompt is None:
        return
    # A lost session is reopened with all ids so far, on the exact version that it was pinned to.
    limit = principal.max_prompt + (MAX_ANSWER_TOKENS if "@" in opening.model else 0)
    tokens = len(opening.prompt)
    if tokens > limit:
        raise VerifierRefused(
            ErrorCode.CONTEXT_OVERFLOW,
            f"the prompt has {tokens} tokens and {principal.name} may send {principal.max_prompt}; shorten it",
            detail={"limit": principal.max_prompt},
        )
