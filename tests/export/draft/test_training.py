"""The training loop learns, resumes exactly after a kill, and records its losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from export.draft import training
from export.draft.training import TIME_RESERVE, TIMED_STEPS, LossFunction, MicroBatch, TrainingSchedule, fit

SCHEDULE = TrainingSchedule(steps=40, peak_rate=0.05, rows=16, length=4, warm_up=5, weight_decay=0.0)


class Killed(Exception):
    """Simulates a kill."""


def regression(model: torch.nn.Linear, killed_at: int | None = None) -> LossFunction:
    """Return a loss that trains `model` to sum its inputs."""

    def loss(batch: MicroBatch) -> torch.Tensor:
        if batch.step == killed_at:
            raise Killed
        inputs = torch.from_numpy(batch.random.standard_normal((batch.rows, batch.length))).float()
        return (model(inputs).squeeze(-1) - inputs.sum(-1)).square().mean()

    return loss


def make_model() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 1)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    uninterrupted = make_model()
    expected = fit(uninterrupted, regression(uninterrupted), SCHEDULE, label="test", record_every=5)
    assert expected.losses[-1] < expected.losses[0] / 5

    checkpoint = tmp_path / "run.checkpoint"
    options = {"label": "test", "record_every": 5, "checkpoint": checkpoint, "seconds_between_checkpoints": 0.0}
    killed = make_model()
    with pytest.raises(Killed):
        fit(killed, regression(killed, killed_at=23), SCHEDULE, **options)
    resumed = make_model()
    curve = fit(resumed, regression(resumed), SCHEDULE, **options)
    assert torch.equal(resumed.weight, uninterrupted.weight)
    assert (curve.steps, curve.losses) == (expected.steps, expected.losses)


def test_a_checkpoint_of_another_schedule_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"label": "test", "checkpoint": tmp_path / "c", "seconds_between_checkpoints": 0.0, "record_every": 5}
    killed = make_model()
    fit(killed, regression(killed), SCHEDULE, **options)
    resumed = make_model()
    curve = fit(resumed, regression(resumed), TrainingSchedule(10, 0.05, 16, 4, warm_up=5), **options)
    assert curve.steps[0] == 5
    assert "another training schedule" in capsys.readouterr().out


def test_the_steps_that_fit_into_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 0.0

    def tick() -> float:
        return seconds

    monkeypatch.setattr(training.time, "monotonic", tick)
    model = make_model()
    plain = regression(model)

    def loss(batch: MicroBatch) -> torch.Tensor:
        nonlocal seconds
        seconds += 2.0 if batch.step < TIMED_STEPS.start else 0.5  # The first steps compile.
        return plain(batch)

    long = replace(SCHEDULE, steps=1000)
    checkpoint = tmp_path / "c"
    options = {"label": "test", "checkpoint": checkpoint, "max_seconds": 120.0, "seconds_between_checkpoints": 0.0}
    curve = fit(model, loss, long, **options)
    # 40 s for 20 steps, and half a second for each of the others, with a reserve.
    expected = TIMED_STEPS.start + int((120 * (1 - TIME_RESERVE) - 2 * TIMED_STEPS.start) / 0.5)
    assert curve.steps[-1] == curve.plan["steps"] == expected
    assert seconds <= 120
    resumed = fit(make_model(), loss, long, **options)
    assert resumed.plan == curve.plan


def test_frozen_parameters_do_not_change() -> None:
    model = make_model()
    model.bias.requires_grad_(False)
    before = model.bias.clone()
    fit(model, regression(model), SCHEDULE, label="test")
    assert torch.equal(model.bias, before)


def test_a_diverged_run_raises() -> None:
    model = make_model()
    with pytest.raises(FloatingPointError, match="test: the loss is nan at step 25"):
        fit(model, lambda batch: model.weight.sum() * float("nan"), SCHEDULE, label="test")


def test_learning_rates_and_batch_shapes() -> None:
    schedule = TrainingSchedule(100, 1.0, 8, 64, long_length=128, long_share=0.1, warm_up=10)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(10) == pytest.approx(1.0)
    assert schedule.rate(100) == pytest.approx(0.1)
    assert schedule.shape(89) == (8, 64)
    assert schedule.shape(90) == (4, 128)
