"""Choices of the target in torch; that they equal the numpy form is tested beside `coupling`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cloud_verifier.model import sampling as torch_form
from cloud_verifier.model.sampling import Choice, Choices, Warping, uniforms
from edge_runtime.protocol.sampling import Chooser, Sampling, candidates

LOGITS = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 500)).astype(np.float32) * 3)
PLACES = [7, 8, 1000, 2**31 - 1]


def coupled_scores(logits: torch.Tensor, places: list[int], sampling: Sampling) -> torch.Tensor:
    return torch_form.coupled_scores(logits, Warping.of([(sampling, places)], logits.device))


def choose(logits: torch.Tensor, places: list[int], sampling: Sampling) -> list[Choice]:
    chosen = torch_form.choose(logits, Warping.of([(sampling, places)], logits.device))
    return [Choice(int(token), margin) for token, margin in chosen.T.tolist()]


def test_coupled_scores_are_warped_logits_plus_noise() -> None:
    sampling = Sampling(0.8, top_k=20, top_p=0.9, seed=2**63 + 5)
    scores = coupled_scores(LOGITS, PLACES, sampling)
    assert scores.dtype == torch.float64
    noise = -torch.log(-torch.log(uniforms(sampling.seed, PLACES, torch.arange(500))))
    for row in range(len(PLACES)):
        kept = candidates(LOGITS[row].numpy(), sampling).tolist()
        assert scores[row].isfinite().nonzero()[:, 0].tolist() == kept
        torch.testing.assert_close(scores[row, kept], LOGITS[row, kept].double() / 0.8 + noise[row, kept])


def test_greedy_scores_are_the_logits_whatever_the_warpers() -> None:
    scores = coupled_scores(LOGITS, PLACES, Sampling(0.0, top_k=3, top_p=0.1, seed=9))
    assert torch.equal(scores, LOGITS)


def test_rows_do_not_influence_each_other() -> None:
    sampling = Sampling(1.0, top_p=0.95, seed=4)
    alone = [choose(LOGITS[row : row + 1], PLACES[row : row + 1], sampling)[0] for row in range(len(PLACES))]
    assert choose(LOGITS, PLACES, sampling) == alone


def test_the_same_seed_and_position_choose_the_same_token_again() -> None:
    sampling = Sampling(1.0, seed=4)
    assert choose(LOGITS, PLACES, sampling) == choose(LOGITS, PLACES, sampling)
    others = [choose(LOGITS, PLACES, Sampling(1.0, seed=seed)) for seed in range(20)]
    assert len({tuple(choice.token for choice in row) for row in others}) > 10


def test_rows_of_different_samplings_are_chosen_each_by_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    samplings = [Sampling(), Sampling(1.0, seed=2**64 - 1), Sampling(0.7, top_p=0.9, seed=5), Sampling(2.0, top_k=9)]
    alone = [choose(LOGITS[row : row + 1], PLACES[row : row + 1], samplings[row])[0] for row in range(4)]
    warping = Warping.of(
        ((each, [place]) for each, place in zip(samplings, PLACES, strict=True)), LOGITS.device, rows=6
    )
    filled = torch.cat([LOGITS, LOGITS[:2]])
    # All at once, and two rows at a time.
    for limit in (torch_form.AT_ONCE, 1000):
        monkeypatch.setattr(torch_form, "AT_ONCE", limit)
        chosen = torch_form.choose(filled, warping).T.tolist()
        assert [Choice(int(token), margin) for token, margin in chosen[:4]] == alone
        assert [int(token) for token, _ in chosen[4:]] == filled[4:].argmax(-1).tolist()


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6)], ids=["top_k", "top_p"])
def test_a_single_candidate_is_certain(sampling: Sampling) -> None:
    rows = Choices(LOGITS, PLACES, sampling, Chooser(500))
    for row, choice in enumerate(choose(LOGITS, PLACES, sampling)):
        assert choice == rows[row] == (int(LOGITS[row].argmax()), math.inf)
