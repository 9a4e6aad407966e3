"""Rounds played on what was watched: by hand, and against the simulator that plays them in earnest."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.acceptance_table import BINS, STAGES, Stage, Table
from edge_runtime.planning.counterfactual import Way, replay
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import UNNAMED, FixedPlanner, Plan, Watched
from edge_runtime.planning.search import Draft, Prices
from edge_runtime.simulation.recorded_texts import Text, read_texts
from edge_runtime.simulation.simulator import Simulator
from tests.edge_runtime.simulation.worlds import FORWARD, HALF_TRIP, NODE, STEP, make_world

TRACES = Path(__file__).parents[3] / "export" / "example_family" / "acceptance.npz"
ROUND_TRIP = 2 * HALF_TRIP
# The world of `worlds`.
PRICES = Prices(
    exchange=ROUND_TRIP,
    step=STEP,
    identity=0.0,
    second=1.0,
    worked=1.0,
    ahead=0.0,
    void=0.0,
    step_seconds=STEP,
    flight_seconds=ROUND_TRIP + FORWARD,
    overhead_seconds=0.0,
    queue_seconds=0.0,
    widths=[1.0, 72.0],
    forwards=[FORWARD, FORWARD + 71 * NODE],
)
EVEN = Stage([1.0 / BINS] * BINS, ((np.arange(BINS) + 0.5) / BINS).tolist())
TABLE = Table([EVEN] * len(STAGES), np.zeros(8))


def way(draft: Draft) -> Way:
    return Way(draft, TABLE)


def seen(ranks: str, confidence: float = 0.9) -> list[Watched]:
    """`.` a right guess, a digit the place of the right sibling, `x` none of them."""
    return [(confidence, 0 if mark == "." else UNNAMED if mark == "x" else int(mark)) for mark in ranks]


def test_rounds_by_hand() -> None:
    four = way(Draft(0.05, 4, 0.0))
    # All of four and the target's own; two and the own; two, the own token being the last.
    played = replay(seen("....." + "..x" + "..."), 0, four, four, PRICES)
    assert played.tokens == 11
    forwards = 3 * FORWARD + (4 + 4 + 2) * NODE
    assert played.cost == pytest.approx(3 * ROUND_TRIP + 10 * STEP + forwards)
    assert played.told == pytest.approx(11 * 0.05)
    assert played.running == 0


def test_the_stop_rule_and_siblings() -> None:
    # One token of 0.9 survives with 0.925, two with 0.86.
    stopping = way(Draft(0.05, 8, 0.9, siblings=2, sibling_confidence=0.95))
    played = replay(seen(".2.."), 0, stopping, stopping, PRICES)
    # Both tokens are drafted; the second sibling beside the second is right, and the target's own follows.
    assert played.tokens == 3
    assert played.cost == pytest.approx(ROUND_TRIP + 2 * STEP + FORWARD + (2 + 4) * NODE)


def test_behind_a_streak_it_drafts_the_other_way() -> None:
    short, long = way(Draft(0.05, 2, 0.0)), way(Draft(0.02, 20, 0.0))
    behind = replay(seen("." * 21), STAGES[-1], short, long, PRICES)
    assert (behind.running, behind.tokens) == (21, 21)
    assert behind.told == pytest.approx(21 * 0.02)
    growing = replay(seen("." * 60), 0, short, long, PRICES)
    assert 0 < growing.running < growing.tokens


@pytest.mark.parametrize(
    "draft",
    [
        Draft(0.05, 5, 0.0),
        Draft(0.05, 12, 0.3, siblings=3, sibling_confidence=0.8),
        Draft(0.05, 6, 0.2, ahead=6),
        Draft(0.05, 8, 0.2, ahead=8, in_flight=2),
    ],
    ids=["plain", "stop rule and siblings", "ahead", "two in flight"],
)
@pytest.mark.parametrize(("target", "temperature"), [("target-v1", 0.0), ("target-v2", 1.0)])
def test_it_comes_to_what_the_simulator_comes_to(draft: Draft, target: str, temperature: float) -> None:
    """Recorded texts, drafted in earnest and replayed from what a stream would have shown of them."""
    texts = read_texts(TRACES, target=target, temperature=temperature)[:24]
    plan = Plan(
        draft.length,
        siblings=draft.siblings,
        sibling_confidence=draft.sibling_confidence,
        min_survival=draft.survival,
        calibration=TABLE.calibration,
        ahead=draft.ahead,
        in_flight=draft.in_flight,
    )
    simulator = Simulator(make_world(), FixedPlanner(plan))
    real = sum(simulator.play(text).latency_seconds for text in texts) / sum(map(len, texts))
    replays = [replay(watched(text), 0, way(draft), way(draft), PRICES) for text in texts]
    told = sum(played.cost for played in replays) / sum(played.tokens for played in replays)
    assert told == pytest.approx(real, rel=0.06)


def watched(text: Text) -> list[Watched]:
    return list(zip(text.confidences, text.ranks, strict=True))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from((0, 0, 0, 1, 5, UNNAMED))), max_size=80),
    st.integers(0, 40),
    st.builds(
        Draft,
        cost=st.just(0.05),
        length=st.integers(1, 31),
        survival=st.floats(0, 1),
        siblings=st.integers(0, 7),
        sibling_confidence=st.floats(0, 1),
        ahead=st.integers(0, 24),
        in_flight=st.integers(1, 2),
    ),
)
def test_all_but_the_last_token_is_played(text: list[Watched], streak: int, draft: Draft) -> None:
    played = replay(text, streak, way(draft), way(msgspec.structs.replace(draft, length=31)), PRICES)
    assert max(0, len(text) - 1) <= played.tokens <= len(text)
    assert 0 <= played.running <= played.tokens
    if played.tokens:
        objective = Objective()
        assert objective.cost(FORWARD, FORWARD, 0.0, 0) / 3 < played.cost
        assert played.told == pytest.approx(0.05 * played.tokens)
