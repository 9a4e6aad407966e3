"""How far drafted rounds cost more or less than is told of them, by the last few hundred."""

from __future__ import annotations

# That they cost what is told weighs as much as so many rounds.
ROUNDS = 30.0
# Share of all before that is kept for every round that was drafted; for every token that the cloud said while nobody
# looked what drafting it would have cost; and for every token that was guessed along.
KEPT = 0.997
KEPT_STREAMED = 0.999
KEPT_WATCHED = 0.999
LEAST, MOST = 0.8, 1.3


class Bias:
    """What rounds cost and what they were to cost, in all."""

    def __init__(self) -> None:
        self._real = self._told = 0.0

    def observe(self, cost: float, told: float) -> None:
        """A drafted round cost so much."""
        self._add(KEPT, cost, told)

    def watch(self, tokens: int, cost: float, told: float) -> None:
        """Rounds for so many tokens, that the cloud said, would have."""
        self._add(KEPT_WATCHED**tokens, cost, told)

    def fade(self, tokens: int) -> None:
        """The cloud said so many tokens, and nobody knows what rounds would have cost."""
        self._add(KEPT_STREAMED**tokens, 0.0, 0.0)

    def factor(self, cost: float) -> float:
        """How many times more drafted rounds cost than is told; `cost` is a usual round's."""
        weight = ROUNDS * cost
        return min(max((self._real + weight) / (self._told + weight), LEAST), MOST)

    def _add(self, kept: float, cost: float, told: float) -> None:
        self._real = kept * self._real + cost
        self._told = kept * self._told + told
