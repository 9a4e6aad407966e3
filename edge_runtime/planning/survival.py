"""What the draft's guesses are worth: how sure it is, how often it is right then, and how far a draft gets.

Every judged token (all accepted ones and the first rejected) teaches, whatever was drafted: full information, so that
nothing needs to be tried out. What is learned is kept per target version and temperature class and slowly forgotten;
what all texts taught is the prior of the next one.

How far a draft gets under the stop rule follows from two learned curves. Let c be a confidence, p(c) its chance of
being accepted and M_k = p(c_1) ... p(c_k) the chance that the first k tokens all are. A draft that stops behind a
token with M < s has a (k+1)-th token iff M_k >= s, since M only falls. So the distributions of M_0, M_1, ... answer
for every draft length and every threshold at once; they are the convolutions of that of log p(c), confidences of
neighbouring tokens being nearly independent (on the shipped family, a plan chosen so is within 1 to 2 % of the best
in hindsight).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edge_runtime.planning.plan import Conditions, Outcome

Floats = npt.NDArray[np.float64]

BINS = 20
# Longest draft that is considered, and the most siblings beside a token.
LONGEST = 24
MOST_SIBLINGS = 7
# Tokens that a verifier speculating by itself is taken to draft for a forward.
SPECULATED = 5
# Thresholds of survival are exp(-GRAIN * level): from 1 down to 0.03.
GRAIN = 0.1
LEVELS = 36
THRESHOLDS: Floats = np.exp(-GRAIN * np.arange(LEVELS))

# Share kept of old evidence per judged token: about the last 1000 tokens say what texts are like, and the last 140 of
# this text what this one is like.
KEPT = 0.999
KEPT_OF_TEXT = 0.993
# Judged tokens that a prior is worth, and that all texts are worth to one of them: of how sure the draft is, of how
# right it is in each bin, of a sibling's rank.
PRIOR_TOKENS = 24.0
PRIOR_PER_BIN = 5.0
PRIOR_MISSES = 12.0
# What another version of the target taught counts for at most so many tokens of a new one.
INHERITED = 300.0
# What the prior from the bundle's evaluation is worth to all texts, as a multiple of what these are worth to one.
WORTH = 6.0
# Share by which a prior may be wrong about what a drafted token costs, and the judged tokens that halve its variance;
# and the share by which texts differ in it.
DOUBT = 0.2
DOUBTED = 100.0
SPREAD = 0.1

# (mean confidence, share accepted) of the draft's tokens, by fifths of confidence: greedy, up to T=0.85, above;
# recorded on both versions of the shipped family.
FIFTHS = (
    ((0.39, 0.58), (0.82, 0.91), (0.96, 0.98), (0.99, 0.993), (0.999, 0.998)),
    ((0.12, 0.45), (0.66, 0.63), (0.95, 0.83), (0.997, 0.94), (0.9999, 0.99)),
    ((0.004, 0.45), (0.09, 0.50), (0.43, 0.57), (0.85, 0.78), (0.99, 0.95)),
)
TEMPERATURES = (0.0, 0.7, 1.0)
# Points of that distribution that are counted by bin.
QUANTILES = 2000
# Share accepted in the evaluation of the same bundle, on text that people wrote.
EVALUATED = (0.663, 0.632, 0.631)
# Of the misses that no better sibling hit, the share that the r-th one hits; recorded likewise.
SIBLING_HAZARDS = (0.44, 0.29, 0.22, 0.18, 0.16, 0.13, 0.11)


def temperature_class(temperature: float) -> int:
    """0 for greedy, 1 for mild sampling, 2 for sampling at about the model's own distribution."""
    return 0 if temperature == 0.0 else 1 if temperature < 0.85 else 2


