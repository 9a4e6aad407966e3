"""The learned planner: the shipped policy, its fallbacks, and valid plans."""

from __future__ import annotations

import functools
import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.planning.acceptance_table import MAX_DRAFT_LENGTH
from edge_runtime.planning.analytic import AnalyticPlanner
from edge_runtime.planning.device_model import DeviceModel
from edge_runtime.planning.energy_budget import EnergyBudget
from edge_runtime.planning.factory import POLICY_NAMES, make_planner
from edge_runtime.planning.learned import (
    CORRECTIONS,
    MODEL_PATH,
    OBSERVATIONS,
    CorrectedPlanner,
    Correction,
    CorrectionPolicy,
    Floats,
    LearnedPlanner,
)
from edge_runtime.planning.objective import PRESETS, Objective
from edge_runtime.planning.plan import Conditions, Outcome
from edge_runtime.protocol.errors import InputError
from edge_runtime.simulation.recorded_texts import RecordedText, read_texts
from edge_runtime.simulation.simulator import simulate
from edge_runtime.simulation.world import make_world
from tests.conftest import TRACES
from tests.edge_runtime.planning import test_analytic

LATENCY = PRESETS["latency"]


@pytest.fixture(scope="module")
def texts() -> list[RecordedText]:
    return read_texts(TRACES, target="target-v1", temperature=0.7)[:2]


class ScriptedPlanner(CorrectedPlanner):
    """Applies one correction, or random ones if it is None, and records the observations."""

    def __init__(self, correction: Correction | None) -> None:
        super().__init__(LATENCY, DeviceModel())
        self._correction = correction
        self._random = random.Random(0)
        self.observations: list[Floats] = []

    def choose_correction(self, conditions: Conditions, observation: Floats) -> tuple[Correction, str]:
        self.observations.append(observation)
        return self._correction or self._random.choice(CORRECTIONS), "scripted"


# A correction may double what is drafted ahead.
check_plan = functools.partial(test_analytic.check_plan, max_ahead=2 * MAX_DRAFT_LENGTH)


def test_shipped_policy_is_small_and_matches_its_metadata() -> None:
    policy = CorrectionPolicy()
    assert policy.metadata.sha256 == hashlib.sha256(MODEL_PATH.read_bytes()).hexdigest()
    assert policy.metadata.objective == LATENCY
    assert MODEL_PATH.stat().st_size + MODEL_PATH.with_suffix(".json").stat().st_size < 100_000
    middle = (np.array(policy.metadata.low, np.float32) + np.array(policy.metadata.high, np.float32)) / 2
    scores = policy.scores(middle)
    assert scores.shape == (len(CORRECTIONS),)
    assert np.isfinite(scores).all()


def test_policy_decides_within_its_range(texts: list[RecordedText]) -> None:
    planner = make_planner("learned", LATENCY, make_world("4g", "raspberry-pi-5", "loaded").device)
    log = simulate(texts, planner, make_world("4g", "raspberry-pi-5", "loaded"), log=True).log
    decided = [outcome.plan.reason.endswith("(learned)") for outcome in log if outcome.plan.draft]
    assert len(decided) > 10
    assert sum(decided) > 0.8 * len(decided)
    for outcome in log:
        check_plan(outcome.plan, outcome.conditions)


def test_without_corrections_plans_equal_the_analytic_ones(texts: list[RecordedText]) -> None:
    for link, board, verifier in (("4g", "raspberry-pi-5", "32b"), ("lan", "server", "loaded")):
        corrected = simulate(texts, ScriptedPlanner(CORRECTIONS[0]), make_world(link, board, verifier), log=True)
        analytic = simulate(texts, AnalyticPlanner(LATENCY, DeviceModel()), make_world(link, board, verifier), log=True)
        assert [msgspec.structs.replace(outcome.plan, reason="") for outcome in corrected.log] == [
            msgspec.structs.replace(outcome.plan, reason="") for outcome in analytic.log
        ]


@pytest.mark.parametrize("correction", [None, *CORRECTIONS], ids=lambda correction: getattr(correction, "name", "any"))
def test_every_correction_gives_valid_plans(texts: list[RecordedText], correction: Correction | None) -> None:
    planner = ScriptedPlanner(correction)
    result = simulate(texts, planner, make_world("lan", "laptop", "loaded"), log=True)
    assert result.tokens == sum(map(len, texts))
    for outcome in result.log:
        check_plan(outcome.plan, outcome.conditions)
    observations = np.array(planner.observations)
    assert observations.shape[1] == len(OBSERVATIONS)
    assert np.isfinite(observations).all() and np.abs(observations).max() <= 5.0


def make_with_another_objective() -> LearnedPlanner:
    return LearnedPlanner(Objective(verifier=4.0), DeviceModel())


