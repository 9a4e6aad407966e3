"""Trains the learned planner's policy: PPO on simulated rounds, exported as a small ONNX for the board.

One round says little of a correction that saves two hundredths of its cost, so training begins with whole texts: each
correction is made throughout, in the same settings, and the actor ascends the exact gradient of what that saves. PPO
goes on from there, round by round. Before both, the policy is the analytic planner, since the first of its actions is
to correct nothing.
"""

from __future__ import annotations

import hashlib
import time
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
    RoundEnvironment,
    ScenarioSampler,
    run_episode,
    split_texts,
)

OPSET = 17
# Rounds of each environment between two updates, and how many environments there are.
ROLLOUT_ROUNDS = 256
ENVIRONMENT_COUNT = 16
BATCH_ROUNDS = 1024
HIDDEN_UNITS = 48
# What a token that is saved a round later is worth: most corrections show at once.
GAMMA = 0.95
# What correcting nothing is ahead of every other action at first, in logits.
NO_CORRECTION_LOGIT = 1.0
# Largest magnitude of a normalised observation.
OBSERVATION_CLIP = 8.0
# Shares of observations that may lie below and above the range that counts as seen.
LOW_QUANTILE, HIGH_QUANTILE = 0.0002, 0.9998
# Seeds of the settings for evaluation, and for drills; PPO's environments draw smaller ones.
EVALUATION_SEED, PRETRAINING_SEED = 1 << 31, 1 << 32
# Drills: most observations of a setting, the largest share of the cost that counts, and how often all are gone through.
MAX_OBSERVATIONS_PER_SCENARIO = 12
MAX_SAVED_SHARE = 0.5
PRETRAINING_EPOCHS = 25


@dataclass(frozen=True)
class PolicyTrainingConfig:
    """What to train.

    Attributes:
        objective: prices.
        steps: rounds to play, at least.
        seed: of everything.
        settings: how many to evaluate on, with texts that training has not seen.
        drills: settings that are played with each correction throughout before PPO begins.
    """

    objective: Objective = PRESETS["latency"]
    steps: int = 200_000
    seed: int = 0
    settings: int = 1000
    drills: int = 6000


@dataclass(frozen=True)
class PolicyEvaluation:
    """How the learned planner did.

    Attributes:
        ratios: cost of its texts as multiples of the analytic planner's, one for each setting.
        handed_over: share of rounds that it left to that.
    """

    ratios: list[float]
    handed_over: float

    def summary(self) -> dict[str, float]:
        """The numbers worth keeping."""
        ordered = sorted(self.ratios)
        return {
            "settings": len(ordered),
            "mean": round(mean(ordered), 4),
            "cheaper by 2 %": round(sum(ratio < 0.98 for ratio in ordered) / len(ordered), 4),
            "dearer by 2 %": round(sum(ratio > 1.02 for ratio in ordered) / len(ordered), 4),
            "best": round(ordered[0], 4),
            "worst": round(ordered[-1], 4),
            "handed over": round(self.handed_over, 4),
        }


class TrainingMonitor(BaseCallback):
    """What happens in training.

    Attributes:
        ratios: (step, cost as a multiple of the analytic planner's) of each episode.
        seen: some of the observations.
    """

    def __init__(self, progress: Progress, steps: int) -> None:
        super().__init__()
        self._steps = steps
        self.ratios: list[tuple[int, float]] = []
        self.seen: list[Floats] = []
        self._progress = progress

    def _on_step(self) -> bool:
        ended = [info["ratio"] for info in self.locals["infos"] if "ratio" in info]
        self.ratios += [(self.num_timesteps, ratio) for ratio in ended]
        if self.n_calls % 4 == 0:
            assert isinstance(self.training_env, VecNormalize)
            self.seen.append(self.training_env.get_original_obs().copy())
        lately = [ratio for _, ratio in self.ratios[-300:]]
        note = f"{mean(lately):.3f} of the analytic planner's cost" if lately else ""
        # The last update takes training beyond what was asked for.
        if self.num_timesteps <= self._steps:
            self._progress.update(self.num_timesteps, note)
        return True


class PolicyNetwork(torch.nn.Module):
    """The trained network with the normalisation of its observations: (batch, OBSERVATIONS) to (batch, CORRECTIONS)."""

    def __init__(self, model: PPO, environment: VecNormalize) -> None:
        super().__init__()
        seen = environment.obs_rms
        self.register_buffer("mean", torch.tensor(seen.mean, dtype=torch.float32))
        scale = 1.0 / np.sqrt(seen.var + environment.epsilon)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        first, _, second, _ = model.policy.mlp_extractor.policy_net
        self.layers = torch.nn.ModuleList([first, second, model.policy.action_net])

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        first, second, last = self.layers
        hidden = ((observation - self.mean) * self.scale).clamp(-OBSERVATION_CLIP, OBSERVATION_CLIP)
        return last(torch.tanh(second(torch.tanh(first(hidden)))))


