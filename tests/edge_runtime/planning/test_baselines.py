"""Published baseline policies, and the creation of planners by name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.planning.baselines import BanditPlanner, HuggingFacePlanner, ThroughputPlanner
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.factory import DEFAULT_POLICY, POLICY_NAMES, make_planner
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import Conditions, Outcome
from edge_runtime.protocol.errors import InputError
from tests.edge_runtime.planning.rounds import conditions, make_outcome, outcomes

CONDITIONS = Conditions(100, 50, 1)


def test_default_is_a_policy_and_unknown_names_are_rejected() -> None:
    assert DEFAULT_POLICY in POLICY_NAMES
    with pytest.raises(InputError, match="analytic"):
        make_planner("fastest", Objective(), DeviceModel())


@pytest.mark.slow
@settings(max_examples=40)
@given(st.sampled_from(POLICY_NAMES), st.lists(st.tuples(conditions(), outcomes()), max_size=25))
def test_every_policy_returns_valid_plans(name: str, rounds: list[tuple[Conditions, Outcome]]) -> None:
    planner = make_planner(name, Objective(), DeviceModel())
    for conditions_, outcome in rounds:
        plan = planner.plan(conditions_)
        assert plan.draft >= 0 and plan.continuation >= 1 and plan.in_flight in (1, 2)
        planner.observe(outcome)


def test_hugging_face_schedule() -> None:
    planner = HuggingFacePlanner()
    assert planner.plan(CONDITIONS).draft == 20 and planner.plan(CONDITIONS).min_confidence == 0.4
    planner.observe(make_outcome([0.9] * 3, 2))
    assert planner.plan(CONDITIONS).draft == 19
    planner.observe(make_outcome([0.9] * 3, 3))
    assert planner.plan(CONDITIONS).draft == 21
    for _ in range(40):
        planner.observe(make_outcome([0.3], 0))
    assert planner.plan(CONDITIONS).draft == 1


def run_rounds(planner: ThroughputPlanner | BanditPlanner, rounds: int, best: int) -> list[int]:
    """Run rounds in which exactly the first `best` tokens are accepted, so that this draft length is the fastest.

    Returns the planned draft lengths.
    """
    lengths = []
    for _ in range(rounds):
        plan = planner.plan(CONDITIONS)
        lengths.append(plan.draft)
        planner.observe(make_outcome([0.9] * plan.draft, min(plan.draft, best), step=0.02, link=0.03))
    return lengths


def test_throughput_controller_climbs_to_the_best_length() -> None:
    lengths = run_rounds(ThroughputPlanner(), 400, 8)
    assert lengths[0] == 4
    assert sum(lengths[-100:]) / 100 == pytest.approx(8, abs=1.2)


def test_throughput_controller_cools_down_after_empty_rounds() -> None:
    planner = ThroughputPlanner()
    for _ in range(3):
        planner.observe(make_outcome([0.5] * 4, 0))
    assert planner.plan(CONDITIONS).draft == 1
    for _ in range(ThroughputPlanner.COOLDOWN_ROUNDS):
        planner.observe(make_outcome([0.5], 0))
    assert planner.plan(CONDITIONS).draft == 4


def test_bandit_tries_every_length_and_settles_on_the_best() -> None:
    lengths = run_rounds(BanditPlanner(Objective()), 600, 8)
    assert set(lengths) == set(BanditPlanner.LENGTHS)
    assert lengths[-200:].count(8) > 120
