"""The analytic planner: valid plans, the choice between streaming and drafting, budgets, and step changes."""

from __future__ import annotations

import logging
import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.planning.acceptance_table import MAX_DRAFT_LENGTH, MAX_SIBLINGS
from edge_runtime.planning.analytic import AnalyticPlanner
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.energy_budget import EnergyBudget
from edge_runtime.planning.objective import PRESETS, Objective
from edge_runtime.planning.plan import Conditions, FixedPlanner, Outcome, Plan, Surroundings
from edge_runtime.simulation.recorded_texts import RecordedText, read_texts
from edge_runtime.simulation.simulator import Simulator, simulate
from edge_runtime.simulation.world import World, make_world
from tests.conftest import TRACES
from tests.edge_runtime.planning.rounds import conditions, make_outcome, outcomes

ACCEPTANCE = {"T=0": 0.58, "T=0.7": 0.56, "T=1": 0.547}
STREAMING = Plan(0, 1 << 20)


@pytest.fixture(scope="module")
def texts() -> list[RecordedText]:
    return read_texts(TRACES, target="target-v1", temperature=0.7)[:8]


def make_planner(
    world: World, objective: Objective | None = None, budget: EnergyBudget | None = None
) -> AnalyticPlanner:
    return AnalyticPlanner(objective or Objective(), world.device, acceptance=ACCEPTANCE, budget=budget)


def check_plan(plan: Plan, conditions_: Conditions, max_ahead: int = MAX_DRAFT_LENGTH) -> None:
    """Assert that `plan` is valid under the conditions."""
    assert 0 <= plan.draft <= max(MAX_DRAFT_LENGTH, conditions_.ready)
    assert 1 <= plan.continuation <= conditions_.left
    assert plan.in_flight in (1, 2)
    assert 0 <= plan.draft_ahead <= max_ahead
    # Without a draft, `draft_ahead` only lets the draft prefill.
    assert not plan.draft_ahead or plan.continuation == 1 or not plan.draft
    assert not plan.shadow or not plan.draft
    assert 0 <= plan.siblings <= MAX_SIBLINGS
    assert 0.0 <= plan.min_survival <= 1.0 and 0.0 <= plan.sibling_confidence <= 1.0
    assert all(0.0 < probability < 1.0 for probability in plan.calibration)
    assert plan.reason


@pytest.mark.slow
@settings(max_examples=60)
@given(
    st.lists(st.tuples(conditions(), outcomes(), st.booleans()), max_size=30),
    st.sampled_from([*PRESETS.values(), Objective(latency=0.0, byte=1e-4)]),
    st.sampled_from([None, EnergyBudget(watts=0.1), EnergyBudget(watts=5.0), EnergyBudget(until=5e5)]),
)
def test_plans_are_always_valid(rounds: list, objective: Objective, budget: EnergyBudget | None) -> None:
    planner = AnalyticPlanner(objective, DeviceModel(radio_watts=1.0, joules_per_byte=1e-6), budget=budget)
    for conditions_, outcome, planned in rounds:
        plan = planner.plan(conditions_)
        check_plan(plan, conditions_)
        if planned:
            planner.observe(msgspec.structs.replace(outcome, plan=plan, conditions=conditions_))
        else:
            planner.observe(outcome)


def test_planning_is_deterministic(texts: list[RecordedText]) -> None:
    logs = []
    for _ in range(2):
        world = make_world("4g", "laptop", "32b", seed=3)
        logs.append(simulate(texts[:3], make_planner(world), world, log=True).log)
    assert logs[0] == logs[1]


def simulate_cost(link: str, board: str, verifier: str, texts: list[RecordedText], plan: Plan | None = None) -> float:
    world = make_world(link, board, verifier, seed=1)
    planner = make_planner(world) if plan is None else FixedPlanner(plan)
    return simulate(texts, planner, world).seconds_per_token


@pytest.mark.parametrize(
    ("link", "board", "verifier"),
    [
        ("wifi", "raspberry-pi-4", "7b"),
        ("4g", "raspberry-pi-5", "32b+spec"),
        ("weak-4g", "laptop", "7b-64+spec"),
        ("lan", "raspberry-pi-zero-2w", "loaded"),
    ],
)
def test_streams_if_drafting_does_not_pay_off(link: str, board: str, verifier: str, texts: list[RecordedText]) -> None:
    assert simulate_cost(link, board, verifier, texts) <= 1.04 * simulate_cost(link, board, verifier, texts, STREAMING)


