"""The one training loop: pretraining, adapters and distillation differ only in the loss they hand to it.

Batches are a function of (seed, step) alone, so a run that was killed goes on from its last checkpoint with the very
batches it would have seen.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_runtime.protocol.errors import InputError
from export.common.progress import Progress

# What a step is given: its number, the batch's shape, and a generator that depends on seed and step alone.
LossFunction = Callable[["Step"], torch.Tensor]
BETAS = (0.9, 0.95)
LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Plan:
    """How long, how fast and on how much text at once.

    Attributes:
        steps: optimiser steps.
        peak_rate: learning rate after warm-up; it falls along a cosine to a tenth of that.
        rows, length: batch shape in sequences and tokens.
        long_length, long_share: in the last share of steps sequences are this long, with as many tokens per batch.
        accumulate: parts that a batch is taken in, where it does not fit into memory at once; divides `rows`.
        warm_up: steps until the peak rate.
        weight_decay: of matrices; vectors have none.
        seed: of every random choice.
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
            raise InputError("training takes at least one step of one row of two tokens")
        if self.rows % self.accumulate:
            raise InputError(f"a batch of {self.rows} rows cannot be taken in {self.accumulate} equal parts")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warm_up:
            return self.peak_rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.peak_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def shape(self, step: int) -> tuple[int, int]:
        """Sequences and tokens per sequence of a part of a step's batch."""
        rows = self.rows // self.accumulate
        if not self.long_length or step < self.steps * (1 - self.long_share):
            return rows, self.length
        return max(1, rows * self.length // self.long_length), self.long_length


@dataclass(frozen=True)
class Step:
    """One part of a step of a plan; all parts draw from one generator."""

    number: int
    rows: int
    length: int
    done: float
    random: np.random.Generator


@dataclass
class Curve:
    """What a run recorded: losses by step, and what it ran on."""

    plan: dict[str, object]
    machine: dict[str, object]
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    model: nn.Module,
    loss: LossFunction,
    plan: Plan,
    *,
    label: str,
    checkpoint: Path | None = None,
    seconds_between_checkpoints: float = 60.0,
    record_every: int = 25,
) -> Curve:
    """Trains the parameters of `model` that require a gradient, in place, to lower `loss`.

    Parameters stay float32; on a GPU the forward runs under bfloat16 autocast.

    Args:
        loss: a scalar for a part of a step; it calls the model itself.
        checkpoint: file to write now and then and to go on from; removed by whoever stores the result.

    Returns:
        The loss curve, mean loss per `record_every` steps.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    device = next(iter(parameters.values())).device
    optimiser = _optimiser(parameters, plan, device)
    curve = Curve(asdict(plan), _machine(device))
    first = _resume(checkpoint, parameters, optimiser, curve)
    started = saved = time.monotonic()
    earlier = curve.seconds
    # Summed on the device: reading a number back at every step would stall the queue of kernels.
    total, summed = torch.zeros((), device=device), 0
    model.train()
    with Progress(label, plan.steps, first) as progress:
        for number in range(first, plan.steps):
            for group in optimiser.param_groups:
                group["lr"] = plan.rate(number)
            step = Step(number, *plan.shape(number), number / plan.steps, np.random.default_rng([plan.seed, number]))
            for _ in range(plan.accumulate):
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    value = loss(step) / plan.accumulate
                value.backward()
                total += value.detach()
            nn.utils.clip_grad_norm_(list(parameters.values()), LARGEST_GRADIENT)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            summed += 1
            last = number + 1 == plan.steps
            if summed == record_every or last:
                curve.steps.append(number + 1)
                curve.losses.append(round(total.item() / summed, 5))
                curve.seconds = round(earlier + time.monotonic() - started, 2)
                if not math.isfinite(curve.losses[-1]):
                    raise FloatingPointError(f"{label}: the loss is {curve.losses[-1]} at step {number + 1}")
                total.zero_()
                summed = 0
                progress.update(number + 1, f"loss {curve.losses[-1]:.4f}")
                # Only here, so that a run that goes on records the same means.
                if checkpoint and not last and time.monotonic() - saved > seconds_between_checkpoints:
                    _save(checkpoint, number + 1, parameters, optimiser, curve)
                    saved = time.monotonic()
    model.eval()
    return curve


def write_json(path: Path, content: object) -> None:
    """Replaces the JSON file at `path` in one step, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _optimiser(parameters: dict[str, nn.Parameter], plan: Plan, device: torch.device) -> torch.optim.AdamW:
    groups = [
        {
            "params": [value for value in parameters.values() if value.ndim >= 2],
            "weight_decay": plan.weight_decay,
        },
        {"params": [value for value in parameters.values() if value.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.peak_rate, betas=BETAS, fused=device.type == "cuda")


def _save(
    path: Path, step: int, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, curve: Curve
) -> None:
    state = {
        "step": step,
        "parameters": parameters,
        "optimiser": optimiser.state_dict(),
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
    path: Path | None, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, curve: Curve
) -> int:
    """Goes on from the checkpoint, if there is one of this very plan; returns the steps done."""
    if path is None or not path.is_file():
        return 0
    device = next(iter(parameters.values())).device
    state = torch.load(path, map_location=device, weights_only=True)
    if state["curve"]["plan"] != curve.plan or state["parameters"].keys() != parameters.keys():
        print(f"{path} is of another plan: starting over", flush=True)
        return 0
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state["parameters"][name])
    optimiser.load_state_dict(state["optimiser"])
    curve.steps, curve.losses = state["curve"]["steps"], state["curve"]["losses"]
    curve.seconds = state["curve"]["seconds"]
    return int(state["step"])


def _machine(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "torch": str(torch.__version__), "python": platform.python_version()}
