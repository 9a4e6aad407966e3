"""Rounds counted from ranks: by hand, and as the simulator plays them."""

from __future__ import annotations

import random

import pytest

from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.simulation.recorded_texts import NONE
from edge_runtime.simulation.simulator import simulate
from edge_runtime.simulation.world import make_world
from export.evaluate.proposers import Guesses, Passage
from export.evaluate.traces import Trace


def trace_of(ranks: list[int], looped: list[bool] | None = None) -> Trace:
    passage = Passage(list(range(len(ranks) + 1)), 1, Sampling())
    return Trace(passage, ranks, [0.5] * len(ranks), looped or [False] * len(ranks))


def test_ranks_are_places_among_the_candidates() -> None:
    guesses = Guesses([[4, 5], [6, 4], [1, 2]], [0.9, 0.8, 0.7])
    trace = Trace.of(Passage([9, 4, 4, 4], 1, Sampling()), [4, 4, 4], guesses)
    assert trace.ranks == [0, 1, NONE]
    assert trace.accepted() == (1, 3)
    assert trace.accepted(looped=True) == (0, 0)


def test_rounds_by_hand() -> None:
    # Two right, one whose first sibling is right, five right, and a miss without any.
    trace = trace_of([0, 0, 1, 0, 0, 0, 0, 0, NONE, 0])
    # K=2: (0 0)+1, (0 0)+0, (0 0)+NONE; the round behind that could be cut short.
    assert trace.round_tokens(2, 0) == (9, 3)
    # K=4: 0 0 [1], then 4 right and one more; what is behind could be cut short.
    assert trace.round_tokens(4, 0) == (8, 2)
    # With a sibling the first round brings what follows it, too.
    assert trace.round_tokens(4, 1) == (9, 2)
    assert trace.surviving(3) == [(7, 8), (5, 8), (3, 8)]


def test_rounds_that_could_reach_into_a_loop_are_played_and_not_counted() -> None:
    trace = trace_of([NONE, NONE, 0, 0, 0, NONE, NONE, NONE], [False, False, True, True, True, False, False, False])
    # Of those that begin at 0, 1, 2, 4, 6 and 7: the first and that at 6.
    assert trace.round_tokens(1, 0) == (2, 2)
    assert trace.surviving(2) == [(0, 3), (0, 3)]
    assert trace.accepted() == (0, 5)
    assert trace.accepted(looped=True) == (3, 3)
    text = trace.recorded("v")
    assert text is not None and text.ranks == [NONE, NONE]
    assert trace_of([0, 0], [True, True]).recorded("v") is None


@pytest.mark.parametrize("siblings", [0, 3])
@pytest.mark.parametrize("draft", [1, 2, 4, 8])
def test_the_simulator_plays_the_same_rounds(draft: int, siblings: int) -> None:
    chance = random.Random(draft)
    ranks = [chance.choice([0, 0, 0, 0, 1, 2, 5, NONE]) for _ in range(400)]
    trace = trace_of(ranks)
    text = trace.recorded("v")
    assert text is not None
    plan = Plan(draft, siblings=siblings, sibling_confidence=1.0)
    played = simulate([text], FixedPlanner(plan), make_world("lan", "server", "7b"), log=True)
    counted = [outcome.accepted + outcome.own for outcome in played.log if outcome.conditions.left > draft]
    assert trace.round_tokens(draft, siblings) == (sum(counted), len(counted))
