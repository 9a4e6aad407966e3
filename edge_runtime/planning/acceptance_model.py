"""Online model of draft acceptance: confidence distribution, calibration and sibling hit rates of the draft model.

Every judged token (all accepted ones and the first rejected one) is evidence, whatever length was drafted: the planner
learns from full information and needs no exploration for this. Shadow guesses (see `Plan.shadow`) count likewise.
Evidence is kept per target version and temperature class and per stage of a text (`acceptance_table`), and decays
exponentially. What all texts have taught is the prior for the next text.

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
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edge_runtime.planning.acceptance_prior import (
    EVALUATED_ACCEPTANCE,
    LAST_STAGE_SHARES,
    QUINTILES,
    SIBLING_HAZARDS,
)
from edge_runtime.planning.acceptance_table import (
    CONFIDENCE_BINS,
    MAX_SIBLINGS,
    STAGE_STREAKS,
    AcceptanceTable,
    FloatArray,
    StageAcceptance,
    stage_index,
)
from edge_runtime.planning.plan import Conditions, Outcome
from edge_runtime.planning.planner_state import MAX_RECORDS, AcceptanceRecord

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
# Maximum weight, in tokens, that evidence from another target version has for a new version.
INHERITED_TOKENS = 150.0
# Assumed relative error of the cost per drafted token under the prior alone, and the number of judged tokens after
# which half of the variance is left.
PRIOR_COST_ERROR = 0.2
ERROR_HALVING_TOKENS = 100.0

# The tables are recomputed once the number of new judged tokens exceeds REFRESH_TOKENS + REFRESH_SHARE * all evidence.
REFRESH_TOKENS, REFRESH_SHARE = 4.0, 0.1

# Tokens without a guess after which evidence fades by as many: new tables take some 0.5 ms. Chosen.
FADED_AT_ONCE = 64
# Models that are kept, by version and temperature class; those made first go first. Chosen: some 40 MB.
MAX_MODELS = 512

# Temperatures at which a bundle's evaluation reports acceptance, by class.
EVALUATED_TEMPERATURES = (0.0, 0.7, 1.0)
# Points of the quintiles' interpolated distribution that are counted by bin.
INTERPOLATION_POINTS = 2000


def temperature_class(temperature: float) -> int:
    """Return 0 for greedy decoding, 1 for mild sampling, 2 for sampling close to the model's own distribution."""
    return 0 if temperature == 0.0 else 1 if temperature < 0.85 else 2


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


class _Evidence:
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

    def capped(self, tokens: float) -> _Evidence:
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
    def from_record(cls, record: AcceptanceRecord) -> _Evidence:
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


