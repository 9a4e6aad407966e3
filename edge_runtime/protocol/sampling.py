"""Coupled sampling: one shared noise stream makes speculative decoding exact, and the output independent of the draft.

The rule. For a request with seed s, the token at absolute position t (0 is the first prompt token) is

    argmax_i ( log p_i(t) + g_i ),    g_i = -log(-log(u_i)),    u_i = u(s, t, i) in (0, 1)

with p the target's distribution after the processors of `logits_processing` (bias, penalties, minimum length, grammar)
and then temperature, top-k, top-p and min-p, applied in this order and as Hugging Face's logits warpers define them.
This is the Gumbel-max trick, so the token is distributed exactly as p. The normalizer of p does not change the argmax,
so the coupled scores are computed as logit_i / T + g_i, in float64 from the processed float32 logits, over the
candidates that the warpers keep. At temperature 0 the token is the argmax of the processed logits. Ties go to the lower
id. A logit of -inf excludes its token.

The noise. u is a counter-based hash, SplitMix64's finalizer, of seed, position and token id, modulo 2^64:

    mix(z):      z = (z ^ z>>30) * 0xBF58476D1CE4E5B9;  z = (z ^ z>>27) * 0x94D049BB133111EB;  return z ^ z>>31
    key(s, t)    = mix(mix(s + G) + (t + 1) G),                      G = 0x9E3779B97F4A7C15
    u(s, t, i)   = ((mix(key(s, t) + (i + 1) G) >> 12) + 0.5) * 2^-52

There is no generator state: board and cloud compute the same noise without exchanging anything. The hash keeps 52 bits,
because with 53 the largest value would round to 1.

The acceptance. The board draws its draft tokens from the draft's distribution q with the same noise. The verifier
accepts a draft token iff it equals the token that the target chooses, and replaces the first one that differs. The
output is therefore a function of target version, prompt, sampling parameters and seed alone. The acceptance
probability is

    Pr[accept] = sum_i 1 / sum_j max(p_j / p_i, q_j / q_i) >= (1 - TV(p, q)) / (1 + TV(p, q))

(Daliri, Musco, Suresh: Coupling without Communication and Drafter-Invariant Speculative Decoding, arXiv 2408.07978).
Never combine this noise with rejection sampling's u < p/q: with shared noise that rule is biased.

This module is the numpy form, used on the board; `cloud_verifier.model.sampling` is the torch form, bit-equal in u.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.errors import InputError

# SplitMix64's increment and the multipliers of its finalizer (Steele, Lea, Flood, OOPSLA 2014).
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MIX_MULTIPLIER_2 = 0x94D049BB133111EB
MASK_64 = (1 << 64) - 1
# The same for numpy's uint64 arithmetic; the last shift keeps 52 bits.
_MULTIPLIERS = (np.uint64(MIX_MULTIPLIER_1), np.uint64(MIX_MULTIPLIER_2))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(12))

# The nucleus is searched among this many most probable tokens before all tokens are sorted. Chosen for speed.
NUCLEUS_SEARCH_TOKENS = 256
# Tokens whose logit / T is more than this below the largest can win only with extraordinary noise (see `_contenders`).
# Chosen for speed.
CONTENDER_NATS = 3.0

# Bounds of the parameters. Penalties and bias: OpenAI's. The others were chosen: far above what is useful, and an
# opening request stays well below the verifier's limit of a body.
ID_LIMIT = 1 << 31
MAX_PENALTY = 2
MAX_BIAS = 100
MAX_REPETITION_PENALTY = 10
MAX_BIASED_IDS = 1024
MAX_STOP_IDS = 256
MAX_GRAMMAR_CHARACTERS = 1 << 18

_TokenId = Annotated[int, msgspec.Meta(ge=0, lt=ID_LIMIT)]
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Sampling parameters: how the target's distribution is processed and warped, and the seed of the noise.

    The order in which the parameters apply is in `logits_processing`. Wherever "generated" occurs, the tokens after the
    prompt of the first request are meant, also after a lost session is reopened.

    Attributes:
        temperature: logits are divided by it; 0 is greedy decoding.
        top_k: keep the k largest logits, and ties with the k-th; 0 keeps all.
        top_p: keep the smallest set of most probable tokens that reaches this mass; 1 keeps all.
        seed: 64-bit seed of the noise.
        ignore_eos: continue after the target's end-of-text tokens, for measurements; `stop_ids` still end the text.
        min_p: keep tokens with at least this share of the most probable token's probability; 0 keeps all.
        repetition_penalty: tokens of the prompt and of the generated text have their logits divided by it if positive,
            multiplied if negative; 1 changes nothing.
        presence_penalty: subtracted from the logits of all tokens that were generated already.
        frequency_penalty: subtracted from the logit of a token as often as it was generated.
        logit_bias: added to the logits of these token ids.
        min_tokens: the text does not end before this many tokens were generated.
        stop_ids: further tokens that end the text.
        grammar: a grammar in the syntax of llguidance that the generated text must follow; empty for free text.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, msgspec.Meta(ge=0)] = 0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    # No `le`: msgspec's bounds are signed 64-bit. `__post_init__` checks the upper bound.
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    ignore_eos: bool = False
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=MAX_REPETITION_PENALTY)] = 1.0
    presence_penalty: Annotated[float, msgspec.Meta(ge=-MAX_PENALTY, le=MAX_PENALTY)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-MAX_PENALTY, le=MAX_PENALTY)] = 0.0
    logit_bias: dict[_TokenId, Annotated[float, msgspec.Meta(ge=-MAX_BIAS, le=MAX_BIAS)]] = {}
    min_tokens: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] = 0
    stop_ids: list[_TokenId] = []
    grammar: str = ""

    def __post_init__(self) -> None:
        # msgspec checks the constraints on decoding only; this also covers construction in Python.
        if not 0 <= self.temperature <= 100 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError("temperature must be in [0, 100], top_p in (0, 1] and top_k at least 0")
        if 0 < self.temperature < 1e-3:
            raise ValueError("a temperature above 0 must be at least 0.001; use 0 for greedy decoding")
        if not 0 <= self.seed <= MASK_64:
            raise ValueError("seed must be in [0, 2^64)")
        if not 0 <= self.min_p <= 1:
            raise ValueError("min_p must be in [0, 1]")
        if not 0 < self.repetition_penalty <= MAX_REPETITION_PENALTY:
            raise ValueError(f"repetition_penalty must be above 0 and at most {MAX_REPETITION_PENALTY}")
        if not abs(self.presence_penalty) <= MAX_PENALTY or not abs(self.frequency_penalty) <= MAX_PENALTY:
            raise ValueError(f"presence_penalty and frequency_penalty must be in [-{MAX_PENALTY}, {MAX_PENALTY}]")
        if len(self.logit_bias) > MAX_BIASED_IDS or len(self.stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"at most {MAX_BIASED_IDS} ids in logit_bias and {MAX_STOP_IDS} in stop_ids")
        if not all(abs(bias) <= MAX_BIAS for bias in self.logit_bias.values()):
            raise ValueError(f"every value of logit_bias must be in [-{MAX_BIAS}, {MAX_BIAS}]")
        if not all(0 <= token < ID_LIMIT for token in (*self.logit_bias, *self.stop_ids)):
            raise ValueError("logit_bias and stop_ids must have token ids in [0, 2^31)")
        if not 0 <= self.min_tokens < ID_LIMIT:
            raise ValueError("min_tokens must be in [0, 2^31)")
        if len(self.grammar) > MAX_GRAMMAR_CHARACTERS:
            raise ValueError(
                f"the grammar has {len(self.grammar)} characters; at most {MAX_GRAMMAR_CHARACTERS}: simplify it"
            )

    def __hash__(self) -> int:
        # msgspec's own would hash the dictionary and the list.
        fields = msgspec.structs.asdict(self)
        return hash((frozenset(fields.pop("logit_bias").items()), *fields.pop("stop_ids"), *fields.values()))

    @property
    def processes_logits(self) -> bool:
        """Whether the logits are changed before temperature, top-k, top-p and min-p (see `logits_processing`)."""
        return self.depends_on_prompt_end or self.repetition_penalty != 1.0 or bool(self.logit_bias)

    @property
    def depends_on_prompt_end(self) -> bool:
        """Whether the choice of a token depends on where the prompt ended, and not on the ids so far alone."""
        return bool(self.presence_penalty or self.frequency_penalty or self.min_tokens or self.grammar)

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p may exclude candidates."""
        return self.temperature > 0.0 and bool(self.top_k or self.top_p < 1.0 or self.min_p)