@pytest.mark.parametrize(
    ("link", "board", "verifier", "share"),
    [
        ("lan", "laptop", "loaded", 0.85),
        ("wifi", "raspberry-pi-5", "loaded", 0.85),
        # The link is slow beside this verifier.
        ("5g", "laptop", "32b", 0.95),
        ("lan", "server", "32b", 0.85),
    ],
)
def test_beats_streaming_and_every_fixed_length_if_drafting_pays_off(
    link: str, board: str, verifier: str, share: float, texts: list[RecordedText]
) -> None:
    planned = simulate_cost(link, board, verifier, texts)
    assert planned < share * simulate_cost(link, board, verifier, texts, STREAMING)
    fixed = [simulate_cost(link, board, verifier, texts, Plan(count)) for count in (1, 2, 3, 4, 5, 6, 8, 12)]
    assert planned < min(fixed)


@pytest.mark.slow
def test_shadow_drafting_corrects_a_pessimistic_prior() -> None:
    """The bundle reports a very low acceptance: the planner streams until shadow drafting has shown a higher one."""
    # About 170 watched tokens are needed to correct this prior.
    texts = read_texts(TRACES, target="target-v1", temperature=0.7)[:16]
    world = make_world("5g", "laptop", "32b")
    planner = AnalyticPlanner(Objective(), world.device, acceptance={"T=0.7": 0.05})
    simulator = Simulator(world, planner, log=True)
    rounds = [outcome for text in texts for outcome in simulator.run(text).log]
    assert rounds[1].plan.shadow and not rounds[1].plan.draft
    first = next(index for index, outcome in enumerate(rounds) if outcome.plan.draft)
    assert sum(len(outcome.shadow_guesses) for outcome in rounds[:first]) > 64
    assert all(outcome.plan.draft for outcome in rounds[-20:])


def test_no_shadow_drafting_if_drafting_is_hopeless_or_joules_are_expensive(texts: list[RecordedText]) -> None:
    for link, board, verifier, objective in (
        ("lan", "raspberry-pi-zero-2w", "7b", "latency"),
        ("wifi", "raspberry-pi-4", "7b", "energy"),
    ):
        world = make_world(link, board, verifier)
        simulator = Simulator(world, make_planner(world, PRESETS[objective]), log=True)
        rounds = [outcome for text in texts for outcome in simulator.run(text).log]
        shadowed = sum(len(outcome.shadow_guesses) for outcome in rounds)
        assert shadowed < 0.05 * sum(outcome.own_tokens for outcome in rounds if not outcome.drafted)


def test_follows_a_step_change_of_the_link_within_five_rounds() -> None:
    planner = AnalyticPlanner(Objective(), DeviceModel(step_seconds=0.005, overhead_seconds=0.0))
    now = 0.0

    def run_rounds(rounds: int, link: float) -> Plan:
        nonlocal now
        for index in range(rounds):
            # Each round begins a new text.
            conditions_ = Conditions(60, 100 + index, 1, now=now, version="v1")
            plan = planner.plan(conditions_)
            outcome = make_outcome(
                [0.72] * min(plan.draft, 6),
                min(plan.draft, (3, 1, 5, 0)[index % 4]),
                own=plan.continuation,
                planned_own=plan.continuation,
                link=link,
                forward=0.03,
                own_seconds=0.03,
                step=0.005,
                overhead=0.0,
            )
            planner.observe(msgspec.structs.replace(outcome, plan=plan, conditions=conditions_))
            now += outcome.draft_seconds + outcome.exchange_seconds
        return planner.plan(Conditions(60, 100, 1, now=now, version="v1"))

    assert run_rounds(40, 0.005).draft
    assert not run_rounds(5, 0.4).draft
    assert not run_rounds(10, 0.4).draft
    assert run_rounds(5, 0.005).draft


def test_streams_while_the_draft_prefills_a_long_prompt(texts: list[RecordedText]) -> None:
    world = make_world("wifi", "raspberry-pi-5", "loaded", weight_bytes=270_000_000, seed=1)
    log: list[Outcome] = []
    simulator = Simulator(world, make_planner(world), log=True)
    for text in texts:
        log += simulator.run(text).log
    prefill_plans = [outcome.plan for outcome in log if outcome.plan.draft_ahead and not outcome.plan.draft]
    assert len(prefill_plans) >= 4
    assert all(plan.continuation < 40 for plan in prefill_plans)
    assert all(outcome.conditions.unread < 60 for outcome in log if outcome.drafted)


def test_price_of_the_verifier_moves_work_to_the_board(texts: list[RecordedText]) -> None:
    spent = {}
    for name in ("latency", "cloud"):
        world = make_world("wifi", "laptop", "7b", seed=1)
        result = simulate(texts, make_planner(world, PRESETS[name]), world)
        spent[name] = result.verifier_seconds / result.tokens
    assert spent["cloud"] < 0.7 * spent["latency"]


