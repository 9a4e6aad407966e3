"""The draft's choice beside the exact one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.draft.sampler import Guesser
from edge_runtime.protocol.sampling import Chooser, Sampling, candidates, confidence, counters

SIZE = 3000
CHOOSER = Chooser(SIZE)
NEAR = 0.01

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 50]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**63),
)


def row(seed: int, spread: float) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(SIZE) * spread).astype(np.float32)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.5, 8.0), samplings, st.integers(0, 4000), st.integers(1, 5))
def test_guesses_what_the_exact_choice_is(
    seed: int, spread: float, sampling: Sampling, position: int, count: int
) -> None:
    logits = row(seed, spread)
    ids, sure = Guesser(counters(np.arange(SIZE))).guess(logits, sampling, position, count)
    exact = CHOOSER.rank(logits, sampling, position, count + 1)
    kept = candidates(logits, sampling) if sampling.temperature else np.array(exact.ids)
    mass = np.exp((logits - logits.max()).astype(np.float64) / (sampling.temperature or 1.0))
    close = any(a - b < NEAR for a, b in zip(exact.scores, exact.scores[1:], strict=False))
    # Of tokens that are equally probable, or nearly so, the other may be the last that top-p keeps.
    edge = mass[kept].min()
    close |= bool(np.any((mass != edge) & (abs(mass / edge - 1.0) < 1e-3))) or int((mass == edge).sum()) > 1
    if not close:
        assert set(ids) <= set(kept.tolist())
        assert ids == exact.ids[: len(ids)]
        assert len(ids) == min(count, kept.size) or sampling.top_p < 1.0
    assert sure == pytest.approx(confidence(logits, ids[0], sampling.temperature), rel=1e-4)


def test_all_siblings_come_where_there_are_enough() -> None:
    guesser = Guesser(counters(np.arange(SIZE)))
    for position in range(50):
        ids, _ = guesser.guess(row(position, 2.0), Sampling(temperature=1.0, seed=1), position, 4)
        assert len(set(ids)) == 4


def test_noise_made_beforehand_is_the_same_and_is_bounded() -> None:
    sampling = Sampling(temperature=1.0, seed=9)
    ready, late = Guesser(counters(np.arange(SIZE))), Guesser(counters(np.arange(SIZE)))
    for start in range(0, 200, 7):
        ready.prepare(sampling, range(start, start + 9))
        assert len(ready._noise) <= 60
        for position in range(start, start + 9):
            assert ready.guess(row(position, 2.0), sampling, position, 3) == late.guess(
                row(position, 2.0), sampling, position, 3
            )


def test_the_noise_is_gumbels() -> None:
    noise = np.concatenate([Guesser(counters(np.arange(SIZE)))._noise_at(3, position) for position in range(40)])
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.05)
