"""Token sampling in torch. That it equals the numpy form is tested with `edge_runtime.protocol.sampling`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cloud_verifier.model import sampling as torch_form
from cloud_verifier.model.sampling import (
    LazySampledTokens,
    RowSampling,
    SampledToken,
    SamplingBatch,
    measure_logprobs,
    uniform_noise,
)
from edge_runtime.protocol.errors import GrammarError
from edge_runtime.protocol.grammar import GrammarCompiler, GrammarMatcher
from edge_runtime.protocol.logits_processing import SequenceProcessor, make_processor
from edge_runtime.protocol.messages import MIN_LOGPROB, TokenLogprobs
from edge_runtime.protocol.sampling import CoupledSampler, Sampling, filter_candidates
from tests.models import VOCABULARY_SIZE, byte_tokenizer

LOGITS = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 500)).astype(np.float32) * 3)
POSITIONS = [7, 8, 1000, 2**31 - 1]


def coupled_scores(logits: torch.Tensor, positions: list[int], sampling: Sampling) -> torch.Tensor:
    return torch_form.coupled_scores(logits, SamplingBatch.from_segments([(sampling, positions)], logits.device))


def sample_tokens(logits: torch.Tensor, positions: list[int], sampling: Sampling) -> list[SampledToken]:
    batch = SamplingBatch.from_segments([(sampling, positions)], logits.device)
    return [SampledToken(int(token), margin) for token, margin in torch_form.sample_tokens(logits, batch).T.tolist()]


def test_coupled_scores_are_scaled_logits_plus_noise() -> None:
    sampling = Sampling(0.8, top_k=20, top_p=0.9, seed=2**63 + 5)
    scores = coupled_scores(LOGITS, POSITIONS, sampling)
    assert scores.dtype == torch.float64
    noise = -torch.log(-torch.log(uniform_noise(sampling.seed, POSITIONS, torch.arange(500))))
    for row in range(len(POSITIONS)):
        candidates = filter_candidates(LOGITS[row].numpy(), sampling).tolist()
        assert scores[row].isfinite().nonzero()[:, 0].tolist() == candidates
        expected = LOGITS[row, candidates].double() / 0.8 + noise[row, candidates]
        torch.testing.assert_close(scores[row, candidates], expected)


def test_greedy_scores_are_the_logits_whatever_top_k_and_top_p() -> None:
    scores = coupled_scores(LOGITS, POSITIONS, Sampling(0.0, top_k=3, top_p=0.1, seed=9))
    assert torch.equal(scores, LOGITS)


def test_rows_do_not_influence_each_other() -> None:
    sampling = Sampling(1.0, top_p=0.95, seed=4)
    single = [sample_tokens(LOGITS[row : row + 1], POSITIONS[row : row + 1], sampling)[0] for row in range(4)]
    assert sample_tokens(LOGITS, POSITIONS, sampling) == single


def test_sampling_is_deterministic_in_seed_and_position() -> None:
    sampling = Sampling(1.0, seed=4)
    assert sample_tokens(LOGITS, POSITIONS, sampling) == sample_tokens(LOGITS, POSITIONS, sampling)
    other_seeds = [sample_tokens(LOGITS, POSITIONS, Sampling(1.0, seed=seed)) for seed in range(20)]
    assert len({tuple(sampled.token for sampled in row) for row in other_seeds}) > 10


def test_each_row_of_a_batch_is_sampled_with_its_own_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    samplings = [Sampling(), Sampling(1.0, seed=2**64 - 1), Sampling(0.7, top_p=0.9, seed=5), Sampling(2.0, top_k=9)]
    single = [sample_tokens(LOGITS[row : row + 1], POSITIONS[row : row + 1], samplings[row])[0] for row in range(4)]
    batch = SamplingBatch.from_segments(
        ((sampling, [position]) for sampling, position in zip(samplings, POSITIONS, strict=True)),
        LOGITS.device,
        rows=6,
    )
    padded = torch.cat([LOGITS, LOGITS[:2]])
    # In one chunk, and in chunks of two rows.
    for limit in (torch_form.MAX_SCORES_AT_ONCE, 1000):
        monkeypatch.setattr(torch_form, "MAX_SCORES_AT_ONCE", limit)
        sampled = torch_form.sample_tokens(padded, batch).T.tolist()
        assert [SampledToken(int(token), margin) for token, margin in sampled[:4]] == single
        assert [int(token) for token, _ in sampled[4:]] == padded[4:].argmax(-1).tolist()


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6)], ids=["top_k", "top_p"])
def test_a_single_candidate_has_an_infinite_margin(sampling: Sampling) -> None:
    lazy = LazySampledTokens(LOGITS, RowSampling(sampling, POSITIONS), CoupledSampler(500))
    for row, sampled in enumerate(sample_tokens(LOGITS, POSITIONS, sampling)):
        assert sampled == lazy[row] == SampledToken(int(LOGITS[row].argmax()), math.inf)


@pytest.mark.parametrize("k", [1, 2, 6, 501])
def test_log_probabilities_are_the_models_own_on_cpu_and_device(k: int) -> None:
    """Before bias and temperature, rounded; ties, which low precision makes frequent, go to the lower id."""
    logits = LOGITS.round(decimals=1)
    sampling = Sampling(0.5, top_k=2, seed=1, logit_bias={4: 50.0})
    rows = RowSampling(
        sampling, POSITIONS, processor=SequenceProcessor(sampling, 1), paths=[[]] * len(POSITIONS), logprobs=k
    )
    sampled = [LazySampledTokens(logits, rows, CoupledSampler(500))[row] for row in range(4)]
    assert [each.token for each in sampled] == [4] * 4
    entries = [each.logprobs for each in sampled]
    assert entries == measure_logprobs(logits, torch.tensor([4.0] * 4, dtype=torch.float64), k - 1)
    expected = logits.double().log_softmax(-1)
    order = expected.sort(dim=-1, descending=True, stable=True).indices
    for row, entry in enumerate(entries):
        assert entry is not None
        assert entry.logprob == pytest.approx(expected[row, 4].item(), abs=1 / 8192 + 1e-9)
        assert [token for token, _ in entry.top] == order[row, : k - 1].tolist()
        values = expected[row, order[row, : k - 1]].tolist()
        assert [value for _, value in entry.top] == pytest.approx(values, abs=1 / 8192 + 1e-9)


def test_improbable_tokens_have_the_least_log_probability() -> None:
    logits = torch.tensor([[0.0, -30_000.0, -torch.inf]])
    for token in (1, 2):
        assert measure_logprobs(logits, torch.tensor([token]), 0) == [TokenLogprobs(MIN_LOGPROB)]


def test_an_error_of_a_grammar_on_a_rejected_path_is_raised_only_where_it_is_asked_for() -> None:
    class Costly:
        """Fails after a text that ends with 9."""

        def allowed(self, generated: list[int]) -> None:
            if generated[-1:] == [9]:
                raise GrammarError("too costly")

        def forced(self, generated: list[int], limit: int) -> list[int]:
            return []

    sampling = Sampling(grammar="start: /x/")
    processor = make_processor(sampling, 2, [0], Costly())
    assert processor is not None
    processor.sync_to([5, 6])
    rows = RowSampling(sampling, [2, 3, 3], processor=processor, paths=[[], [7], [9]])
    assert [row for row, _ in rows.all_changes(3)] == [0, 1]
    sampled = rows.result([SampledToken(token, 1.0) for token in (7, 8, 3)])
    assert (sampled[0].token, sampled[1].token) == (7, 8)
    with pytest.raises(GrammarError, match="too costly"):
        sampled[2]
    logits = torch.zeros(3, 10)
    logits[[0, 1, 2], [7, 8, 3]] = 1.0
    (on_device,) = torch_form.sample_segments(logits, [(rows, 3)])
    assert on_device is not None
    assert (on_device[0].token, on_device[1].token) == (7, 8)
    with pytest.raises(GrammarError, match="too costly"):
        on_device[2]


@pytest.mark.parametrize("size", [VOCABULARY_SIZE, VOCABULARY_SIZE + 33])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_grammar_masks_are_equal_on_cpu_and_device(size: int, temperature: float) -> None:
    sampling = Sampling(temperature, seed=8, top_p=0.9, grammar="start: /[a-f]{2,9}x/", repetition_penalty=1.2)
    compiled = GrammarCompiler(byte_tokenizer, size, [0]).compile(sampling.grammar)
    processor = make_processor(sampling, 2, [0], GrammarMatcher(compiled))
    assert processor is not None
    first, second = byte_tokenizer().encode("bd").ids
    prompt = [5, 6]
    processor.sync_to([*prompt, first])
    # The root, a draft token, one that the grammar excludes, and a row that nobody asks for.
    rows = RowSampling(sampling, [3, 4, 4, 4], processor=processor, paths=[[], [second], [290], None])
    logits = torch.from_numpy(np.random.default_rng(4).standard_normal((4, size)).astype(np.float32) * 3)
    lazy = LazySampledTokens(logits, rows, CoupledSampler(size))
    batch = SamplingBatch.from_segments([(sampling, [3, 4, 4, 4])], logits.device, changes=rows.all_changes(4))
    tokens, margins = torch_form.sample_tokens(logits, batch).tolist()
    for row in range(4):
        assert tokens[row] == lazy[row].token
        assert margins[row] == pytest.approx(lazy[row].margin, rel=1e-6)
    spelled = byte_tokenizer().decode([int(tokens[0]), int(tokens[1])])
    assert set(spelled) <= set("abcdefx")
