"""The draft's choice of tokens: that of `contract.coupling` in float32, with its noise made beforehand.

The verifier's choice must be exact; the draft's is a guess. Where two scores differ by less than a thousandth or so
this may take the other token than `Chooser` would, which costs an acceptance now and then, and no correctness. In
exchange, with `prepare`, no hash and no logarithm stands between two steps of the draft.

What verified text says (`memory`) may be mixed into the draft's distribution first: that, too, is but a better guess.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edge_runtime.ngram_cache.lookup import Hint
from edge_runtime.protocol.sampling import Sampling, noise_bits, position_key

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

# Noise is kept for so many positions.
KEPT = 48
# How many candidates that top-p excludes are passed over for the first, and for all others.
FIRST_PATIENCE = 64
PATIENCE = 4
# Of a token's mass, where the best has about 1.
WEIGHTY = np.float32(1e-3)


class Guesser:
    """Guesses tokens of one text."""

    def __init__(self, counters: npt.NDArray[np.uint64], ids: Ids | None = None) -> None:
        """
        Args:
            counters: of the ids that logits are of, as `coupling.counters` makes them.
            ids: these ids, ascending; None where they count from 0.
        """
        self._counters = counters
        self._ids = ids
        # By position, for `_seed`.
        self._noise: dict[int, Row] = {}
        self._seed = -1

    def prepare(self, sampling: Sampling, positions: range) -> None:
        """Makes the noise for `positions` beforehand, for when there is time."""
        if sampling.temperature > 0.0:
            for position in positions:
                self._noise_at(sampling.seed, position)

    def guess(
        self, logits: Row, sampling: Sampling, position: int, count: int, hint: Hint | None = None
    ) -> tuple[list[int], float]:
        """The `count` best candidates by coupled score, best first, and the probability of the first.

        Args:
            logits: (n,) float32, finite, one for each id.
            position: of the token to guess, 0 being the first prompt token.
            count: at least 1; fewer candidates may come where top-k and top-p exclude the others.
            hint: of the memory, which is mixed in where it is surer than the draft.
        """
        scale = np.float32(1.0 / (sampling.temperature or 1.0))
        scores = logits * scale
        mass = np.exp(scores - scores.max())
        total = float(mass.sum())
        most = 1.0
        if hint is not None:
            total = self._mix(scores, mass, total, hint)
            most = float(mass.max())
        left, top_k, top_p = total, sampling.top_k, sampling.top_p
        if sampling.temperature == 0.0:
            top_k, top_p = 0, 1.0
        ids: list[int] = []
        if 0 < top_k < logits.size:
            out = scores < np.partition(scores, -top_k)[-top_k]
            scores[out] = -np.inf
            left -= float(mass[out].sum())
        if top_p < 1.0 and top_p * left <= most:
            # The most probable token is all that top-p keeps.
            return self._named([int(mass.argmax())]), most / total
        if sampling.temperature > 0.0:
            scores += self._noise_at(sampling.seed, position)
        # Few tokens weigh more than this, and few candidates less: to add those up is to add up all.
        weighty = mass[mass >= WEIGHTY] if top_p < 1.0 else mass
        passed = 0
        while len(ids) < count and passed < (PATIENCE if ids else FIRST_PATIENCE):
            token = int(scores.argmax())
            if scores[token] == -np.inf:
                break
            # A token stays iff those more probable do not reach top_p without it.
            weight = mass[token]
            others = weighty if weight >= WEIGHTY else mass
            if top_p >= 1.0 or float(others[others > weight].sum()) < top_p * left:
                ids.append(token)
            else:
                passed += 1
            scores[token] = -np.inf
        # Something must be guessed.
        ids = ids or [int(mass.argmax())]
        return self._named(ids), float(mass[ids[0]]) / total

    def _mix(self, scores: Row, mass: Row, total: float, hint: Hint) -> float:
        """Gives the hint's token its chance in `scores` and `mass`, both (n,). Returns the sum of `mass`."""
        place = hint.token if self._ids is None else int(self._ids.searchsorted(hint.token))
        if place >= mass.size or (self._ids is not None and self._ids[place] != hint.token):
            return total
        before = float(mass[place])
        chance = hint.chance_beside(before / total)
        if chance * total <= before:
            return total
        others = total - before
        after = others * chance / (1.0 - chance)
        # A mass of 1 is that of the best.
        scores[place] = float(scores.max()) + math.log(after)
        mass[place] = after
        return others + after

    def _named(self, places: list[int]) -> list[int]:
        """The ids at these places among the logits."""
        return places if self._ids is None else self._ids[places].tolist()

    def _noise_at(self, seed: int, position: int) -> Row:
        if seed != self._seed:
            self._noise, self._seed = {}, seed
        noise = self._noise.get(position)
        if noise is None:
            if len(self._noise) >= KEPT:
                for old in sorted(self._noise)[: KEPT // 2]:
                    del self._noise[old]
            u = noise_bits(position_key(seed, position), self._counters).astype(np.float32)
            # float32 would round the largest to 1, and its noise to infinity.
            u = np.minimum(u * np.float32(2.0**-52) + np.float32(2.0**-54), np.float32(1.0 - 2.0**-24))
            np.log(u, out=u)
            np.negative(u, out=u)
            np.log(u, out=u)
            noise = self._noise[position] = np.negative(u, out=u)
        return noise
