"""Distillation losses on cases computed by hand, division of batches, and sampling."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from edge_runtime.protocol.errors import InputError
from export.data.token_stream import TokenStream
from export.draft.distill import (
    Objective,
    blended_loss,
    distillation_loss,
    kl_divergence,
    lk_weight,
    overlap,
    split_rows,
)
from export.draft.samples import SampleConfig, sample_texts
from tests.models import make_target

P = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]).log()
Q = torch.tensor([[0.25, 0.25, 0.5], [1 / 3, 1 / 3, 1 / 3]]).log()


def test_kl_divergence_matches_manual_calculation() -> None:
    # 0.5 log 2 + 0.25 log 1 + 0.25 log 0.5 = 0.25 log 2
    assert kl_divergence(P, Q).tolist() == pytest.approx([0.25 * math.log(2), 0.0], abs=1e-6)


def test_overlap_matches_manual_calculation() -> None:
    assert overlap(P, Q).tolist() == pytest.approx([0.75, 1.0])


def test_logits_need_no_normalization() -> None:
    assert kl_divergence(P + 3, Q - 5).tolist() == pytest.approx(kl_divergence(P, Q).tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "progress", "expected"),
    [
        ("kl", 0.9, 0.125 * math.log(2)),
        ("lk", 0.0, 0.125),
        ("mixed", 0.25, 0.125 * math.log(2)),
        ("mixed", 0.75, 0.5 * 0.125 * math.log(2) + 0.5 * 0.125),
        ("mixed", 1.0, 0.125),
    ],
)
def test_objectives_match_manual_calculation(objective: Objective, progress: float, expected: float) -> None:
    assert distillation_loss(P, Q, objective, progress).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_compilable_loss_equals_the_distillation_loss(weight: float) -> None:
    expected = (1 - weight) * distillation_loss(P, Q, "kl", 0.0) + weight * distillation_loss(P, Q, "lk", 0.0)
    assert blended_loss(P, Q, torch.tensor(weight)).item() == pytest.approx(expected.item(), abs=1e-7)


def test_split_rows_is_exact_on_average_and_uses_all_rows() -> None:
    shares = [0.46, 0.18, 0.18, 0.18]
    counts = np.array([split_rows(4, shares, np.random.default_rng(seed)) for seed in range(2000)])
    assert (counts.sum(1) == 4).all()
    assert counts.min() >= 0
    assert counts.mean(0).tolist() == pytest.approx([4 * share for share in shares], abs=0.05)
    assert split_rows(7, [2.0], np.random.default_rng(0)) == [7]


def test_lk_weight_of_mixed_is_monotonic() -> None:
    weights = [lk_weight("mixed", percent / 100) for percent in range(101)]
    assert weights[0] == 0
    assert weights[-1] == 1
    assert all(later >= earlier for earlier, later in pairwise(weights))


def test_gradient_of_a_perfect_draft_is_zero() -> None:
    logits = P.clone().requires_grad_()
    distillation_loss(P, logits, "kl", 0.0).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-7


def test_unknown_objective_is_rejected() -> None:
    with pytest.raises(InputError, match="choose one of kl, lk, mixed"):
        lk_weight("hinge", 0.0)


def test_sampling_continues_past_the_end_of_a_text() -> None:
    target = make_target("llama", vocab_size=4)
    stream = TokenStream(torch.randint(0, 4, (200,), dtype=torch.int32))
    config = SampleConfig(batches=2, rows=8, prompt=4, length=40)
    rows = sample_texts(target, stream, config, end_id=0, padding_id=1).reshape(16, 41)
    assert (rows[:, 40] == 0).all()
    # One of the four tokens ends a text: if sampling stopped there, only padding would follow.
    assert set(rows[:, 30:40].flatten().tolist()) == {0, 1, 2, 3}