class Table:
    """How far drafts get; a snapshot of what was known when it was made.

    Attributes:
        calibration: chance of being accepted by confidence bin, never falling.
        acceptance: chance that a token is accepted if all before it were.
        drafted: (LONGEST + 1, LEVELS): expected tokens of a draft of at most K under each threshold.
        accepted: the same of accepted tokens.
        going: chance that more tokens than K would be drafted, were K no bound.
        intact: chance of that and that all K are accepted.
        sureness: share of tokens whose confidence is in each bin.
        missed: chance of not being accepted by confidence bin.
        first_missed: the product of the two.
        sibling_hits: (MOST_SIBLINGS + 1,): chance that one of the first s siblings is what a missed token should have
            been.
        speculated: tokens that a forward over SPECULATED drafted ones brings.
    """

    def __init__(self, sureness: Floats, calibration: Floats, sibling_hits: Floats) -> None:
        self.calibration: tuple[float, ...] = tuple(calibration.tolist())
        self.acceptance = float(sureness @ calibration)
        self.sureness = sureness
        self.missed: Floats = 1.0 - calibration
        self.first_missed: Floats = sureness * self.missed
        self.sibling_hits = sibling_hits
        # Each bin moves a draft's mass down the levels; between two levels it is split so that the mean is right.
        fall = -np.log(calibration) / GRAIN
        low = np.minimum(fall.astype(np.intp), LEVELS - 1)
        part = np.minimum(fall - low, 1.0)
        kernels = np.zeros((2, LEVELS + 1))
        for row, mass in enumerate((sureness, sureness * calibration)):
            kernels[row] += np.bincount(low, mass * (1.0 - part), LEVELS + 1)
            kernels[row] += np.bincount(low + 1, mass * part, LEVELS + 1)
        # _SHIFTS[i, j] = j - i where a mass at level i can fall to level j.
        masses = np.zeros((2, LONGEST + 1, LEVELS))
        masses[:, 0, 0] = 1.0
        for mass, kernel in zip(masses, kernels, strict=True):
            step = kernel[_SHIFTS] * _FALLING
            for k in range(LONGEST):
                np.dot(mass[k], step, out=mass[k + 1])
        self.going, self.intact = masses.cumsum(axis=2)
        self.drafted = np.zeros((LONGEST + 1, LEVELS))
        self.drafted[1:] = self.going[:-1].cumsum(axis=0)
        self.accepted = np.zeros((LONGEST + 1, LEVELS))
        self.accepted[1:] = self.acceptance * self.intact[:-1].cumsum(axis=0)
        self.speculated = 1.0 + float(self.accepted[SPECULATED, -1])


_SHIFTS = np.maximum(0, np.arange(LEVELS)[None, :] - np.arange(LEVELS)[:, None])
_FALLING = (np.arange(LEVELS)[None, :] >= np.arange(LEVELS)[:, None]).astype(np.float64)


