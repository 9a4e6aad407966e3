"""Drafts and targets of an evaluation: all of them choose as the board and the verifier do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_verifier.draft_models.checkpoint import load_draft
from cloud_verifier.model.reference import decode_alone
from cloud_verifier.model.target import load_model
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol.sampling import Chooser, Sampling
from export.evaluate.proposers import OnnxProposer, Passage, TorchProposer, Writer, draw

SAMPLINGS = [Sampling(temperature=t, seed=s) for s, t in enumerate((0.0, 0.7, 1.0))]


def test_targets_write_side_by_side_what_they_write_alone(tiny_path: Path) -> None:
    model, _, ends = load_model(tiny_path, "cpu", "float32")
    prompts = [[5, 17, 4], [9, 9, 30], [200, 1, 2], [11, 12, 13]]
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in range(4)]
    written = Writer(model).write(prompts, samplings, 30)
    for prompt, sampling, new in zip(prompts, samplings, written, strict=True):
        assert new == decode_alone(model, prompt, sampling, 30, ends)


def test_a_text_ends_with_its_end_token(tiny_path: Path) -> None:
    model, _, _ = load_model(tiny_path, "cpu", "float32")
    writer = Writer(model)
    prompts = [[5, 17, 4], [9, 9, 30]]
    whole = writer.write(prompts, [Sampling(), Sampling()], 20)
    model.generation_config.eos_token_id = [whole[0][4]]
    first, second = Writer(model).write(prompts, [Sampling(), Sampling()], 20)
    assert first == whole[0][: whole[0].index(whole[0][4]) + 1]
    assert second == whole[1][: len(second)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_target_chooses_its_own_text_again(tiny_path: Path, sampling: Sampling) -> None:
    model, _, _ = load_model(tiny_path, "cpu", "float32")
    writer = Writer(model)
    prompts = [[5, 17, 4], [9, 9, 30], [7, 8, 9]]
    written = writer.write(prompts, [sampling] * 3, 12)
    # Of different lengths, so that some are padded.
    texts = zip(prompts, written, (12, 9, 6), strict=True)
    passages = [Passage(prompt + new[:length], 3, sampling) for prompt, new, length in texts]
    assert writer.choices(passages) == [passage.ids[3:] for passage in passages]
    guesses = TorchProposer(model).guess(passages)
    assert [[row[0] for row in guess.candidates] for guess in guesses] == [passage.ids[3:] for passage in passages]
    assert all(0 < share <= 1 for guess in guesses for share in guess.confidences)


@pytest.mark.parametrize("temperatures", [(0.0, 0.0), (0.7, 1.0)])
def test_choices_on_a_device_are_the_choosers(temperatures: tuple[float, float]) -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)) * 3
    samplings = [Sampling(temperature=t, seed=5 + i) for i, t in enumerate(temperatures)]
    expected = [Chooser(300).rank(row, s, 40).ids[0] for row, s in zip(logits.numpy(), samplings, strict=True)]
    assert draw(logits, 40, samplings) == expected


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_boards_runner_and_pytorch_propose_alike(family: Path, sampling: Sampling) -> None:
    board = OnnxProposer(OnnxDraft.load(family / "bundle", threads=1))
    model = TorchProposer(load_draft(family / "draft-anchor", family / "target-v1"))
    ids = OnnxDraft.load(family / "bundle", threads=1).tokenizer.encode(Path(__file__).read_text()).ids[:80]
    for draft in (board, model):
        draft.begin("target-v1")
    (ours,), (theirs,) = (draft.guess([Passage(ids, 20, sampling)]) for draft in (board, model))
    same = np.mean([one[0] == other[0] for one, other in zip(ours.candidates, theirs.candidates, strict=True)])
    # int8 against float32.
    assert same >= 0.9
    assert np.abs(np.subtract(ours.confidences, theirs.confidences)).mean() < 0.05
    assert len(ours.candidates) == 60 and all(len(set(row)) == 8 for row in ours.candidates + theirs.candidates)


def test_a_memory_hears_passages_as_they_are_judged_and_forgets_between_passes(family: Path) -> None:
    draft = OnnxDraft.load(family / "bundle", threads=1)
    remembering, plain = OnnxProposer(draft, remembers=True), OnnxProposer(draft)
    ids = draft.tokenizer.encode(Path(__file__).read_text()).ids[:160]
    passage = Passage(ids, 16, Sampling())

    def right(proposer: OnnxProposer) -> list[int]:
        return [
            sum(row[0] == token for row, token in zip(guess.candidates, ids[16:], strict=True))
            for guess in proposer.guess([passage, passage])
        ]

    remembering.begin("v")
    first, second = right(remembering)
    assert second > first + 10
    assert second > right(plain)[1]
    remembering.begin("v")
    assert right(remembering) == [first, second]
