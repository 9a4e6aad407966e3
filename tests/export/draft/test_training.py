"""The loop learns, goes on after a kill as if nothing had happened, and says what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.draft.training import MicroBatch, TrainingSchedule, fit

PLAN = TrainingSchedule(steps=40, peak_rate=0.05, rows=16, length=4, warm_up=5, weight_decay=0.0)


class Killed(Exception):
    """Stands for the machine being taken away."""


def regression(model: torch.nn.Linear, killed_at: int | None = None):
    """A loss that teaches `model` to sum its inputs."""

    def loss(step: MicroBatch) -> torch.Tensor:
        if step.number == killed_at:
            raise Killed
        inputs = torch.from_numpy(step.random.standard_normal((step.rows, step.length))).float()
        return (model(inputs).squeeze(-1) - inputs.sum(-1)).square().mean()

    return loss


def fresh() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 1)


def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    whole = fresh()
    expected = fit(whole, regression(whole), PLAN, label="test", record_every=5)
    assert expected.losses[-1] < expected.losses[0] / 5

    checkpoint = tmp_path / "run.checkpoint"
    options = {"label": "test", "record_every": 5, "checkpoint": checkpoint, "seconds_between_checkpoints": 0.0}
    first = fresh()
    with pytest.raises(Killed):
        fit(first, regression(first, killed_at=23), PLAN, **options)
    second = fresh()
    curve = fit(second, regression(second), PLAN, **options)
    assert torch.equal(second.weight, whole.weight)
    assert (curve.steps, curve.losses) == (expected.steps, expected.losses)


def test_a_checkpoint_of_another_plan_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"label": "test", "checkpoint": tmp_path / "c", "seconds_between_checkpoints": 0.0, "record_every": 5}
    first = fresh()
    fit(first, regression(first), PLAN, **options)
    second = fresh()
    curve = fit(second, regression(second), TrainingSchedule(10, 0.05, 16, 4, warm_up=5), **options)
    assert curve.steps[0] == 5
    assert "another plan" in capsys.readouterr().out


def test_frozen_parameters_stay() -> None:
    model = fresh()
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    fit(model, regression(model), PLAN, label="test")
    assert torch.equal(model.bias, before)


def test_a_diverged_run_stops() -> None:
    model = fresh()
    with pytest.raises(FloatingPointError, match="test: the loss is nan at step 25"):
        fit(model, lambda step: model.weight.sum() * float("nan"), PLAN, label="test")


def test_rates_and_shapes() -> None:
    plan = TrainingSchedule(100, 1.0, 8, 64, long_length=128, long_share=0.1, warm_up=10)
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(10) == pytest.approx(1.0)
    assert plan.rate(100) == pytest.approx(0.1)
    assert plan.shape(89) == (8, 64)
    assert plan.shape(90) == (4, 128)
