"""Replay of drafted rounds on shadow guesses: by hand, and against the simulator."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.acceptance_table import CONFIDENCE_BINS, STAGE_STREAKS, AcceptanceTable, StageAcceptance
from edge_runtime.planning.counterfactual import ReplayedRounds, replay_rounds
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import UNRANKED, FixedPlanner, Plan, ShadowGuess
from edge_runtime.planning.search import DraftedRound, RoundPrices
from edge_runtime.simulation.recorded_texts import RecordedText, read_texts
from edge_runtime.simulation.simulator import Simulator
from tests.conftest import TRACES
from tests.edge_runtime.simulation.worlds import FORWARD, HALF_TRIP, NODE, STEP, make_world

ROUND_TRIP = 2 * HALF_TRIP
# The prices that correspond to `make_world`.
PRICES = RoundPrices(
    exchange=ROUND_TRIP,
    step=STEP,
    id=0.0,
    flight_second=1.0,
    forward_second=1.0,
    step_ahead=0.0,
    void=0.0,
    step_seconds=STEP,
    flight_seconds=ROUND_TRIP + FORWARD,
    overhead_seconds=0.0,
    queue_seconds=0.0,
    forward_nodes=[1.0, 72.0],
    forward_seconds=[FORWARD, FORWARD + 71 * NODE],
)
# Uniform confidences that equal the acceptance probability.
UNIFORM = StageAcceptance(
    [1.0 / CONFIDENCE_BINS] * CONFIDENCE_BINS, ((np.arange(CONFIDENCE_BINS) + 0.5) / CONFIDENCE_BINS).tolist()
)
TABLE = AcceptanceTable([UNIFORM] * len(STAGE_STREAKS), np.zeros(8))


def drafted_round(cost: float, length: int, min_survival: float, **fields: Any) -> DraftedRound:
    return DraftedRound(cost, Plan(length, min_survival=min_survival, calibration=TABLE.calibration, **fields))


def replay(
    guesses: list[ShadowGuess], first_stage: DraftedRound, last_stage: DraftedRound | None = None, streak: int = 0
) -> ReplayedRounds:
    """Replay at `PRICES`, with the same round in the last stage unless there is another one."""
    return replay_rounds(
        guesses,
        streak=streak,
        first_stage=first_stage,
        last_stage=last_stage or first_stage,
        prices=PRICES,
    )


def make_guesses(ranks: str, confidence: float = 0.9) -> list[ShadowGuess]:
    """Return guesses by one mark per token: `.` correct, a digit the rank of the correct sibling, `x` none."""
    return [(confidence, 0 if mark == "." else UNRANKED if mark == "x" else int(mark)) for mark in ranks]


def test_replays_rounds_computed_by_hand() -> None:
    # All four and the bonus token; two and the own token; two, with the last token as the own one.
    replayed = replay(make_guesses("....." + "..x" + "..."), drafted_round(0.05, 4, 0.0))
    assert replayed.tokens == 11
    forwards = 3 * FORWARD + (4 + 4 + 2) * NODE
    assert replayed.cost == pytest.approx(3 * ROUND_TRIP + 10 * STEP + forwards)
    assert replayed.predicted_cost == pytest.approx(11 * 0.05)
    assert replayed.last_stage_tokens == 0


def test_replays_stop_rule_and_siblings() -> None:
    # A token of confidence 0.9 has a calibrated acceptance of 0.925; the survival of two is 0.86.
    stopping = drafted_round(0.05, 8, 0.9, siblings=2, sibling_confidence=0.95)
    replayed = replay(make_guesses(".2.."), stopping)
    # Both tokens are drafted; the second sibling of the second token is correct, and the own token follows.
    assert replayed.tokens == 3
    assert replayed.cost == pytest.approx(ROUND_TRIP + 2 * STEP + FORWARD + (2 + 4) * NODE)


def test_uses_the_last_stage_round_after_a_long_streak() -> None:
    short, long = drafted_round(0.05, 2, 0.0), drafted_round(0.02, 20, 0.0)
    after_streak = replay(make_guesses("." * 21), short, long, streak=STAGE_STREAKS[-1])
    assert (after_streak.last_stage_tokens, after_streak.tokens) == (21, 21)
    assert after_streak.predicted_cost == pytest.approx(21 * 0.02)
    growing = replay(make_guesses("." * 60), short, long)
    assert 0 < growing.last_stage_tokens < growing.tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "round_",
    [
        drafted_round(0.05, 5, 0.0),
        drafted_round(0.05, 12, 0.3, siblings=3, sibling_confidence=0.8),
        drafted_round(0.05, 6, 0.2, draft_ahead=6),
        drafted_round(0.05, 8, 0.2, draft_ahead=8, in_flight=2),
    ],
    ids=["plain", "stop rule and siblings", "ahead", "two in flight"],
)
@pytest.mark.parametrize(("target", "temperature"), [("target-v1", 0.0), ("target-v2", 1.0)])
def test_replay_agrees_with_the_simulator(round_: DraftedRound, target: str, temperature: float) -> None:
    """Simulate drafted rounds on recorded texts, and replay them on the shadow guesses for the same texts."""
    texts = read_texts(TRACES, target=target, temperature=temperature)[:24]
    simulator = Simulator(make_world(), FixedPlanner(round_.plan))
    simulated = sum(simulator.run(text).latency_seconds for text in texts) / sum(map(len, texts))
    results = [replay(shadow_guesses(text), round_) for text in texts]
    replayed = sum(result.cost for result in results) / sum(result.tokens for result in results)
    assert replayed == pytest.approx(simulated, rel=0.06)


def shadow_guesses(text: RecordedText) -> list[ShadowGuess]:
    return list(zip(text.confidences, text.ranks, strict=True))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from((0, 0, 0, 1, 5, UNRANKED))), max_size=80),
    st.integers(0, 40),
    st.builds(
        drafted_round,
        cost=st.just(0.05),
        length=st.integers(1, 31),
        min_survival=st.floats(0, 1),
        siblings=st.integers(0, 7),
        sibling_confidence=st.floats(0, 1),
        draft_ahead=st.integers(0, 24),
        in_flight=st.integers(1, 2),
    ),
)
def test_all_tokens_but_the_last_are_replayed(guesses: list[ShadowGuess], streak: int, round_: DraftedRound) -> None:
    long = msgspec.structs.replace(round_, plan=msgspec.structs.replace(round_.plan, draft=31))
    replayed = replay(guesses, round_, long, streak=streak)
    assert max(0, len(guesses) - 1) <= replayed.tokens <= len(guesses)
    assert 0 <= replayed.last_stage_tokens <= replayed.tokens
    if replayed.tokens:
        objective = Objective()
        assert objective.cost(FORWARD, FORWARD, 0.0, 0) / 3 < replayed.cost
        assert replayed.predicted_cost == pytest.approx(0.05 * replayed.tokens)
