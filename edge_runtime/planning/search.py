"""The best drafted round for given prices: the plan with the least cost per token.

A text is many rounds, so what counts is E[cost of a round] / E[tokens of a round] (renewal-reward). Under known costs
everything in it is linear in two expectations, how many tokens are drafted and how many accepted, and `Table` has both
for every draft length K and every threshold of survival s at once. So the search is exact over its grid and costs a
few array operations.

At the optimum, the threshold is where one more step costs what it brings: with lambda the cost per token, draft on iff
(chance that all so far are accepted) * (chance that the next is) * lambda > cost of a step. Siblings are named where
(chance that this token is the first missed) * (chance that one of them is right) * lambda > cost of their width.
"""

from __future__ import annotations

import msgspec

from edge_runtime.planning.survival import BINS, LONGEST, MOST_SIBLINGS, THRESHOLDS, Table

# Nodes that a verifier's widest forward holds; drafts and siblings stay well below on average.
MOST_NODES = 48.0
# Counts of siblings to choose from.
SIBLINGS = tuple(range(1, MOST_SIBLINGS + 1))


class Prices(msgspec.Struct, frozen=True):
    """What a drafted round costs, in the objective's seconds.

    Attributes:
        base: of a round that drafts nothing and gets one token.
        step: of each drafted token: the draft's step and one node of the verifier's forward.
        node: of each sibling.
        longest: most tokens to draft.
    """

    base: float
    step: float
    node: float
    longest: int = LONGEST


class Draft(msgspec.Struct, frozen=True):
    """The best drafted round.

    Attributes:
        cost: per token.
        length: K.
        survival: threshold of the stop rule.
        level: its index in `THRESHOLDS`.
        siblings, sibling_confidence: as in `Plan`.
        drafted, accepted, tokens: expected, per round.
    """

    cost: float
    length: int
    survival: float
    level: int
    siblings: int
    sibling_confidence: float
    drafted: float
    accepted: float
    tokens: float


def best_draft(table: Table, prices: Prices) -> Draft:
    """The drafted round of at least one token that is cheapest per token."""
    bound = max(1, min(prices.longest, LONGEST)) + 1
    drafted, accepted = table.drafted[1:bound], table.accepted[1:bound]
    costs = (prices.base + prices.step * drafted) / (1.0 + accepted)
    index = int(costs.argmin())
    row, level = divmod(index, costs.shape[1])
    siblings, confidence, share, hits = _siblings(
        table, prices, float(costs[row, level]), float(accepted[row, level] / drafted[row, level])
    )
    if siblings:
        # Per drafted token `share` siblings are named; per token whose forerunners are right, `hits` bring one more.
        width = prices.step + share * prices.node
        costs = (prices.base + width * drafted) / (1.0 + (1.0 + hits / table.acceptance) * accepted)
        index = int(costs.argmin())
        row, level = divmod(index, costs.shape[1])
    taken = float(accepted[row, level])
    return Draft(
        cost=float(costs[row, level]),
        length=row + 1,
        survival=float(THRESHOLDS[level]),
        level=level,
        siblings=siblings,
        sibling_confidence=confidence,
        drafted=float(drafted[row, level]),
        accepted=taken,
        tokens=1.0 + taken * (1.0 + hits / table.acceptance),
    )


def _siblings(table: Table, prices: Prices, cost: float, accepted: float) -> tuple[int, float, float, float]:
    """How many siblings, up to which confidence, how many that are per drafted token, and how many of these hit.

    Args:
        cost: what a token is worth.
        accepted: share of drafted tokens that are accepted.
    """
    # Chance that all before a drafted token are accepted, on average.
    alive = min(1.0, accepted / table.acceptance)
    best, chosen = 0.0, (0, 0.0, 0.0, 0.0)
    for count in SIBLINGS:
        hit = float(table.sibling_hits[count])
        # Misses are rarer the surer the draft is, so the bins that are worth it are the lowest ones.
        worth = alive * table.missed * hit * cost > count * prices.node
        bins = BINS if worth.all() else int(worth.argmin())
        if not bins:
            continue
        named = float(table.sureness[:bins].sum())
        hits = float(table.first_missed[:bins].sum()) * hit
        gain = alive * hits * cost - named * count * prices.node
        if gain > best:
            best, chosen = gain, (count, bins / BINS, named * count, hits)
    return chosen


def best_lead(table: Table, step: float, own: float, longest: int) -> tuple[int, float, float]:
    """What to draft in front of a stream whose tokens cost `own` each: K, threshold, and what it saves."""
    bound = max(1, min(longest, LONGEST)) + 1
    saved = own * table.accepted[:bound] - step * table.drafted[:bound]
    index = int(saved.argmax())
    row, level = divmod(index, saved.shape[1])
    return row, float(THRESHOLDS[level]), float(saved[row, level])