class _Evidence:
    """Counts of judged tokens, slowly forgetting.

    Attributes:
        judged: how many, old ones counting less.
    """

    def __init__(self, kept: float) -> None:
        """
        Args:
            kept: share of old evidence per judged token.
        """
        self.judged = 0.0
        self._kept = kept
        # Evidence counts for 1 / weight when it comes, so that nothing old needs touching: decay is one division.
        self._weight = 1.0
        self._seen = [0.0] * BINS
        self._hits = [0.0] * BINS
        self._offered = [0.0] * MOST_SIBLINGS
        self._sibling_hits = [0.0] * MOST_SIBLINGS

    def observe(self, outcome: Outcome, judged: int) -> None:
        """Takes in the first `judged` tokens of a draft, all of which but the last were accepted."""
        seen, hits, weight, accepted = self._seen, self._hits, self._weight, outcome.accepted
        for index in range(judged):
            weight /= self._kept
            bin_ = int(outcome.confidences[index] * BINS)
            if bin_ >= BINS:
                bin_ = BINS - 1
            seen[bin_] += weight
            if index < accepted:
                hits[bin_] += weight
        self.judged = self.judged * self._kept**judged + judged
        if accepted < outcome.drafted and accepted < len(outcome.offered):
            rank = outcome.sibling
            for index in range(min(rank or outcome.offered[accepted], MOST_SIBLINGS)):
                self._offered[index] += weight
            if 0 < rank <= MOST_SIBLINGS:
                self._sibling_hits[rank - 1] += weight
        self._weight = weight
        if weight > 1e100:
            self._rescale(1.0 / weight)

    def capped(self, most: float) -> _Evidence:
        """The same, worth `most` tokens at most."""
        heir = _Evidence(self._kept)
        heir.__dict__.update({k: list(v) if isinstance(v, list) else v for k, v in self.__dict__.items()})
        if heir.judged > most:
            heir._rescale(most / heir.judged / heir._weight)
            heir._weight = 1.0
            heir.judged = most
        return heir

    def curves(self, prior: Curves, worth: float) -> Curves:
        """What `prior`, worth so many times what it is to a text, becomes in the light of this."""
        per_bin, tokens, misses = worth * PRIOR_PER_BIN, worth * PRIOR_TOKENS, worth * PRIOR_MISSES
        unit = 1.0 / self._weight
        right = [
            (hits * unit + per_bin * prior) / (count * unit + per_bin)
            for hits, count, prior in zip(self._hits, self._seen, prior.right, strict=True)
        ]
        total = sum(self._seen) * unit + tokens
        sure = [(count * unit + tokens * p) / total for count, p in zip(self._seen, prior.sure, strict=True)]
        hazards = [
            (hits * unit + misses * prior) / (offered * unit + misses)
            for hits, offered, prior in zip(self._sibling_hits, self._offered, prior.hazards, strict=True)
        ]
        right = _never_falling(right, [count * unit + per_bin for count in self._seen])
        return Curves(sure, right, hazards)

    def _rescale(self, factor: float) -> None:
        for counts in (self._seen, self._hits, self._offered, self._sibling_hits):
            counts[:] = [count * factor for count in counts]
        self._weight *= factor


class Curves(NamedTuple):
    """How good a draft is.

    Attributes:
        sure: (BINS,) share of tokens by confidence.
        right: (BINS,) chance of being accepted by confidence.
        hazards: (MOST_SIBLINGS,) of the misses that no better sibling hit, the share that the r-th one hits.
    """

    sure: list[float]
    right: list[float]
    hazards: list[float]

    def table(self) -> Table:
        """How far drafts get."""
        missed, hits = 1.0, [0.0]
        for hazard in self.hazards:
            missed *= 1.0 - hazard
            hits.append(1.0 - missed)
        return Table(np.array(self.sure), np.clip(self.right, 0.01, 0.999), np.array(hits))


class Survival:
    """What is known of the draft against one target version at one temperature class: of texts, and of this one.

    Texts differ, and each is alike in itself. So what all of them taught is the prior of the next, and what a text
    teaches counts most for itself.
    """

    _text: _Evidence
    _end: int
    _done: int
    _fresh: int
    _table: Table | None

    def __init__(self, kind: int, acceptance: float | None = None) -> None:
        """The prior.

        Args:
            kind: see `temperature_class`.
            acceptance: share of draft tokens accepted, from the bundle's evaluation; None where there is none.
        """
        sure, right = _prior(kind)
        if acceptance is not None:
            # The evaluation says how often, and Bayes' rule how sure the draft is then. What a target writes is easier
            # to guess than what people wrote, on which drafts are evaluated: by as much as for the shipped family.
            easier = _odds(float(sure @ right)) / _odds(EVALUATED[kind])
            odds = easier * _odds(min(max(acceptance, 0.05), 0.95))
            acceptance = odds / (1.0 + odds)
            of_hits, of_misses = sure * right, sure * (1.0 - right)
            hits = acceptance * of_hits / of_hits.sum()
            sure = hits + (1.0 - acceptance) * of_misses / of_misses.sum()
            right = hits / sure
        self._prior = Curves(sure.tolist(), right.tolist(), list(SIBLING_HAZARDS))
        self._all = _Evidence(KEPT)
        self._forget_text()

    @property
    def judged(self) -> float:
        """Evidence so far, in tokens, old ones counting less."""
        return self._all.judged

    def follow(self, conditions: Conditions) -> None:
        """Notices where a text begins: it ends elsewhere, or goes back behind what is done."""
        end = conditions.position + conditions.left
        if end != self._end or conditions.position < self._done:
            self._forget_text()
            self._end = end

    def observe(self, outcome: Outcome) -> None:
        """Learns from a round's judged tokens."""
        self._done = outcome.conditions.position + outcome.tokens
        judged = min(outcome.accepted + 1, outcome.drafted)
        if judged:
            self._all.observe(outcome, judged)
            self._text.observe(outcome, judged)
            self._fresh += judged

    def table(self) -> Table:
        """How far drafts get, made anew once evidence has grown enough to matter."""
        if self._table is None or self._fresh > 8.0 + 0.2 * self._text.judged:
            self._fresh = 0
            self._table = self._text.curves(self._all.curves(self._prior, WORTH), 1.0).table()
        return self._table

    @property
    def doubt(self) -> float:
        """Share by which drafted tokens could yet turn out to be cheaper than the table says, in all texts."""
        return DOUBT * math.sqrt(DOUBTED / (DOUBTED + self._all.judged))

    @property
    def spread(self) -> float:
        """Share by which they could yet in this text."""
        return SPREAD * math.sqrt(PRIOR_TOKENS / (PRIOR_TOKENS + self._text.judged))

    def inherit(self) -> Survival:
        """What a new target version starts with: all of this, worth `INHERITED` tokens at most."""
        heir = Survival.__new__(Survival)
        heir._prior, heir._all = self._prior, self._all.capped(INHERITED)
        heir._forget_text()
        return heir

    def _forget_text(self) -> None:
        self._text = _Evidence(KEPT_OF_TEXT)
        self._end = self._done = 0
        self._fresh = 0
        self._table = None


