"""N-gram index: finds earlier occurrences of the end of a text in the last tokens seen (LZ77's hash chains).

Tokens go into a ring buffer. For each n-gram length in `NGRAM_ORDERS`, a table maps the hash of an n-gram to the
position after its last occurrence, and each position links to that of the occurrence before it. A search therefore
visits the most recent occurrences first, memory is fixed, and what the ring overwrites is forgotten.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# N-gram lengths that are hashed, longest first. Chosen.
NGRAM_ORDERS = (4, 2)
# Occurrences visited for each n-gram length. Chosen: bounds the time of a search.
MAX_CHAIN_STEPS = 8
# Matches are compared up to this length. Chosen: longer ones predict no better.
MAX_MATCH_TOKENS = 16
# Separates texts in the ring; not a token id.
BOUNDARY = -1


class NgramMatch(NamedTuple):
    """The most likely next token, from earlier occurrences of the end of a text.

    Attributes:
        token: the token that followed most often, weighted by match length.
        length: length in tokens of its longest match.
        share: weight of this token among all tokens that followed, in (0, 1].
        position: position after the longest match, counted from the first token ever added.
    """

    token: int
    length: int
    share: float
    position: int


class NgramIndex:
    """Index of the last tokens added. Not thread-safe.

    Attributes:
        end: number of tokens ever added, boundaries included.
    """

    def __init__(self, capacity: int) -> None:
        """
        Args:
            capacity: tokens kept, rounded up to a power of two; each takes 36 bytes.
        """
        size = 1 << max(5, (capacity - 1).bit_length())
        self.end = 0
        self._mask = size - 1
        self._tokens = array("i", [BOUNDARY]) * size
        # (n-gram length, head position by hash, previous position by position). 0 ends a chain: no token precedes it.
        self._chains = [(order, array("q", [0]) * size, array("q", [0]) * size) for order in NGRAM_ORDERS]
        self._last: tuple[int, ...] = ()

    def add(self, ids: Iterable[int]) -> None:
        """Append `ids`."""
        mask, tokens, last, end = self._mask, self._tokens, self._last, self.end
        for token in ids:
            tokens[end & mask] = token
            end += 1
            last = (*last[1 - NGRAM_ORDERS[0] :], token)
            for order, heads, previous in self._chains:
                slot = hash(last[-order:]) & mask
                previous[end & mask] = heads[slot]
                heads[slot] = end
        self._last, self.end = last, end

    def find(self, text: Sequence[int]) -> NgramMatch | None:
        """Find the token that followed earlier occurrences of the end of `text`; None if there are none."""
        tokens, mask, end = self._tokens, self._mask, self.end
        # A usable position needs the tokens before it and the one after it.
        oldest = max(0, end - mask - 1 + MAX_MATCH_TOKENS)
        max_length = min(MAX_MATCH_TOKENS, len(text))
        weights: dict[int, float] = {}
        longest: dict[int, tuple[int, int]] = {}
        seen: set[int] = set()
        for order, heads, previous in self._chains:
            if len(text) < order:
                continue
            position = heads[hash(tuple(text[-order:])) & mask]
            for _ in range(MAX_CHAIN_STEPS):
                if position <= oldest:
                    break
                if position < end and position not in seen:
                    seen.add(position)
                    token, length = tokens[position & mask], 0
                    while length < max_length and tokens[(position - 1 - length) & mask] == text[-1 - length]:
                        length += 1
                    # A shorter match is a hash collision.
                    if length >= NGRAM_ORDERS[-1] and token != BOUNDARY:
                        weights[token] = weights.get(token, 0.0) + 4.0 ** min(length, 8)
                        if length > longest.get(token, (0, 0))[0]:
                            longest[token] = (length, position)
                position = previous[position & mask]
        if not weights:
            return None
        best = max(weights, key=weights.__getitem__)
        length, position = longest[best]
        return NgramMatch(best, length, weights[best] / sum(weights.values()), position)