def test_price_of_joules_saves_energy(texts: list[RecordedText]) -> None:
    spent = {}
    for name in ("latency", "energy"):
        world = make_world("wifi", "raspberry-pi-5", "32b", seed=1)
        result = simulate(texts, make_planner(world, PRESETS[name]), world)
        spent[name] = result.joules / result.tokens
    assert spent["energy"] < 0.8 * spent["latency"]


def test_energy_budget_is_met(texts: list[RecordedText]) -> None:
    many = texts * 3
    world = make_world("wifi", "raspberry-pi-5", "32b", seed=1)
    unlimited = simulate(many, make_planner(world), world)
    watts = 0.7 * unlimited.joules / unlimited.latency_seconds
    world = make_world("wifi", "raspberry-pi-5", "32b", seed=1)
    limited = simulate(many, make_planner(world, budget=EnergyBudget(watts=watts)), world)
    assert limited.joules / limited.latency_seconds == pytest.approx(watts, rel=0.03)


@pytest.mark.parametrize("objective", [Objective(), Objective(joule=0.02)])
def test_hot_boards_draft_less(objective: Objective, texts: list[RecordedText]) -> None:
    def drafted(surroundings: Surroundings) -> float:
        world = make_world("wifi", "raspberry-pi-5", "loaded", seed=1)
        planner = make_planner(world, objective)
        simulate(texts, planner, world)
        plan = planner.plan(
            Conditions(60, 100, 1, now=1e3, version="target-v1", temperature=0.7, surroundings=surroundings)
        )
        return plan.draft and 1.0 - plan.min_survival

    assert drafted(Surroundings(celsius=84.0, throttled=True)) < drafted(Surroundings(celsius=50.0))


def test_early_rounds_count_in_the_cost_calibration() -> None:
    """The first round of a chain bears its exchange; without the early rounds, drafting would seem expensive."""
    planners = []
    for early in (True, False):
        planner = AnalyticPlanner(Objective(), DeviceModel(step_seconds=0.002, overhead_seconds=0.0))
        planner.observe(make_outcome([], 0, own=30, planned_own=30, link=0.1, forward=0.05, own_seconds=0.05))
        for index in range(120):
            planner.plan(Conditions(100, 50, 1, version="v1"))
            first = make_outcome([0.7] * 6, 3, link=0.1, forward=0.05, step=0.002, now=float(index))
            planner.observe(first)
            if early:
                planner.observe(
                    msgspec.structs.replace(
                        first, ready=6, draft_seconds=0.0, first_seconds=0.05, exchange_seconds=0.05, early=True
                    )
                )
        planners.append(planner)
    assert planners[0]._costs.link.now.value == pytest.approx(planners[1]._costs.link.now.value)
    assert planners[0]._calibration.factor(1.0) < planners[1]._calibration.factor(1.0) - 0.02


def test_acceptance_is_learned_per_version() -> None:
    planner = AnalyticPlanner(Objective(), DeviceModel())
    for version, accepted in (("v1", 6), ("v2", 0)) * 120:
        outcome = make_outcome([0.7] * 6, accepted, version=version, forward=0.08)
        planner.observe(outcome)
    tables = [planner._acceptance.get(version, 0.0).first_stage_table() for version in ("v1", "v2")]
    assert tables[0].calibration[14] > tables[1].calibration[14] + 0.3


def test_every_decision_is_logged_with_values_and_reason(
    caplog: pytest.LogCaptureFixture, texts: list[RecordedText]
) -> None:
    world = make_world("wifi", "laptop", "loaded", seed=1)
    with caplog.at_level(logging.DEBUG, "edge_runtime.planning"):
        result = simulate(texts[:1], make_planner(world), world, log=True)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) >= result.rounds
    assert all("ms/token drafted" in line and "regret budget" in line for line in lines)
    assert all(outcome.plan.reason for outcome in result.log)
    assert any(re.search(r"drafting up to \d+ tokens with \d siblings?", outcome.plan.reason) for outcome in result.log)


def test_outage_is_no_step_change(texts: list[RecordedText]) -> None:
    """Rounds retried during an outage do not measure the link, and planning continues as before."""
    world = make_world("wifi:3,offline:4,wifi", "laptop", "loaded", seed=1)
    simulator = Simulator(world, make_planner(world), log=True)
    log: list[Outcome] = []
    for text in texts:
        log += simulator.run(text).log
    repeated = [index for index, outcome in enumerate(log) if outcome.repeated and outcome.exchange_seconds > 1]
    assert repeated
    recovered = repeated[-1] + 1
    drafting = [outcome.plan.draft > 0 for outcome in log[recovered : recovered + 10]]
    assert sum(drafting) >= 8
