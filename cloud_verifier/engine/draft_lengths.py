"""How many tokens the verifier drafts for itself before a forward: as many as make a text fastest, perhaps none.

What drafting costs and saves differs by a factor of ten between machines and texts: a draft on the CPU beside a small
target on a GPU costs more than it saves. So both are measured. The text is the same whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Callable

# By how much older evidence counts less with every forward of a text, and of all texts.
TEXT_DECAY, SHARED_DECAY = 0.97, 0.995
# Acceptance rate of a draft that nothing is known about yet, and how many tested tokens that counts for; likewise what
# is known of all texts for a new one. Chosen: so optimistic that drafts are tried, and from time to time tried again.
UNKNOWN_ACCEPTANCE, UNKNOWN_WEIGHT, SHARED_WEIGHT = 0.7, 4.0, 8.0
# A moving average weighs the latest time as if there had been at most so many before, and at most so many times the
# average: in a forward there may be a chunk of another text's prompt.
MAX_WEIGHT, MAX_EXCESS = 10.0, 2.0
# An average of n times is taken to be this much too high, divided by n: each length is tried a few times. And by how
# much n falls with every step of another length, so that it is tried again: the load may have changed. Chosen.
OPTIMISM, FADING = 0.5, 0.0005


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


class StepTimes:
    """Seconds from one forward's tokens to the next one's, by draft length: scheduling, drafting and the forward."""

    def __init__(self) -> None:
        # Mean seconds, and how many steps they are worth.
        self._means: dict[int, float] = {}
        self._weights: dict[int, float] = {}

    def record(self, length: int, seconds: float | None) -> None:
        """Record a step; one whose time tells nothing still counts as a try."""
        for other in self._means.keys() - {length}:
            self._weights[other] = max(OPTIMISM, self._weights[other] * (1 - FADING))
        mean = self._means.get(length, seconds)
        if mean is None:
            return
        weight = self._weights[length] = min(MAX_WEIGHT, self._weights.get(length, 0.0) + 1)
        latest = mean if seconds is None else min(seconds, MAX_EXCESS * mean)
        self._means[length] = mean + (latest - mean) / weight

    def expect(self, length: int) -> float | None:
        """The time with drafts of `length` tokens; None if nothing is known."""
        if length in self._means:
            return self._means[length] * (1 - OPTIMISM / self._weights[length])
        if not self._means:
            return None
        nearest, *others = sorted(self._means, key=lambda known: abs(known - length))
        seconds = self._means[nearest]
        if not others:
            # Too low for a shorter draft, which is therefore tried next.
            return seconds * (1 + min(length, nearest)) / (1 + nearest)
        slope = (self._means[others[0]] - seconds) / (others[0] - nearest)
        return max(0.0, seconds + slope * (length - nearest))


class DraftLengths:
    """Chooses draft lengths on one target from the times of steps and from acceptance.

    Args:
        observe: called with the length and the accepted tokens of each draft.
    """

    def __init__(self, observe: Callable[[int, int], object] = lambda drafted, accepted: None) -> None:
        self._observe = observe
        self._shared = AcceptanceEvidence(SHARED_DECAY)
        self._times = StepTimes()

    def choose(self, text: AcceptanceEvidence, limit: int) -> int:
        """The number of tokens from 0 to `limit` with which a step brings most tokens per second."""
        rate = text.rate(self._shared.rate(UNKNOWN_ACCEPTANCE, UNKNOWN_WEIGHT), SHARED_WEIGHT)
        best, best_speed = 0, 0.0
        tokens, reached = 1.0, 1.0
        for length in range(limit + 1):
            if length:
                reached *= rate
                tokens += reached
            speed = tokens / (self._times.expect(length) or 1e-9)
            if speed >= best_speed:
                best, best_speed = length, speed
        return best

    def record(self, text: AcceptanceEvidence, drafted: int, accepted: int, seconds: float | None) -> None:
        """Record a step of a text, in which the verifier's own model drafted `drafted` tokens.

        Args:
            seconds: None if they do not tell how long such steps take.
        """
        for evidence in (text, self._shared):
            evidence.record(drafted, accepted)
        self._times.record(drafted, seconds)
        self._observe(drafted, accepted)
