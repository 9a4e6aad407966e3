"""The account of drafting: what it may lose, what fills it, and what it asks of drafting when it is empty."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.plan import Outcome
from edge_runtime.planning.regret_budget import ADDED, BEGIN, LEAST, MOST, Stake
from tests.edge_runtime.planning.rounds import make_outcome


def test_a_text_left_to_the_cloud_costs_nothing() -> None:
    stake = Stake()
    stake.observe(round_of(100, drafted=0), 100, 5.0, 0.15, 0.05)
    assert stake.tokens == pytest.approx(BEGIN + 100 * ADDED)


def test_drafting_is_set_against_streaming_the_same_tokens() -> None:
    """20 tokens in 2 s, where the cloud alone would have taken 0.15 s for the first and 0.05 s for each other."""
    stake = Stake()
    stake.observe(round_of(10), 10, 1.0, 0.15, 0.05)
    stake.observe(round_of(10), 10, 1.0, 0.15, 0.05)
    assert stake.tokens == pytest.approx(BEGIN + 20 * ADDED - (2.0 - 0.15 - 19 * 0.05) / 0.05)


def test_leaving_the_rest_to_the_cloud_costs_another_exchange() -> None:
    one, other = Stake(), Stake()
    for stake in (one, other):
        stake.observe(round_of(4), 4, 0.3, 0.15, 0.05)
    one.observe(round_of(90, drafted=0), 90, 5.0, 0.15, 0.05)
    other.observe(round_of(90, drafted=0, left=101), 90, 5.0, 0.15, 0.05)
    assert one.tokens == pytest.approx(other.tokens - (0.15 - 0.05) / 0.05)


def test_what_was_lost_makes_drafting_seem_dearer_until_it_is_made_up_for() -> None:
    stake = Stake()
    doubts = []
    for cost in (1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1):
        stake.observe(round_of(5), 5, cost, 0.1, 0.1)
        doubts.append(stake.doubt)
    assert doubts[:3] == sorted(doubts[:3]) and doubts[2] > doubts[-1]


@given(
    st.lists(
        st.tuples(st.integers(1, 24), st.integers(1, 200), st.booleans(), st.floats(0, 1e3), st.floats(1e-6, 10)),
        max_size=50,
    )
)
def test_it_stays_within_its_bounds(rounds: list[tuple[int, int, bool, float, float]]) -> None:
    stake = Stake()
    for tokens, left, drafted, cost, each in rounds:
        stake.observe(round_of(tokens, drafted=drafted, left=left), tokens, cost, 2 * each, each)
        assert -MOST <= stake.tokens <= MOST
        assert stake.doubt >= LEAST


def round_of(tokens: int, *, drafted: bool | int = True, left: int = 100) -> Outcome:
    """So many tokens, drafted or of the cloud's own."""
    if drafted:
        return (
            make_outcome([0.9] * (tokens - 1), tokens - 1, left=left)
            if tokens > 1
            else make_outcome([0.9], 0, left=left)
        )
    return make_outcome([], 0, own=tokens, asked=tokens, left=left)
