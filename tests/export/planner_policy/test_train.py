"""Training of the learned policy: Gymnasium contract, rewards, costs, scenarios, and the exported model."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from edge_runtime.planning.analytic import AnalyticPlanner
from edge_runtime.planning.learned import CORRECTIONS, CorrectionPolicy, PolicyMetadata
from edge_runtime.planning.objective import PRESETS, Objective
from edge_runtime.protocol.errors import InputError
from edge_runtime.simulation.recorded_texts import RecordedText, read_texts
from edge_runtime.simulation.simulator import simulate
from export.cli.main import main
from export.planner_policy.environment import (
    EXAMPLE_FAMILY_PATH,
    HELD_OUT_TEXTS,
    JOINED_TEXT_COUNTS,
    MAX_TEXTS,
    AnalyticBaseline,
    RoundEnvironment,
    ScenarioSampler,
    run_episode,
    split_texts,
)
from export.planner_policy.train import PolicyTrainingConfig, make_policy

SMALL = PolicyTrainingConfig(steps=512, evaluation_scenarios=4, pretraining_scenarios=30)


@pytest.fixture(scope="module")
def texts() -> list[RecordedText]:
    return read_texts(EXAMPLE_FAMILY_PATH / "acceptance.npz")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("policy")
    make_policy(SMALL, output)
    return output


@pytest.mark.slow
def test_environment_satisfies_gymnasiums_checker() -> None:
    environment = RoundEnvironment()
    check_env(environment, skip_render_check=True)
    environment.close()


@pytest.mark.slow
def test_rewards_add_up_to_the_saved_cost_in_tokens(texts: list[RecordedText]) -> None:
    environment = RoundEnvironment(texts=texts)
    for seed in range(6):
        environment.reset(seed=seed)
        actions = np.random.default_rng(seed)
        rewards, over, info = [], False, {}
        while not over:
            _, reward, over, _, info = environment.step(actions.integers(len(CORRECTIONS)))
            rewards.append(reward)
        tokens = sum(rewards) / (1.0 - info["ratio"])
        assert tokens == pytest.approx(round(tokens), abs=1e-3)
        # The target may end a text before its 128 tokens; several are joined to a longer one.
        assert 0 < round(tokens) <= 128 * MAX_TEXTS * max(JOINED_TEXT_COUNTS)


@pytest.mark.slow
def test_no_correction_saves_nothing() -> None:
    environment = RoundEnvironment()
    for seed in range(4):
        environment.reset(seed=seed)
        over, rewards, info = False, [], {}
        while not over:
            _, reward, over, _, info = environment.step(np.int64(0))
            rewards.append(reward)
        assert info["ratio"] == 1.0
        assert sum(rewards) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_an_episode_can_be_abandoned() -> None:
    before = threading.active_count()
    environment = RoundEnvironment()
    for seed in range(3):
        environment.reset(seed=seed)
        environment.step(np.int64(0))
    assert threading.active_count() <= before + 1
    environment.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("objective", PRESETS.values(), ids=PRESETS)
def test_episode_cost_equals_that_of_the_simulator(texts: list[RecordedText], objective: Objective) -> None:
    scenarios = ScenarioSampler(texts)
    for seed in range(5):
        scenario = scenarios.draw(seed)
        spent = run_episode(scenario, objective, lambda observation, done, spent: 0)
        assert AnalyticBaseline(scenario, objective).spent == spent
        planner = AnalyticPlanner(objective, scenario.profile_device, acceptance=scenario.acceptance)
        result = simulate(scenario.texts, planner, scenario.world())
        # Verifiers report their time in tenths of a millisecond, and the energy of drafting ahead is estimated from
        # the plan, because its outcome is not reported.
        assert spent == pytest.approx(result.cost(objective) * result.tokens, rel=0.1 if objective.joule else 1e-3)


def test_scenarios_are_deterministic_and_cover_the_presets(texts: list[RecordedText]) -> None:
    scenarios = ScenarioSampler(texts)
    first, again = scenarios.draw(5), scenarios.draw(5)
    assert first == again
    names = [scenarios.draw(seed).name for seed in range(300)]
    for part in ("lan", "weak-4g", "bursty", "then", "raspberry-pi-4", "server", "7b-64", "loaded+spec"):
        assert any(part in name for name in names), part


def test_held_out_texts_are_not_trained_on(texts: list[RecordedText]) -> None:
    training, held_out = split_texts(texts)
    assert len(training) + len(held_out) == len(texts)
    assert {text.seed for text in training}.isdisjoint({text.seed for text in held_out})
    expected = read_texts(EXAMPLE_FAMILY_PATH / "acceptance.npz", target="target-v2", temperature=0.7)[:HELD_OUT_TEXTS]
    assert [text for text in held_out if (text.target, text.temperature) == ("target-v2", 0.7)] == expected


@pytest.mark.slow
def test_the_board_accepts_a_trained_policy(trained: Path) -> None:
    policy = CorrectionPolicy(trained / "learned.onnx")
    metadata = policy.metadata
    assert metadata.objective == PRESETS["latency"]
    assert metadata.trained["difference"] < 1e-3
    assert metadata.trained["seed"] == 0
    assert metadata.trained["versions"].keys() >= {"stable-baselines3", "torch"}
    assert all(low <= high for low, high in zip(metadata.low, metadata.high, strict=True))
    assert (trained / "learned.png").read_bytes().startswith(b"\x89PNG")
    ratios = metadata.trained["evaluation"]
    assert ratios["settings"] == SMALL.evaluation_scenarios
    # After so few steps it is still close to the analytic planner.
    assert 0.9 < ratios["mean"] < 1.1
    middle = (np.array(metadata.low, np.float32) + np.array(metadata.high, np.float32)) / 2
    assert policy.choose(middle) == 0


@pytest.mark.slow
def test_the_same_seed_gives_the_same_policy(trained: Path, tmp_path: Path) -> None:
    again = make_policy(SMALL, tmp_path)
    before = msgspec.json.decode((trained / "learned.json").read_bytes(), type=PolicyMetadata)
    assert again.low == before.low
    assert again.sha256 == before.sha256


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "policy"
    line = ["policy", "--steps", "64", "--drills", "6", "--settings", "2", "--objective", "cloud"]
    assert main([*line, "--output", str(output)]) == 0
    assert "settings 2" in capsys.readouterr().out
    assert CorrectionPolicy(output / "learned.onnx").metadata.objective == PRESETS["cloud"]
    assert main(["policy", "--steps", "0", "--output", str(output)]) == InputError.exit_code
