"""Rules of a speculative round that the decoding loop and the simulator share: limits and counters.

Everything here is pure. `decoding.generation` applies the rules to token ids and a real verifier,
`simulation.simulator` to recorded acceptance on a simulated clock, so that a plan means the same in both. The stop rule
of a draft is `planning.plan.apply_stop_rule`.
"""

from __future__ import annotations

import msgspec

from edge_runtime.planning.plan import Outcome, Plan
from edge_runtime.protocol import messages

# Chunked prefill of the draft model: the board needs working memory for one chunk, not for the whole prompt, and no
# round waits for more than one. Chosen.
PREFILL_CHUNK_TOKENS = 128


def limit_draft(plan: Plan, left: int) -> int:
    """Return the maximum number of tokens to draft if `left` tokens may still be generated.

    K accepted tokens bring at least K + 1 tokens, so a draft of `left` tokens would waste its last.
    """
    return min(plan.draft, left - 1, messages.MAX_DRAFT_TOKENS)


def limit_continuation(plan: Plan, left: int, drafted: int) -> int:
    """Return n, the number of tokens to request from the target after the accepted ones, at least 1."""
    return max(1, min(plan.continuation, left - drafted, messages.MAX_CONTINUATION_TOKENS))


def limit_ahead(plan: Plan, left: int) -> int:
    """Return the maximum number of tokens to draft ahead, the guess of the bonus token included.

    Args:
        left: tokens that may still be generated after the draft in flight.
    """
    return min(1 + plan.draft_ahead, left)


def limit_early_draft(plan: Plan, left: int, drafted_ahead: int) -> int:
    """Return how many draft tokens to send before the round in flight is answered; 0 does not send the round early.

    Only rounds with continuation = 1 are sent early.

    Args:
        left: tokens that may still be generated after the round in flight.
        drafted_ahead: tokens drafted after the guess of the bonus token.
    """
    return 0 if plan.continuation > 1 else max(0, min(limit_draft(plan, left), drafted_ahead))


class RoundTotals(msgspec.Struct):
    """Counters of rounds, real or simulated.

    Attributes:
        rounds: answered requests.
        drafted: draft tokens that were sent for verification.
        accepted: draft tokens that the target accepted.
        sibling_hits: rounds in which a sibling of the first rejected draft token was accepted.
        early_rounds: rounds that were sent before the previous one was answered, and remained valid.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    sibling_hits: int = 0
    early_rounds: int = 0

    def add_round(self, outcome: Outcome) -> None:
        """Count one round."""
        self.rounds += 1
        self.drafted += outcome.drafted
        self.accepted += outcome.accepted
        self.sibling_hits += outcome.sibling > 0
        self.early_rounds += outcome.early