class Survivals:
    """`Survival` by target version and temperature class."""

    def __init__(self, acceptance: Mapping[str, float]) -> None:
        """
        Args:
            acceptance: as in the bundle's manifest, by `T=0`, `T=0.7` and `T=1`; may lack any.
        """
        self._acceptance = acceptance
        self._known: dict[tuple[str, int], Survival] = {}
        self._latest: dict[int, Survival] = {}

    def of(self, version: str, temperature: float) -> Survival:
        """What is known; of a version without a name, what is known of the latest."""
        kind = temperature_class(temperature)
        known = self._known.get((version, kind)) if version else self._latest.get(kind)
        if known is None:
            latest = self._latest.get(kind)
            if latest is None:
                known = Survival(kind, self._acceptance.get(f"T={TEMPERATURES[kind]:g}"))
            else:
                known = latest.inherit()
            self._latest[kind] = known
            if version:
                self._known[version, kind] = known
        return known


def _prior(kind: int) -> tuple[Floats, Floats]:
    """How sure a draft is, and how right it is then, by bin, from `FIFTHS`."""
    sure, right = (np.array(column) for column in zip(*FIFTHS[kind], strict=True))
    # Each fifth is spread halfway to its neighbours.
    edges = np.concatenate([[0.0], (sure[1:] + sure[:-1]) / 2, [1.0]])
    confidences = np.interp((np.arange(QUANTILES) + 0.5) / QUANTILES, np.linspace(0.0, 1.0, len(edges)), edges)
    # A bin is as right as what lies in it, which in the last one is mostly next to 1; an empty one as its middle.
    bins = np.minimum((confidences * BINS).astype(np.intp), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    hits = np.bincount(bins, np.interp(confidences, sure, right), BINS)
    middles = np.interp((np.arange(BINS) + 0.5) / BINS, sure, right)
    calibrated = np.where(counts, hits / np.maximum(counts, 1), middles)
    return counts / QUANTILES * 0.98 + 0.02 / BINS, calibrated


def _odds(share: float) -> float:
    return share / (1.0 - share)


def _never_falling(values: list[float], weights: list[float]) -> list[float]:
    """The closest never-falling sequence in weighted least squares: neighbours that fall are pooled."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        size = 1
        while pools and pools[-1][0] > value:
            before, before_weight, before_size = pools.pop()
            value = (before * before_weight + value * weight) / (before_weight + weight)
            weight += before_weight
            size += before_size
        pools.append((value, weight, size))
    return [value for value, _, size in pools for _ in range(size)]
