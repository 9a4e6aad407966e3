"""The regret budget of drafting: what is reserved, charged and credited."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.planning.plan import Conditions, Outcome
from edge_runtime.planning.regret_budget import (
    CREDIT_PER_TOKEN,
    INITIAL_TOKENS,
    MAX_TEXTS,
    MAX_TOKENS,
    RESERVATION_SECONDS,
    RegretBudget,
    RoundReservation,
)
from edge_runtime.protocol.messages import MAX_CONTINUATION_TOKENS
from tests.edge_runtime.planning.rounds import make_outcome

# Streaming takes 0.15 s for the first token and 0.05 s for each further one.
FURTHER, FIRST, EXCHANGE = 0.05, 0.15, 2.0
END = 150


def run_round(
    budget: RegretBudget, position: int, tokens: int, cost: float = 0.0, *, drafted: bool = True, end: int = END,
    repeated: bool = False, worst: float = 9.0,
) -> None:  # fmt: skip
    """Reserve and observe a round of `tokens` tokens that begins at `position`."""
    conditions = Conditions(end - position, position, 1)
    budget.reserve(conditions, reservation(position, cost=worst))
    outcome = outcome_of(conditions, tokens, drafted=drafted, repeated=repeated)
    budget.observe(outcome, equivalent=tokens, cost=cost, first=FIRST)


def reservation(position: int, *, loss: float = 0.0, cost: float = 9.0, time: float = 0.0) -> RoundReservation:
    return RoundReservation(position=position, time=time, exchange=EXCHANGE, further=FURTHER, loss=loss, cost=cost)


def outcome_of(conditions: Conditions, tokens: int, *, drafted: bool, repeated: bool = False) -> Outcome:
    if drafted:
        outcome = make_outcome([0.9] * max(1, tokens - 1), tokens - 1)
    else:
        outcome = make_outcome([], 0, own=tokens, planned_own=tokens)
    return msgspec.structs.replace(outcome, conditions=conditions, repeated=repeated)


def test_streaming_a_text_is_free() -> None:
    budget = RegretBudget()
    run_round(budget, 50, 100, 5.0, drafted=False)
    assert budget.lost == 0.0
    assert budget.tokens == pytest.approx(INITIAL_TOKENS + 100 * CREDIT_PER_TOKEN)


def test_drafting_is_charged_against_streaming_the_same_tokens() -> None:
    """20 tokens in 2 s, while streaming takes 0.15 s for the first and 0.05 s for each further token."""
    budget = RegretBudget()
    for position in (50, 60):
        run_round(budget, position, 10, 1.0)
    assert budget.lost == pytest.approx((2.0 - 0.15 - 19 * 0.05) / 0.05)
    assert budget.tokens == pytest.approx(INITIAL_TOKENS + 20 * CREDIT_PER_TOKEN - budget.lost)


def test_savings_earn_the_budget_back() -> None:
    budget = RegretBudget()
    run_round(budget, 50, 1, 0.5)
    low = budget.tokens
    run_round(budget, 51, 20, 0.1)
    assert low < INITIAL_TOKENS < budget.tokens


def test_a_further_stream_in_the_same_text_is_charged_an_exchange() -> None:
    budget = RegretBudget()
    run_round(budget, 50, 4, 0.2)
    lost = budget.lost
    run_round(budget, 54, 90, 5.0, drafted=False)
    assert budget.lost - lost == pytest.approx(EXCHANGE)


def test_a_stream_after_one_of_the_maximum_length_is_free() -> None:
    budget = RegretBudget()
    for index in range(3):
        run_round(budget, 50 + index * MAX_CONTINUATION_TOKENS, MAX_CONTINUATION_TOKENS, drafted=False, end=5000)
    assert budget.lost == 0.0


def test_interleaved_texts_get_one_exchange_each() -> None:
    alone, interleaved = RegretBudget(), RegretBudget()
    for end in (150, 151):
        for position in (50, 60, 70):
            run_round(alone, position, 10, 1.0, end=end)
    for position in (50, 60, 70):
        for end in (150, 151):
            run_round(interleaved, position, 10, 1.0, end=end)
    assert interleaved.lost == pytest.approx(alone.lost)


def test_the_same_prompt_again_is_a_new_text() -> None:
    budget = RegretBudget()
    for _ in range(2):
        assert budget.begins_text(Conditions(100, 50, 1))
        run_round(budget, 50, 4, 0.2)
        assert not budget.begins_text(Conditions(96, 54, 1))
    assert budget.lost == pytest.approx(2 * (0.2 / FURTHER - 4 - EXCHANGE))


def test_an_interrupted_round_is_charged_its_worst_case_at_most() -> None:
    budget = RegretBudget()
    run_round(budget, 50, 4, 60.0, repeated=True, worst=0.5)
    assert budget.lost == pytest.approx(0.5 / FURTHER - 4 - EXCHANGE)


def test_planned_rounds_hold_their_share_until_they_are_observed() -> None:
    budget = RegretBudget()
    first, early, other = Conditions(100, 50, 1), Conditions(94, 56, 1), Conditions(80, 40, 1)
    budget.reserve(first, reservation(50, loss=3.0))
    assert budget.available(early) == INITIAL_TOKENS - 3.0
    assert not budget.begins_text(early) and budget.begins_text(other)
    budget.reserve(early, reservation(56, loss=4.0))
    assert budget.available(other) == INITIAL_TOKENS - 7.0
    # The first round ends otherwise than the early one assumed, which the next plan replaces.
    budget.observe(outcome_of(first, 2, drafted=True), equivalent=2, cost=0.2, first=FIRST)
    following = Conditions(98, 52, 1)
    assert budget.available(following) == budget.tokens
    assert not budget.begins_text(following)
    budget.reserve(following, reservation(52, loss=1.0))
    assert budget.available(other) == budget.tokens - 1.0


def test_a_round_that_never_ends_releases_its_share() -> None:
    budget = RegretBudget()
    budget.reserve(Conditions(100, 50, 1), reservation(50, loss=3.0))
    assert budget.available(Conditions(100, 20, 1, now=RESERVATION_SECONDS - 1.0)) == INITIAL_TOKENS - 3.0
    assert budget.available(Conditions(100, 20, 1, now=RESERVATION_SECONDS)) == INITIAL_TOKENS


def test_only_the_latest_texts_are_remembered() -> None:
    budget = RegretBudget()
    for index in range(MAX_TEXTS + 1):
        run_round(budget, 50, 4, 0.2, end=150 + index)
    assert budget.begins_text(Conditions(96, 54, 1))
    assert not budget.begins_text(Conditions(97, 54, 1))


@given(
    st.lists(
        st.tuples(st.integers(1, 24), st.integers(51, 200), st.booleans(), st.booleans(), st.floats(0, 1e3)),
        max_size=50,
    )
)
def test_budget_stays_within_its_bounds(rounds: list[tuple[int, int, bool, bool, float]]) -> None:
    budget = RegretBudget()
    for tokens, end, drafted, repeated, cost in rounds:
        run_round(budget, 50, tokens, cost, drafted=drafted, end=end, repeated=repeated)
        assert -MAX_TOKENS <= budget.tokens <= MAX_TOKENS
