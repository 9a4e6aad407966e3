"""What drafting may lose: the account that keeps it from being dearer than leaving texts to the cloud.

Estimates err, and who drafts whenever that seems cheaper is dearer than the cloud alone wherever they err in favour of
drafting. So what drafting has really cost is set against what the cloud alone would have, and a part of the difference
is all that may ever be lost: so much to begin with, and a little more with every token. The emptier the account, the
better drafting has to seem. This is a conservative bandit (Wu, Shariff, Lattimore, Szepesvari, "Conservative Bandits",
arXiv 1602.04282) with the cloud alone as the default arm, and a price on the account instead of a gate, so that what
looks much cheaper goes on where what looks a little cheaper has to stop.
"""

from __future__ import annotations

from edge_runtime.planning.plan import Outcome

# Tokens streamed that drafting may cost more than it saves, to begin with; the share of all tokens that is added; and
# the most that counts of what it has saved.
BEGIN = 20.0
ADDED = 0.014
MOST = 400.0
# An account that is so many tokens below its beginning makes drafted tokens count twice.
DOUBLED = 400.0
# What was saved is there to be lost again by trying: drafted tokens count for so little of what they seem to cost.
LEAST = 0.92


class Stake:
    """Tokens that the cloud alone would say in the time that drafting may yet lose.

    Attributes:
        tokens: so many; below 0 if too much was lost.
    """

    def __init__(self) -> None:
        self.tokens = BEGIN
        self._end = 0

    @property
    def doubt(self) -> float:
        """Factor of what drafting seems to cost."""
        return max(LEAST, 1.0 + (BEGIN - self.tokens) / DOUBLED)

    def observe(self, outcome: Outcome, worth: float, cost: float, first: float, each: float) -> None:
        """Counts a round.

        Args:
            outcome: of it.
            worth: tokens that the cloud alone says, on average, in the time that it would have taken for this round's.
            cost: of it, in the objective's seconds.
            first, each: cost of a round of one token of the cloud's own, and of each further token.
        """
        end = outcome.conditions.position + outcome.conditions.left
        begins, self._end = end != self._end, end
        # The cloud alone needs one exchange for all of a text.
        exchange = first / each - 1.0
        gained = ADDED * outcome.tokens
        if outcome.drafted:
            gained += worth - cost / each + (exchange if begins else 0.0)
        elif not begins:
            gained -= exchange
        self.tokens = min(max(self.tokens + gained, -MOST), MOST)