class AcceptanceModel:
    """What is known about the draft's acceptance by one target version in one temperature class.

    Also tracks the streak of the current text. Besides the draft's own confidence, the stage of the text predicts
    acceptance best; longer histories of a text add nothing.

    Attributes:
        streak: consecutive correct guesses before the text's next token.
    """

    def __init__(self, temperature_class: int, evaluated: float | None = None) -> None:
        """Start from the prior.

        Args:
            temperature_class: see the function of that name.
            evaluated: acceptance rate from the bundle's evaluation; None if it has none.
        """
        # Text that a target generates is easier to predict than the human text that drafts are evaluated on. The odds
        # of acceptance are taken to be better by the same factor as for the shipped family.
        if evaluated is None:
            odds_ratio = 1.0
        else:
            odds_ratio = _odds(min(max(evaluated, 0.05), 0.95)) / _odds(EVALUATED_ACCEPTANCE[temperature_class])
        stages = tuple(_prior_stage(quintiles, odds_ratio) for quintiles in QUINTILES[temperature_class])
        self._prior = AcceptanceCurves(stages, SIBLING_HAZARDS)
        self._prior_last_stage_share = LAST_STAGE_SHARES[temperature_class]
        self._evidence = _Evidence()
        # Tokens without a guess that evidence has yet to fade by.
        self._unguessed = 0
        self._refresh()
        self.streak = 0
        self._begin_text(0)

    @property
    def judged(self) -> float:
        """Decayed number of judged tokens."""
        return self._evidence.judged

    def follow(self, conditions: Conditions) -> None:
        """Detect the start of a new text: the end position changes, or the position moves backwards."""
        end = conditions.position + conditions.left
        if end != self._end or conditions.position < self._done:
            self._begin_text(end)

    def observe(self, outcome: Outcome) -> None:
        """Learn from a round's judged tokens, or from the shadow guesses for streamed tokens."""
        self._done = outcome.conditions.position + outcome.tokens
        streak = self.streak
        self.streak = self.learn_draft(
            streak,
            outcome.confidences,
            accepted=outcome.accepted,
            offered=outcome.offered,
            sibling=outcome.sibling,
        )
        for confidence, rank in outcome.shadow_guesses:
            self._evidence.add_judged(confidence, not rank, streak)
            if rank:
                self._evidence.add_siblings(outcome.plan.siblings, rank if rank <= outcome.plan.siblings else 0)
            streak = 0 if rank else streak + 1
        if outcome.shadow_guesses and len(outcome.shadow_guesses) == outcome.own_tokens:
            self.streak = streak
        self._count_judged(len(outcome.shadow_guesses))

    def learn_draft(
        self, streak: int, confidences: Sequence[float], *, accepted: int, offered: Sequence[int], sibling: int
    ) -> int:
        """Learn from a verified draft; return the streak after it.

        Args:
            streak: consecutive correct guesses before it.
            confidences, accepted, offered, sibling: see `Outcome`.
        """
        evidence, drafted = self._evidence, len(confidences)
        judged = min(accepted + 1, drafted)
        for index in range(judged):
            evidence.add_judged(confidences[index], index < accepted, streak + index)
        if judged and _in_last_stage(streak):
            evidence.add_last_stage(judged)
        if accepted < min(drafted, len(offered)):
            evidence.add_siblings(offered[accepted], sibling)
        self._count_judged(judged)
        # Whether the draft would have guessed the target's own token is unknown; that does not end a streak.
        return streak + judged if judged and accepted == drafted else 0

    def fade(self) -> None:
        """Let evidence count less, because a token was generated without a guess."""
        self._unguessed += 1
        if self._unguessed == FADED_AT_ONCE:
            self._unguessed = 0
            self._evidence.fade(FADED_AT_ONCE)
            self._count_judged(FADED_AT_ONCE)

    def add_last_stage(self, tokens: float) -> None:
        """Count `tokens` of the shadow guesses as belonging to drafts that would have begun in the last stage."""
        self._evidence.add_last_stage(tokens)

    def table(self) -> AcceptanceTable:
        """Return the table of drafts that begin at the text's current position."""
        return self.table_after(self.streak)

    def table_after(self, streak: int) -> AcceptanceTable:
        """Return the table of drafts that follow `streak` consecutive correct guesses."""
        return self.last_stage_table() if _in_last_stage(streak) else self.first_stage_table()

    def first_stage_table(self) -> AcceptanceTable:
        """Return the table of drafts that begin after a rejection."""
        return self._table(0)

    def last_stage_table(self) -> AcceptanceTable:
        """Return the table of drafts that begin in the last stage, in which nearly all guesses are correct."""
        return self._table(STAGE_STREAKS[-1])

    def last_stage_share(self, left: int) -> float:
        """Return the expected share of the text's next `left` tokens whose drafts begin in the last stage."""
        if not _in_last_stage(self.streak):
            return self._last_stage_share
        leave = 1.0 - self.last_stage_table().acceptance
        stay = (1.0 - (1.0 - leave) ** left) / (leave * left)
        return stay + (1.0 - stay) * self._last_stage_share

    def tokens_per_forward(self, left: int) -> float:
        """Return the expected yield of a forward over VERIFIER_DRAFT_LENGTH draft tokens, over the next `left` tokens.

        The harmonic mean of both stages' yields: forwards, not tokens, add up.
        """
        share = self.last_stage_share(left)
        first, last = self.first_stage_table(), self.last_stage_table()
        return 1.0 / (share / last.tokens_per_forward + (1.0 - share) / first.tokens_per_forward)

    @property
    def cost_error(self) -> float:
        """Relative standard error of the cost per drafted token that follows from the table, over all texts."""
        return PRIOR_COST_ERROR * math.sqrt(self.prior_weight)

    @property
    def prior_weight(self) -> float:
        """Share of the prior in the current estimates."""
        return ERROR_HALVING_TOKENS / (ERROR_HALVING_TOKENS + self.judged)

    def inherit(self) -> AcceptanceModel:
        """Return the starting point for a new target version: this evidence, capped at `INHERITED_TOKENS` tokens."""
        successor = copy.copy(self)
        successor._evidence = self._evidence.capped(INHERITED_TOKENS)
        successor._refresh()
        successor._begin_text(0)
        return successor

    def record(self, version: str, temperature_class: int) -> AcceptanceRecord:
        """Return the evidence, to be restored in another process."""
        return self._evidence.record(version, temperature_class)

    def restore(self, record: AcceptanceRecord) -> None:
        """Replace the evidence."""
        self._evidence = _Evidence.from_record(record)
        self._refresh()

    def _table(self, streak: int) -> AcceptanceTable:
        table = self._tables.get(streak)
        if table is None:
            table = self._tables[streak] = self._curves.table(streak)
        return table

    def _count_judged(self, tokens: float) -> None:
        self._fresh += tokens
        if self._fresh > REFRESH_TOKENS + REFRESH_SHARE * self.judged:
            self._refresh()

    def _refresh(self) -> None:
        self._curves, self._fresh = self._evidence.posterior(self._prior), 0.0
        self._tables: dict[int, AcceptanceTable] = {}
        self._last_stage_share = self._evidence.last_stage_share(self._prior_last_stage_share)

    def _begin_text(self, end: int) -> None:
        self._end, self._done, self.streak = end, 0, 0


