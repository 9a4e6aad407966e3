"""What drafted rounds would have cost for text that the cloud said while the draft guessed along.

Tables say what a plan costs as if neighbouring tokens were nearly independent. Here its rounds are played on what was
watched, at the prices and by the rules of `search`, so that both ways to finish a text are known though one was taken,
and nothing has to be tried out: full information instead of a bandit's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from edge_runtime.planning.acceptance_table import STAGES, Table
from edge_runtime.planning.plan import Watched, calibrated
from edge_runtime.planning.search import Draft, Prices


class Way(NamedTuple):
    """How rounds are drafted, and the table by which that was chosen."""

    draft: Draft
    table: Table


class Replayed(NamedTuple):
    """What rounds came to.

    Attributes:
        tokens: of all of them.
        running: of those that began at the last stage.
        cost: in the objective's seconds.
        told: what the search said that so many tokens cost.
    """

    tokens: int
    running: int
    cost: float
    told: float


def replay(watched: Sequence[Watched], streak: int, fresh: Way, running: Way, prices: Prices) -> Replayed:
    """Plays rounds to the end of what was watched.

    Args:
        watched: consecutive tokens, as the draft saw them.
        streak: right guesses in a row in front of them.
        fresh: how to draft behind fewer than `STAGES[-1]` right guesses in a row.
        running: and behind as many or more.
        prices: of both.
    """
    play = _Play(watched, streak, prices)
    ran_on, told = 0, 0.0
    while play.left:
        begun, runs = play.done, play.streak >= STAGES[-1]
        way = running if runs else fresh
        play.chain(way)
        told += way.draft.cost * (play.done - begun)
        ran_on += (play.done - begun) if runs else 0
    return Replayed(play.done, ran_on, play.cost, told)


class _Play:
    """Rounds being played.

    Attributes:
        done: tokens so far.
        streak: right guesses in a row in front of the next.
        cost: so far.
    """

    def __init__(self, watched: Sequence[Watched], streak: int, prices: Prices) -> None:
        self.done, self.streak, self.cost = 0, streak, 0.0
        self._watched, self._prices = watched, prices
        # Tokens that are drafted already.
        self._ready = 0

    @property
    def left(self) -> int:
        """Tokens that there are to draft; the last one is the target's own."""
        return max(0, len(self._watched) - 1 - self.done)

    def chain(self, way: Way) -> None:
        """A round from scratch, and the early ones that follow it."""
        draft, prices = way.draft, self._prices
        drafted, named, stopped = self._draft(way, draft.length, draft.survival)
        forward = _forward(prices, 1 + drafted + named)
        self.cost += prices.exchange + prices.step * drafted + prices.identity * (drafted + named)
        self.cost += prices.worked * forward - min(self._ready, drafted) * prices.step_seconds * prices.second
        stands = self._verify(draft, drafted)
        self._ready = 0
        if not draft.ahead or stopped:
            return
        self.cost += prices.ahead * (1 + draft.ahead)
        if draft.in_flight < 2:
            time = prices.flight_seconds - prices.forwards[0] + prices.queue_seconds + forward
            self._ready = min(draft.ahead, max(0, int(time / prices.step_seconds) - 1)) if stands else 0
        elif stands:
            self._follow(way, forward)
        else:
            self.cost += prices.void

    def _follow(self, way: Way, before: float) -> None:
        """Early rounds, for as long as they stand; `before` is the forward in front of them, in seconds."""
        prices, stands, early = self._prices, True, 0
        while stands and self.left:
            drafted, named, _ = self._draft(way, way.draft.ahead, way.draft.survival)
            forward = _forward(prices, 1 + drafted + named)
            sent = (1 + drafted) * prices.step_seconds + prices.overhead_seconds
            least = prices.queue_seconds + forward
            arriving = sent + least + (prices.flight_seconds - prices.forwards[0])
            second = max(least, sent + forward - before)
            seconds = (second, max(least, arriving - second), max(least, arriving / 2))[min(early, 2)]
            self.cost += prices.second * seconds + (prices.worked - prices.second) * forward
            self.cost += prices.identity * (drafted + named) + prices.ahead * (1 + way.draft.ahead)
            stands = self._verify(way.draft, drafted)
            early += 1

    def _draft(self, way: Way, most: int, bound: float) -> tuple[int, int, bool]:
        """How many of at most `most` tokens the stop rule leaves, siblings named beside them, and whether it did stop.

        What the draft would have said behind a miss is not known: it is taken to be as sure as of the text.
        """
        draft, calibration = way.draft, way.table.calibration
        drafted, named, survival = 0, 0, 1.0
        for confidence, _ in islice(self._watched, self.done, self.done + min(most, self.left)):
            drafted += 1
            if confidence <= draft.sibling_confidence:
                named += draft.siblings
            survival *= calibrated(confidence, calibration)
            if survival < bound:
                return drafted, named, True
        return drafted, named, False

    def _verify(self, draft: Draft, drafted: int) -> bool:
        """The target's answer. Returns whether the draft is right throughout, the target's own token included."""
        for index in range(drafted):
            confidence, rank = self._watched[self.done + index]
            if rank:
                hit = rank <= draft.siblings and confidence <= draft.sibling_confidence
                self.done += index + (2 if hit else 1)
                self.streak = 0
                return False
        self.done += drafted + 1
        self.streak += drafted
        return not self._watched[self.done - 1][1]


def _forward(prices: Prices, nodes: int) -> float:
    return float(np.interp(nodes, prices.widths, prices.forwards))
