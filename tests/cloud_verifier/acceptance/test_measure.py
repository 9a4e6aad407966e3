"""The measurement of acceptance: choices with the coupled noise, on the board's runner and in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_verifier.acceptance.measure import (
    Passage,
    choose_tokens,
    count_accepted,
    judged_logits,
    propose_tokens,
    rank_tokens,
    read_calibration_text,
)
from cloud_verifier.model.sampling import SamplingBatch, sample_tokens
from cloud_verifier.model.target import load_model
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol.sampling import CoupledSampler, Sampling

SAMPLINGS = [Sampling(temperature=t, seed=s) for s, t in enumerate((0.0, 0.7, 1.0))]


@pytest.mark.parametrize("temperatures", [(0.0, 0.0), (0.7, 1.0), (0.0, 1.0)])
def test_numpy_and_torch_choose_the_same_tokens(temperatures: tuple[float, float]) -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * 3
    segments = [(Sampling(temperature=t, seed=5 + i), [40, 41]) for i, t in enumerate(temperatures)]
    parameters = [(sampling, position) for sampling, positions in segments for position in positions]
    expected = [
        CoupledSampler(300).rank(row, sampling, position).ids[0]
        for row, (sampling, position) in zip(logits.numpy(), parameters, strict=True)
    ]
    assert choose_tokens(logits, segments) == expected
    assert sample_tokens(logits, SamplingBatch.from_segments(segments, logits.device))[0].tolist() == expected


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_best_ranked_token_is_the_chosen_one(sampling: Sampling) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * 3
    passage = Passage(list(range(10, 18)), 3, sampling)
    ranked = rank_tokens(logits, passage, 4)
    assert [row[0] for row in ranked.candidates] == choose_tokens(logits, [(sampling, passage.positions)])
    assert all(len(set(row)) == 4 for row in ranked.candidates)
    assert all(0 < confidence <= 1 for confidence in ranked.confidences)


def test_passages_of_different_lengths_share_a_forward(tiny_path: Path) -> None:
    model, _, _ = load_model(tiny_path, "cpu", "float32")
    ids = np.random.default_rng(0).integers(1, 300, 30).tolist()
    passages = [Passage(ids[:length], start, Sampling()) for length, start in ((30, 5), (12, 11), (20, 1))]
    for passage, logits in zip(passages, judged_logits(model, passages), strict=True):
        with torch.inference_mode():
            alone = model(input_ids=torch.tensor([passage.ids])).logits[0, passage.start - 1 : -1]
        assert logits.shape == (len(passage.positions), 300)
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_board_drafts_from_the_true_prefix(family: Path, sampling: Sampling) -> None:
    draft = OnnxDraft.load(family / "bundle", threads=1)
    ids = draft.tokenizer.encode(read_calibration_text()).ids[:30]
    drafted = [p.tokens[0] for p in propose_tokens(draft.new_context(), Passage(ids, 20, sampling))]
    alone = [draft.new_context().propose(ids[:end], 1, sampling).tokens[0] for end in range(20, 30)]
    # int8 kernels round differently when a prefix is prefilled at once.
    assert count_accepted(drafted, alone)[0] >= 9


def test_accepted_positions_are_counted() -> None:
    assert count_accepted([1, 2, 3], [1, 3, 3]) == (2, 3)
    assert count_accepted([], []) == (0, 0)
    with pytest.raises(ValueError, match="zip"):
        count_accepted([1], [1, 2])
