"""Training the learned planner's policy: the environment keeps Gymnasium's contract, and what is exported computes."""

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
    AnalyticBaseline,
    RoundEnvironment,
    ScenarioSampler,
    run_episode,
    split_texts,
)
from export.planner_policy.train import PolicyTrainingConfig, make_policy

SMALL = PolicyTrainingConfig(steps=512, settings=4, drills=30)


@pytest.fixture(scope="module")
def texts() -> list[RecordedText]:
    return read_texts(EXAMPLE_FAMILY_PATH / "acceptance.npz")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("policy")
    make_policy(SMALL, output)
    return output


def test_the_environment_keeps_gymnasiums_contract() -> None:
    environment = RoundEnvironment()
    check_env(environment, skip_render_check=True)
    environment.close()


def test_an_episodes_rewards_are_the_tokens_that_it_saves(texts: list[RecordedText]) -> None:
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
        assert round(tokens) % 128 == 0


def test_who_corrects_nothing_saves_nothing() -> None:
    environment = RoundEnvironment()
    for seed in range(4):
        environment.reset(seed=seed)
        over, rewards, info = False, [], {}
        while not over:
            _, reward, over, _, info = environment.step(np.int64(0))
            rewards.append(reward)
        assert info["ratio"] == 1.0
        assert sum(rewards) == pytest.approx(0.0, abs=1e-6)


def test_an_episode_can_be_left_in_its_middle() -> None:
    before = threading.active_count()
    environment = RoundEnvironment()
    for seed in range(3):
        environment.reset(seed=seed)
        environment.step(np.int64(0))
    assert threading.active_count() <= before + 1
    environment.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("objective", PRESETS.values(), ids=PRESETS)
def test_what_an_episode_costs_is_what_the_simulator_says(texts: list[RecordedText], objective: Objective) -> None:
    settings = ScenarioSampler(texts)
    for seed in range(5):
        setting = settings.draw(seed)
        spent = run_episode(setting, objective, lambda observation, done, spent: 0)
        assert AnalyticBaseline(setting, objective).spent == spent
        planner = AnalyticPlanner(objective, setting.believed, acceptance=setting.acceptance)
        result = simulate(setting.texts, planner, setting.world())
        # Verifiers report their time in tenths of a millisecond, and joules of drafting ahead are estimated from what
        # was planned, since nobody reports what came of it.
        assert spent == pytest.approx(result.cost(objective) * result.tokens, rel=0.1 if objective.joule else 1e-3)


def test_settings_come_from_their_seed_and_cover_the_presets(texts: list[RecordedText]) -> None:
    settings = ScenarioSampler(texts)
    first, again = settings.draw(5), settings.draw(5)
    assert first == again
    names = [settings.draw(seed).name for seed in range(300)]
    for part in ("lan", "weak-4g", "bursty", "then", "raspberry-pi-4", "server", "7b-64", "loaded+spec"):
        assert any(part in name for name in names), part


def test_texts_to_be_judged_on_are_not_learned_from(texts: list[RecordedText]) -> None:
    learnt, held_out = split_texts(texts)
    assert len(learnt) + len(held_out) == len(texts)
    assert {text.seed for text in learnt}.isdisjoint({text.seed for text in held_out})
    played = read_texts(EXAMPLE_FAMILY_PATH / "acceptance.npz", target="target-v2", temperature=0.7)[:HELD_OUT_TEXTS]
    assert [text for text in held_out if (text.target, text.temperature) == ("target-v2", 0.7)] == played


def test_training_ends_in_a_policy_that_the_board_takes(trained: Path) -> None:
    policy = CorrectionPolicy(trained / "learned.onnx")
    training = policy.metadata
    assert training.objective == PRESETS["latency"]
    assert training.trained["difference"] < 1e-3
    assert training.trained["seed"] == 0
    assert training.trained["versions"].keys() >= {"stable-baselines3", "torch"}
    assert all(low <= high for low, high in zip(training.low, training.high, strict=True))
    assert (trained / "learned.png").read_bytes().startswith(b"\x89PNG")
    ratios = training.trained["evaluation"]
    assert ratios["settings"] == SMALL.settings
    # Barely trained, it is what it started as.
    assert 0.9 < ratios["mean"] < 1.1
    middle = (np.array(training.low, np.float32) + np.array(training.high, np.float32)) / 2
    assert policy.choose(middle) == 0


def test_the_same_seed_gives_the_same_policy(trained: Path, tmp_path: Path) -> None:
    again = make_policy(SMALL, tmp_path)
    before = msgspec.json.decode((trained / "learned.json").read_bytes(), type=PolicyMetadata)
    assert again.low == before.low
    assert again.sha256 == before.sha256


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "policy"
    assert (
        main(
            [
                "policy",
                "--steps",
                "200",
                "--drills",
                "20",
                "--settings",
                "2",
                "--objective",
                "cloud",
                "--output",
                str(output),
            ]
        )
        == 0
    )
    assert "settings 2" in capsys.readouterr().out
    assert CorrectionPolicy(output / "learned.onnx").metadata.objective == PRESETS["cloud"]
    assert main(["policy", "--steps", "0", "--output", str(output)]) == InputError.exit_code
