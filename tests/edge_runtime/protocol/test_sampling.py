"""Noise, logits warping, coupled sampling and the acceptance rule, in numpy.

`tests/cloud_verifier/model/test_shared_sampling.py` compares them with torch's and transformers' forms.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.protocol import sampling as sampling_module
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import (
    MASK_64,
    CoupledSampler,
    Sampling,
    accepted_length,
    filter_candidates,
    uniform_noise,
)

Logits = npt.NDArray[np.float32]


def chi_square_p_value(observed: npt.ArrayLike, expected: npt.ArrayLike | None = None) -> float:
    """The probability of counts at least as unlikely, by Wilson and Hilferty's approximation (1931).

    Without scipy: transformers imports it at each start of a process where it is installed, which takes half a second.

    Args:
        expected: counts; equal ones if None.
    """
    counts = np.asarray(observed, dtype=np.float64)
    means = np.full(counts.size, counts.mean()) if expected is None else np.asarray(expected, dtype=np.float64)
    freedom = counts.size - 1
    spread = 2 / (9 * freedom)
    statistic = float(((counts - means) ** 2 / means).sum())
    return 1 - NormalDist(1 - spread, math.sqrt(spread)).cdf((statistic / freedom) ** (1 / 3))


VECTORS = [
    (0, 0, 0, 0.13870941014555427),
    (1, 0, 0, 0.6935121390102293),
    (0, 1, 0, 0.18383979100743952),
    (0, 0, 1, 0.9711020828012883),
    (42, 1000, 8191, 0.6874398168779184),
    (2**64 - 1, 2**31 - 1, 151935, 0.6096496063812243),
]

seeds = st.integers(0, 2**64 - 1)
positions = st.integers(0, 2**31 - 1)
token_ids = st.integers(0, 2**31 - 1)
temperatures = st.sampled_from([0.001, 0.3, 0.7, 1.0, 2.5, 100.0])
samplings = st.one_of(
    st.just(Sampling()),
    st.builds(Sampling, temperature=temperatures, seed=seeds),
    st.builds(Sampling, temperature=temperatures, top_k=st.integers(0, 300), seed=seeds),
    st.builds(Sampling, temperature=temperatures, top_p=st.floats(0.01, 1.0), seed=seeds),
    st.builds(Sampling, temperature=temperatures, top_k=st.integers(1, 50), top_p=st.floats(0.3, 0.99), seed=seeds),
    st.builds(Sampling, temperature=temperatures, min_p=st.floats(0.001, 1.0), seed=seeds),
    st.builds(
        Sampling,
        temperature=temperatures,
        top_k=st.integers(1, 50),
        top_p=st.floats(0.3, 1.0),
        min_p=st.just(0.1),
        seed=seeds,
    ),
)


@st.composite
def logits_rows(draw: st.DrawFn, largest: int = 9000) -> Logits:
    """Logits of any size, flat to peaked, from a drawn seed: a list strategy is too slow for vocabularies."""
    size = draw(st.one_of(st.integers(2, 200), st.integers(2, largest)))
    scale = draw(st.sampled_from([0.01, 1.0, 5.0, 40.0]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    return (generator.standard_normal(size) * scale).astype(np.float32)


def hash_in_integers(seed: int, position: int, token: int) -> float:
    """The definition in Python integers, independent of the code under test."""

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    golden = 0x9E3779B97F4A7C15
    key = mix((mix((seed + golden) % 2**64) + (position + 1) * golden) % 2**64)
    return ((mix((key + (token + 1) * golden) % 2**64) >> 12) + 0.5) * 2.0**-52


def brute_force(logits: Logits, sampling: Sampling, position: int, count: int) -> tuple[list[int], list[float]]:
    """The `count` best candidates by definition: compute all scores and sort."""
    ids = np.arange(logits.size)
    if sampling.temperature == 0.0:
        scores = logits.astype(np.float64)
    else:
        scaled = logits.astype(np.float64) / sampling.temperature
        keep = np.ones(logits.size, dtype=np.bool_)
        if 0 < sampling.top_k < logits.size:
            keep &= logits >= np.sort(logits)[-sampling.top_k]
        if sampling.top_p < 1.0:
            mass = np.where(keep, np.exp(scaled - scaled.max()), 0.0)
            mass /= mass.sum()
            order = np.lexsort((ids, -mass))
            before = np.cumsum(mass[order]) - mass[order]
            nucleus = order[1.0 - before > 1.0 - sampling.top_p]
            keep &= np.isin(ids, [*nucleus, order[0]])
        if sampling.min_p:
            keep &= scaled >= scaled.max() + math.log(sampling.min_p)
        scores = np.where(keep, scaled - np.log(-np.log(uniform_noise(sampling.seed, position, ids))), -np.inf)
    best = [int(i) for i in np.lexsort((ids, -scores))[:count] if scores[i] > -np.inf]
    return best, [float(scores[i]) for i in best]


@pytest.mark.parametrize(("seed", "position", "token", "expected"), VECTORS)
def test_published_vectors(seed: int, position: int, token: int, expected: float) -> None:
    assert uniform_noise(seed, position, np.array([token]))[0] == expected
    assert hash_in_integers(seed, position, token) == expected


@given(seeds, positions, st.lists(token_ids, min_size=1, max_size=20))
def test_noise_is_that_of_the_definition(seed: int, position: int, ids: list[int]) -> None:
    assert uniform_noise(seed, position, np.array(ids)).tolist() == [hash_in_integers(seed, position, id) for id in ids]


def id_with_bits(bits: int) -> int:
    """The 64-bit id whose hash at seed 0, position 0 is `bits`; every step of the hash is invertible."""

    def unshift(z: int, by: int) -> int:
        out = z
        for _ in range(64 // by):
            out = z ^ out >> by
        return out

    z = unshift(bits, 31)
    z = unshift(z * pow(sampling_module.MIX_MULTIPLIER_2, -1, 2**64) & MASK_64, 27)
    z = unshift(z * pow(sampling_module.MIX_MULTIPLIER_1, -1, 2**64) & MASK_64, 30)
    return ((z - sampling_module.position_key(0, 0)) * pow(sampling_module.GOLDEN_GAMMA, -1, 2**64) - 1) & MASK_64


@pytest.mark.parametrize(("bits", "expected"), [(0, 2.0**-53), (MASK_64, 1 - 2.0**-53), (MASK_64 >> 1, 0.5 - 2.0**-53)])
def test_extreme_bits_stay_strictly_inside(bits: int, expected: float) -> None:
    token = id_with_bits(bits)
    in_numpy = uniform_noise(0, 0, np.array([token], dtype=np.uint64))
    assert in_numpy[0] == expected
    assert 0.0 < expected < 1.0
    assert np.isfinite(sampling_module.gumbel_noise(in_numpy)).all()


@pytest.mark.parametrize("axis", ["ids", "positions", "seeds"])
def test_uniforms_are_uniform_along_every_axis(axis: str) -> None:
    count = 200_000
    match axis:
        case "ids":
            u = uniform_noise(7, 11, np.arange(count))
        case "positions":
            u = np.concatenate([uniform_noise(7, position, np.array([13])) for position in range(count // 4)])
        case _:
            u = np.array([hash_in_integers(seed, 11, 13) for seed in range(count // 4)])
    assert u.min() > 0.0
    assert u.max() < 1.0
    assert chi_square_p_value(np.histogram(u, bins=256, range=(0, 1))[0]) > 1e-4
    # Neighbors are independent: pairs fill the unit square evenly too.
    pairs = np.histogram2d(u[:-1:2], u[1::2], bins=16, range=((0, 1), (0, 1)))[0]
    assert chi_square_p_value(pairs.ravel()) > 1e-4


def test_ties_with_the_kth_logit_are_kept() -> None:
    logits = np.array([1, 3, 2, 2, 2, 0], dtype=np.float32)
    assert filter_candidates(logits, Sampling(1.0, top_k=2)).tolist() == [1, 2, 3, 4]


def test_the_nucleus_prefers_lower_ids_among_equal_probabilities() -> None:
    assert filter_candidates(np.zeros(8, dtype=np.float32), Sampling(1.0, top_p=0.5)).tolist() == [0, 1, 2, 3]
    assert filter_candidates(np.zeros(4096, dtype=np.float32), Sampling(1.0, top_p=0.25)).tolist() == list(range(1024))


@pytest.mark.slow
@given(logits_rows(), samplings, positions, st.integers(1, 4), st.sampled_from([None, 0, 1]), st.integers(0, 9))
@settings(max_examples=300)
def test_rank_equals_the_definition(
    logits: Logits, sampling: Sampling, position: int, count: int, decimals: int | None, excluded: int
) -> None:
    if decimals is not None and sampling.top_p == 1.0:
        logits = logits.round(decimals)  # many ties
    # Up to nine of ten tokens are excluded, as by a grammar.
    logits[np.arange(logits.size) % 10 < excluded] = -np.inf
    if not np.isfinite(logits).any():
        logits[-1] = 0.0
    ranked = CoupledSampler(logits.size).rank(logits, sampling, position, count)
    ids, scores = brute_force(logits, sampling, position, count)
    assert ranked.ids == ids
    assert ranked.scores == pytest.approx(scores, rel=1e-12)


def test_greedy_ties_go_to_the_lower_id() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    logits[[500, 20, 900]] = 1.0
    assert CoupledSampler(1000).rank(logits, Sampling(), 0, count=4).ids == [20, 500, 900, 0]


def test_an_improbable_token_wins_with_extreme_noise() -> None:
    """A peak and a flat tail of 100k tokens: the shortcut in `rank` must not lose the mass of the tail."""
    size, peak = 100_000, 20
    logits = np.full(size, -5.0, dtype=np.float32)
    logits[:peak] = 5.0
    chooser = CoupledSampler(size)
    outside = sum(chooser.rank(logits, Sampling(1.0, seed=seed), 0).ids[0] >= peak for seed in range(200))
    share = (size - peak) / (size - peak + peak * math.exp(10))
    assert chi_square_p_value([outside, 200 - outside], [200 * share, 200 * (1 - share)]) > 1e-4


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.5), Sampling(1.0, top_k=5), Sampling(1.5, top_p=0.8)], ids=str
)
def test_sampled_frequencies_follow_softmax(sampling: Sampling) -> None:
    logits = (np.random.default_rng(1).standard_normal(200) * 2).astype(np.float32)
    chooser, draws = CoupledSampler(logits.size), 6000
    kept = filter_candidates(logits, sampling)
    mass = np.exp(logits[kept].astype(np.float64) / sampling.temperature)
    expected = draws * mass / mass.sum()
    counts = np.zeros(logits.size)
    for seed in range(draws):
        variant = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed)
        counts[chooser.rank(logits, variant, 5).ids[0]] += 1
    assert counts.sum() == counts[kept].sum()
    rare = expected < 10  # pooled: chi-square needs full bins
    observed = [*counts[kept][~rare], counts[kept][rare].sum()]
    pooled = [*expected[~rare], expected[rare].sum()]
    filled = np.array(pooled) > 0
    assert chi_square_p_value(np.array(observed)[filled], np.array(pooled)[filled]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("difference", [0.0, 0.5, 2.0])
def test_the_acceptance_rate_matches_the_theorem(difference: float) -> None:
    """Pr[accept] = sum_i 1 / sum_j max(p_j/p_i, q_j/q_i), which is at least (1 - TV) / (1 + TV)."""
    generator = np.random.default_rng(2)
    target = (generator.standard_normal(40) * 2).astype(np.float32)
    draft = (target + difference * generator.standard_normal(40)).astype(np.float32)
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (target, draft))
    promised = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in range(p.size))
    variation = np.abs(p - q).sum() / 2
    assert promised >= (1 - variation) / (1 + variation) - 1e-12
    chooser, draws = CoupledSampler(p.size), 6000
    accepted = 0
    for seed in range(draws):
        sampling = Sampling(1.0, seed=seed)
        accepted += chooser.rank(target, sampling, 9).ids == chooser.rank(draft, sampling, 9).ids
    assert accepted / draws == pytest.approx(promised, abs=4 * math.sqrt(0.25 / draws))
    if difference == 0.0:
        assert accepted == draws


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6))
def test_accepted_length_is_the_common_prefix(draft: list[int], chosen: list[int]) -> None:
    length = accepted_length(draft, chosen)
    assert draft[:length] == chosen[:length]
    assert length == min(len(draft), len(chosen)) or draft[length] != chosen[length]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": 101.0},
        {"temperature": 1e-4},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**64},
        {"min_p": -0.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"logit_bias": {5: 101.0}},
        {"logit_bias": {5: math.nan}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        {"min_tokens": -1},
        {"stop_ids": [2**31]},
        {"stop_ids": list(range(257))},
        {"grammar": "x" * (1 << 19)},
    ],
    ids=lambda wrong: str(wrong)[:60],
)
def test_invalid_sampling_parameters_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_sampling_parameters_are_values() -> None:
    same = [Sampling(1.0, logit_bias=bias, stop_ids=[4, 5]) for bias in ({1: 2.0, 3: 4.0}, {3: 4.0, 1: 2.0})]
    assert len({*same}) == 1
    assert len({*same, Sampling(1.0, stop_ids=[4, 5]), Sampling(1.0)}) == 3


def test_the_bounds_of_sampling_parameters_are_valid() -> None:
    assert Sampling(100.0, 0, 1.0, 2**64 - 1).seed == MASK_64
    assert Sampling(0.001, top_p=1e-9).top_p == 1e-9


@pytest.mark.parametrize("prompt", [[], [300], [-1], [5, 300, 1]], ids=str)
def test_a_prompt_outside_the_vocabulary_is_refused(prompt: list[int]) -> None:
    with pytest.raises(InputError, match=r"prompt is empty|outside the vocabulary of 300"):
        sampling_module.validate_prompt(prompt, 300)


def test_the_error_names_a_negative_id() -> None:
    with pytest.raises(InputError, match="-1"):
        sampling_module.validate_prompt([-1, 7], 300)
