"""The regret budget of drafting: what is charged and credited, and the cost factor that follows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.plan import Outcome
from edge_runtime.planning.regret_budget import (
    CREDIT_PER_TOKEN,
    INITIAL_TOKENS,
    MAX_TOKENS,
    MIN_COST_FACTOR,
    RegretBudget,
)
from tests.edge_runtime.planning.rounds import make_outcome


def test_streaming_a_text_is_free() -> None:
    budget = RegretBudget()
    budget.observe(round_of(100, drafted=False), equivalent=100, cost=5.0, first=0.15, further=0.05)
    assert budget.tokens == pytest.approx(INITIAL_TOKENS + 100 * CREDIT_PER_TOKEN)


def test_drafting_is_charged_against_streaming_the_same_tokens() -> None:
    """20 tokens in 2 s, while streaming takes 0.15 s for the first and 0.05 s for each further token."""
    budget = RegretBudget()
    for _ in range(2):
        budget.observe(round_of(10), equivalent=10, cost=1.0, first=0.15, further=0.05)
    lost = (2.0 - 0.15 - 19 * 0.05) / 0.05
    assert budget.tokens == pytest.approx(INITIAL_TOKENS + 20 * CREDIT_PER_TOKEN - lost)


def test_streaming_the_rest_of_a_text_is_charged_an_exchange() -> None:
    same_text, new_text = RegretBudget(), RegretBudget()
    for budget in (same_text, new_text):
        budget.observe(round_of(4), equivalent=4, cost=0.3, first=0.15, further=0.05)
    same_text.observe(round_of(90, drafted=False), equivalent=90, cost=5.0, first=0.15, further=0.05)
    new_text.observe(round_of(90, drafted=False, left=101), equivalent=90, cost=5.0, first=0.15, further=0.05)
    assert same_text.tokens == pytest.approx(new_text.tokens - (0.15 - 0.05) / 0.05)


def test_losses_raise_the_cost_factor_until_they_are_recovered() -> None:
    budget = RegretBudget()
    factors = []
    for cost in (1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1):
        budget.observe(round_of(5), equivalent=5, cost=cost, first=0.1, further=0.1)
        factors.append(budget.cost_factor)
    assert factors[:3] == sorted(factors[:3]) and factors[2] > factors[-1]


@given(
    st.lists(
        st.tuples(st.integers(1, 24), st.integers(1, 200), st.booleans(), st.floats(0, 1e3), st.floats(1e-6, 10)),
        max_size=50,
    )
)
def test_budget_stays_within_its_bounds(rounds: list[tuple[int, int, bool, float, float]]) -> None:
    budget = RegretBudget()
    for tokens, left, drafted, cost, further in rounds:
        outcome = round_of(tokens, drafted=drafted, left=left)
        budget.observe(outcome, equivalent=tokens, cost=cost, first=2 * further, further=further)
        assert -MAX_TOKENS <= budget.tokens <= MAX_TOKENS
        assert budget.cost_factor >= MIN_COST_FACTOR


def round_of(tokens: int, *, drafted: bool = True, left: int = 100) -> Outcome:
    """Return a round that yields `tokens` tokens, drafted or streamed."""
    if not drafted:
        return make_outcome([], 0, own=tokens, planned_own=tokens, left=left)
    return make_outcome([0.9] * max(1, tokens - 1), tokens - 1, left=left)