def make_with_budget() -> LearnedPlanner:
    return LearnedPlanner(LATENCY, DeviceModel(), budget=EnergyBudget(5.0))


def make_without_model() -> LearnedPlanner:
    return LearnedPlanner(LATENCY, DeviceModel(), model=Path("nowhere.onnx"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_with_another_objective, "another objective"),
        (make_with_budget, "budgeted"),
        (make_without_model, "no learned policy"),
    ],
)
def test_falls_back_to_the_analytic_planner(
    make: Callable[[], LearnedPlanner], reason: str, texts: list[RecordedText]
) -> None:
    world = make_world("4g", "raspberry-pi-5", "loaded")
    log = simulate(texts[:1], make(), world, log=True).log
    drafted = [outcome.plan for outcome in log if outcome.plan.draft]
    assert drafted
    for plan in drafted:
        assert reason in plan.reason.rpartition("(analytic: ")[2]


def test_features_outside_the_trained_range_are_detected() -> None:
    policy = CorrectionPolicy()
    low, high = (np.array(bound, np.float32) for bound in (policy.metadata.low, policy.metadata.high))
    inside = (low + high) / 2
    assert policy.out_of_range(inside) == ""
    for index, name in enumerate(OBSERVATIONS):
        for value in (low[index] - (high[index] - low[index]) - 1.0, high[index] * 2 + 1.0, np.nan):
            outside = inside.copy()
            outside[index] = value
            assert policy.out_of_range(outside) == name


def test_fallback_plans_equal_the_analytic_ones(texts: list[RecordedText]) -> None:
    out_of_range = [msgspec.structs.replace(text, temperature=5.0) for text in texts]
    device = make_world("wifi", "server", "loaded").device
    learned = simulate(out_of_range, LearnedPlanner(LATENCY, device), make_world("wifi", "server", "loaded"), log=True)
    analytic = simulate(
        out_of_range, AnalyticPlanner(LATENCY, device), make_world("wifi", "server", "loaded"), log=True
    )
    drafted = [outcome.plan for outcome in learned.log if outcome.plan.draft]
    assert drafted
    assert all("'temperature' is outside the trained range" in plan.reason for plan in drafted)
    assert learned.log == [
        msgspec.structs.replace(before, plan=after.plan)
        for before, after in zip(analytic.log, learned.log, strict=True)
    ]


def test_altered_model_is_rejected(tmp_path: Path) -> None:
    for suffix in (".onnx", ".json"):
        shutil.copy(MODEL_PATH.with_suffix(suffix), tmp_path)
    altered = tmp_path / MODEL_PATH.name
    CorrectionPolicy(altered)
    altered.write_bytes(altered.read_bytes() + b"\0")
    with pytest.raises(InputError, match="hash differs"):
        CorrectionPolicy(altered)
    altered.with_suffix(".json").write_bytes(b"{}")
    with pytest.raises(InputError, match="training"):
        CorrectionPolicy(altered)


def test_policy_is_created_by_name() -> None:
    assert "learned" in POLICY_NAMES
    assert isinstance(make_planner("learned", LATENCY, DeviceModel()), LearnedPlanner)


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_plans_are_always_valid(data: st.DataObject) -> None:
    # Measured times are 0 or at least 0.1 ms.
    seconds = st.just(0.0) | st.floats(1e-4, 10.0)
    device = DeviceModel(step_seconds=data.draw(st.floats(1e-5, 2.0)), prefill_seconds=data.draw(st.floats(0.0, 0.1)))
    planner = LearnedPlanner(LATENCY, device)
    now = 0.0
    for _ in range(data.draw(st.integers(1, 12))):
        left = data.draw(st.integers(1, 300))
        conditions = Conditions(
            left,
            position=data.draw(st.integers(1, 4000)),
            unread=data.draw(st.integers(0, 200)),
            ready=data.draw(st.integers(0, min(20, left - 1))),
            now=now,
            temperature=data.draw(st.sampled_from([0.0, 0.7, 1.0])),
        )
        plan = planner.plan(conditions)
        check_plan(plan, conditions)
        drafted = min(plan.draft, left - 1)
        accepted = data.draw(st.integers(0, drafted))
        outcome = Outcome(
            plan=plan,
            conditions=conditions,
            accepted=accepted,
            own_tokens=min(plan.continuation, left - accepted),
            confidences=data.draw(st.lists(st.floats(0.0, 1.0), min_size=drafted, max_size=drafted)),
            offered=[plan.siblings] * drafted,
            draft_seconds=data.draw(seconds),
            first_seconds=data.draw(seconds),
            exchange_seconds=data.draw(seconds),
            forward_seconds=data.draw(seconds),
            sent=100,
            received=100,
        )
        planner.observe(outcome)
        now += outcome.draft_seconds + outcome.exchange_seconds
