"""Rules of a speculative round that the decoding loop and the simulator share: limits, work in flight, outcomes.

Everything here is pure. `generation` applies the rules to token ids and a real verifier, `simulation.simulator` to
recorded acceptance on a simulated clock, so that a plan means the same in both. The stop rule of a draft is
`planning.plan.apply_stop_rule`.
"""

from __future__ import annotations

import enum

import msgspec

from edge_runtime.planning.plan import Conditions, Outcome, Plan, ShadowGuess
from edge_runtime.protocol import messages


class InFlightWork(enum.Enum):
    """What the draft model does while a round is in flight.

    Attributes:
        NONE: nothing.
        SHADOW: prefill the text and, if the plan says `watch`, predict each streamed token.
        AHEAD: guess the bonus token and draft the next round's tokens.
    """

    NONE = enum.auto()
    SHADOW = enum.auto()
    AHEAD = enum.auto()


def work_in_flight(plan: Plan) -> InFlightWork:
    """Return the draft model's work during a round of this plan."""
    if not plan.draft:
        return InFlightWork.SHADOW if plan.ahead or plan.watch else InFlightWork.NONE
    return InFlightWork.AHEAD if plan.ahead and plan.own == 1 else InFlightWork.NONE


def limit_draft(plan: Plan, left: int) -> int:
    """Return the maximum number of tokens to draft if `left` tokens may still be generated.

    K accepted tokens bring at least K + 1 tokens, so a draft of `left` tokens would waste its last.
    """
    return min(plan.draft, left - 1, messages.MAX_DRAFT_TOKENS)


def limit_continuation(plan: Plan, left: int, drafted: int) -> int:
    """Return n, the number of tokens to request from the target after the accepted ones, at least 1."""
    return max(1, min(plan.own, left - drafted, messages.MAX_CONTINUATION_TOKENS))


def limit_ahead(plan: Plan, left: int) -> int:
    """Return the maximum number of tokens to draft ahead, the guess of the bonus token included.

    Args:
        left: tokens that may still be generated after the draft in flight.
    """
    return min(1 + plan.ahead, left)


def limit_early_draft(plan: Plan, left: int, drafted_ahead: int) -> int:
    """Return how many draft tokens to send before the round in flight is answered; 0 does not send the round early.

    Only rounds with own = 1 are sent early.

    Args:
        left: tokens that may still be generated after the round in flight.
        drafted_ahead: tokens drafted after the guess of the bonus token.
    """
    return 0 if plan.own > 1 else max(0, min(limit_draft(plan, left), drafted_ahead))


class PendingRound(msgspec.Struct, kw_only=True):
    """A round from its plan to its outcome.

    Attributes:
        plan, conditions: the decision and what it was based on.
        confidences: draft probability of each draft token.
        offered: number of siblings sent with each draft token.
        drafted_ahead: draft tokens that had been drafted before this round.
        draft_seconds: drafting the others, prefill included.
        sent: clock time in seconds when the request was sent; for an early round when the previous one was answered.
        early: whether the request was sent before the previous round was answered.
    """

    plan: Plan
    conditions: Conditions
    confidences: list[float]
    offered: list[int]
    drafted_ahead: int
    draft_seconds: float
    sent: float
    early: bool = False

    @property
    def drafted(self) -> int:
        return len(self.confidences)

    def to_outcome(
        self,
        *,
        accepted: int,
        own: int,
        sibling: int,
        first_seconds: float,
        exchange_seconds: float,
        queue_seconds: float,
        forward_seconds: float,
        further: int,
        ahead_seconds: float,
        watched: list[ShadowGuess],
        sent_bytes: int,
        received_bytes: int,
        repeated: bool,
        prefill_seconds: float = 0.0,
    ) -> Outcome:
        """Build what the planner learns from this round; see `Outcome` for the arguments."""
        return Outcome(
            plan=self.plan,
            conditions=self.conditions,
            accepted=accepted,
            own=own,
            confidences=self.confidences,
            offered=self.offered,
            sibling=sibling,
            ready=self.drafted_ahead,
            draft_seconds=self.draft_seconds,
            first_seconds=first_seconds,
            exchange_seconds=exchange_seconds,
            queue_seconds=queue_seconds,
            forward_seconds=forward_seconds,
            sent=sent_bytes,
            received=received_bytes,
            repeated=repeated,
            early=self.early,
            prefill_seconds=prefill_seconds,
            ahead_seconds=ahead_seconds,
            further=further,
            watched=watched,
        )
