"""Measures the planner's prior of draft acceptance (`edge_runtime.planning.acceptance_prior`) on recorded texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edge_runtime.planning.acceptance_model import EVALUATED_TEMPERATURES, temperature_class
from edge_runtime.planning.acceptance_table import MAX_SIBLINGS, STAGE_STREAKS, stage_index
from edge_runtime.protocol.errors import InputError
from edge_runtime.simulation import RecordedText

QUINTILE_COUNT = 5
# A stage with fewer tokens has the quintiles of the stage before it: long runs are rare at temperature 1.
MIN_STAGE_TOKENS = 100
# Mean confidence and acceptance rate of the tokens of each quintile of confidence, least confident first.
Quintiles = tuple[tuple[float, float], ...]


class AcceptancePrior(NamedTuple):
    """The constants of `edge_runtime.planning.acceptance_prior`; see there.

    Attributes:
        quintiles: by temperature class and stage.
        last_stage_shares: by temperature class.
        sibling_hazards: (MAX_SIBLINGS,)
    """

    quintiles: tuple[tuple[Quintiles, ...], ...]
    last_stage_shares: tuple[float, ...]
    sibling_hazards: tuple[float, ...]


def measure_prior(texts: Sequence[RecordedText]) -> AcceptancePrior:
    """Measure the prior on texts of every temperature class.

    Raises:
        InputError: the first stage of a class has fewer than MIN_STAGE_TOKENS tokens.
    """
    quintiles, last_stage_shares = [], []
    for kind in range(len(EVALUATED_TEMPERATURES)):
        guesses = [_judged_guesses(text) for text in texts if temperature_class(text.temperature) == kind]
        confidences, accepted, stages = np.concatenate(guesses, axis=1) if guesses else np.empty((3, 0))
        counts = [int((stages == stage).sum()) for stage in range(len(STAGE_STREAKS))]
        if counts[0] < MIN_STAGE_TOKENS:
            raise InputError(
                f"too few texts of temperature class {kind}: {counts[0]} tokens in the first stage, "
                f"at least {MIN_STAGE_TOKENS} needed"
            )
        by_stage: list[Quintiles] = []
        for stage, count in enumerate(counts):
            few = count < MIN_STAGE_TOKENS
            chosen = stages == stage
            by_stage.append(by_stage[-1] if few else _quintiles(confidences[chosen], accepted[chosen]))
        quintiles.append(tuple(by_stage))
        last_stage_shares.append(counts[-1] / sum(counts))
    ranks = np.array([rank for text in texts for rank in text.ranks])
    hazards = tuple(float((ranks == r).sum() / max(1, (ranks >= r).sum())) for r in range(1, MAX_SIBLINGS + 1))
    return AcceptancePrior(tuple(quintiles), tuple(last_stage_shares), hazards)


def _judged_guesses(text: RecordedText) -> np.ndarray:
    """Return confidence, acceptance (0 or 1) and stage of every guess, (3, positions)."""
    stages, streak = [], 0
    for rank in text.ranks:
        stages.append(stage_index(streak))
        streak = 0 if rank else streak + 1
    return np.array([text.confidences, [rank == 0 for rank in text.ranks], stages], dtype=np.float64)


def _quintiles(confidences: np.ndarray, accepted: np.ndarray) -> Quintiles:
    order = np.argsort(confidences, kind="stable")
    parts = np.array_split(order, QUINTILE_COUNT)
    return tuple((float(confidences[part].mean()), float(accepted[part].mean())) for part in parts)
