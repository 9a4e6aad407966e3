"""Evidence of draft acceptance: decaying counts of judged tokens, and the posterior that follows from them.

Each estimate is a posterior mean with the prior as pseudo-counts. With `hits` of `seen` tokens in a confidence bin, a
prior acceptance `p0` and a prior weight of `w` tokens:

    acceptance = (hits + w * p0) / (seen + w)

where `p0` is first shifted to the level of the evidence: all odds are multiplied by the factor that maximizes the
likelihood of all judged tokens times a log-normal prior of that factor. A draft that is much worse, or better, than
the prior is thus noticed after a dozen tokens, long before each bin has evidence of its own. Weighted isotonic
regression (pool adjacent violators) follows, so that acceptance never decreases with confidence.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edge_runtime.planning.acceptance_table import (
    CONFIDENCE_BINS,
    MAX_SIBLINGS,
    STAGE_STREAKS,
    AcceptanceTable,
    StageAcceptance,
    stage_index,
)
from edge_runtime.planning.planner_state import AcceptanceRecord

# Exponential decay of evidence per judged token. Chosen: an effective window of about 3000 tokens.
EVIDENCE_DECAY = 0.9997
# Prior weights, in judged tokens (chosen): of a stage's confidence distribution, of the acceptance in each bin of it,
# of the hit rate of each sibling rank (in rejected tokens), and of the share of tokens in the last stage.
PRIOR_CONFIDENCE_TOKENS = 150.0
PRIOR_TOKENS_PER_BIN = 25.0
PRIOR_REJECTED_TOKENS = 70.0
PRIOR_LAST_STAGE_TOKENS = 200.0
# Standard deviation of the logarithm of the odds factor between prior and actual acceptance, and the share of judged
# tokens that count as independent for it: a text is easier or harder than others as a whole. Chosen.
LEVEL_DEVIATION = 1.0
LEVEL_SHARE = 0.4
LEVEL_STEPS = 12


class AcceptanceCurves(NamedTuple):
    """Point estimates of the draft model's quality.

    Attributes:
        stages: one for each of `STAGE_STREAKS`.
        hazards: (MAX_SIBLINGS,) hit rate of the r-th sibling, given a rejection that no earlier sibling hit.
    """

    stages: tuple[StageAcceptance, ...]
    hazards: tuple[float, ...]

    def table(self, streak: int) -> AcceptanceTable:
        """Return the table of drafts that follow `streak` consecutive correct guesses."""
        missed, hits = 1.0, [0.0]
        for hazard in self.hazards:
            missed *= 1.0 - hazard
            hits.append(1.0 - missed)
        return AcceptanceTable(self.stages, np.array(hits), streak)


class Evidence:
    """Exponentially decaying counts of judged tokens.

    New evidence is added with the weight `_weight`, which grows by 1 / EVIDENCE_DECAY per judged token, so that old
    counts decay without being touched. A count in tokens is the stored count divided by `_weight`.
    """

    def __init__(self) -> None:
        self._weight = 1.0
        # All judged tokens, and those of drafts that began in the last stage.
        self._judged = self._last_stage = 0.0
        self._seen = [[0.0] * CONFIDENCE_BINS for _ in STAGE_STREAKS]
        self._hits = [[0.0] * CONFIDENCE_BINS for _ in STAGE_STREAKS]
        self._offered = [0.0] * MAX_SIBLINGS
        self._sibling_hits = [0.0] * MAX_SIBLINGS

    def fade(self, tokens: float) -> None:
        """Let all evidence count as little as if `tokens` had been judged since."""
        self._weight /= EVIDENCE_DECAY**tokens
        if self._weight > 1e100:
            self._rescale(1.0 / self._weight)

    def add_judged(self, confidence: float, accepted: bool, streak: int) -> None:
        """Count a judged guess that follows `streak` consecutive correct ones."""
        self.fade(1.0)
        weight, stage = self._weight, stage_index(streak)
        bin_ = int(confidence * CONFIDENCE_BINS)
        if bin_ >= CONFIDENCE_BINS:
            bin_ = CONFIDENCE_BINS - 1
        self._seen[stage][bin_] += weight
        if accepted:
            self._hits[stage][bin_] += weight
        self._judged += weight

    def add_siblings(self, offered: int, rank: int) -> None:
        """Count the siblings of a rejected guess.

        Args:
            rank: which of them was correct, from 1; 0 for none.
        """
        for index in range(min(rank or offered, MAX_SIBLINGS)):
            self._offered[index] += self._weight
        if 0 < rank <= MAX_SIBLINGS:
            self._sibling_hits[rank - 1] += self._weight

    def add_last_stage(self, tokens: float) -> None:
        """Count `tokens` of the latest judged tokens as belonging to drafts that began in the last stage."""
        self._last_stage += tokens * self._weight

    @property
    def judged(self) -> float:
        """Decayed number of judged tokens."""
        return self._judged / self._weight

    def capped(self, tokens: float) -> Evidence:
        """Return a copy that is scaled down to a weight of at most `tokens` tokens."""
        copied = copy.deepcopy(self)
        if copied.judged > tokens:
            copied._rescale(tokens / copied._judged)
            copied._weight = 1.0
        return copied

    def record(self, version: str, temperature_class: int) -> AcceptanceRecord:
        """Return the counts, in tokens."""
        unit = 1.0 / self._weight

        def scaled(counts: list[float]) -> tuple[float, ...]:
            return tuple(unit * count for count in counts)

        return AcceptanceRecord(
            version=version,
            temperature_class=temperature_class,
            judged=unit * self._judged,
            last_stage=unit * self._last_stage,
            seen=tuple(map(scaled, self._seen)),
            hits=tuple(map(scaled, self._hits)),
            offered=scaled(self._offered),
            sibling_hits=scaled(self._sibling_hits),
        )

    @classmethod
    def from_record(cls, record: AcceptanceRecord) -> Evidence:
        """Return the evidence that `record` describes."""
        evidence = cls()
        evidence._judged, evidence._last_stage = record.judged, record.last_stage
        evidence._seen, evidence._hits = [[*counts] for counts in record.seen], [[*counts] for counts in record.hits]
        evidence._offered, evidence._sibling_hits = [*record.offered], [*record.sibling_hits]
        return evidence

    def last_stage_share(self, prior: float) -> float:
        """Return the share of tokens whose drafts begin in the last stage."""
        prior_weight = PRIOR_LAST_STAGE_TOKENS * self._weight
        return (self._last_stage + prior_weight * prior) / (self._judged + prior_weight)

    def posterior(self, prior: AcceptanceCurves) -> AcceptanceCurves:
        """Return `prior` updated with this evidence."""
        unit = 1.0 / self._weight
        calibrations = _shift_level([stage.calibration for stage in prior.stages], self._seen, self._hits, unit)
        stages = tuple(
            _posterior_stage(StageAcceptance(stage.confidence_shares, calibration), seen, hits, unit)
            for stage, calibration, seen, hits in zip(prior.stages, calibrations, self._seen, self._hits, strict=True)
        )
        (prior_hazards,) = _shift_level([prior.hazards], [self._offered], [self._sibling_hits], unit)
        hazards = tuple(
            (hits * unit + PRIOR_REJECTED_TOKENS * before) / (offered * unit + PRIOR_REJECTED_TOKENS)
            for hits, offered, before in zip(self._sibling_hits, self._offered, prior_hazards, strict=True)
        )
        return AcceptanceCurves(stages, hazards)

    def _rescale(self, factor: float) -> None:
        for counts in (*self._seen, *self._hits, self._offered, self._sibling_hits):
            counts[:] = [count * factor for count in counts]
        self._weight *= factor
        self._judged *= factor
        self._last_stage *= factor


def _shift_level(
    priors: Sequence[Sequence[float]], seen: list[list[float]], hits: list[list[float]], unit: float
) -> list[list[float]]:
    """Return prior probabilities with their odds multiplied by the most probable common factor.

    Args:
        priors: probabilities.
        seen, hits: stored counts for each of them, each of which stands for `unit` tokens.
    """
    odds = np.log(np.clip(priors, 1e-6, 1.0 - 1e-6))
    odds -= np.log1p(-np.exp(odds))
    counts, accepted = LEVEL_SHARE * unit * np.array(seen), LEVEL_SHARE * unit * float(np.sum(hits))
    level = 0.0
    # The posterior's logarithm is concave: Newton's method, with steps bounded because it overshoots far from the top.
    for _ in range(LEVEL_STEPS):
        probability = 1.0 / (1.0 + np.exp(-(odds + level)))
        expected = counts * probability
        slope = accepted - float(expected.sum()) - level / LEVEL_DEVIATION**2
        curvature = float((expected * (1.0 - probability)).sum()) + LEVEL_DEVIATION**-2
        step = min(max(slope / curvature, -1.0), 1.0)
        level += step
        if abs(step) < 1e-3:
            break
    shifted: list[list[float]] = (1.0 / (1.0 + np.exp(-(odds + level)))).tolist()
    return shifted


def _posterior_stage(prior: StageAcceptance, seen: list[float], hits: list[float], unit: float) -> StageAcceptance:
    """Return `prior` updated with stored counts, each of which stands for `unit` tokens."""
    total, per_bin, tokens = sum(seen) * unit, PRIOR_TOKENS_PER_BIN, PRIOR_CONFIDENCE_TOKENS
    calibration = [
        (hit * unit + per_bin * before) / (count * unit + per_bin)
        for hit, count, before in zip(hits, seen, prior.calibration, strict=True)
    ]
    shares = [
        (count * unit + tokens * before) / (total + tokens)
        for count, before in zip(seen, prior.confidence_shares, strict=True)
    ]
    return StageAcceptance(shares, _isotonic(calibration, [count * unit + per_bin for count in seen]))


def _isotonic(values: list[float], weights: list[float]) -> list[float]:
    """Return the weighted least-squares non-decreasing fit of `values` (pool adjacent violators)."""
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
