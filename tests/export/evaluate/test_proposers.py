"""Drafts and targets of an evaluation: they sample as the board and the verifier do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cloud_verifier.acceptance.measure import Passage, read_calibration_text
from cloud_verifier.draft_models.checkpoint import load_draft
from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import load_model
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol.sampling import Sampling
from export.evaluate.proposers import OnnxProposer, TargetWriter, TorchProposer

SAMPLINGS = [Sampling(temperature=t, seed=s) for s, t in enumerate((0.0, 0.7, 1.0))]


@pytest.mark.slow
def test_targets_generate_in_a_batch_what_they_generate_alone(tiny_path: Path) -> None:
    model, _, ends = load_model(tiny_path, "cpu", "float32")
    # Of different lengths, so that some are padded.
    prompts = [[5, 17, 4], [9], [200, 1, 2, 7, 7, 31, 8], [11, 12, 13], [*range(3, 40)]]
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in range(5)]
    written = TargetWriter(model).generate(prompts, samplings, 30)
    for prompt, sampling, new in zip(prompts, samplings, written, strict=True):
        assert new == generate_reference(model, prompt, sampling, 30, ends)


def test_a_text_ends_with_the_end_token(tiny_path: Path) -> None:
    model, _, _ = load_model(tiny_path, "cpu", "float32")
    writer = TargetWriter(model)
    prompts = [[5, 17, 4], [9, 9, 30]]
    whole = writer.generate(prompts, [Sampling(), Sampling()], 20)
    model.generation_config.eos_token_id = [whole[0][4]]
    first, second = TargetWriter(model).generate(prompts, [Sampling(), Sampling()], 20)
    assert first == whole[0][: whole[0].index(whole[0][4]) + 1]
    assert second == whole[1][: len(second)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_target_chooses_the_text_that_it_generated(tiny_path: Path, sampling: Sampling) -> None:
    model, _, _ = load_model(tiny_path, "cpu", "float32")
    writer = TargetWriter(model)
    prompts = [[5, 17, 4], [9, 9, 30], [7, 8, 9]]
    written = writer.generate(prompts, [sampling] * 3, 12)
    # Of different lengths, so that some are padded.
    texts = zip(prompts, written, (12, 9, 6), strict=True)
    passages = [Passage(prompt + new[:length], 3, sampling) for prompt, new, length in texts]
    assert writer.choose(passages) == [passage.ids[3:] for passage in passages]
    drafted = TorchProposer(model).propose(passages)
    assert [[row[0] for row in ranked.candidates] for ranked in drafted] == [passage.ids[3:] for passage in passages]
    assert all(0 < share <= 1 for ranked in drafted for share in ranked.confidences)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_boards_runner_and_pytorch_propose_similar_tokens(family: Path, sampling: Sampling) -> None:
    board = OnnxProposer(OnnxDraft.load(family / "bundle", threads=1))
    model = TorchProposer(load_draft(family / "draft-anchor", family / "target-v1"))
    ids = OnnxDraft.load(family / "bundle", threads=1).tokenizer.encode(read_calibration_text()).ids[:80]
    (ours,), (theirs,) = (draft.propose([Passage(ids, 20, sampling)]) for draft in (board, model))
    same = np.mean([one[0] == other[0] for one, other in zip(ours.candidates, theirs.candidates, strict=True)])
    # int8 against float32.
    assert same >= 0.9
    assert np.abs(np.subtract(ours.confidences, theirs.confidences)).mean() < 0.05
    assert len(ours.candidates) == 60 and all(len(set(row)) == 8 for row in ours.candidates + theirs.candidates)
