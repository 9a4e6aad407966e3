"""How many tokens the verifier drafts for itself before a forward: as many as make a text fastest, perhaps none.

What drafting costs and saves differs by a factor of ten between machines and texts: a draft on the CPU beside a small
target on a GPU costs more than it saves. So both are measured. The text is the same whatever is chosen.
"""

from __future__ import annotations

# By how much older evidence counts less with every forward of a text, and of all texts.
TEXT_DECAY, SHARED_DECAY = 0.97, 0.995
# Acceptance rate of a draft that nothing is known about yet, and how many tested tokens that counts for; likewise what
# is known of all texts for a new one. Chosen: so optimistic that drafts are tried, and from time to time tried again.
UNKNOWN_ACCEPTANCE, UNKNOWN_WEIGHT, SHARED_WEIGHT = 0.7, 4.0, 8.0
# Weight of the latest time in its moving average, and how many times the average it counts for at most: a forward may
# have had a chunk of another text's prompt in it.
LATEST_WEIGHT, MAX_EXCESS = 0.1, 2.0


class AcceptanceEvidence:
    """Tested and accepted draft tokens, older ones counting less."""

    def __init__(self, decay: float) -> None:
        self.tested = self.accepted = 0.0
        self._decay = decay

    def record(self, drafted: int, accepted: int) -> None:
        """Record a forward; one without a draft lets what is known fade."""
        # The tokens after the first rejected one were not tested.
        self.tested = self._decay * self.tested + min(drafted, accepted + 1)
        self.accepted = self._decay * self.accepted + accepted

    def rate(self, prior: float, weight: float) -> float:
        """The acceptance rate of a token, if `weight` tokens at the rate `prior` were tested before."""
        return (self.accepted + weight * prior) / (self.tested + weight)


class DraftLengths:
    """Chooses draft lengths from the times of forwards and drafts on one target, and from acceptance."""

    def __init__(self) -> None:
        self._shared = AcceptanceEvidence(SHARED_DECAY)
        # Mean seconds of a forward by draft length, and of drafting a token.
        self._forward_seconds: dict[int, float] = {}
        self._draft_seconds: float | None = None

    def choose(self, text: AcceptanceEvidence, limit: int) -> int:
        """The number of tokens from 0 to `limit` whose draft and forward give most tokens per second."""
        shared = self._shared.rate(UNKNOWN_ACCEPTANCE, UNKNOWN_WEIGHT)
        rate = text.rate(shared, SHARED_WEIGHT)
        best, best_speed = 0, 0.0
        tokens, reached = 1.0, 1.0
        for length in range(limit + 1):
            if length:
                reached *= rate
                tokens += reached
            seconds = length * (self._draft_seconds or 0.0) + self._expected_forward(length)
            # Of equal ones the longest: while nothing is known, everything is tried.
            if seconds <= 0 or tokens / seconds >= best_speed:
                best, best_speed = length, tokens / max(seconds, 1e-9)
        return best

    def record(
        self, text: AcceptanceEvidence, drafted: int, accepted: int, *, draft_seconds: float, forward_seconds: float
    ) -> None:
        """Record a forward of a text.

        Args:
            drafted: tokens drafted by the verifier's own model for this forward.
            draft_seconds: from the first step of that to the last; others' drafts in between count.
        """
        for evidence in (text, self._shared):
            evidence.record(drafted, accepted)
        self.record_forward(drafted, forward_seconds)
        if drafted:
            self._draft_seconds = _updated(self._draft_seconds, draft_seconds / drafted)

    def record_forward(self, length: int, seconds: float) -> None:
        """Record the time of a forward that verified a draft of `length` tokens, whoever drafted them."""
        self._forward_seconds[length] = _updated(self._forward_seconds.get(length), seconds)

    def _expected_forward(self, length: int) -> float:
        """Seconds of a forward: those of the nearest length that is known; 0 if none is."""
        if not self._forward_seconds:
            return 0.0
        return self._forward_seconds[min(self._forward_seconds, key=lambda known: abs(known - length))]


def _updated(mean: float | None, latest: float) -> float:
    if mean is None:
        return latest
    return mean + LATEST_WEIGHT * (min(latest, MAX_EXCESS * mean) - mean)
