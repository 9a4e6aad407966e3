"""The draft's sampler: the rule of `protocol.sampling` in float32, with noise that can be computed in advance.

The logits are processed (`protocol.logits_processing`) and warped as the target's are, so that penalties and grammars
do not lower acceptance. The verifier's choice must be exact; the draft's is a proposal. If two coupled scores differ by
less than about 0.001, this sampler may take the other token than `CoupledSampler` would. That costs an acceptance now
and then, and never correctness. In exchange, after `precompute_noise`, no hash and no logarithm is computed between two
steps of the draft.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.logits_processing import LogitChanges
from edge_runtime.protocol.sampling import Sampling, noise_bits, position_key

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

# Noise is cached for this many positions, (n,) float32 each. Chosen: more than the longest draft.
MAX_CACHED_POSITIONS = 48
# Search limits: how many candidates outside the nucleus are skipped before the draft token is found, and in total once
# it is found. Chosen: the draft token matters, siblings are optional.
MAX_SKIPPED_FIRST = 64
MAX_SKIPPED_SIBLINGS = 4
# Unnormalized mass of a token, the best one having about 1, above which it is summed in the short list.
HEAVY_MASS = np.float32(1e-3)


class DraftSampler:
    """Samples the draft tokens of one text."""

    def __init__(self, hash_counters: npt.NDArray[np.uint64], ids: Ids | None = None) -> None:
        """
        Args:
            hash_counters: `protocol.sampling.hash_counters` of the ids that the logits cover.
            ids: these ids, ascending; None if they are 0, 1, 2, ...
        """
        self._hash_counters = hash_counters
        self._ids = ids
        # By position, for the seed `_seed`.
        self._noise: dict[int, Row] = {}
        self._seed = -1

    def precompute_noise(self, sampling: Sampling, positions: range) -> None:
        """Compute the noise for `positions` in advance, while the draft is idle."""
        if sampling.temperature > 0.0:
            for position in positions:
                self._noise_at(sampling.seed, position)

    def sample(
        self,
        logits: Row,
        sampling: Sampling,
        position: int,
        count: int,
        *,
        changes: LogitChanges | None = None,
    ) -> tuple[list[int], float]:
        """Return the `count` best ids by coupled score, best first, and the draft's probability of the first.

        Args:
            logits: (n,) float32, finite.
            position: absolute position of the token to draft, 0 being the first prompt token.
            count: at least 1; fewer ids are returned if grammar, top-k, top-p or min-p exclude the others.
            changes: how the target's logits are processed at this position, and therefore the draft's; None: not.
        """
        if changes is not None:
            raw, logits = logits, changes.apply(logits, self._ids)
            if logits.max() == -np.inf:
                # Only tokens may follow that a trimmed head does not cover.
                return self._to_ids([int(raw.argmax())]), 0.0
        scale = np.float32(1.0 / (sampling.temperature or 1.0))
        scores = logits * scale
        mass = np.exp(scores - scores.max())
        total = float(mass.sum())
        kept_mass, top_k, top_p = total, sampling.top_k, sampling.top_p
        if sampling.temperature == 0.0:
            top_k, top_p = 0, 1.0
        if 0 < top_k < logits.size:
            excluded = scores < np.partition(scores, -top_k)[-top_k]
            scores[excluded] = -np.inf
            kept_mass -= float(mass[excluded].sum())
        if sampling.min_p and sampling.temperature > 0.0:
            scores[scores < scores.max() + math.log(sampling.min_p)] = -np.inf
        if top_p < 1.0 and top_p * kept_mass <= 1.0:
            # The nucleus is the most probable token alone, whose mass is 1.
            return self._to_ids([int(mass.argmax())]), 1.0 / total
        if sampling.temperature > 0.0:
            scores += self._noise_at(sampling.seed, position)
        # Nearly all candidates are heavier than HEAVY_MASS, and few tokens are: for those, the sum over the heavy
        # tokens equals the sum over all.
        heavy = mass[mass >= HEAVY_MASS] if top_p < 1.0 else mass
        rows: list[int] = []
        skipped = 0
        while len(rows) < count and skipped < (MAX_SKIPPED_SIBLINGS if rows else MAX_SKIPPED_FIRST):
            row = int(scores.argmax())
            if scores[row] == -np.inf:
                break
            # A token is in the nucleus iff the more probable ones do not reach top_p without it.
            weight = mass[row]
            others = heavy if weight >= HEAVY_MASS else mass
            if top_p >= 1.0 or float(others[others > weight].sum()) < top_p * kept_mass:
                rows.append(row)
            else:
                skipped += 1
            scores[row] = -np.inf
        # The draft always proposes something.
        rows = rows or [int(mass.argmax())]
        return self._to_ids(rows), float(mass[rows[0]]) / total

    def _to_ids(self, rows: list[int]) -> list[int]:
        """The token ids of these indices of the logits."""
        return rows if self._ids is None else self._ids[rows].tolist()

    def _noise_at(self, seed: int, position: int) -> Row:
        if seed != self._seed:
            self._noise, self._seed = {}, seed
        noise = self._noise.get(position)
        if noise is None:
            if len(self._noise) >= MAX_CACHED_POSITIONS:
                for old in sorted(self._noise)[: MAX_CACHED_POSITIONS // 2]:
                    del self._noise[old]
            u = noise_bits(position_key(seed, position), self._hash_counters).astype(np.float32)
            # float32 would round the largest uniform to 1, whose noise is infinite.
            u = np.minimum(u * np.float32(2.0**-52) + np.float32(2.0**-54), np.float32(1.0 - 2.0**-24))
            np.log(u, out=u)
            np.negative(u, out=u)
            np.log(u, out=u)
            noise = self._noise[position] = np.negative(u, out=u)
        return noise