def make_policy(lesson: PolicyTrainingConfig, output: Path) -> PolicyMetadata:
    """Trains a policy into the directory `output`: model, what it was trained on, and a picture of its learning.

    Raises:
        InputError: a number of the lesson makes no sense.
        RuntimeError: the exported model does not compute what PyTorch does.
    """
    if min(lesson.steps, lesson.settings, lesson.drills) < 1:
        raise InputError(
            f"{lesson.steps} steps, {lesson.drills} drills, {lesson.settings} settings: all must be above 0"
        )
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    learnt, held_out = split_texts(read_texts(EXAMPLE_FAMILY_PATH / "acceptance.npz"))
    torch.set_num_threads(1)
    drills = collect_counterfactuals(lesson, ScenarioSampler(learnt))
    with Progress("policy", lesson.steps) as progress:
        diary = TrainingMonitor(progress, lesson.steps)
        actor = train_policy(
            lesson, diary, [lambda: RoundEnvironment(lesson.objective, learnt)] * ENVIRONMENT_COUNT, drills
        )
    seen = np.concatenate([*diary.seen, drills.observations.numpy()])
    path = output / MODEL_PATH.name
    onnx.save(to_onnx(actor), path)
    low, high = (
        np.quantile(seen, share, axis=0).astype(float).round(6).tolist() for share in (LOW_QUANTILE, HIGH_QUANTILE)
    )
    training = PolicyMetadata(
        FORMAT_VERSION,
        hashlib.sha256(path.read_bytes()).hexdigest(),
        lesson.objective,
        OBSERVATIONS,
        tuple(correction.name for correction in CORRECTIONS),
        tuple(low),
        tuple(high),
        {},
    )
    _write_metadata(training, path)
    difference = largest_difference(actor, CorrectionPolicy(path), seen[:: max(1, len(seen) // 2000)])
    if difference > 1e-3:
        raise RuntimeError(
            f"{path} and PyTorch differ by {difference:g} in a score, which should be alike within 0.001"
        )
    verdict = evaluate_policy(CorrectionPolicy(path), lesson, ScenarioSampler(held_out))
    trained = {
        "algorithm": "policy gradient on whole settings, then PPO",
        "drills": lesson.drills,
        "steps": lesson.steps,
        "episodes": len(diary.ratios),
        "seed": lesson.seed,
        "seconds": round(time.monotonic() - started),
        "texts": f"the example family's acceptance.npz, without the first {HELD_OUT_TEXTS} of each kind",
        "versions": {name: version(name) for name in ("flexspec", "gymnasium", "numpy", "stable-baselines3", "torch")},
        "difference": float(f"{difference:.1e}"),
        "evaluation": verdict.summary(),
    }
    training = msgspec.structs.replace(training, trained=trained)
    _write_metadata(training, path)
    _save_learning_curve(diary, path.with_suffix(".png"))
    return training


class CounterfactualSet(NamedTuple):
    """Settings in which each correction was made throughout.

    Attributes:
        observations: (count, len(OBSERVATIONS)), a few of each setting.
        saved: (count, len(CORRECTIONS)) share of the setting's cost that each correction saved.
        weights: (count,) such that settings count alike.
    """

    observations: torch.Tensor
    saved: torch.Tensor
    weights: torch.Tensor


def collect_counterfactuals(lesson: PolicyTrainingConfig, settings: ScenarioSampler) -> CounterfactualSet:
    """Plays `lesson.drills` settings with each correction."""
    random = Random(lesson.seed)
    rows: list[tuple[Floats, list[float], float]] = []
    with Progress("drills", lesson.drills) as progress:
        for index in range(lesson.drills):
            setting = settings.draw(PRETRAINING_SEED + (lesson.seed << 24) + index)
            reference = AnalyticBaseline(setting, lesson.objective)
            progress.update(index + 1, setting.name)
            if not reference.observations:
                continue
            saved = [0.0]
            for action in range(1, len(CORRECTIONS)):
                spent = run_episode(setting, lesson.objective, lambda observation, done, spent, action=action: action)
                saved.append(min(max(1.0 - spent / reference.spent, -MAX_SAVED_SHARE), MAX_SAVED_SHARE))
            some = random.sample(
                reference.observations, min(MAX_OBSERVATIONS_PER_SCENARIO, len(reference.observations))
            )
            rows += [(observation, saved, 1.0 / len(some)) for observation in some]
    if not rows:
        raise InputError(f"{lesson.drills} drills came to nothing to correct: take more")
    observations, saved_, weights = (torch.tensor(np.array(c, np.float32)) for c in zip(*rows, strict=True))
    return CounterfactualSet(observations, saved_, weights)


def pretrain_actor(model: PPO, environment: VecNormalize, drills: CounterfactualSet) -> None:
    """Ascends the gradient of what the policy would save in `drills`; sets the normalisation of observations too."""
    observations = drills.observations.numpy()
    environment.obs_rms.mean = observations.mean(axis=0).astype(np.float64)
    environment.obs_rms.var = observations.var(axis=0).astype(np.float64)
    environment.obs_rms.count = len(observations)
    actor = PolicyNetwork(model, environment)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-3, weight_decay=1.0)
    for _ in range(PRETRAINING_EPOCHS):
        for batch in torch.randperm(len(observations)).split(512):
            chances = torch.softmax(actor(drills.observations[batch]), dim=-1)
            weights = drills.weights[batch] / drills.weights[batch].sum()
            saved = weights @ (chances * drills.saved[batch]).sum(dim=-1)
            entropy = -(chances * (chances + 1e-9).log()).sum(dim=-1).mean()
            loss = -100.0 * saved - 0.2 * entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def train_policy(
    lesson: PolicyTrainingConfig, diary: TrainingMonitor, makers: list[Any], drills: CounterfactualSet
) -> PolicyNetwork:
    """Trains from `drills`, and with PPO in the environments that `makers` make."""
    environment = VecNormalize(DummyVecEnv(makers), clip_obs=OBSERVATION_CLIP, gamma=GAMMA)
    rounds = min(ROLLOUT_ROUNDS, max(8, lesson.steps // len(makers)))
    try:
        model = PPO(
            "MlpPolicy",
            environment,
            n_steps=rounds,
            batch_size=min(BATCH_ROUNDS, rounds * len(makers)),
            n_epochs=6,
            gamma=GAMMA,
            gae_lambda=0.95,
            learning_rate=lambda left: 1e-4 * left,
            clip_range=0.1,
            policy_kwargs={
                "net_arch": {"pi": [HIDDEN_UNITS, HIDDEN_UNITS], "vf": [2 * HIDDEN_UNITS, 2 * HIDDEN_UNITS]},
                "activation_fn": torch.nn.Tanh,
            },
            seed=lesson.seed,
            device="cpu",
        )
        with torch.no_grad():
            model.policy.action_net.bias[0] = NO_CORRECTION_LOGIT
        pretrain_actor(model, environment, drills)
        model.learn(lesson.steps, callback=diary)
    finally:
        environment.close()
    return PolicyNetwork(model, environment).eval()


def to_onnx(actor: PolicyNetwork) -> onnx.ModelProto:
    """The actor as a graph of a dozen nodes, float32, for any number of observations at once."""
    weights = {"mean": actor.mean, "scale": actor.scale}
    for index, layer in enumerate(actor.layers):
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
    last = len(actor.layers) - 1
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


def largest_difference(actor: PolicyNetwork, policy: CorrectionPolicy, observations: Floats) -> float:
    """Between the scores of PyTorch and of the exported model for (count, len(OBSERVATIONS)) observations."""
    with torch.no_grad():
        expected = actor(torch.from_numpy(observations)).numpy()
    found = np.stack([policy.scores(observation) for observation in observations])
    return float(np.abs(expected - found).max())


def evaluate_policy(
    policy: CorrectionPolicy, lesson: PolicyTrainingConfig, settings: ScenarioSampler
) -> PolicyEvaluation:
    """Plays settings that training has not seen, as the board would."""

    known: list[bool] = []

    def ask(observation: Floats, done: int, spent: float) -> int:
        known.append(not policy.out_of_range(observation))
        return policy.choose(observation) if known[-1] else 0

    ratios = []
    with Progress("evaluation", lesson.settings) as progress:
        for index in range(lesson.settings):
            setting = settings.draw(EVALUATION_SEED + index)
            reference = AnalyticBaseline(setting, lesson.objective)
            ratios.append(run_episode(setting, lesson.objective, ask) / reference.spent)
            progress.update(index + 1, f"{mean(ratios):.3f} of the analytic planner's cost")
    # Where no round was drafted, nothing was handed over.
    return PolicyEvaluation(ratios, 1.0 - mean(known) if known else 0.0)


def _write_metadata(training: PolicyMetadata, path: Path) -> None:
    path.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(training), indent=1) + b"\n")


def _save_learning_curve(diary: TrainingMonitor, path: Path) -> None:
    """The learning curve: means of a hundredth of all episodes."""
    if not diary.ratios:
        return
    steps, ratios = (np.array(column) for column in zip(*diary.ratios, strict=True))
    pieces = max(1, min(100, len(ratios) // 20))
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [piece.mean() for piece in np.array_split(steps, pieces)],
        [piece.mean() for piece in np.array_split(ratios, pieces)],
    )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xlabel="rounds", ylabel="cost / analytic planner's cost", title="While exploring, modelled")
    figure.savefig(path, dpi=120)
