"""The shared noise and the choice of a token: why the text does not depend on the draft.

The token at absolute position t (0 is the first prompt token) of a request with seed s is

    argmax_i ( logit_i / T + g_i ),    g_i = -log(-log(u_i)),    u_i = u(s, t, i) in (0, 1)

over the candidates i that temperature, top-k and top-p leave, in that order and as Hugging Face's logits warpers
define them; at temperature 0 it is the plain argmax, ties going to the lower id. This is the Gumbel-max trick, so the
token follows softmax(logits / T) exactly. The noise is a counter-based hash (SplitMix64's finaliser) of seed, position
and id: there is no generator state, so the board and the cloud draw the same noise without exchanging anything. The
cloud accepts a draft token iff it equals the token that the target chooses; Pr[accept] = sum_i 1 / sum_j
max(p_j/p_i, q_j/q_i) >= (1 - TV) / (1 + TV) (Daliri, Musco, Suresh, arXiv 2408.07978).

This file is the numpy form, used on the board; `cloud_verifier.model.sampling` is the torch form of the same
definitions.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.errors import InputError

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
MASK = (1 << 64) - 1
FACTORS = (np.uint64(MULTIPLIER_1), np.uint64(MULTIPLIER_2))
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(12))

# The most probable tokens that are looked at first: the rest is looked at only where these do not settle the matter.
HEAD = 64
# Tokens more than this below the largest logit / T win only with extraordinary noise (see `_contenders`).
HEAD_NATS = 3.0

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the target's distribution is warped, and with which noise it is drawn from.

    Attributes:
        temperature: 0 is greedy; else logits are divided by it.
        top_k: keep the k largest logits (and ties with the k-th); 0 keeps all.
        top_p: keep the smallest set of most probable tokens that reaches this mass; 1 keeps all.
        seed: 64-bit seed of the noise.
        ignore_eos: go on past the end-of-text token (for measurements).
    """

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, msgspec.Meta(ge=0)] = 0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    # msgspec's bounds are signed 64-bit, hence no `le`; the hash reduces any integer modulo 2^64.
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        # Struct constraints hold on decoding only; this holds for callers in Python too.
        if not 0 <= self.temperature <= 100 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError("temperature must be in [0, 100], top_p in (0, 1] and top_k at least 0")
        if 0 < self.temperature < 1e-3:
            raise ValueError("a temperature above 0 must be at least 0.001; use 0 for greedy decoding")
        if not 0 <= self.seed <= MASK:
            raise ValueError("seed must be in [0, 2^64)")


class Ranked(NamedTuple):
    """The best candidates for one position, best first.

    Attributes:
        ids: (count,) token ids; fewer where fewer candidates exist. `ids[0]` is the chosen token.
        scores: (count,) their coupled scores (at temperature 0: their logits).
    """

    ids: list[int]
    scores: list[float]


def mix(z: int) -> int:
    """SplitMix64's finaliser on one 64-bit integer."""
    z = ((z ^ (z >> 30)) * MULTIPLIER_1) & MASK
    z = ((z ^ (z >> 27)) * MULTIPLIER_2) & MASK
    return z ^ (z >> 31)


def position_key(seed: int, position: int) -> int:
    """The 64-bit key from which the noise of every id at one position is derived."""
    return mix((mix((seed + GOLDEN) & MASK) + (position + 1) * GOLDEN) & MASK)


