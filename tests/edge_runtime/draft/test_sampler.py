"""The draft's float32 sampler, compared with the exact one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.draft.sampler import DraftSampler
from edge_runtime.protocol.logits_processing import LogitChanges, SequenceProcessor
from edge_runtime.protocol.sampling import CoupledSampler, Sampling, filter_candidates, hash_counters

SIZE = 3000
CHOOSER = CoupledSampler(SIZE)
NEAR = 0.01


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 50]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**63),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5]),
)


def row(seed: int, spread: float) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(SIZE) * spread).astype(np.float32)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.integers(0, 10**6), st.floats(0.5, 8.0), samplings, st.integers(0, 4000), st.integers(1, 5))
def test_samples_equal_the_exact_choice(
    seed: int, spread: float, sampling: Sampling, position: int, count: int
) -> None:
    logits = row(seed, spread)
    ids, confidence = DraftSampler(hash_counters(np.arange(SIZE))).sample(logits, sampling, position, count)
    exact = CHOOSER.rank(logits, sampling, position, count + 1)
    kept = filter_candidates(logits, sampling) if sampling.temperature else np.array(exact.ids)
    mass = np.exp((logits - logits.max()).astype(np.float64) / (sampling.temperature or 1.0))
    close = any(a - b < NEAR for a, b in zip(exact.scores, exact.scores[1:], strict=False))
    # If the last token of the nucleus is nearly tied with another, the sampler may keep the other.
    edge = mass[kept].min()
    close |= bool(np.any((mass != edge) & (abs(mass / edge - 1.0) < 1e-3))) or int((mass == edge).sum()) > 1
    if not close:
        assert set(ids) <= set(kept.tolist())
        assert ids == exact.ids[: len(ids)]
        assert len(ids) == min(count, kept.size) or sampling.top_p < 1.0
    assert confidence == pytest.approx(softmax(logits / (sampling.temperature or 1.0))[ids[0]], rel=1e-4)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0]), st.booleans(), st.integers(1, 4))
def test_processed_logits_are_drafted_as_the_target_chooses(
    seed: int, temperature: float, trimmed: bool, count: int
) -> None:
    sampling = Sampling(
        temperature,
        seed=seed,
        repetition_penalty=1.2,
        frequency_penalty=0.7,
        logit_bias={8: 20.0, 10: 19.0},
        min_tokens=9,
    )
    ids = np.arange(0, SIZE, 2 if trimmed else 1, dtype=np.int32)
    logits = row(seed, 2.0)
    changes = SequenceProcessor(sampling, 2, [8]).changes_after([4, 10, 10, 12])
    drafted, confidence = DraftSampler(hash_counters(ids), ids).sample(logits[ids], sampling, 4, count, changes=changes)
    processed = changes.apply(logits)
    processed[np.setdiff1d(np.arange(SIZE), ids)] = -np.inf
    exact = CHOOSER.rank(processed, sampling, 4, count)
    assert 8 not in drafted
    if not any(a - b < NEAR for a, b in zip(exact.scores, exact.scores[1:], strict=False)):
        assert drafted == exact.ids
    assert confidence == pytest.approx(softmax(processed)[drafted[0]], rel=1e-4)


def test_a_trimmed_head_without_any_allowed_token_drafts_without_confidence() -> None:
    ids = np.array([1, 5, 9], np.int32)
    mask = np.packbits(np.array([0, 0, 1, 1] + [0] * 28, np.uint8), bitorder="little")
    nothing = np.empty(0, np.float32)
    changes = LogitChanges(np.empty(0, np.int64), nothing, nothing, nothing, mask)
    sampler = DraftSampler(hash_counters(ids), ids)
    assert sampler.sample(np.array([1, 3, 2], np.float32), Sampling(1.0), 4, 2, changes=changes) == ([5], 0.0)


def test_all_siblings_are_returned_if_enough_candidates_exist() -> None:
    sampler = DraftSampler(hash_counters(np.arange(SIZE)))
    for position in range(50):
        ids, _ = sampler.sample(row(position, 2.0), Sampling(temperature=1.0, seed=1), position, 4)
        assert len(set(ids)) == 4


def test_precomputed_noise_is_identical_and_bounded() -> None:
    sampling = Sampling(temperature=1.0, seed=9)
    ready, late = DraftSampler(hash_counters(np.arange(SIZE))), DraftSampler(hash_counters(np.arange(SIZE)))
    for start in range(0, 200, 7):
        ready.precompute_noise(sampling, range(start, start + 9))
        assert len(ready._noise) <= 60
        for position in range(start, start + 9):
            assert ready.sample(row(position, 2.0), sampling, position, 3) == late.sample(
                row(position, 2.0), sampling, position, 3
            )


def test_the_noise_is_gumbel() -> None:
    noise = np.concatenate(
        [DraftSampler(hash_counters(np.arange(SIZE)))._noise_at(3, position) for position in range(40)]
    )
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.05)
