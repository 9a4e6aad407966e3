"""The training loop of pretraining, adapters and distillation, which differ only in their loss functions.

Batches depend on (seed, step, part) alone, so that a killed run resumes from its last checkpoint with the same batches
as an uninterrupted one, and several GPUs train on the same batches as one.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_runtime.protocol.errors import InputError
from export.common.progress import Progress
from export.draft.training_group import ALONE, TrainingGroup

# Computes the scalar loss of one micro-batch.
LossFunction = Callable[["MicroBatch"], torch.Tensor]
ADAM_BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
# Chosen: five points from a fifth of the training to its end.
EVALUATIONS, EVALUATION_FACTOR = 5, 1.5
# Chosen: steps after compilation whose time tells how many fit, and the share of the time that is kept for evaluations.
TIMED_STEPS, TIME_RESERVE = range(20, 60), 0.05


@dataclass(frozen=True)
class TrainingSchedule:
    """Steps, learning rates and batch shapes of a training run. The field names are part of `distill.json`.

    Attributes:
        steps: number of optimizer steps.
        peak_rate: learning rate after warm-up; it decays along a cosine to a tenth of that.
        rows, length: batch shape in sequences and tokens.
        long_length, long_share: sequence length in the last `long_share` of the steps, with equal tokens per batch.
        warm_up: steps of linear warm-up.
        weight_decay: weight decay of matrices; vectors have none.
        seed: seed of every random choice.
        accumulate: number of micro-batches per step, for batches that do not fit into memory; divides `rows`.
    """

    steps: int
    peak_rate: float
    rows: int
    length: int
    long_length: int = 0
    long_share: float = 0.0
    warm_up: int = 100
    weight_decay: float = 0.1
    seed: int = 0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1 or self.length < 2 or self.accumulate < 1:
            raise InputError("training needs at least one step with one row of two tokens")
        if self.rows % self.accumulate:
            raise InputError(f"a batch of {self.rows} rows cannot be split into {self.accumulate} equal parts")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warm_up:
            return self.peak_rate * (step + 1) / self.warm_up
        progress = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.peak_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))

    def evaluation_step(self, index: int) -> float:
        """Return the number of completed steps before evaluation `index`, the last of EVALUATIONS being at the end."""
        return self.steps * EVALUATION_FACTOR ** (index + 1 - EVALUATIONS)

    def shape(self, step: int) -> tuple[int, int]:
        """Return the sequences and the tokens per sequence of a micro-batch of a step."""
        rows = self.rows // self.accumulate
        if not self.long_length or step < self.steps * (1 - self.long_share):
            return rows, self.length
        return max(1, rows * self.length // self.long_length), self.long_length


@dataclass(frozen=True)
class MicroBatch:
    """The part of a batch that one forward pass takes.

    Attributes:
        step: number of the optimizer step, from 0.
        rows, length: shape in sequences and tokens.
        progress: share of the steps completed, in [0, 1).
        random: generator seeded by (seed, step, part of the batch).
    """

    step: int
    rows: int
    length: int
    progress: float
    random: np.random.Generator


@dataclass
class TrainingCurve:
    """Losses of a run by step, with its schedule and machine. The field names are those of `training.json`.

    Attributes:
        plan: the schedule as plain data.
        machine: device and versions.
        steps: steps completed at each record.
        losses: mean loss since the previous record.
        seconds: training time, including that of earlier interrupted runs.
        evaluated_steps, scores: steps completed at each evaluation, and its result.
    """

    plan: dict[str, object]
    machine: dict[str, object]
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    evaluated_steps: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def fit(
    model: nn.Module,
    loss: LossFunction,
    schedule: TrainingSchedule,
    *,
    label: str,
    checkpoint: Path | None = None,
    evaluate: Callable[[], float] | None = None,
    rounded: Callable[[], AbstractContextManager[None]] = nullcontext,
    max_seconds: float | None = None,
    group: TrainingGroup = ALONE,
    seconds_between_checkpoints: float = 60.0,
    record_every: int = 25,
) -> TrainingCurve:
    """Train the parameters of `model` that require a gradient, in place, to minimize `loss`.

    Parameters stay float32; on a GPU the forward pass runs under bfloat16 autocast.

    Args:
        model: the model to train.
        loss: returns the scalar loss of a micro-batch; it calls the model.
        schedule: steps, learning rates and batch shapes.
        label: name of the run in the progress output.
        checkpoint: file to save to periodically and to resume from; the caller removes it after storing the result.
        evaluate: measures the model, EVALUATIONS times at steps that grow by a constant factor, for the curve.
        rounded: context in which parameters have the values of their stored form; loss and gradients are computed in
            it, and the step is taken from the values outside (a straight-through estimator).
        max_seconds: take only as many steps as fit into this time, judged by TIMED_STEPS; the curve's plan says how
            many. Learning rates and lengths of text follow the new number, so that the training ends as it should.
        group: the processes that train; each computes some of the micro-batches of every step.
        seconds_between_checkpoints: minimum time between two saves.
        record_every: steps per point of the curve.

    Returns:
        The training curve.

    Raises:
        FloatingPointError: the loss is not finite.
        InputError: the micro-batches cannot be divided among the processes.
    """
    parts = group.own_parts(schedule.accumulate)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    device = next(iter(parameters.values())).device
    optimizer = _make_optimizer(parameters, schedule, device)
    curve = TrainingCurve(asdict(schedule), _describe_machine(device))
    first = _resume(checkpoint, parameters, optimizer, curve, other_steps=max_seconds is not None)
    schedule = replace(schedule, steps=int(str(curve.plan["steps"])))
    started = saved = timed = time.monotonic()
    seconds_before = curve.seconds
    # Summed on the device: reading a value at every step would stall the kernel queue.
    total, summed = torch.zeros((), device=device), 0
    model.train()
    with Progress(label, schedule.steps, first, shown=group.is_first) as progress:
        number = first
        while number < schedule.steps:
            if number == first + TIMED_STEPS.start:
                timed = time.monotonic()
            for options in optimizer.param_groups:
                options["lr"] = schedule.rate(number)
            rows, length = schedule.shape(number)
            for part in parts:
                random = np.random.default_rng([schedule.seed, number, part])
                batch = MicroBatch(number, rows, length, number / schedule.steps, random)
                with rounded():
                    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        value = loss(batch) / schedule.accumulate
                    torch.autograd.backward(value)
                total += value.detach()
            group.sum(parameter.grad for parameter in parameters.values() if parameter.grad is not None)
            nn.utils.clip_grad_norm_(list(parameters.values()), MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            summed += 1
            number += 1
            last = number == schedule.steps
            if summed == record_every or last:
                group.sum([total])
                curve.steps.append(number)
                curve.losses.append(round(total.item() / summed, 5))
                curve.seconds = round(seconds_before + time.monotonic() - started, 2)
                if not math.isfinite(curve.losses[-1]):
                    raise FloatingPointError(f"{label}: the loss is {curve.losses[-1]} at step {number}")
                total.zero_()
                summed = 0
                progress.update(number, f"loss {curve.losses[-1]:.4f}")
                if evaluate is not None and number >= schedule.evaluation_step(len(curve.scores)):
                    model.eval()
                    curve.evaluated_steps.append(number)
                    curve.scores.append(group.share(evaluate() if group.is_first else 0.0, device))
                    model.train()
                # Saved only at a record, so that a resumed run records the same means.
                if (
                    checkpoint
                    and group.is_first
                    and not last
                    and time.monotonic() - saved > seconds_between_checkpoints
                ):
                    _save(checkpoint, number, parameters, optimizer, curve)
                    saved = time.monotonic()
            if max_seconds is not None and number == first + TIMED_STEPS.stop:
                total.item()  # Waits for the device.
                step_seconds = (time.monotonic() - timed) / len(TIMED_STEPS)
                left = max_seconds * (1 - TIME_RESERVE) - seconds_before - (time.monotonic() - started)
                steps = min(schedule.steps, number + max(1, int(left / step_seconds)))
                schedule = replace(schedule, steps=int(group.share(steps, device)))
                curve.plan = asdict(schedule)
                progress.change_total(schedule.steps)
    model.eval()
    return curve


def write_json(path: Path, content: object) -> None:
    """Replace the JSON file at `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _make_optimizer(
    parameters: dict[str, nn.Parameter], schedule: TrainingSchedule, device: torch.device
) -> torch.optim.AdamW:
    groups = [
        {
            "params": [value for value in parameters.values() if value.ndim >= 2],
            "weight_decay": schedule.weight_decay,
        },
        {"params": [value for value in parameters.values() if value.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.peak_rate, betas=ADAM_BETAS, fused=device.type == "cuda")


def _save(
    path: Path, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, curve: TrainingCurve
) -> None:
    state = {
        "step": step,
        "parameters": parameters,
        "optimiser": optimizer.state_dict(),
        "curve": asdict(curve),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _resume(
    path: Path | None,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    curve: TrainingCurve,
    *,
    other_steps: bool,
) -> int:
    """Restore the checkpoint if it has the same schedule; return the number of completed steps.

    Args:
        other_steps: the checkpoint may have another number of steps, which `curve.plan` then has as well.
    """
    if path is None or not path.is_file():
        return 0
    device = next(iter(parameters.values())).device
    state = torch.load(path, map_location=device, weights_only=True)
    plan = state["curve"]["plan"]
    expected = curve.plan | ({"steps": plan["steps"]} if other_steps else {})
    if plan != expected or state["parameters"].keys() != parameters.keys():
        print(f"{path} belongs to another training schedule: starting over", flush=True)
        return 0
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimiser"])
    curve.plan = plan
    curve.steps, curve.losses = state["curve"]["steps"], state["curve"]["losses"]
    curve.seconds = state["curve"]["seconds"]
    curve.evaluated_steps, curve.scores = state["curve"]["evaluated_steps"], state["curve"]["scores"]
    return int(state["step"])


def _describe_machine(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "torch": str(torch.__version__), "python": platform.python_version()}
