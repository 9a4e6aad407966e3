"""Counterfactual cost of drafting: replays drafted rounds on streamed text that the draft model shadowed.

Tables compute the cost of a plan as if the confidences of successive tokens were nearly independent. Here, drafted
rounds are replayed on the shadow guesses for actual text (see `Plan.shadow`), at the prices and by the rules of
`search`. The planner thus learns the cost of both options although only one was executed: full information instead of
bandit feedback.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from edge_runtime.planning.acceptance_table import STAGE_STREAKS
from edge_runtime.planning.plan import Plan, ShadowGuess, apply_stop_rule
from edge_runtime.planning.search import DraftedRound, RoundPrices


class ReplayedRounds(NamedTuple):
    """Totals of replayed rounds.

    Attributes:
        last_stage_tokens: of the chains of rounds that began in the last stage.
        cost: in the objective's seconds.
        predicted_cost: what the search predicted for as many tokens.
    """

    tokens: int
    last_stage_tokens: int
    cost: float
    predicted_cost: float


def replay_rounds(
    guesses: Sequence[ShadowGuess],
    *,
    streak: int,
    first_stage: DraftedRound,
    last_stage: DraftedRound,
    prices: RoundPrices,
) -> ReplayedRounds:
    """Replay rounds until the shadow guesses are used up.

    Args:
        guesses: for consecutive tokens.
        streak: consecutive correct guesses before them.
        first_stage: round to use while the streak is below `STAGE_STREAKS[-1]`.
        last_stage: round to use from that streak on.
    """
    replay = _Replay(guesses, streak, prices)
    last_stage_tokens, predicted = 0, 0.0
    while replay.left:
        begin, in_last_stage = replay.done, replay.streak >= STAGE_STREAKS[-1]
        choice = last_stage if in_last_stage else first_stage
        replay.run_chain(choice.plan)
        predicted += choice.cost * (replay.done - begin)
        last_stage_tokens += (replay.done - begin) if in_last_stage else 0
    return ReplayedRounds(replay.done, last_stage_tokens, replay.cost, predicted)


class _Replay:
    """State of a replay.

    Attributes:
        done: tokens so far.
        streak: consecutive correct guesses before the next token.
    """

    def __init__(self, guesses: Sequence[ShadowGuess], streak: int, prices: RoundPrices) -> None:
        self.done, self.streak, self.cost = 0, streak, 0.0
        self._guesses, self._prices = guesses, prices
        # Tokens that were drafted ahead.
        self._ready = 0

    @property
    def left(self) -> int:
        """Number of tokens that can still be drafted; the last token is always the target's own."""
        return max(0, len(self._guesses) - 1 - self.done)

    def run_chain(self, plan: Plan) -> None:
        """Replay a round from scratch and the early rounds that follow it."""
        prices = self._prices
        drafted, siblings, stopped = self._draft(plan, plan.draft)
        forward = float(prices.forward(1 + drafted + siblings))
        self.cost += prices.exchange + prices.step * drafted + prices.id * (drafted + siblings)
        saved = min(self._ready, drafted) * prices.step_seconds * prices.flight_second
        self.cost += prices.forward_second * forward - saved
        holds = self._verify(plan, drafted)
        self._ready = 0
        if not plan.draft_ahead or stopped:
            return
        self.cost += prices.step_ahead * (1 + plan.draft_ahead)
        if plan.in_flight < 2:
            flight = prices.flight_seconds - prices.forward_seconds[0] + prices.queue_seconds + forward
            self._ready = min(plan.draft_ahead, max(0, int(flight / prices.step_seconds) - 1)) if holds else 0
        elif holds:
            self._run_early_rounds(plan, forward)
        else:
            self.cost += prices.void

    def _run_early_rounds(self, plan: Plan, previous_forward: float) -> None:
        """Replay early rounds as long as their guesses hold; `previous_forward` is in seconds."""
        prices, holds, early = self._prices, True, 0
        while holds and self.left:
            drafted, siblings, _ = self._draft(plan, plan.draft_ahead)
            forward = float(prices.forward(1 + drafted + siblings))
            # The same intervals between replies as in the search.
            sent = (1 + drafted) * prices.step_seconds + prices.overhead_seconds
            verifier = prices.queue_seconds + forward
            arrival = sent + verifier + (prices.flight_seconds - prices.forward_seconds[0])
            second = max(verifier, sent + forward - previous_forward)
            seconds = (second, max(verifier, arrival - second), max(verifier, arrival / 2))[min(early, 2)]
            self.cost += prices.flight_second * seconds + (prices.forward_second - prices.flight_second) * forward
            self.cost += prices.id * (drafted + siblings) + prices.step_ahead * (1 + plan.draft_ahead)
            holds = self._verify(plan, drafted)
            early += 1

    def _draft(self, plan: Plan, max_length: int) -> tuple[int, int, bool]:
        """Apply the stop rule; return the number of draft tokens, that of siblings, and whether the rule took effect.

        The draft's guesses after its first miss are unknown; they are taken to be as confident as those for the text.
        """
        drafted, siblings, survival = 0, 0, 1.0
        for confidence, _ in islice(self._guesses, self.done, self.done + min(max_length, self.left)):
            drafted += 1
            if confidence <= plan.sibling_confidence:
                siblings += plan.siblings
            survival, stop = apply_stop_rule(plan, survival, confidence)
            if stop:
                return drafted, siblings, True
        return drafted, siblings, False

    def _verify(self, plan: Plan, drafted: int) -> bool:
        """Verify the draft; return whether all of it is accepted and the bonus token was guessed as well."""
        for index in range(drafted):
            confidence, rank = self._guesses[self.done + index]
            if rank:
                hit = rank <= plan.siblings and confidence <= plan.sibling_confidence
                self.done += index + (2 if hit else 1)
                self.streak = 0
                return False
        self.done += drafted + 1
        self.streak += drafted
        return not self._guesses[self.done - 1][1]
