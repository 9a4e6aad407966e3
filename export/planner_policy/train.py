"""Trains the policy of the learned planner: PPO on simulated rounds, exported as a small ONNX model for the board.

A single round is too noisy to show a correction that saves 2 % of its cost. Training therefore starts with
counterfactuals of whole scenarios: each scenario is run once with each correction applied throughout, and the policy
network ascends the exact gradient of the expected saving. PPO then continues round by round. The initial policy is the
analytic planner, because the first action is to correct nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any, NamedTuple

import matplotlib.figure
import msgspec
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from edge_runtime.planning.learned import (
    CORRECTIONS,
    FORMAT_VERSION,
    MODEL_PATH,
    OBSERVATIONS,
    CorrectionPolicy,
    Floats,
    PolicyMetadata,
)
from edge_runtime.planning.objective import PRESETS, Objective
from edge_runtime.protocol.errors import InputError
from edge_runtime.simulation import read_texts
from export.common.progress import Progress
from export.planner_policy.environment import (
    EXAMPLE_FAMILY_PATH,
    HELD_OUT_TEXTS,
    AnalyticBaseline,
    CorrectionCallback,
    RoundEnvironment,
    ScenarioSampler,
    run_episode,
    split_texts,
)

OPSET = 17
# Rounds of each environment between two PPO updates, and number of environments.
ROLLOUT_ROUNDS = 256
ENVIRONMENT_COUNT = 16
BATCH_ROUNDS = 1024
HIDDEN_UNITS = 48
# Discount per round. Chosen: most corrections have their effect in the same round.
GAMMA = 0.95
# Initial advantage of the action that corrects nothing over every other action, in logits.
NO_CORRECTION_LOGIT = 1.0
# Largest magnitude of a normalized observation.
OBSERVATION_CLIP = 8.0
# Quantiles of the training observations between which the policy is used; outside, the analytic planner decides.
LOW_QUANTILE, HIGH_QUANTILE = 0.0002, 0.9998
# First seeds of the scenarios for evaluation and pretraining; the PPO environments draw smaller ones.
EVALUATION_SEED, PRETRAINING_SEED = 1 << 31, 1 << 32
# Pretraining: observations per scenario, bound on the magnitude of a saved share of the cost, and epochs.
MAX_OBSERVATIONS_PER_SCENARIO = 12
MAX_SAVED_SHARE = 0.5
PRETRAINING_EPOCHS = 25


@dataclass(frozen=True)
class PolicyTrainingConfig:
    """Options of a policy training.

    Attributes:
        objective: prices.
        steps: minimum number of simulated rounds of PPO.
        seed: seed of all random choices.
        evaluation_scenarios: number of scenarios to evaluate on, with held-out texts.
        pretraining_scenarios: number of scenarios that are run with each correction throughout before PPO starts.
    """

    objective: Objective = PRESETS["latency"]
    steps: int = 200_000
    seed: int = 0
    evaluation_scenarios: int = 1000
    pretraining_scenarios: int = 6000


class TrainingMonitor(BaseCallback):
    """Records the progress of PPO.

    Attributes:
        ratios: (step, cost as a multiple of that of the analytic planner) of each episode.
        observations: every fourth observation of each environment.
    """

    def __init__(self, progress: Progress, steps: int) -> None:
        super().__init__()
        self._steps = steps
        self.ratios: list[tuple[int, float]] = []
        self.observations: list[Floats] = []
        self._progress = progress

    def _on_step(self) -> bool:
        ended = [info["ratio"] for info in self.locals["infos"] if "ratio" in info]
        self.ratios += [(self.num_timesteps, ratio) for ratio in ended]
        if self.n_calls % 4 == 0:
            assert isinstance(self.training_env, VecNormalize)
            observations = self.training_env.get_original_obs()
            assert isinstance(observations, np.ndarray)
            self.observations.append(observations.copy())
        recent = [ratio for _, ratio in self.ratios[-300:]]
        note = f"{mean(recent):.3f} of the analytic planner's cost" if recent else ""
        # The last PPO update exceeds the requested number of steps.
        if self.num_timesteps <= self._steps:
            self._progress.update(self.num_timesteps, note)
        return True


class PolicyNetwork(torch.nn.Module):
    """The policy network with normalization of its input: (batch, OBSERVATIONS) to scores (batch, CORRECTIONS)."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, model: PPO, environment: VecNormalize) -> None:
        super().__init__()
        statistics = _observation_statistics(environment)
        self.register_buffer("mean", torch.tensor(statistics.mean, dtype=torch.float32))
        scale = 1.0 / np.sqrt(statistics.var + environment.epsilon)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        policy: Any = model.policy
        first, _, second, _ = policy.mlp_extractor.policy_net
        self.layers = torch.nn.ModuleList([first, second, policy.action_net])

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        first, second, last = self.layers
        hidden = ((observation - self.mean) * self.scale).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        scores: torch.Tensor = last(torch.tanh(second(torch.tanh(first(hidden)))))
        return scores


