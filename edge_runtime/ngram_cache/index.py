"""The last tokens that were seen, and where what stands at the end of a text stood before (LZ77's hash chains).

Tokens go into a ring. For each length in `ORDERS` a table has, by a hash of so many tokens, the last place behind them,
and each place has the one before it: so a search looks at the most recent places first, memory is fixed, and what
the ring overwrites is forgotten.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Places are found by so many tokens before them; the longer first. Of each length, so many places are looked at.
ORDERS = (4, 2)
PLACES = 8
# Longer matches say no more.
LONGEST = 16
# Between texts: no token's id.
BOUNDARY = -1


class Match(NamedTuple):
    """What followed, where the text's end stood before.

    Attributes:
        token: what followed most, longer matches counting more.
        length: tokens of its longest match.
        share: of this token among all that followed, in (0, 1].
        place: behind the longest match, counted from the first token ever.
    """

    token: int
    length: int
    share: float
    place: int


class Trace:
    """Not for concurrent use.

    Attributes:
        end: how many tokens there were, boundaries among them.
    """

    def __init__(self, capacity: int) -> None:
        """
        Args:
            capacity: tokens that are kept, rounded up to a power of two; each takes 36 bytes.
        """
        size = 1 << max(5, (capacity - 1).bit_length())
        self.end = 0
        self._mask = size - 1
        self._tokens = array("i", [BOUNDARY]) * size
        # 0 is no place: no token stands before it.
        self._chains = [(order, array("q", [0]) * size, array("q", [0]) * size) for order in ORDERS]
        self._last: tuple[int, ...] = ()

    def add(self, ids: Iterable[int]) -> None:
        """Puts `ids` behind what there is."""
        mask, tokens, last, end = self._mask, self._tokens, self._last, self.end
        for token in ids:
            tokens[end & mask] = token
            end += 1
            last = (*last[1 - ORDERS[0] :], token)
            for order, heads, before in self._chains:
                slot = hash(last[-order:]) & mask
                before[end & mask] = heads[slot]
                heads[slot] = end
        self._last, self.end = last, end

    def find(self, text: Sequence[int]) -> Match | None:
        """What followed where the last tokens of `text` stood before; None if they never did."""
        tokens, mask, end, have = self._tokens, self._mask, self.end, len(text)
        # A place needs the tokens before it, and the one behind it.
        oldest = max(0, end - mask - 1 + LONGEST)
        most = min(LONGEST, have)
        weights: dict[int, float] = {}
        longest: dict[int, tuple[int, int]] = {}
        seen: set[int] = set()
        for order, heads, before in self._chains:
            if have < order:
                continue
            place = heads[hash(tuple(text[-order:])) & mask]
            for _ in range(PLACES):
                if place <= oldest:
                    break
                if place < end and place not in seen:
                    seen.add(place)
                    token, length = tokens[place & mask], 0
                    while length < most and tokens[(place - 1 - length) & mask] == text[-1 - length]:
                        length += 1
                    # Hashes of other tokens may be the same.
                    if length >= ORDERS[-1] and token != BOUNDARY:
                        weights[token] = weights.get(token, 0.0) + 4.0 ** min(length, 8)
                        if length > longest.get(token, (0, 0))[0]:
                            longest[token] = (length, place)
                place = before[place & mask]
        if not weights:
            return None
        best = max(weights, key=weights.__getitem__)
        length, place = longest[best]
        return Match(best, length, weights[best] / sum(weights.values()), place)
