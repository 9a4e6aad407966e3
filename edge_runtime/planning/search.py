"""The best drafted round for given prices: the plan with the least cost per token.

A text is many rounds, so what counts is E[cost of a round] / E[tokens of a round] (renewal-reward). Under known costs
everything in it is linear in two expectations, how many tokens are drafted and how many accepted, and `Table` has both
for every draft length K and every threshold of survival s at once. So the search is exact over its grid and costs a
few array operations.

At the optimum, the threshold is where one more step costs what it brings: with lambda the cost per token, draft on iff
(chance that all so far are accepted) * (chance that the next is) * lambda > cost of a step. Siblings are named where
(chance that this token is the first missed) * (chance that one of them is right) * lambda > cost of their width.

Drafting ahead makes a renewal of several rounds: one from scratch, and with the chance that the guess stands, others
whose drafts are there already or whose requests are on their way already.
"""

from __future__ import annotations

from bisect import bisect_right

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.planning.acceptance_table import BINS, LEVELS, LONGEST, MOST_SIBLINGS, THRESHOLDS, Table

Floats = npt.NDArray[np.float64]

# Tokens to draft ahead to choose from.
AHEAD = (1, 2, 3, 4, 6, 8, 12, 16, 24)
_AHEAD = np.array(AHEAD)
_COUNTS = np.arange(1.0, MOST_SIBLINGS + 1)[:, None]
# Drafting ahead is searched over these lengths, and over every so-many-th threshold only.
LENGTHS = np.array((1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 19, 24, 30))
COARSE = 3
# Of a draft that stops where it is unsure, one of up to so many times what fits into a flight may be there in time.
FITTING = 2.0


class Prices(msgspec.Struct, frozen=True):
    """What a drafted round costs, in the objective's seconds unless it says seconds.

    Attributes:
        exchange: of a round, whatever it carries.
        step: of a step of the draft.
        identity: of each id on its way.
        second: of time in flight.
        worked: of a second of the verifier's forward, the waiting for it included.
        ahead: of a step while a round is in flight: energy alone.
        void: of a round that was sent early in vain.
        step_seconds: of the draft.
        flight_seconds: from sending a round of one node to its answer, but for queueing; of the quicker rounds, for
            whether something fits.
        overhead_seconds: of the board, per round.
        queue_seconds: of a round's waiting at the verifier, early rounds included.
        widths, forwards: seconds of the verifier's forward by its nodes, on straight lines between these.
        longest: most tokens to draft.
    """

    exchange: float
    step: float
    identity: float
    second: float
    worked: float
    ahead: float
    void: float
    step_seconds: float
    flight_seconds: float
    overhead_seconds: float
    queue_seconds: float
    widths: list[float]
    forwards: list[float]
    longest: int = LONGEST

    def near(self, other: Prices, share: float) -> bool:
        """Whether all that a search depends on much differs by at most `share`."""
        if self.widths != other.widths:
            return False
        forwards = sum(other.forwards)
        moved = sum(abs(a - b) for a, b in zip(self.forwards, other.forwards, strict=True))
        return (
            abs(self.step - other.step) <= share * other.step
            and abs(self.exchange - other.exchange) <= share * (other.exchange + other.worked * other.forwards[0])
            and abs(self.flight_seconds - other.flight_seconds) <= 2 * share * other.flight_seconds
            and moved <= share * forwards
            and abs(self.worked - other.worked) <= share * other.worked
        )


class Draft(msgspec.Struct, frozen=True):
    """The best drafted round.

    Attributes:
        cost: per token.
        length: K.
        survival: threshold of the stop rule.
        siblings, sibling_confidence, ahead, in_flight: as in `Plan`.
        tokens: expected, of a round that was not sent early.
        chained: of this and of the early ones that follow it, all of which wait for one exchange.
    """

    cost: float
    length: int
    survival: float
    siblings: int = 0
    sibling_confidence: float = 0.0
    ahead: int = 0
    in_flight: int = 1
    tokens: float = 1.0
    chained: float = 1.0


class _Beside(msgspec.Struct, frozen=True):
    """Siblings: how many, up to which confidence, how many per drafted token, and hits per token whose forerunners are
    all accepted."""

    count: int = 0
    confidence: float = 0.0
    named: float = 0.0
    hits: float = 0.0


def best_draft(table: Table, prices: Prices) -> Draft:
    """The drafted round of at least one token that is cheapest per token."""
    bound = max(1, min(prices.longest, LONGEST)) + 1
    drafted, accepted = table.drafted[1:bound], table.accepted[1:bound]
    costs = _round(prices, drafted, 0.0) / (1.0 + accepted)
    row, level = divmod(int(costs.argmin()), LEVELS)
    beside = _siblings(table, prices, float(costs[row, level]), float(drafted[row, level]), float(accepted[row, level]))
    # Per token whose forerunners are right, some siblings bring one token more.
    yield_ = 1.0 + beside.hits / table.acceptance
    if beside.count:
        costs = _round(prices, drafted, beside.named) / (1.0 + yield_ * accepted)
        row, level = divmod(int(costs.argmin()), LEVELS)
    tokens = 1.0 + yield_ * float(accepted[row, level])
    best = Draft(
        cost=float(costs[row, level]),
        length=row + 1,
        survival=float(THRESHOLDS[level]),
        siblings=beside.count,
        sibling_confidence=beside.confidence,
        tokens=tokens,
        chained=tokens,
    )
    return _ahead(table, prices, best, beside.named, yield_)


