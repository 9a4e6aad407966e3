"""Regret budget of drafting: bounds what drafting may lose in total against leaving all tokens to the verifier.

Cost estimates err, and a planner that drafts whenever drafting seems cheaper is more expensive than streaming wherever
the estimates err in favor of drafting. Therefore the measured cost of drafted rounds is compared with what streaming
would have cost, and the difference is charged to a budget: an initial amount plus a small share of every token. The
lower the budget, the larger the factor that is applied to the estimated cost of drafting.

This is a conservative bandit (Wu, Shariff, Lattimore, Szepesvari, "Conservative Bandits", arXiv 1602.04282) with
streaming as the default arm. Unlike there, the budget sets a price rather than a gate, so that drafting continues where
it seems much cheaper and stops where it seems only a little cheaper.
"""

from __future__ import annotations

from edge_runtime.planning.plan import Outcome

# All amounts are in streamed tokens: the cost of a further token of a stream. Chosen.
INITIAL_TOKENS = 20.0
# Share of all generated tokens that is credited.
CREDIT_PER_TOKEN = 0.014
# Bound of the budget in both directions, so that neither savings nor losses accumulate without limit.
MAX_TOKENS = 400.0
# The cost factor grows by 1 for this deficit relative to the initial budget.
DOUBLING_TOKENS = 400.0
# Lower bound of the factor: savings may be spent on exploration, down to this share of the estimated cost.
MIN_COST_FACTOR = 0.92


class RegretBudget:
    """The amount that drafting may still lose against streaming.

    Attributes:
        tokens: the budget, in streamed tokens; negative after excessive losses.
    """

    def __init__(self) -> None:
        self.tokens = INITIAL_TOKENS
        self._end = 0

    @property
    def cost_factor(self) -> float:
        """Factor to apply to the estimated cost of drafting: max(0.92, 1 + (initial budget - budget) / 400)."""
        return max(MIN_COST_FACTOR, 1.0 + (INITIAL_TOKENS - self.tokens) / DOUBLING_TOKENS)

    def observe(self, outcome: Outcome, *, equivalent: float, cost: float, first: float, further: float) -> None:
        """Charge or credit a round.

        Args:
            outcome: of the round.
            equivalent: own tokens that the verifier streams, on average, in the time that this round's tokens would
                have taken it (`CostModel.streaming_equivalent`).
            cost: measured cost of the round, in the objective's seconds.
            first: cost of a streaming round of one token.
            further: cost of each further token of a stream.
        """
        end = outcome.conditions.position + outcome.conditions.left
        new_text, self._end = end != self._end, end
        # Streaming needs a single exchange for a whole text.
        exchange = first / further - 1.0
        gained = CREDIT_PER_TOKEN * outcome.tokens
        if outcome.drafted:
            gained += equivalent - cost / further + (exchange if new_text else 0.0)
        elif not new_text:
            gained -= exchange
        self.tokens = min(max(self.tokens + gained, -MAX_TOKENS), MAX_TOKENS)