def noise_bits(key: int, counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The 52 random bits of each id. `counters`: (m,) uint64, (id + 1) * GOLDEN modulo 2^64. Returns (m,) uint64."""
    z = counters + np.uint64(key)
    z ^= z >> SHIFTS[0]
    z *= FACTORS[0]
    z ^= z >> SHIFTS[1]
    z *= FACTORS[1]
    z ^= z >> SHIFTS[2]
    z >>= SHIFTS[3]
    return z


def counters(ids: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """(id + 1) * GOLDEN modulo 2^64, the form in which ids enter the hash."""
    return (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)


def uniforms(seed: int, position: int, ids: npt.NDArray[np.integer]) -> Floats:
    """u(seed, position, id) in (0, 1) for `ids` (m,). Returns (m,) float64, never 0 and never 1."""
    return (noise_bits(position_key(seed, position), counters(ids)).astype(np.float64) + 0.5) * 2.0**-52


def gumbel(u: Floats) -> Floats:
    """Standard Gumbel noise from uniforms."""
    return -np.log(-np.log(u))


def candidates(logits: npt.NDArray[np.float32], sampling: Sampling) -> Ids:
    """The ids that top-k and top-p leave of `logits` (V,), ascending. Returns (m,) int64 with m >= 1.

    As `TopKLogitsWarper` and `TopPLogitsWarper` do after `TemperatureLogitsWarper`: ties with the k-th logit stay; a
    token stays iff the mass of all tokens up to and including it, from the least probable up, exceeds 1 - top_p.
    """
    kept: Ids
    if 0 < sampling.top_k < logits.size:
        kth = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        kept = np.flatnonzero(logits >= kth)
    else:
        kept = np.arange(logits.size)
    if sampling.top_p < 1.0:
        scaled = logits[kept].astype(np.float64) / sampling.temperature
        mass = np.exp(scaled - scaled.max())
        mass /= mass.sum()
        return np.sort(kept[_nucleus(mass, sampling.top_p)])
    return kept


def _nucleus(mass: Floats, top_p: float) -> Ids:
    """Indices of the most probable entries of `mass` (m,) that together reach `top_p`; of equals, the first.

    Sorting is what this costs, so the HEAD most probable are tried before all of them.
    """
    if mass.size > 4 * HEAD:
        head = np.sort(np.argpartition(mass, mass.size - 4 * HEAD)[-4 * HEAD :])
        # Good only if it holds the whole nucleus and no tie with an entry outside it.
        left = mass[head] > mass[head].min()
        if mass[head][left].sum() > top_p:
            head = head[left]
            within: Ids = head[_nucleus_of_few(mass[head], top_p)]
            return within
    return _nucleus_of_few(mass, top_p)


def _nucleus_of_few(mass: Floats, top_p: float) -> Ids:
    order = np.argsort(-mass, kind="stable")
    before = mass[order].cumsum() - mass[order]
    keep = before < top_p - 1e-12
    keep[0] = True
    nucleus: Ids = order[keep]
    return nucleus


class Chooser:
    """Chooses tokens for one vocabulary size; holds the hash's per-id constants so that a choice costs microseconds."""

    def __init__(self, vocabulary_size: int) -> None:
        self._counters = counters(np.arange(vocabulary_size))

    def rank(self, logits: npt.NDArray[np.float32], sampling: Sampling, position: int, count: int = 1) -> Ranked:
        """The `count` best candidates at `position` by coupled score; the first is the choice.

        Args:
            logits: (V,) float32, finite.
            sampling: warping and seed.
            position: absolute position of the token to choose, 0 being the first prompt token.
            count: how many candidates to return, at least 1.
        """
        if sampling.temperature == 0.0:
            ids = _largest(logits, count)
            return Ranked(ids, [float(logits[i]) for i in ids])
        key = position_key(sampling.seed, position)
        if sampling.top_k or sampling.top_p < 1.0:
            kept = candidates(logits, sampling)
            scores = self._scores(logits, kept, sampling.temperature, key)
        else:
            kept, scores = self._contenders(logits, sampling.temperature, key, count)
        if scores.size > count:
            # Sorting is for the few that can be among the best.
            fit = np.flatnonzero(scores >= np.partition(scores, scores.size - count)[scores.size - count])
            kept, scores = kept[fit], scores[fit]
        best = np.lexsort((kept, -scores))[:count]
        return Ranked(kept[best].tolist(), scores[best].tolist())

    def _scores(self, logits: npt.NDArray[np.float32], ids: Ids, temperature: float, key: int) -> Floats:
        """Coupled scores of `ids` (m,)."""
        u = (noise_bits(key, self._counters[ids]).astype(np.float64) + 0.5) * 2.0**-52
        scores: Floats = logits[ids].astype(np.float64) / temperature + gumbel(u)
        return scores

    def _contenders(
        self, logits: npt.NDArray[np.float32], temperature: float, key: int, count: int
    ) -> tuple[Ids, Floats]:
        """Every id that can be among the `count` best, and their scores: exact, and far fewer logarithms than V.

        The `count`-th best score among the most probable ids, the head, is a bar. An id outside the head has a logit
        below `edge`, so it passes the bar only if g > bar - edge / T, that is u > exp(-exp(-(bar - edge / T))): one
        integer comparison on the hash's bits.
        """
        edge = float(logits.max()) - HEAD_NATS * temperature
        head = np.flatnonzero(logits >= edge)
        if head.size < count:
            edge, head = -math.inf, np.arange(logits.size)
        scores = self._scores(logits, head, temperature, key)
        bar = float(scores.max() if count == 1 else np.partition(scores, head.size - count)[head.size - count])
        # A bit of slack, so that rounding in the threshold can only add contenders.
        least = math.exp(-math.exp(min(edge / temperature - bar, 700.0))) * (1.0 - 1e-9)
        passing = np.flatnonzero(noise_bits(key, self._counters) >= np.uint64(max(0.0, least * 2.0**52 - 1.0)))
        others = passing[logits[passing] < edge]
        if not others.size:
            return head, scores
        return np.concatenate([head, others]), np.concatenate([scores, self._scores(logits, others, temperature, key)])


def _largest(scores: npt.NDArray[np.floating], count: int) -> list[int]:
    """Indices of the `count` largest, best first, ties to the lower index."""
    if count == 1:
        return [int(scores.argmax())]
    # A search for each is quicker than sorting, for the few that are asked for.
    rest = scores.copy()
    best = []
    for _ in range(min(count, scores.size)):
        best.append(int(rest.argmax()))
        rest[best[-1]] = -np.inf
    return best


def confidence(logits: npt.NDArray[np.float32], token: int, temperature: float) -> float:
    """softmax(logits / T)[token] over the whole vocabulary (V,); at temperature 0 as at 1."""
    mass = logits - logits[token]
    if temperature not in (0.0, 1.0):
        mass *= np.float32(1.0 / temperature)
    # What overflows is infinitely more probable than the token.
    with np.errstate(over="ignore"):
        return float(1.0 / np.exp(mass, out=mass).sum())


def accepted_length(draft: list[int], chosen: list[int]) -> int:
    """How many leading draft tokens equal the target's choices: the acceptance rule."""
    for index, (guess, truth) in enumerate(zip(draft, chosen, strict=False)):
        if guess != truth:
            return index
    return min(len(draft), len(chosen))


def check_prompt(prompt: list[int], vocabulary_size: int) -> None:
    """Raises InputError unless `prompt` is a non-empty list of ids below `vocabulary_size`."""
    if not prompt:
        raise InputError("the prompt is empty: give at least one token")
    wrong = [token for token in prompt if not 0 <= token < vocabulary_size]
    if wrong:
        raise InputError(f"token id {wrong[0]} is outside the vocabulary of {vocabulary_size}")