class AcceptanceModels:
    """One `AcceptanceModel` per target version and temperature class."""

    def __init__(self, acceptance: Mapping[str, float]) -> None:
        """
        Args:
            acceptance: acceptance rates from the bundle's manifest, by `T=0`, `T=0.7` and `T=1`; any may be missing.
        """
        self._acceptance = acceptance
        self._models: dict[tuple[str, int], AcceptanceModel] = {}
        self._latest: dict[int, AcceptanceModel] = {}

    def get(self, version: str, temperature: float) -> AcceptanceModel:
        """Return the model of a target version, created on first use; an empty version means the latest one."""
        kind = temperature_class(temperature)
        model = self._models.get((version, kind)) if version else self._latest.get(kind)
        if model is None:
            latest = self._latest.get(kind)
            model = self._make(kind) if latest is None else latest.inherit()
            self._latest[kind] = model
            if version:
                self._models[version, kind] = model
                if len(self._models) > MAX_MODELS:
                    del self._models[next(iter(self._models))]
        return model

    def records(self) -> list[AcceptanceRecord]:
        """Return the evidence of the last MAX_RECORDS versions and classes, the latest last."""
        return [model.record(*key) for key, model in list(self._models.items())[-MAX_RECORDS:]]

    def restore(self, records: list[AcceptanceRecord]) -> None:
        """Replace all models by those of `records`."""
        self._models, self._latest = {}, {}
        for record in records:
            model = self._make(record.temperature_class)
            model.restore(record)
            self._models[record.version, record.temperature_class] = model
            self._latest[record.temperature_class] = model

    def _make(self, kind: int) -> AcceptanceModel:
        return AcceptanceModel(kind, self._acceptance.get(f"T={EVALUATED_TEMPERATURES[kind]:g}"))


def _in_last_stage(streak: int) -> bool:
    """Return whether a token that follows `streak` consecutive correct guesses belongs to the last stage."""
    return streak >= STAGE_STREAKS[-1]


def _prior_stage(quintiles: tuple[tuple[float, float], ...], odds_ratio: float) -> StageAcceptance:
    """Return the prior of one stage: the measured quintiles, with the odds of acceptance multiplied by `odds_ratio`."""
    means, rates = (np.array(column) for column in zip(*quintiles, strict=True))
    # Each quintile is spread halfway to its neighbors.
    edges = np.concatenate([[0.0], (means[1:] + means[:-1]) / 2, [1.0]])
    levels = (np.arange(INTERPOLATION_POINTS) + 0.5) / INTERPOLATION_POINTS
    confidences = np.interp(levels, np.linspace(0.0, 1.0, len(edges)), edges)
    # A bin's acceptance is the mean over the points in it, which lie next to 1 in the last bin; that of an empty bin is
    # interpolated at its middle.
    bins = np.minimum((confidences * CONFIDENCE_BINS).astype(np.intp), CONFIDENCE_BINS - 1)
    counts = np.bincount(bins, minlength=CONFIDENCE_BINS)
    hits = np.bincount(bins, np.interp(confidences, means, rates), CONFIDENCE_BINS)
    middles = np.interp((np.arange(CONFIDENCE_BINS) + 0.5) / CONFIDENCE_BINS, means, rates)
    calibration: FloatArray = np.where(counts, hits / np.maximum(counts, 1), middles)
    shares: FloatArray = counts / INTERPOLATION_POINTS * 0.98 + 0.02 / CONFIDENCE_BINS
    # The odds ratio fixes the overall acceptance; Bayes' rule then gives the confidence distribution, with those of
    # accepted and of rejected tokens unchanged.
    measured = float(shares @ calibration)
    target = odds_ratio * _odds(measured) / (1.0 + odds_ratio * _odds(measured))
    accepted = target / measured * shares * calibration
    shares = accepted + (1.0 - target) / (1.0 - measured) * shares * (1.0 - calibration)
    return StageAcceptance(shares.tolist(), (accepted / shares).tolist())


def _odds(probability: float) -> float:
    return probability / (1.0 - probability)


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
