"""What the draft's guesses are worth: how sure it is, how often it is right then, and how far a draft gets.

Every judged token (all accepted ones and the first rejected) teaches, whatever was drafted: full information, so that
nothing needs to be tried out. What is learned is kept per target version and temperature class, by the stages of a text
(`tables`), and slowly forgotten; what all texts taught is the prior of the next one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from edge_runtime.planning.acceptance_table import BINS, MOST_SIBLINGS, STAGES, Floats, Stage, Table, stage_of
from edge_runtime.planning.plan import Conditions, Outcome

# Share kept of old evidence per judged token: about the last 3000 tokens say what texts are like.
KEPT = 0.9997
# Judged tokens that the prior is worth: of how sure the draft is at a stage, of how right it is in each bin of it, of a
# sibling's rank, of how much of a text is at the last stage.
PRIOR_TOKENS = 150.0
PRIOR_PER_BIN = 25.0
PRIOR_MISSES = 70.0
PRIOR_SHARE = 200.0
# What another version of the target taught counts for at most so many tokens of a new one.
INHERITED = 150.0
# Share by which a prior may be wrong about what a drafted token costs, and the judged tokens that halve its variance.
DOUBT = 0.2
DOUBTED = 100.0

# Stock is taken of evidence once so many tokens are new, and such a share of all.
FRESH, RENEWED = 32.0, 0.1

# By temperature class (greedy, up to T=0.85, above) and stage: (mean confidence, share accepted) of the draft's tokens,
# by fifths of confidence; and the share of tokens whose drafts begin at the last stage. Recorded on both versions of
# the shipped family, on other texts than those that simulations replay (`draft-export record --seed 100`).
FIFTHS = (
    (
        ((0.24, 0.41), (0.53, 0.68), (0.81, 0.90), (0.96, 0.963), (0.997, 0.985)),
        ((0.41, 0.63), (0.82, 0.87), (0.95, 0.976), (0.99, 0.979), (0.999, 0.997)),
        ((0.71, 0.93), (0.93, 0.996), (0.98, 0.998), (0.995, 0.998), (0.9994, 0.999)),
    ),
    (
        ((0.070, 0.495), (0.46, 0.526), (0.85, 0.71), (0.98, 0.87), (0.9995, 0.978)),
        ((0.23, 0.51), (0.83, 0.77), (0.98, 0.90), (0.999, 0.979), (1.0, 0.998)),
        ((0.68, 0.78), (0.986, 0.915), (0.998, 0.98), (0.9999, 0.985), (1.0, 0.999)),
    ),
    (
        ((0.0034, 0.465), (0.065, 0.465), (0.34, 0.56), (0.79, 0.70), (0.984, 0.925)),
        ((0.016, 0.49), (0.33, 0.60), (0.82, 0.79), (0.975, 0.95), (0.9985, 0.996)),
        ((0.51, 0.725), (0.954, 0.97), (0.993, 0.98), (0.997, 0.985), (0.9996, 0.999)),
    ),
)
RUNNING = (0.29, 0.08, 0.04)
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


class Curves(NamedTuple):
    """How good a draft is.

    Attributes:
        stages: one for each of `STAGES`.
        hazards: (MOST_SIBLINGS,) of the misses that no better sibling hit, the share that the r-th one hits.
    """

    stages: tuple[Stage, ...]
    hazards: tuple[float, ...]

    def table(self, streak: int) -> Table:
        """How far drafts get behind `streak` right guesses in a row."""
        missed, hits = 1.0, [0.0]
        for hazard in self.hazards:
            missed *= 1.0 - hazard
            hits.append(1.0 - missed)
        return Table(self.stages, np.array(hits), streak)


class _Evidence:
    """Counts of judged tokens, slowly forgetting."""

    def __init__(self) -> None:
        # Evidence counts for 1 / weight when it comes, so that nothing old needs touching: decay is one division.
        self._weight = 1.0
        # All, and those of drafts that began at the last stage.
        self._judged = self._running = 0.0
        self._seen = [[0.0] * BINS for _ in STAGES]
        self._hits = [[0.0] * BINS for _ in STAGES]
        self._offered = [0.0] * MOST_SIBLINGS
        self._sibling_hits = [0.0] * MOST_SIBLINGS

    def judge(self, confidence: float, right: bool, streak: int) -> None:
        """Takes in a guess behind `streak` right ones in a row."""
        self._weight /= KEPT
        if self._weight > 1e100:
            self._rescale(1.0 / self._weight)
        weight, stage = self._weight, stage_of(streak)
        bin_ = int(confidence * BINS)
        if bin_ >= BINS:
            bin_ = BINS - 1
        self._seen[stage][bin_] += weight
        if right:
            self._hits[stage][bin_] += weight
        self._judged += weight

    def miss(self, offered: int, rank: int) -> None:
        """Takes in what siblings came to beside a wrong guess.

        Args:
            offered: how many were named.
            rank: which of them was right, from 1; 0 if none was.
        """
        for index in range(min(rank or offered, MOST_SIBLINGS)):
            self._offered[index] += self._weight
        if 0 < rank <= MOST_SIBLINGS:
            self._sibling_hits[rank - 1] += self._weight

    def run_on(self, tokens: float) -> None:
        """Of the latest, so many are of drafts that began at the last stage."""
        self._running += tokens * self._weight

    @property
    def judged(self) -> float:
        """How many, old ones counting less."""
        return self._judged / self._weight

    def capped(self, most: float) -> _Evidence:
        """The same, worth `most` tokens at most."""
        heir = copy.deepcopy(self)
        if heir.judged > most:
            heir._rescale(most / heir._judged)
            heir._weight = 1.0
        return heir

    def running(self, prior: float) -> float:
        """The share of tokens whose drafts begin at the last stage."""
        worth = PRIOR_SHARE * self._weight
        return (self._running + worth * prior) / (self._judged + worth)

    def curves(self, prior: Curves) -> Curves:
        """What `prior` becomes in the light of this."""
        unit = 1.0 / self._weight
        stages = tuple(
            _updated(stage, seen, hits, unit)
            for stage, seen, hits in zip(prior.stages, self._seen, self._hits, strict=True)
        )
        hazards = tuple(
            (hits * unit + PRIOR_MISSES * before) / (offered * unit + PRIOR_MISSES)
            for hits, offered, before in zip(self._sibling_hits, self._offered, prior.hazards, strict=True)
        )
        return Curves(stages, hazards)

    def _counts(self) -> list[list[float]]:
        return [*self._seen, *self._hits, self._offered, self._sibling_hits]

    def _rescale(self, factor: float) -> None:
        for counts in self._counts():
            counts[:] = [count * factor for count in counts]
        self._weight *= factor
        self._judged *= factor
        self._running *= factor


def _updated(prior: Stage, seen: list[float], hits: list[float], unit: float) -> Stage:
    """`prior` in the light of counts in such a unit."""
    count, per_bin, tokens = sum(seen) * unit, PRIOR_PER_BIN, PRIOR_TOKENS
    right = [
        (hit * unit + per_bin * before) / (count * unit + per_bin)
        for hit, count, before in zip(hits, seen, prior.right, strict=True)
    ]
    sure = [(one * unit + tokens * before) / (count + tokens) for one, before in zip(seen, prior.sure, strict=True)]
    return Stage(sure, _never_falling(right, [one * unit + per_bin for one in seen]))


class Survival:
    """What is known of the draft against one target version at one temperature class.

    Texts differ, but where a text goes is not told by where it has been for long: what tells more than the draft's own
    confidence is the stage that it is in.

    Attributes:
        streak: right guesses in a row in front of the text's next token.
    """

    streak: int
    _end: int
    _done: int
    _curves: Curves
    _share: float
    _tables: dict[int, Table]

    def __init__(self, kind: int, acceptance: float | None = None) -> None:
        """The prior.

        Args:
            kind: see `temperature_class`.
            acceptance: share of draft tokens accepted, from the bundle's evaluation; None where there is none.
        """
        # What a target writes is easier to guess than what people wrote, on which drafts are evaluated: by as much as
        # for the shipped family.
        odds = 1.0 if acceptance is None else _odds(min(max(acceptance, 0.05), 0.95)) / _odds(EVALUATED[kind])
        self._prior = Curves(tuple(_prior(fifths, odds) for fifths in FIFTHS[kind]), SIBLING_HAZARDS)
        self._running = RUNNING[kind]
        self._evidence = _Evidence()
        self._take_stock()
        self._begin(0)

    @property
    def judged(self) -> float:
        """Evidence so far, in tokens, old ones counting less."""
        return self._evidence.judged

    def follow(self, conditions: Conditions) -> None:
        """Notices where a text begins: it ends elsewhere, or goes back behind what is done."""
        end = conditions.position + conditions.left
        if end != self._end or conditions.position < self._done:
            self._begin(end)

    def observe(self, outcome: Outcome) -> None:
        """Learns from a round's judged tokens, or from those that the cloud said while the draft guessed along."""
        self._done = outcome.conditions.position + outcome.tokens
        evidence, streak, accepted = self._evidence, self.streak, outcome.accepted
        judged = min(accepted + 1, outcome.drafted)
        for index in range(judged):
            evidence.judge(outcome.confidences[index], index < accepted, streak + index)
        if judged and self._runs:
            evidence.run_on(judged)
        if accepted < min(outcome.drafted, len(outcome.offered)):
            evidence.miss(outcome.offered[accepted], outcome.sibling)
        # Whether the target's own token would have been guessed is not known, and does not end a streak.
        self.streak = streak + judged if judged and accepted == outcome.drafted else 0
        for confidence, rank in outcome.watched:
            evidence.judge(confidence, not rank, streak)
            if rank:
                evidence.miss(outcome.plan.siblings, rank if rank <= outcome.plan.siblings else 0)
            streak = 0 if rank else streak + 1
        if outcome.watched and len(outcome.watched) == outcome.own:
            self.streak = streak
        self._new += judged + len(outcome.watched)
        if self._new > FRESH + RENEWED * self.judged:
            self._take_stock()

    def run_on(self, tokens: float) -> None:
        """Of the tokens that were watched, so many would have been of drafts that begin at the last stage."""
        self._evidence.run_on(tokens)

    def table(self) -> Table:
        """How far drafts get from here."""
        return self._behind(STAGES[-1] if self._runs else 0)

    def fresh_table(self) -> Table:
        """How far drafts get behind a miss."""
        return self._behind(0)

    def running_table(self) -> Table:
        """How far drafts get where nearly all guesses are right."""
        return self._behind(STAGES[-1])

    def running(self, left: int) -> float:
        """The share of the text's next `left` tokens whose drafts will begin at the last stage."""
        if not self._runs:
            return self._share
        leaves = 1.0 - self.running_table().acceptance
        stays = (1.0 - (1.0 - leaves) ** left) / (leaves * left)
        return stays + (1.0 - stays) * self._share

    def speculated(self, left: int) -> float:
        """Tokens of the next `left` that a forward over SPECULATED drafted ones brings."""
        share = self.running(left)
        return 1.0 / (share / self.running_table().speculated + (1.0 - share) / self.fresh_table().speculated)

    @property
    def doubt(self) -> float:
        """Share by which drafted tokens could yet turn out to be cheaper than the table says, in all texts."""
        return DOUBT * math.sqrt(self.unsure)

    @property
    def unsure(self) -> float:
        """Share of the prior in what is known."""
        return DOUBTED / (DOUBTED + self.judged)

    def inherit(self) -> Survival:
        """What a new target version starts with: all of this, worth `INHERITED` tokens at most."""
        heir = copy.copy(self)
        heir._evidence = self._evidence.capped(INHERITED)
        heir._take_stock()
        heir._begin(0)
        return heir

    @property
    def _runs(self) -> bool:
        return self.streak >= STAGES[-1]

    def _behind(self, streak: int) -> Table:
        table = self._tables.get(streak)
        if table is None:
            table = self._tables[streak] = self._curves.table(streak)
        return table

    def _take_stock(self) -> None:
        self._curves, self._tables, self._new = self._evidence.curves(self._prior), {}, 0
        self._share = self._evidence.running(self._running)

    def _begin(self, end: int) -> None:
        self._end, self._done, self.streak = end, 0, 0


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


