"""Oracles: no plan beats the lower bound, and plan footprints predict simulated costs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.simulation.oracle import FIXED_PLANS, PlanFootprints, make_static_plans, measure_calibration
from edge_runtime.simulation.recorded_texts import RecordedText, read_texts
from edge_runtime.simulation.simulator import simulate
from edge_runtime.simulation.world import World
from tests.benchmarks.lower_bound import compute_lower_bound
from tests.conftest import TRACES
from tests.edge_runtime.simulation.worlds import CyclingPlanner, make_text, make_world, plans, texts

objectives = st.sampled_from(
    (Objective(), Objective(verifier=2.0), Objective(joule=0.3), Objective(latency=0.0, joule=1.0, byte=0.01))
)
worlds = st.builds(
    make_world,
    step=st.sampled_from((0.0005, 0.01, 0.1)),
    half_trip=st.sampled_from((0.001, 0.05, 0.2)),
    speculates=st.booleans(),
    overhead=st.sampled_from((0.0, 0.003)),
)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.lists(texts, min_size=1, max_size=2), st.lists(plans, min_size=1, max_size=4), worlds, objectives)
def test_no_plans_beat_the_lower_bound(
    texts: list[RecordedText], plans: list[Plan], world: World, objective: Objective
) -> None:
    cost = simulate(texts, CyclingPlanner(plans), world).cost(objective)
    assert compute_lower_bound(texts, world, objective) <= cost * (1 + 1e-9)


def test_a_small_lower_bound() -> None:
    world = make_world()
    # Streaming: a round trip and a forward for each token; drafting everything but the last token is cheaper here.
    assert compute_lower_bound([make_text("...")], world, Objective()) * 3 == pytest.approx(0.1 + 0.02 + 2 * 0.011)
    assert compute_lower_bound([make_text("xxx")], world, Objective()) * 3 == pytest.approx(0.1 + 3 * 0.02)


@pytest.fixture(scope="module")
def recorded() -> list[RecordedText]:
    return read_texts(TRACES, target="target-v2", temperature=0.7)[:3]


@pytest.fixture(scope="module")
def footprints(recorded: list[RecordedText]) -> PlanFootprints:
    # Every ninth plan of the coarse space, to keep the test short.
    return PlanFootprints(recorded, make_static_plans(measure_calibration(recorded))[::9] + list(FIXED_PLANS))


@pytest.mark.parametrize("speculates", [False, True])
def test_footprints_predict_simulated_costs(
    recorded: list[RecordedText], footprints: PlanFootprints, speculates: bool
) -> None:
    objective = Objective(verifier=0.5, joule=0.02, byte=1e-5)
    costs = footprints.estimate_costs(make_world(speculates=speculates, overhead=0.003), objective)
    for plan, expected in zip(footprints.plans, costs, strict=True):
        result = simulate(recorded, FixedPlanner(plan), make_world(speculates=speculates, overhead=0.003))
        # The cost ratio of short and full forwards of a speculating verifier differs between verifiers.
        assert result.cost(objective) == pytest.approx(
            expected, rel=0.03 if speculates and plan.continuation > 1 else 0.01
        )


@pytest.mark.slow
def test_hindsight_costs_no_more_than_any_static_plan(recorded: list[RecordedText], footprints: PlanFootprints) -> None:
    objective = Objective()
    for step in (0.001, 0.03):
        best, result = footprints.find_best(lambda step=step: make_world(step=step), objective, ahead=True)  # type: ignore[misc]
        assert result.cost(objective) == simulate(recorded, FixedPlanner(best), make_world(step=step)).cost(objective)
        for plan in footprints.plans:
            other = simulate(recorded, FixedPlanner(plan), make_world(step=step)).cost(objective)
            assert result.cost(objective) <= other * 1.001
        assert compute_lower_bound(recorded, make_world(step=step), objective) <= result.cost(objective)


def test_calibration_is_the_share_of_correct_guesses() -> None:
    right, wrong = make_text("." * 40, confidence=0.95), make_text("x" * 40, confidence=0.05)
    found = measure_calibration([right, wrong])
    assert found[0] < 0.02 and found[-1] > 0.98 and found[5] == pytest.approx(0.55)
