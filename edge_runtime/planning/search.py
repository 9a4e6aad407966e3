"""Search for the best drafted round at given prices: the plan with the least cost per token.

A text consists of many rounds, so the objective is E[cost of a round] / E[tokens of a round] (renewal-reward theorem).
With known prices both are linear in the expected drafted and accepted tokens, and `AcceptanceTable` has these for every
draft length K and every stop threshold s at once. The search is therefore exact over its grid and takes a few array
operations.

At the optimum, with lambda the cost per token, the stop rule continues a draft iff

    S(k) * P(next token is accepted) * lambda > cost of a draft step

and siblings are sent with a token iff

    P(this token is the first rejected one) * P(one of the siblings is correct) * lambda > cost of their width.

With drafting ahead, a renewal consists of a chain of rounds: one from scratch and, each with the probability that the
guess of the bonus token holds, early rounds, whose draft is ready or whose request is already on its way.
"""

from __future__ import annotations

from bisect import bisect_right
from weakref import WeakKeyDictionary

import msgspec
import numpy as np

from edge_runtime.planning.acceptance_table import (
    CONFIDENCE_BINS,
    MAX_DRAFT_LENGTH,
    MAX_SIBLINGS,
    THRESHOLD_COUNT,
    THRESHOLDS,
    AcceptanceTable,
    FloatArray,
)
from edge_runtime.planning.plan import Plan

# The grid of the search with drafting ahead (chosen: fine enough to lose little, small enough to take microseconds):
# numbers of tokens to draft ahead, draft lengths, and the stride through THRESHOLDS.
AHEAD_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
DRAFT_LENGTHS = np.array((1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 19, 24, 30))
THRESHOLD_STRIDE = 3
_AHEAD_LENGTHS = np.array(AHEAD_LENGTHS)
_SIBLING_COUNTS = np.arange(1.0, MAX_SIBLINGS + 1)[:, None]
# Numbers ahead are considered up to this multiple of the draft steps that fit into a flight: the stop rule often ends
# a draft earlier, and then it is ready in time.
FLIGHT_FACTOR = 2.0