class RankedCandidates(NamedTuple):
    """The best candidates for one position, best first.

    Attributes:
        ids: (count,) token ids, or fewer if fewer candidates exist. `ids[0]` is the chosen token.
        scores: their coupled scores (at temperature 0: their logits).
    """

    ids: list[int]
    scores: list[float]


def mix64(z: int) -> int:
    """Apply SplitMix64's finalizer to a 64-bit integer."""
    z = ((z ^ (z >> 30)) * MIX_MULTIPLIER_1) & MASK_64
    z = ((z ^ (z >> 27)) * MIX_MULTIPLIER_2) & MASK_64
    return z ^ (z >> 31)


def position_key(seed: int, position: int) -> int:
    """Return key(seed, position), the 64-bit key of the noise of all ids at one position."""
    return mix64((mix64((seed + GOLDEN_GAMMA) & MASK_64) + (position + 1) * GOLDEN_GAMMA) & MASK_64)


def hash_counters(ids: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Return (id + 1) * GOLDEN_GAMMA modulo 2^64, the form in which ids enter the hash. (m,) -> (m,) uint64."""
    return (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN_GAMMA)


def noise_bits(key: int, counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the 52 random bits of each id, for `hash_counters` of the ids. (m,) uint64 -> (m,) uint64."""
    z = counters + np.uint64(key)
    z ^= z >> _SHIFTS[0]
    z *= _MULTIPLIERS[0]
    z ^= z >> _SHIFTS[1]
    z *= _MULTIPLIERS[1]
    z ^= z >> _SHIFTS[2]
    z >>= _SHIFTS[3]
    return z


def uniform_noise(seed: int, position: int, ids: npt.NDArray[np.integer]) -> Floats:
    """Return u(seed, position, id) for `ids` (m,). Returns (m,) float64 strictly inside (0, 1)."""
    return _uniforms_from_bits(noise_bits(position_key(seed, position), hash_counters(ids)))


def gumbel_noise(u: Floats) -> Floats:
    """Transform uniforms in (0, 1) into standard Gumbel noise."""
    return -np.log(-np.log(u))


def filter_candidates(logits: npt.NDArray[np.float32], sampling: Sampling) -> Ids:
    """Return the ids that top-k, top-p and min-p keep of `logits` (V,), ascending: (m,) int64 with m >= 1.

    Matches `TopKLogitsWarper`, `TopPLogitsWarper` and `MinPLogitsWarper` after `TemperatureLogitsWarper`: ties with the
    k-th logit are kept; a token is kept iff the mass of all tokens up to and including it, summed from the least
    probable up, exceeds 1 - top_p; and iff its logit / T is at least the largest one plus log(min_p).
    """
    kept: Ids
    if 0 < sampling.top_k < logits.size:
        kth = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        kept = np.flatnonzero(logits >= kth)
    else:
        kept = np.arange(logits.size)
    if sampling.top_p < 1.0 or sampling.min_p:
        scaled = logits[kept].astype(np.float64) / sampling.temperature
        if sampling.top_p < 1.0:
            mass = np.exp(scaled - scaled.max())
            mass /= mass.sum()
            nucleus = np.sort(_nucleus(mass, sampling.top_p))
            kept, scaled = kept[nucleus], scaled[nucleus]
        if sampling.min_p:
            kept = kept[scaled >= scaled.max() + math.log(sampling.min_p)]
    return kept


def _uniforms_from_bits(bits: npt.NDArray[np.uint64]) -> Floats:
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def _nucleus(mass: Floats, top_p: float) -> Ids:
    """Indices of the most probable entries of `mass` (m,) that together reach `top_p`; ties go to the lower index.

    Sorting dominates the cost, so the NUCLEUS_SEARCH_TOKENS most probable entries are tried first.
    """
    if mass.size > NUCLEUS_SEARCH_TOKENS:
        head = np.sort(np.argpartition(mass, mass.size - NUCLEUS_SEARCH_TOKENS)[-NUCLEUS_SEARCH_TOKENS:])
        # Entries equal to the smallest may tie with entries outside the head; without them the head must still hold
        # the whole nucleus.
        unambiguous = mass[head] > mass[head].min()
        if mass[head][unambiguous].sum() > top_p:
            head = head[unambiguous]
            nucleus: Ids = head[_nucleus_by_sorting(mass[head], top_p)]
            return nucleus
    return _nucleus_by_sorting(mass, top_p)


def _nucleus_by_sorting(mass: Floats, top_p: float) -> Ids:
    order = np.argsort(-mass, kind="stable")
    mass_before = mass[order].cumsum() - mass[order]
    keep = mass_before < top_p - 1e-12
    keep[0] = True
    nucleus: Ids = order[keep]
    return nucleus


class CoupledSampler:
    """Chooses tokens by the rule above, for one vocabulary size.

    It holds the per-id constants of the hash, so that a choice takes microseconds.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self._counters = hash_counters(np.arange(vocabulary_size))

    def rank(
        self, logits: npt.NDArray[np.float32], sampling: Sampling, position: int, count: int = 1
    ) -> RankedCandidates:
        """Return the `count` best candidates at `position` by coupled score; the first is the chosen token.

        Args:
            logits: (V,) float32, processed; -inf excludes a token, and at least one is finite.
            position: absolute position of the token to choose, 0 being the first prompt token.
            count: how many candidates to return, at least 1.
        """
        if sampling.temperature == 0.0:
            ids = _largest(logits, count)
            return RankedCandidates(ids, [float(logits[i]) for i in ids])
        key = position_key(sampling.seed, position)
        if sampling.truncates:
            kept = filter_candidates(logits, sampling)
            scores = self._scores(logits, kept, sampling.temperature, key)
        else:
            kept, scores = self._contenders(logits, sampling.temperature, key, count)
        if scores.size > count:
            # Sort only the few that can be among the best.
            top = np.flatnonzero(scores >= np.partition(scores, scores.size - count)[scores.size - count])
            kept, scores = kept[top], scores[top]
        best = np.lexsort((kept, -scores))[:count]
        best = best[scores[best] > -np.inf]
        return RankedCandidates(kept[best].tolist(), scores[best].tolist())

    def _scores(self, logits: npt.NDArray[np.float32], ids: Ids, temperature: float, key: int) -> Floats:
        """Coupled scores of `ids` (m,)."""
        noise = gumbel_noise(_uniforms_from_bits(noise_bits(key, self._counters[ids])))
        scores: Floats = logits[ids].astype(np.float64) / temperature + noise
        return scores

    def _contenders(
        self, logits: npt.NDArray[np.float32], temperature: float, key: int, count: int
    ) -> tuple[Ids, Floats]:
        """Return every id that can be among the `count` best, and their scores: exact, with few logarithms.

        The `count`-th best score among the most probable ids, the head, is a bar. An id outside the head has a logit
        below `edge`, so it passes the bar only if g > bar - edge / T, that is u > exp(-exp(-(bar - edge / T))): one
        integer comparison on the bits of the hash.
        """
        edge = float(logits.max()) - CONTENDER_NATS * temperature
        head = np.flatnonzero(logits >= edge)
        if head.size < count:
            head = np.flatnonzero(logits > -np.inf)
            return head, self._scores(logits, head, temperature, key)
        scores = self._scores(logits, head, temperature, key)
        bar = float(scores.max() if count == 1 else np.partition(scores, head.size - count)[head.size - count])
        # The slack makes rounding of the threshold only ever add contenders.
        min_uniform = math.exp(-math.exp(min(edge / temperature - bar, 700.0))) * (1.0 - 1e-9)
        min_bits = np.uint64(max(0.0, min_uniform * 2.0**52 - 1.0))
        passing = np.flatnonzero(noise_bits(key, self._counters) >= min_bits)
        others = passing[logits[passing] < edge]
        if not others.size:
            return head, scores
        return np.concatenate([head, others]), np.concatenate([scores, self._scores(logits, others, temperature, key)])


def _largest(scores: npt.NDArray[np.floating], count: int) -> list[int]:
    """Indices of the `count` largest above -inf, best first, ties to the lower index."""
    if count == 1:
        return [int(scores.argmax())]
    # For a few candidates, one search for each is faster than sorting.
    remaining = scores.copy()
    best = []
    for _ in range(min(count, scores.size)):
        best.append(int(remaining.argmax()))
        if remaining[best[-1]] == -np.inf:
            return best[:-1]
        remaining[best[-1]] = -np.inf
    return best


def accepted_length(draft: list[int], chosen: list[int]) -> int:
    """Return how many leading draft tokens equal the target's choices: the acceptance rule."""
    return common_prefix_length(draft, chosen)


def common_prefix_length(ids: list[int], other: list[int]) -> int:
    """Return how many leading ids are equal, by bisection: comparing slices is fast."""
    low, high = 0, min(len(ids), len(other))
    if ids[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if ids[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def validate_prompt(prompt: list[int], vocabulary_size: int) -> None:
    """Raise InputError unless `prompt` is a non-empty list of ids below `vocabulary_size`."""
    if not prompt:
        raise InputError("the prompt is empty: give at least one token")
    invalid = [token for token in prompt if not 0 <= token < vocabulary_size]
    if invalid:
        raise InputError(f"token id {invalid[0]} is outside the vocabulary of {vocabulary_size}")