def _round(prices: Prices, drafted: Floats, named: float) -> Floats:
    """Expected cost of a round that drafts so many tokens and names `named` siblings beside each."""
    ids = drafted * (1.0 + named)
    return prices.exchange + prices.step * drafted + prices.identity * ids + prices.worked * _forward(prices, 1.0 + ids)


def _forward(prices: Prices, nodes: Floats) -> Floats:
    return np.interp(nodes, prices.widths, prices.forwards)


def _siblings(table: Table, prices: Prices, cost: float, drafted: float, accepted: float) -> _Beside:
    """The siblings worth naming.

    Args:
        cost: what a token is worth.
        drafted, accepted: tokens in a round.
    """
    # Chance that all before a drafted token are accepted, on average.
    alive = min(1.0, accepted / drafted / table.acceptance)
    # What one more node costs where siblings would come.
    low, high = np.interp((1.0 + drafted, 2.0 + 2.0 * drafted), prices.widths, prices.forwards).tolist()
    node = prices.identity + prices.worked * (high - low) / (1.0 + drafted)
    # Misses are rarer the surer the draft is, so the bins that are worth it are the lowest ones: (siblings, bins).
    gains = (alive * cost * table.first_missed * table.sibling_hits[1:, None] - node * _COUNTS * table.sureness).cumsum(
        1
    )
    row, last = divmod(int(gains.argmax()), BINS)
    if gains[row, last] <= 0.0:
        return _Beside()
    count = row + 1
    return _Beside(
        count,
        (last + 1) / BINS,
        count * float(table.sureness[: last + 1].sum()),
        float(table.first_missed[: last + 1].sum() * table.sibling_hits[count]),
    )


def _ahead(table: Table, prices: Prices, best: Draft, named: float, yield_: float) -> Draft:
    """`best`, or what drafting ahead makes cheaper than that; arrays are (tokens ahead, K, threshold)."""
    seconds, flight = prices.step_seconds, prices.flight_seconds
    # Only what is there before the answer is of use.
    fitting = bisect_right(AHEAD, FITTING * flight / seconds)
    if not fitting:
        return best
    ahead = _AHEAD[:fitting]
    counts = ahead[:, None, None]
    rows = LENGTHS[: bisect_right(LENGTHS, max(1, prices.longest))]
    drafted = table.drafted[rows, ::COARSE]
    forwards = _forward(prices, 1.0 + drafted * (1.0 + named))
    tokens = 1.0 + yield_ * table.accepted[rows, ::COARSE]
    # Tokens behind the guess of the target's own for which there is time before the answer.
    most = np.maximum(0.0, (flight - prices.forwards[0] + prices.queue_seconds + forwards) // seconds - 1.0)
    # Chances that the draft ends at K alone; and that the guess behind it stands and is worth going on from.
    going, standing = table.going[rows, ::COARSE], table.intact[rows + 1, ::COARSE]
    worked = _round(prices, drafted, named) + prices.ahead * (1 + counts) * going
    # One round in flight: after a guess that stands, drafting begins with what was drafted ahead.
    waiting = worked - standing * np.minimum(np.minimum(counts, most), drafted) * (seconds * prices.second)
    # Two: early rounds' answers come as fast as the verifier or the board allow, but no more than two in a flight. The
    # second, the third and all others of a chain, by when they come after the one before.
    chain = table.intact[ahead + 1, ::COARSE][:, None]
    early = table.drafted[ahead, ::COARSE][:, None]
    ids = early * (1.0 + named)
    forward = _forward(prices, 1.0 + ids)
    sent = (1 + early) * seconds + prices.overhead_seconds
    least = prices.queue_seconds + forward
    arriving = sent + least + (flight - prices.forwards[0])
    second = np.maximum(least, sent + forward - forwards)
    third = np.maximum(least, arriving - second)
    others = np.maximum(least, arriving / 2)
    each = (prices.worked - prices.second) * forward + prices.identity * ids + prices.ahead * (1 + early)
    more = prices.second * (second + chain * third) + (prices.second * chain**2 * others + each) / (1.0 - chain)
    chained = worked + prices.void * going + standing * more
    rounds = standing / (1.0 - chain)
    chained_tokens = tokens + rounds * (1.0 + yield_ * table.accepted[ahead, ::COARSE][:, None])
    costs = np.stack([waiting / tokens, np.where(early <= most, chained / chained_tokens, np.inf)])
    index = int(costs.argmin())
    if costs.flat[index] >= best.cost:
        return best
    in_flight, which, row, level = np.unravel_index(index, costs.shape)
    return msgspec.structs.replace(
        best,
        cost=float(costs.flat[index]),
        length=int(LENGTHS[row]),
        survival=float(THRESHOLDS[level * COARSE]),
        ahead=AHEAD[which],
        in_flight=int(in_flight) + 1,
        tokens=float(tokens[row, level]),
        chained=float(chained_tokens[which, row, level] if in_flight else tokens[row, level]),
    )