def make_policy(config: PolicyTrainingConfig, output: Path) -> PolicyMetadata:
    """Train a policy and write its model, metadata and learning curve to the directory `output`.

    Raises:
        InputError: a number of `config` is below 1.
        RuntimeError: the exported model differs from PyTorch.
    """
    if min(config.steps, config.evaluation_scenarios, config.pretraining_scenarios) < 1:
        raise InputError(
            f"--steps {config.steps}, --drills {config.pretraining_scenarios}, "
            f"--settings {config.evaluation_scenarios}: all must be at least 1"
        )
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    training_texts, held_out = split_texts(read_texts(EXAMPLE_FAMILY_PATH / "acceptance.npz"))
    torch.set_num_threads(1)
    counterfactuals = collect_counterfactuals(config, ScenarioSampler(training_texts))
    with Progress("policy", config.steps) as progress:
        monitor = TrainingMonitor(progress, config.steps)
        network = train_policy(
            config,
            monitor,
            [lambda: RoundEnvironment(config.objective, training_texts)] * ENVIRONMENT_COUNT,
            counterfactuals,
        )
    observations = np.concatenate([*monitor.observations, counterfactuals.observations.numpy()])
    path = output / MODEL_PATH.name
    onnx.save(to_onnx(network), path)
    low, high = (
        np.quantile(observations, share, axis=0).astype(float).round(6).tolist()
        for share in (LOW_QUANTILE, HIGH_QUANTILE)
    )
    metadata = PolicyMetadata(
        format=FORMAT_VERSION,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        objective=config.objective,
        observations=OBSERVATIONS,
        corrections=tuple(correction.name for correction in CORRECTIONS),
        low=tuple(low),
        high=tuple(high),
        trained={},
    )
    _write_metadata(metadata, path)
    difference = largest_difference(network, CorrectionPolicy(path), observations[:: max(1, len(observations) // 2000)])
    if difference > 1e-3:
        raise RuntimeError(f"the scores of {path} and of PyTorch differ by {difference:g}; at most 0.001 is allowed")
    evaluation = evaluate_policy(CorrectionPolicy(path), config, ScenarioSampler(held_out))
    trained = {
        "algorithm": "policy gradient on whole settings, then PPO",
        "drills": config.pretraining_scenarios,
        "steps": config.steps,
        "episodes": len(monitor.ratios),
        "seed": config.seed,
        "seconds": round(time.monotonic() - started),
        "texts": f"the example family's acceptance.npz, without the first {HELD_OUT_TEXTS} of each kind",
        "versions": {name: version(name) for name in ("flexspec", "gymnasium", "numpy", "stable-baselines3", "torch")},
        "difference": float(f"{difference:.1e}"),
        "evaluation": evaluation,
    }
    metadata = msgspec.structs.replace(metadata, trained=trained)
    _write_metadata(metadata, path)
    _save_learning_curve(monitor, path.with_suffix(".png"))
    return metadata


class CounterfactualSet(NamedTuple):
    """Outcomes of each correction applied throughout a scenario.

    Attributes:
        observations: (count, len(OBSERVATIONS)), a few of each scenario.
        saved: (count, len(CORRECTIONS)), share of the cost of the scenario that each correction saves.
        weights: (count,), chosen so that scenarios have equal weight.
    """

    observations: torch.Tensor
    saved: torch.Tensor
    weights: torch.Tensor


def collect_counterfactuals(config: PolicyTrainingConfig, scenarios: ScenarioSampler) -> CounterfactualSet:
    """Run `config.pretraining_scenarios` scenarios with each correction throughout.

    Raises:
        InputError: no scenario has a plan that can be corrected.
    """
    random = Random(config.seed)
    rows: list[tuple[Floats, list[float], float]] = []
    with Progress("pretraining", config.pretraining_scenarios) as progress:
        for index in range(config.pretraining_scenarios):
            scenario = scenarios.draw(PRETRAINING_SEED + (config.seed << 24) + index)
            baseline = AnalyticBaseline(scenario, config.objective)
            progress.update(index + 1, scenario.name)
            if not baseline.observations:
                continue
            saved = [0.0]
            for action in range(1, len(CORRECTIONS)):
                spent = run_episode(scenario, config.objective, _always(action))
                saved.append(min(max(1.0 - spent / baseline.spent, -MAX_SAVED_SHARE), MAX_SAVED_SHARE))
            sampled = random.sample(
                baseline.observations, min(MAX_OBSERVATIONS_PER_SCENARIO, len(baseline.observations))
            )
            rows += [(observation, saved, 1.0 / len(sampled)) for observation in sampled]
    if not rows:
        raise InputError(f"{config.pretraining_scenarios} pretraining scenarios have no plan to correct: use more")
    return CounterfactualSet(*(torch.tensor(np.array(column, np.float32)) for column in zip(*rows, strict=True)))


def _always(action: int) -> CorrectionCallback:
    return lambda observation, done, spent: action


def pretrain_actor(model: PPO, environment: VecNormalize, counterfactuals: CounterfactualSet) -> None:
    """Maximize the expected saving on `counterfactuals`; also set the normalization of observations."""
    observations = counterfactuals.observations.numpy()
    statistics = _observation_statistics(environment)
    statistics.mean = observations.mean(axis=0).astype(np.float64)
    statistics.var = observations.var(axis=0).astype(np.float64)
    statistics.count = len(observations)
    network = PolicyNetwork(model, environment)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1.0)
    for _ in range(PRETRAINING_EPOCHS):
        for batch in torch.split(torch.randperm(len(observations)), 512):
            probabilities = torch.softmax(network(counterfactuals.observations[batch]), dim=-1)
            weights = counterfactuals.weights[batch] / counterfactuals.weights[batch].sum()
            saved = weights @ (probabilities * counterfactuals.saved[batch]).sum(dim=-1)
            entropy = -(probabilities * (probabilities + 1e-9).log()).sum(dim=-1).mean()
            loss = -100.0 * saved - 0.2 * entropy
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()


def train_policy(
    config: PolicyTrainingConfig,
    monitor: TrainingMonitor,
    factories: list[Callable[[], RoundEnvironment]],
    counterfactuals: CounterfactualSet,
) -> PolicyNetwork:
    """Train on `counterfactuals`, then with PPO in the environments that `factories` create."""
    environment = VecNormalize(DummyVecEnv(list(factories)), clip_obs=OBSERVATION_CLIP, gamma=GAMMA)
    rounds = min(ROLLOUT_ROUNDS, max(8, config.steps // len(factories)))
    try:
        model = PPO(
            "MlpPolicy",
            environment,
            n_steps=rounds,
            batch_size=min(BATCH_ROUNDS, rounds * len(factories)),
            n_epochs=6,
            gamma=GAMMA,
            gae_lambda=0.95,
            learning_rate=lambda left: 1e-4 * left,
            clip_range=0.1,
            policy_kwargs={
                "net_arch": {"pi": [HIDDEN_UNITS, HIDDEN_UNITS], "vf": [2 * HIDDEN_UNITS, 2 * HIDDEN_UNITS]},
                "activation_fn": torch.nn.Tanh,
            },
            seed=config.seed,
            device="cpu",
        )
        policy: Any = model.policy
        with torch.no_grad():
            policy.action_net.bias[0] = NO_CORRECTION_LOGIT
        pretrain_actor(model, environment, counterfactuals)
        model.learn(config.steps, callback=monitor)
    finally:
        environment.close()
    return PolicyNetwork(model, environment).eval()


def to_onnx(network: PolicyNetwork) -> onnx.ModelProto:
    """Export the network as a float32 graph of a dozen nodes with a dynamic batch dimension."""
    weights = {"mean": network.mean, "scale": network.scale}
    for index, layer in enumerate(network.layers):
        assert isinstance(layer, torch.nn.Linear)
        weights |= {f"weight.{index}": layer.weight, f"bias.{index}": layer.bias}
    constants = [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in weights.items()]
    constants += [
        numpy_helper.from_array(np.array(sign * OBSERVATION_CLIP, np.float32), f"clip.{sign}") for sign in (-1, 1)
    ]
    nodes = [
        helper.make_node("Sub", ["observation", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["scaled"]),
        helper.make_node("Clip", ["scaled", "clip.-1", "clip.1"], ["hidden.0"]),
    ]
    last = len(network.layers) - 1
    for index in range(last + 1):
        summed = "scores" if index == last else f"sum.{index}"
        inputs = [f"hidden.{index}", f"weight.{index}", f"bias.{index}"]
        nodes.append(helper.make_node("Gemm", inputs, [summed], transB=1))
        if index < last:
            nodes.append(helper.make_node("Tanh", [summed], [f"hidden.{index + 1}"]))
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", len(OBSERVATIONS)])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", len(CORRECTIONS)])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def largest_difference(network: PolicyNetwork, policy: CorrectionPolicy, observations: Floats) -> float:
    """Return the largest score difference between PyTorch and the exported model; observations (count, features)."""
    with torch.no_grad():
        expected = network(torch.from_numpy(observations)).numpy()
    found = np.stack([policy.scores(observation) for observation in observations])
    return float(np.abs(expected - found).max())


def evaluate_policy(
    policy: CorrectionPolicy, config: PolicyTrainingConfig, scenarios: ScenarioSampler
) -> dict[str, float]:
    """Run held-out scenarios as the board would.

    Returns a summary with the keys of `learned.json`: costs as multiples of that of the analytic planner, and the share
    of rounds left to that planner because an observation was out of range.
    """
    in_range: list[bool] = []

    def choose(observation: Floats, done: int, spent: float) -> int:
        in_range.append(not policy.out_of_range(observation))
        return policy.choose(observation) if in_range[-1] else 0

    ratios = []
    with Progress("evaluation", config.evaluation_scenarios) as progress:
        for index in range(config.evaluation_scenarios):
            scenario = scenarios.draw(EVALUATION_SEED + index)
            baseline = AnalyticBaseline(scenario, config.objective)
            ratios.append(run_episode(scenario, config.objective, choose) / baseline.spent)
            progress.update(index + 1, f"{mean(ratios):.3f} of the analytic planner's cost")
    summary = {
        "mean": mean(ratios),
        "cheaper by 2 %": sum(ratio < 0.98 for ratio in ratios) / len(ratios),
        "dearer by 2 %": sum(ratio > 1.02 for ratio in ratios) / len(ratios),
        "best": min(ratios),
        "worst": max(ratios),
        # If no round was drafted, none was handed over.
        "handed over": 1.0 - mean(in_range) if in_range else 0.0,
    }
    return {"settings": len(ratios)} | {name: round(value, 4) for name, value in summary.items()}


def _observation_statistics(environment: VecNormalize) -> RunningMeanStd:
    statistics = environment.obs_rms
    assert isinstance(statistics, RunningMeanStd)
    return statistics


def _write_metadata(metadata: PolicyMetadata, path: Path) -> None:
    path.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(metadata), indent=1) + b"\n")


def _save_learning_curve(monitor: TrainingMonitor, path: Path) -> None:
    """Save the learning curve: means over hundredths of the episodes."""
    if not monitor.ratios:
        return
    steps, ratios = (np.array(column) for column in zip(*monitor.ratios, strict=True))
    bins = max(1, min(100, len(ratios) // 20))
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [bin_.mean() for bin_ in np.array_split(steps, bins)], [bin_.mean() for bin_ in np.array_split(ratios, bins)]
    )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xlabel="rounds", ylabel="cost / analytic planner's cost", title="During exploration (simulated)")
    figure.savefig(path, dpi=120)
