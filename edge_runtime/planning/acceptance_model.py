"""Online model of draft acceptance: confidence distribution, calibration and sibling hit rates of the draft model.

Every judged token (all accepted ones and the first rejected one) is evidence, whatever length was drafted: the planner
learns from full information and needs no exploration for this. Shadow guesses (see `Plan.shadow`) count likewise.
Evidence is kept per target version and temperature class and per stage of a text (`acceptance_table`), and decays
exponentially (`acceptance_evidence`). What all texts have taught is the prior for the next text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np

from edge_runtime.planning.acceptance_evidence import AcceptanceCurves, Evidence
from edge_runtime.planning.acceptance_prior import (
    EVALUATED_ACCEPTANCE,
    LAST_STAGE_SHARES,
    QUINTILES,
    SIBLING_HAZARDS,
)
from edge_runtime.planning.acceptance_table import (
    CONFIDENCE_BINS,
    STAGE_STREAKS,
    AcceptanceTable,
    FloatArray,
    StageAcceptance,
)
from edge_runtime.planning.plan import Conditions, Outcome
from edge_runtime.planning.planner_state import MAX_RECORDS, AcceptanceRecord

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
        self._evidence = Evidence()
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
        self._evidence = Evidence.from_record(record)
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
