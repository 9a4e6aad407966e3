"""Counterfactual cost of drafting: replays drafted rounds on streamed text that the draft model shadowed.

Tables compute the cost of a plan as if the confidences of successive tokens were nearly independent. Here, drafted
rounds are replayed on the shadow guesses for actual text (see `Plan.watch`), at the prices and by the rules of
`search`. The planner thus learns the cost of both options although only one was executed: full information instead of
bandit feedback.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from edge_runtime.planning.acceptance_table import STAGE_STREAKS, AcceptanceTable
from edge_runtime.planning.plan import ShadowGuess, calibrated_acceptance
from edge_runtime.planning.search import DraftedRound, RoundPrices


class RoundChoice(NamedTuple):
    """A drafted round and the table that it was chosen by, which gives the calibration of its stop rule."""

    round: DraftedRound
    table: AcceptanceTable


class ReplayedRounds(NamedTuple):
    """Totals of replayed rounds.

    Attributes:
        tokens: of all rounds.
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
    first_stage: RoundChoice,
    last_stage: RoundChoice,
    prices: RoundPrices,
) -> ReplayedRounds:
    """Replay rounds until the shadow guesses are used up.

    Args:
        guesses: for consecutive tokens.
        streak: consecutive correct guesses before them.
        first_stage: round to use while the streak is below `STAGE_STREAKS[-1]`.
        last_stage: round to use from that streak on.
        prices: of both.
    """
    replay = _Replay(guesses, streak, prices)
    last_stage_tokens, predicted = 0, 0.0
    while replay.left:
        begin, in_last_stage = replay.done, replay.streak >= STAGE_STREAKS[-1]
        choice = last_stage if in_last_stage else first_stage
        replay.run_chain(choice)
        predicted += choice.round.cost * (replay.done - begin)
        last_stage_tokens += (replay.done - begin) if in_last_stage else 0
    return ReplayedRounds(replay.done, last_stage_tokens, replay.cost, predicted)


class _Replay:
    """State of a replay.

    Attributes:
        done: tokens so far.
        streak: consecutive correct guesses before the next token.
        cost: so far.
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

    def run_chain(self, choice: RoundChoice) -> None:
        """Replay a round from scratch and the early rounds that follow it."""
        round_, prices = choice.round, self._prices
        drafted, siblings, stopped = self._draft(choice, round_.length)
        forward = _forward_seconds(prices, 1 + drafted + siblings)
        self.cost += prices.exchange + prices.step * drafted + prices.id * (drafted + siblings)
        saved = min(self._ready, drafted) * prices.step_seconds * prices.flight_second
        self.cost += prices.forward_second * forward - saved
        holds = self._verify(round_, drafted)
        self._ready = 0
        if not round_.ahead or stopped:
            return
        self.cost += prices.step_ahead * (1 + round_.ahead)
        if round_.in_flight < 2:
            flight = prices.flight_seconds - prices.forward_seconds[0] + prices.queue_seconds + forward
            self._ready = min(round_.ahead, max(0, int(flight / prices.step_seconds) - 1)) if holds else 0
        elif holds:
            self._run_early_rounds(choice, forward)
        else:
            self.cost += prices.void

    def _run_early_rounds(self, choice: RoundChoice, previous_forward: float) -> None:
        """Replay early rounds as long as their guesses hold; `previous_forward` is in seconds."""
        prices, holds, early = self._prices, True, 0
        while holds and self.left:
            drafted, siblings, _ = self._draft(choice, choice.round.ahead)
            forward = _forward_seconds(prices, 1 + drafted + siblings)
            # The same intervals between replies as in the search.
            sent = (1 + drafted) * prices.step_seconds + prices.overhead_seconds
            verifier = prices.queue_seconds + forward
            arrival = sent + verifier + (prices.flight_seconds - prices.forward_seconds[0])
            second = max(verifier, sent + forward - previous_forward)
            seconds = (second, max(verifier, arrival - second), max(verifier, arrival / 2))[min(early, 2)]
            self.cost += prices.flight_second * seconds + (prices.forward_second - prices.flight_second) * forward
            self.cost += prices.id * (drafted + siblings) + prices.step_ahead * (1 + choice.round.ahead)
            holds = self._verify(choice.round, drafted)
            early += 1

    def _draft(self, choice: RoundChoice, max_length: int) -> tuple[int, int, bool]:
        """Apply the stop rule; return the number of draft tokens, that of siblings, and whether the rule took effect.

        The draft's guesses after its first miss are unknown; they are taken to be as confident as those for the text.
        """
        round_, calibration = choice.round, choice.table.calibration
        drafted, siblings, survival = 0, 0, 1.0
        for confidence, _ in islice(self._guesses, self.done, self.done + min(max_length, self.left)):
            drafted += 1
            if confidence <= round_.sibling_confidence:
                siblings += round_.siblings
            survival *= calibrated_acceptance(confidence, calibration)
            if survival < round_.min_survival:
                return drafted, siblings, True
        return drafted, siblings, False

    def _verify(self, round_: DraftedRound, drafted: int) -> bool:
        """Verify the draft; return whether all of it is accepted and the bonus token was guessed as well."""
        for index in range(drafted):
            confidence, rank = self._guesses[self.done + index]
            if rank:
                hit = rank <= round_.siblings and confidence <= round_.sibling_confidence
                self.done += index + (2 if hit else 1)
                self.streak = 0
                return False
        self.done += drafted + 1
        self.streak += drafted
        return not self._guesses[self.done - 1][1]


def _forward_seconds(prices: RoundPrices, nodes: int) -> float:
    return float(np.interp(nodes, prices.forward_nodes, prices.forward_seconds))