class RoundPrices(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of a drafted round's parts, in the objective's seconds; fields named `..._seconds` are in seconds.

    Attributes:
        exchange: fixed cost of a round, whatever it carries.
        id: of each token id sent.
        forward_second: of a second of the verifier's forward, including the wait for it.
        step_ahead: of a draft step while a round is in flight: energy alone.
        void: of a round that was sent early and is void.
        step_seconds: time of a draft step.
        flight_seconds: from sending a round of one node to its reply, without queueing; a lower quantile, because it
            decides what fits into a flight.
        overhead_seconds: the board's own work per round.
        queue_seconds: a round's wait at the verifier, early rounds included.
        forward_nodes, forward_seconds: knots of the verifier's forward time by tree nodes, piecewise linear.
        max_length, max_siblings: maximum draft length, and siblings per draft token.
    """

    exchange: float
    step: float
    id: float
    flight_second: float
    forward_second: float
    step_ahead: float
    void: float
    step_seconds: float
    flight_seconds: float
    overhead_seconds: float
    queue_seconds: float
    forward_nodes: list[float]
    forward_seconds: list[float]
    max_length: int = MAX_DRAFT_LENGTH
    max_siblings: int = MAX_SIBLINGS

    def forward(self, nodes: FloatArray | int) -> FloatArray:
        """Return the seconds of the verifier's forward over `nodes` tree nodes."""
        return np.asarray(np.interp(nodes, self.forward_nodes, self.forward_seconds))

    def close_to(self, other: RoundPrices, tolerance: float) -> bool:
        """Return whether the prices that matter most to the search differ by at most the share `tolerance`."""
        if self.forward_nodes != other.forward_nodes:
            return False
        if (self.max_length, self.max_siblings) != (other.max_length, other.max_siblings):
            return False
        forwards = sum(other.forward_seconds)
        moved = sum(abs(a - b) for a, b in zip(self.forward_seconds, other.forward_seconds, strict=True))
        round_ = other.exchange + other.forward_second * other.forward_seconds[0]
        return (
            abs(self.step - other.step) <= tolerance * other.step
            and abs(self.exchange - other.exchange) <= tolerance * round_
            and abs(self.flight_seconds - other.flight_seconds) <= 2 * tolerance * other.flight_seconds
            and moved <= tolerance * forwards
            and abs(self.forward_second - other.forward_second) <= tolerance * other.forward_second
        )


class DraftedRound(msgspec.Struct, frozen=True):
    """The best drafted round.

    Attributes:
        cost: per token.
        tokens: expected tokens of a round that was not sent early.
        chain_tokens: expected tokens of that round and the early rounds after it, which share one exchange.
    """

    cost: float
    plan: Plan
    tokens: float = 1.0
    chain_tokens: float = 1.0


class RoundSearch:
    """The best rounds by acceptance table, searched for anew once prices have changed by more than a share of them."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._prices: RoundPrices | None = None
        self._found = WeakKeyDictionary[AcceptanceTable, DraftedRound]()

    def update(self, prices: RoundPrices) -> RoundPrices:
        """Take new prices into account; return the first ones that are close to them."""
        if self._prices is None or not prices.close_to(self._prices, self._tolerance):
            self._found.clear()
            self._prices = prices
        return self._prices

    def best(self, table: AcceptanceTable, prices: RoundPrices) -> DraftedRound:
        """Return the best drafted round, at prices close to those of the latest `update`."""
        found = self._found.get(table)
        if found is None:
            found = self._found[table] = best_drafted_round(table, prices)
        return found


class _SiblingChoice(msgspec.Struct, frozen=True):
    """The siblings to send.

    Attributes:
        count: per draft token of at most `confidence`.
        confidence: see `count`.
        per_token: mean number of siblings per draft token.
        hits: mean number of hits per draft token with an accepted prefix.
    """

    count: int = 0
    confidence: float = 0.0
    per_token: float = 0.0
    hits: float = 0.0


def best_drafted_round(table: AcceptanceTable, prices: RoundPrices) -> DraftedRound:
    """Return the round of at least one draft token with the least cost per token."""
    bound = max(1, min(prices.max_length, MAX_DRAFT_LENGTH)) + 1
    drafted, accepted = table.drafted[1:bound], table.accepted[1:bound]
    costs = _round_cost(prices, drafted, 0.0) / (1.0 + accepted)
    row, column = divmod(int(costs.argmin()), THRESHOLD_COUNT)
    siblings = _best_siblings(
        table,
        prices,
        token_value=float(costs[row, column]),
        drafted=float(drafted[row, column]),
        accepted=float(accepted[row, column]),
    )
    # Tokens gained per accepted token, including the sibling hits; accepted / acceptance is the expected number of
    # draft tokens with an accepted prefix.
    gain = 1.0 + siblings.hits / table.acceptance
    if siblings.count:
        costs = _round_cost(prices, drafted, siblings.per_token) / (1.0 + gain * accepted)
        row, column = divmod(int(costs.argmin()), THRESHOLD_COUNT)
    tokens = 1.0 + gain * float(accepted[row, column])
    plan = Plan(
        row + 1,
        siblings=siblings.count,
        sibling_confidence=siblings.confidence,
        min_survival=float(THRESHOLDS[column]),
        calibration=table.calibration,
    )
    best = DraftedRound(float(costs[row, column]), plan, tokens, chain_tokens=tokens)
    return _best_ahead(table, prices, best, siblings.per_token, gain)


def _round_cost(prices: RoundPrices, drafted: FloatArray, siblings: float) -> FloatArray:
    """Return the expected cost of rounds of `drafted` tokens with `siblings` per token."""
    ids = drafted * (1.0 + siblings)
    forward = prices.forward(1.0 + ids)
    return prices.exchange + prices.step * drafted + prices.id * ids + prices.forward_second * forward


def _best_siblings(
    table: AcceptanceTable, prices: RoundPrices, *, token_value: float, drafted: float, accepted: float
) -> _SiblingChoice:
    """Choose the siblings of a round.

    Args:
        table, prices: as for the search.
        token_value: cost per token, which is what one more token is worth.
        drafted, accepted: expected tokens of the round without siblings.
    """
    if not prices.max_siblings:
        return _SiblingChoice()
    # Mean probability that a draft token's prefix is accepted.
    prefix = min(1.0, accepted / drafted / table.acceptance)
    # Marginal cost of a tree node, where the siblings would be added.
    low, high = prices.forward(np.array([1.0 + drafted, 2.0 + 2.0 * drafted])).tolist()
    node = prices.id + prices.forward_second * (high - low) / (1.0 + drafted)
    # Rejections are rarer the more confident the draft is, so the bins worth it are the lowest ones: the gains are
    # cumulated over bins. Shape: (siblings, bins).
    values = prefix * token_value * table.rejected_shares * table.sibling_hits[1:, None]
    gains = (values - node * _SIBLING_COUNTS * table.confidence_shares).cumsum(1)[: prices.max_siblings]
    row, last = divmod(int(gains.argmax()), CONFIDENCE_BINS)
    if gains[row, last] <= 0.0:
        return _SiblingChoice()
    count = row + 1
    return _SiblingChoice(
        count,
        (last + 1) / CONFIDENCE_BINS,
        count * float(table.confidence_shares[: last + 1].sum()),
        float(table.rejected_shares[: last + 1].sum() * table.sibling_hits[count]),
    )


def _best_ahead(
    table: AcceptanceTable, prices: RoundPrices, best: DraftedRound, siblings: float, gain: float
) -> DraftedRound:
    """Return `best`, or the round with drafting ahead that is cheaper. Shapes: (tokens ahead, K, threshold).

    Args:
        table, prices: as for the search.
        best: the best round without drafting ahead.
        siblings: per draft token.
        gain: tokens gained per accepted token, sibling hits included.
    """
    step, flight = prices.step_seconds, prices.flight_seconds
    # Only tokens that are drafted before the reply are of use.
    candidates = bisect_right(AHEAD_LENGTHS, FLIGHT_FACTOR * flight / step)
    if not candidates:
        return best
    ahead = _AHEAD_LENGTHS[:candidates]
    counts = ahead[:, None, None]
    lengths = DRAFT_LENGTHS[: bisect_right(DRAFT_LENGTHS, max(1, prices.max_length))]
    drafted = table.drafted[lengths, ::THRESHOLD_STRIDE]
    forwards = prices.forward(1.0 + drafted * (1.0 + siblings))
    tokens = 1.0 + gain * table.accepted[lengths, ::THRESHOLD_STRIDE]
    # Tokens after the guessed bonus token for which there is time before the reply.
    flight_tokens = np.maximum(
        0.0, (flight - prices.forward_seconds[0] + prices.queue_seconds + forwards) // step - 1.0
    )
    # Probability that the draft ends because of K; and that the guess after it holds and the stop rule continues.
    reach, holds = table.reach[lengths, ::THRESHOLD_STRIDE], table.survival[lengths + 1, ::THRESHOLD_STRIDE]
    base = _round_cost(prices, drafted, siblings) + prices.step_ahead * (1 + counts) * reach
    # One round in flight: if the guess holds, the next draft begins with the tokens drafted ahead.
    saved = np.minimum(np.minimum(counts, flight_tokens), drafted) * (step * prices.flight_second)
    single = base - holds * saved
    # Two rounds in flight: the replies of early rounds arrive as fast as verifier and board allow, but at most two per
    # flight. Intervals between the replies of the second, the third and each further round of a chain and the one
    # before; `chain` is the probability that an early round's guess holds as well.
    chain = table.survival[ahead + 1, ::THRESHOLD_STRIDE][:, None]
    early = table.drafted[ahead, ::THRESHOLD_STRIDE][:, None]
    ids = early * (1.0 + siblings)
    forward = prices.forward(1.0 + ids)
    sent = (1 + early) * step + prices.overhead_seconds
    verifier = prices.queue_seconds + forward
    arrival = sent + verifier + (flight - prices.forward_seconds[0])
    second = np.maximum(verifier, sent + forward - forwards)
    third = np.maximum(verifier, arrival - second)
    further = np.maximum(verifier, arrival / 2)
    # Cost of an early round in addition to the interval, and of all early rounds (a geometric series in `chain`).
    early_cost = (prices.forward_second - prices.flight_second) * forward
    early_cost = early_cost + prices.id * ids + prices.step_ahead * (1 + early)
    chain_cost = prices.flight_second * (second + chain * third)
    chain_cost = chain_cost + (prices.flight_second * chain**2 * further + early_cost) / (1.0 - chain)
    double = base + prices.void * reach + holds * chain_cost
    early_rounds = holds / (1.0 - chain)
    chain_tokens = tokens + early_rounds * (1.0 + gain * table.accepted[ahead, ::THRESHOLD_STRIDE][:, None])
    costs = np.stack([single / tokens, np.where(early <= flight_tokens, double / chain_tokens, np.inf)])
    index = int(costs.argmin())
    if costs.flat[index] >= best.cost:
        return best
    in_flight, which, row, column = np.unravel_index(index, costs.shape)
    plan = msgspec.structs.replace(
        best.plan,
        draft=int(DRAFT_LENGTHS[row]),
        min_survival=float(THRESHOLDS[column * THRESHOLD_STRIDE]),
        draft_ahead=AHEAD_LENGTHS[which],
        in_flight=int(in_flight) + 1,
    )
    round_tokens = float(tokens[row, column])
    total = float(chain_tokens[which, row, column]) if in_flight else round_tokens
    return DraftedRound(float(costs.flat[index]), plan, round_tokens, total)