def _prior(fifths: tuple[tuple[float, float], ...], odds: float) -> Stage:
    """How sure a draft is, and how right it is then, by bin; the odds of its being right are so many times theirs."""
    means, shares = (np.array(column) for column in zip(*fifths, strict=True))
    # Each fifth is spread halfway to its neighbours.
    edges = np.concatenate([[0.0], (means[1:] + means[:-1]) / 2, [1.0]])
    confidences = np.interp((np.arange(QUANTILES) + 0.5) / QUANTILES, np.linspace(0.0, 1.0, len(edges)), edges)
    # A bin is as right as what lies in it, which in the last one is mostly next to 1; an empty one as its middle.
    bins = np.minimum((confidences * BINS).astype(np.intp), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    hits = np.bincount(bins, np.interp(confidences, means, shares), BINS)
    middles = np.interp((np.arange(BINS) + 0.5) / BINS, means, shares)
    right: Floats = np.where(counts, hits / np.maximum(counts, 1), middles)
    sure: Floats = counts / QUANTILES * 0.98 + 0.02 / BINS
    # How often it is right is told, and Bayes' rule says how sure it is then.
    mean = float(sure @ right)
    told = odds * _odds(mean) / (1.0 + odds * _odds(mean))
    of_hits = told / mean * sure * right
    sure = of_hits + (1.0 - told) / (1.0 - mean) * sure * (1.0 - right)
    return Stage(sure.tolist(), (of_hits / sure).tolist())


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
