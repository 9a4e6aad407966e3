"""What board and verifier must compute alike: the board's noise, sampling and logits processing in numpy, compared with
torch's form of them and with transformers' own processors.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cloud_verifier.model import sampling as torch_form
from cloud_verifier.model.reference import make_logits_processors
from cloud_verifier.model.sampling import RowSampling, process_rows, sample_segments
from edge_runtime.protocol.logits_processing import LogitChanges, SequenceProcessor, end_ids_of, make_processor
from edge_runtime.protocol.sampling import MASK_64, CoupledSampler, Sampling, filter_candidates, uniform_noise
from tests.edge_runtime.protocol.test_logits_processing import (
    END_IDS,
    SIZE,
    Allows,
    ids,
    logits_row,
    mask_of,
    processed,
    texts,
)
from tests.edge_runtime.protocol.test_logits_processing import samplings as processing_samplings
from tests.edge_runtime.protocol.test_sampling import (
    VECTORS,
    Logits,
    id_with_bits,
    logits_rows,
    positions,
    samplings,
    seeds,
    token_ids,
)


@pytest.mark.parametrize(("seed", "position", "token", "expected"), VECTORS)
def test_torch_draws_the_published_vectors(seed: int, position: int, token: int, expected: float) -> None:
    assert torch_form.uniform_noise(seed, [position], torch.tensor([token]))[0, 0].item() == expected


@given(seeds, st.lists(positions, min_size=1, max_size=3), st.lists(token_ids, min_size=1, max_size=20))
def test_numpy_and_torch_draw_the_same_bits(seed: int, places: list[int], ids: list[int]) -> None:
    rows = torch_form.uniform_noise(seed, places, torch.tensor(ids)).numpy()
    for row, position in zip(rows, places, strict=True):
        assert row.tobytes() == uniform_noise(seed, position, np.array(ids)).tobytes()


@pytest.mark.parametrize(("bits", "expected"), [(0, 2.0**-53), (MASK_64, 1 - 2.0**-53), (MASK_64 >> 1, 0.5 - 2.0**-53)])
def test_extreme_bits_are_the_same_in_torch(bits: int, expected: float) -> None:
    token = id_with_bits(bits)
    signed = token - 2**64 if token >> 63 else token
    assert torch_form.uniform_noise(0, [0], torch.tensor([signed]))[0, 0].item() == expected


def warped_by_transformers(logits: Logits, sampling: Sampling) -> list[int]:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    # In float64: in float32 the two sum the tail in different orders and may differ in a token of mass 1e-7.
    scores = warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits.astype(np.float64))[None])
    return torch.isfinite(scores[0]).nonzero()[:, 0].tolist()


@given(
    logits_rows(),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.one_of(st.just(0), st.integers(1, 400)),
    st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.999, 1.0]),
    st.sampled_from([0.0, 0.001, 0.05, 0.3, 1.0]),
)
def test_candidates_are_those_of_transformers(
    logits: Logits, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p=min_p)
    assert filter_candidates(logits, sampling).tolist() == warped_by_transformers(logits, sampling)


def test_ties_with_the_kth_logit_are_kept() -> None:
    logits = np.array([1, 3, 2, 2, 2, 0], dtype=np.float32)
    sampling = Sampling(1.0, top_k=2)
    assert filter_candidates(logits, sampling).tolist() == warped_by_transformers(logits, sampling) == [1, 2, 3, 4]


def test_greedy_ties_go_to_the_lower_id_in_torch() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, [500, 20, 900]] = 1.0
    warping = torch_form.SamplingBatch.from_segments([(Sampling(), [0])], torch.device("cpu"))
    assert torch_form.sample_tokens(logits, warping).tolist() == [[20.0], [0.0]]


@pytest.mark.slow
@given(st.data(), samplings, st.integers(1, 3))
@settings(max_examples=150)
def test_torch_chooses_as_numpy_ranks(data: st.DataObject, sampling: Sampling, rows: int) -> None:
    logits = np.stack([data.draw(logits_rows(largest=3000))] * rows)
    logits[1:] = logits[1:, ::-1]
    places = data.draw(st.lists(positions, min_size=rows, max_size=rows))
    chooser = CoupledSampler(logits.shape[1])
    warping = torch_form.SamplingBatch.from_segments([(sampling, places)], torch.device("cpu"))
    chosen = [
        torch_form.SampledToken(int(token), margin)
        for token, margin in torch_form.sample_tokens(torch.from_numpy(logits), warping).T.tolist()
    ]
    through_rows = torch_form.LazySampledTokens(
        torch.from_numpy(logits), torch_form.RowSampling(sampling, places), chooser
    )
    for row, position in enumerate(places):
        ranked = chooser.rank(logits[row], sampling, position, count=2)
        margin = ranked.scores[0] - ranked.scores[1] if len(ranked.scores) > 1 else math.inf
        assert chosen[row].token == through_rows[row].token == ranked.ids[0]
        assert through_rows[row].margin == margin
        assert chosen[row].margin == pytest.approx(margin, abs=1e-9, rel=1e-9)


def test_torch_and_numpy_draw_the_same_nucleus_of_a_flat_distribution() -> None:
    """If partial sums are nearly equal to top_p, both implementations must still keep the same tokens."""
    differing = []
    for size, top_p in itertools.product([4, 10, 100, 300, 1000], [0.1, 0.3, 0.5, 0.7, 0.9]):
        logits, sampling = torch.zeros(1, size), Sampling(1.0, top_p=top_p)
        excluded = torch_form.excluded_mask(logits, logits.double(), sampling)[0]
        if (~excluded).nonzero()[:, 0].tolist() != filter_candidates(logits[0].numpy(), sampling).tolist():
            differing.append((size, top_p))
    assert differing == []


@pytest.mark.slow
@given(processing_samplings, texts, st.integers(1, 40), st.integers(0, 2**32))
@settings(max_examples=300)
def test_the_choice_is_that_of_transformers_processors(
    sampling: Sampling, text: list[int], prompt: int, seed: int
) -> None:
    """With processors of transformers in its order; only the penalties of OpenAI are not among them."""
    prompt = min(prompt, len(text))
    logits = logits_row(seed)
    end_ids = end_ids_of(sampling, END_IDS)
    processors = make_logits_processors(sampling, SIZE, prompt, end_ids, torch.device("cpu"))
    scores = torch.from_numpy(logits)[None]
    *before, coupled = processors
    for processor in before:
        scores = processor(torch.tensor([text]), scores)
    assert processed(text, prompt, sampling, logits) == scores[0].tolist()
    token = CoupledSampler(SIZE).rank(np.array(processed(text, prompt, sampling, logits), np.float32), sampling, 9)
    assert coupled(torch.zeros(1, 9, dtype=torch.int64), scores)[0, token.ids[0]] == 0.0


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(processing_samplings, texts, st.lists(ids, max_size=5), st.one_of(st.none(), texts)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 2**32),
)
@settings(max_examples=200)
def test_torch_processes_and_chooses_as_numpy(
    segments: list[tuple[Sampling, list[int], list[int], list[int] | None]], seed: int
) -> None:
    """Rows of several texts in one batch, each after a longer prefix of its draft, with and without a mask."""
    samplings, total = [], 0
    for sampling, text, draft, allowed in segments:
        processor = make_processor(sampling, max(1, len(text) - 3), END_IDS, Allows(*allowed) if allowed else None)
        if processor:
            processor.sync_to(text)
        rows = [draft[:index] for index in range(len(draft) + 1)]
        places = [len(text) + len(path) for path in rows]
        samplings.append(RowSampling(sampling, places, processor=processor, paths=rows, logprobs=2))
        total += len(rows)
    # Between them, and after them as padding, rows that are not sampled.
    counts = [len(rows.positions) for rows in samplings]
    batch = [*zip(samplings, counts, strict=True)]
    logits = np.stack([logits_row(seed + index) for index in range(total + 4)])
    logits[1::3] = logits[1::3].round(1)
    sampled = sample_segments(torch.from_numpy(logits), [batch[0], (None, 2), *batch[1:]])
    assert sampled[1] is None
    start = 0
    for rows, count, tokens in zip(samplings, counts, [sampled[0], *sampled[2:]], strict=True):
        assert tokens is not None
        for row in range(count):
            token = tokens[row]
            expected = rows.sample(row, logits[start + row], CoupledSampler(SIZE))
            assert (token.token, token.logprobs) == (expected.token, expected.logprobs)
            assert token.margin == pytest.approx(expected.margin, abs=1e-9)
        start += count + (2 if rows is samplings[0] else 0)
    changes = [(row, changed) for row in range(counts[0]) if (changed := samplings[0].changes(row))]
    if changes:
        processed_rows = process_rows(torch.from_numpy(logits), changes).numpy()
        assert all(processed_rows[row].tobytes() == each.apply(logits[row]).tobytes() for row, each in changes)


def test_many_different_tokens() -> None:
    """More than memory is reserved for at first."""
    size = 1000
    bias = dict.fromkeys(range(0, size, 3), 0.5)
    sampling = Sampling(logit_bias=bias, repetition_penalty=1.5, frequency_penalty=0.25)
    text = [*range(0, 900, 2), *range(0, 900, 4)]
    logits = logits_row(5, size)
    scores = torch.from_numpy(logits)[None]
    for processor in make_logits_processors(sampling, size, 100, frozenset(), torch.device("cpu"))[:-1]:
        scores = processor(torch.tensor([text]), scores)
    assert SequenceProcessor(sampling, 100).changes_after(text).apply(logits).tolist() == scores[0].tolist()


def test_torch_applies_changes_to_more_logits_than_the_mask_or_the_text_covers() -> None:
    mask = mask_of([1, 2, 31], 32)
    changes = LogitChanges(
        np.array([2, 60]), np.full(2, 5, np.float32), np.ones(2, np.float32), np.zeros(2, np.float32), mask
    )
    logits = logits_row(3, 40)
    in_torch = process_rows(torch.from_numpy(logits)[None], [(0, changes)])[0]
    assert in_torch.tolist() == changes.apply(logits).tolist()
