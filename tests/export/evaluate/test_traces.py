"""Rounds counted from ranks: against examples, and against the simulator."""

from __future__ import annotations

import random

import pytest

from cloud_verifier.acceptance.measure import Passage, RankedTokens
from edge_runtime.planning.plan import UNRANKED, FixedPlanner, Plan
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.simulation.simulator import simulate
from edge_runtime.simulation.world import make_world
from export.evaluate.traces import AcceptanceTrace


def make_trace(ranks: list[int], looped: list[bool] | None = None) -> AcceptanceTrace:
    passage = Passage(list(range(len(ranks) + 1)), 1, Sampling())
    return AcceptanceTrace(passage, ranks, [0.5] * len(ranks), looped or [False] * len(ranks))


def test_ranks_are_indices_into_the_candidates() -> None:
    drafted = RankedTokens([[4, 5], [6, 4], [1, 2]], [0.9, 0.8, 0.7])
    trace = AcceptanceTrace.from_tokens(Passage([9, 4, 4, 4], 1, Sampling()), [4, 4, 4], drafted)
    assert trace.ranks == [0, 1, UNRANKED]
    assert trace.count_accepted() == (1, 3)
    assert trace.count_accepted(looped=True) == (0, 0)


def test_rounds_of_an_example() -> None:
    # Two accepted, one whose first sibling is the target's token, five accepted, and one without any match.
    trace = make_trace([0, 0, 1, 0, 0, 0, 0, 0, UNRANKED, 0])
    # K=2: (0 0)+1, (0 0)+0, (0 0)+NONE; the round after that could be cut short.
    assert trace.count_round_tokens(2, 0) == (9, 3)
    # K=4: 0 0 [1], then 4 accepted and a bonus token; the round after that could be cut short.
    assert trace.count_round_tokens(4, 0) == (8, 2)
    # With a sibling the first round also returns the token after it.
    assert trace.count_round_tokens(4, 1) == (9, 2)
    assert trace.count_surviving(3) == [(7, 8), (5, 8), (3, 8)]


def test_rounds_that_could_reach_into_a_loop_are_not_counted() -> None:
    trace = make_trace(
        [UNRANKED, UNRANKED, 0, 0, 0, UNRANKED, UNRANKED, UNRANKED],
        [False, False, True, True, True, False, False, False],
    )
    # Of the rounds that start at 0, 1, 2, 4, 6 and 7: the first one and the one at 6.
    assert trace.count_round_tokens(1, 0) == (2, 2)
    assert trace.count_surviving(2) == [(0, 3), (0, 3)]
    assert trace.count_accepted() == (0, 5)
    assert trace.count_accepted(looped=True) == (3, 3)
    text = trace.to_recorded_text("v")
    assert text is not None and text.ranks == [UNRANKED, UNRANKED]
    assert make_trace([0, 0], [True, True]).to_recorded_text("v") is None


@pytest.mark.parametrize("siblings", [0, 3])
@pytest.mark.parametrize("draft", [1, 2, 4, 8])
def test_the_simulator_executes_the_same_rounds(draft: int, siblings: int) -> None:
    rng = random.Random(draft)
    ranks = [rng.choice([0, 0, 0, 0, 1, 2, 5, UNRANKED]) for _ in range(400)]
    trace = make_trace(ranks)
    text = trace.to_recorded_text("v")
    assert text is not None
    plan = Plan(draft, siblings=siblings, sibling_confidence=1.0)
    played = simulate([text], FixedPlanner(plan), make_world("lan", "server", "7b"), log=True)
    counted = [outcome.accepted + outcome.own_tokens for outcome in played.log if outcome.conditions.left > draft]
    assert trace.count_round_tokens(draft, siblings) == (sum(counted), len(counted))
