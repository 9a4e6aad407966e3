"""N-gram proposals: what they propose, how their acceptance is estimated, and that the output never changes."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from cloud_verifier.model.reference import generate_reference
from cloud_verifier.model.target import Target, load_model
from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.draft.sampler import DraftSampler
from edge_runtime.ngram_cache.index import NgramMatch
from edge_runtime.ngram_cache.lookup import MAX_VERSIONS, PRIOR_WEIGHTS, NgramCache, NgramLookup, NgramProposal
from edge_runtime.ngram_cache.store import NgramStore
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.protocol.sampling import Sampling, hash_counters
from edge_runtime.verifier.client import VerifierClient
from tests.conftest import serving

SIZE = 300
LOOP = [5, 6, 7, 8, 9, 10, 11, 12]
PROMPTS = ["import os\nimport sys\n\n", "class Queue:\n    def __init__(self", "def add(a, b):\n    return"]


def proposal_of(token: int, length: int = 16) -> NgramProposal:
    return NgramProposal(NgramMatch(token, length, 1.0, 9), [], False, False, list(PRIOR_WEIGHTS))


def row(seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(SIZE) * 2).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("trimmed", [False, True])
def test_the_proposed_token_gets_its_estimated_probability_and_the_others_share_the_rest(
    temperature: float, trimmed: bool
) -> None:
    ids = np.arange(0, 2 * SIZE, 2, dtype=np.int32) if trimmed else np.arange(SIZE, dtype=np.int32)
    sampler = DraftSampler(hash_counters(ids), ids if trimmed else None)
    drawn, expected_draws = 0, 0.0
    for position in range(200):
        logits, sampling = row(position), Sampling(temperature, seed=4)
        token = int(ids[np.argsort(logits)[position]])
        proposal = proposal_of(token)
        mass = np.exp((logits - logits.max()).astype(np.float64) / (temperature or 1.0))
        before = mass / mass.sum()
        at = int(np.flatnonzero(ids == token)[0])
        chosen, confidence = sampler.sample(logits, sampling, position, 3, proposal)
        plain, _ = sampler.sample(logits, sampling, position, 3)
        assert len(set(chosen)) == 3
        if proposal.acceptance > before[at]:
            drawn += chosen[0] == token
            expected_draws += proposal.acceptance
            first = int(np.flatnonzero(ids == chosen[0])[0])
            expected = (
                proposal.acceptance if first == at else before[first] * (1 - proposal.acceptance) / (1 - before[at])
            )
            assert confidence == pytest.approx(expected, rel=1e-3)
            # The order of the other tokens does not change.
            others = [token_ for token_ in chosen if token_ != token]
            assert others == [token_ for token_ in plain if token_ != token][: len(others)]
        else:
            assert chosen == plain
    assert expected_draws > 30
    if temperature:
        assert abs(drawn - expected_draws) < 4 * expected_draws**0.5
    else:
        assert drawn


def test_a_token_outside_a_trimmed_head_is_not_mixed_in() -> None:
    sampler = DraftSampler(hash_counters(np.arange(0, 40, 2)), np.arange(0, 40, 2, dtype=np.int32))
    for token in (3, 41, 39, 10**6):
        assert sampler.sample(row(1)[:20], Sampling(), 0, 2, proposal_of(token)) == sampler.sample(
            row(1)[:20], Sampling(), 0, 2
        )


def test_top_k_and_top_p_apply_after_mixing() -> None:
    sampler, logits = DraftSampler(hash_counters(np.arange(SIZE))), row(2)
    least_probable = int(logits.argmin())
    for sampling in (Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.1), Sampling(1.0, top_k=1, top_p=0.1)):
        assert sampler.sample(logits, sampling, 3, 2, proposal_of(least_probable))[0] == [least_probable]


def estimates_along(cache: NgramCache, text: list[int], version: str, draft_probability: float = 0.1) -> list[float]:
    """Run a lookup along `text` and return the estimated acceptance of every proposal."""
    lookup, estimates = NgramLookup(cache, 4096), []
    lookup.append(text[:2])
    for index in range(2, len(text)):
        proposal = lookup.propose(text[:index])
        if proposal:
            estimates.append(proposal.estimate_acceptance(draft_probability))
        lookup.append(text[index : index + 1], version)
    lookup.finish()
    return estimates


def test_the_estimate_follows_the_observed_acceptance() -> None:
    cache = NgramCache(SIZE)
    estimates = estimates_along(cache, LOOP * 40, "v1")
    assert estimates[-1] > 0.95 > estimates[0]
    # In these texts no continuation ever repeats.
    wrong = NgramCache(SIZE)
    estimates = estimates_along(wrong, [token for number in range(200) for token in (1, 2, 20 + number)], "v1", 0.9)
    assert estimates[-1] < 0.3 < 0.5 < estimates[0]


def test_the_same_history_gives_the_same_proposals(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    history = [rng.integers(0, 6, 60).tolist() for _ in range(20)]

    def replay(cache: NgramCache) -> list[float]:
        return [
            estimate
            for number, text in enumerate(history)
            for estimate in estimates_along(cache, text, f"v{number % 3}")
        ]

    first = replay(NgramCache(SIZE))
    stored = NgramCache(SIZE, NgramStore(tmp_path, "abc"))
    assert first == replay(stored) == replay(NgramCache(SIZE))
    # Nor does a restart change anything.
    assert estimates_along(NgramCache(SIZE, NgramStore(tmp_path, "abc")), history[3], "v1") == estimates_along(
        stored, history[3], "v1"
    )


def test_proposals_after_rejected_draft_tokens_are_not_learned_from() -> None:
    cache, rng = NgramCache(SIZE), np.random.default_rng(1)
    lookup = NgramLookup(cache, 4096)
    lookup.append(LOOP * 3)
    weights = list(cache._weights[""])
    for _ in range(50):
        proposal = lookup.propose([*LOOP * 3, 5, 6, 99, 5, 6, 7])
        assert proposal is not None
        proposal.estimate_acceptance(0.5)
    lookup.append([*LOOP, *rng.integers(100, 200, 50).tolist()], "v")
    assert cache._weights["v" if "v" in cache._weights else ""] == weights
    assert not lookup._proposals


def test_the_turns_of_a_conversation_are_stored_once() -> None:
    cache, text = NgramCache(SIZE), list(range(200))
    cache.add("v", text)
    for _ in range(5):
        text = [*text, 7, 8, 9]
        cache.add("v", text)
    assert cache.tokens < 201 + 5 * 25


def test_a_prompt_without_an_answer_is_not_stored() -> None:
    cache = NgramCache(SIZE)
    lookup = NgramLookup(cache, 4096)
    lookup.append(LOOP)
    lookup.finish()
    assert cache.tokens == 0


def test_cache_and_lookup_are_bounded() -> None:
    cache = NgramCache(SIZE, capacity=512)
    for number in range(100):
        cache.add(f"v{number}", list(range(number, number + 100)))
        estimates_along(cache, LOOP * 5, f"w{number}")
    assert cache.tokens == 512
    assert len(cache._weights) <= MAX_VERSIONS
    assert len(cache._starts) == len(cache._versions) < 60
    lookup = NgramLookup(cache, 64)
    lookup.append(LOOP)
    for index in range(300):
        lookup.propose([*LOOP, *LOOP[: index % 8], index])
        lookup.propose(LOOP * (2 + index % 9))
        lookup.append([index % 7], "v")
    assert len(lookup._proposals) < 200


@pytest.mark.slow
def test_concurrent_texts() -> None:
    cache = NgramCache(SIZE, capacity=1024)
    estimates: list[list[float]] = []
    threads = [
        threading.Thread(
            target=lambda n=number: estimates.extend(estimates_along(cache, LOOP * 20, f"v{n % 2}") for _ in range(10))
        )
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(estimates) == 60
    assert all(row[-1] > 0.9 for row in estimates)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_the_output_is_unchanged_and_repeated_text_is_accepted_more_often(
    temperature: float, family: Path, target_v1: Target, shipped_draft: OnnxDraft, tmp_path: Path
) -> None:
    model = load_model(family / "target-v1", "cpu", "float32")[0]
    cache, accepted = NgramCache(8192, NgramStore(tmp_path, "abc")), {}
    # Earlier texts may hold anything.
    rng = np.random.default_rng(3)
    for _ in range(30):
        cache.add("another", rng.integers(0, 8192, 200).tolist())
    plans = [Plan(6, siblings=2), Plan(2, siblings=2, draft_ahead=3, in_flight=2), Plan(8, continuation=4)]
    async with serving(target_v1) as server, VerifierClient(server.url) as client:
        for prompt, plan in zip(PROMPTS, plans, strict=True):
            ids: list[int] = shipped_draft.tokenizer.encode(prompt).ids
            sampling = Sampling(temperature, seed=21)
            expected = generate_reference(model, ids, sampling, 64, frozenset([0]))
            for turn in range(3):
                generation = Generation(
                    shipped_draft,
                    client,
                    ids,
                    sampling,
                    max_new_tokens=64,
                    planner=FixedPlanner(plan),
                    ngram_cache=cache if turn else None,
                )
                known = cache.tokens
                async for _ in generation:
                    pass
                # The draft thread stores the text some time later.
                for _ in range(30000):
                    if not turn or cache.tokens > known:
                        break
                    await asyncio.sleep(0.01)
                assert generation.ids[len(ids) :] == expected
                counted = accepted.setdefault(turn, [0, 0])
                counted[0] += generation.statistics.accepted
                counted[1] += generation.statistics.drafted
    rates = {turn: matched / drafted for turn, (matched, drafted) in accepted.items()}
    assert rates[2] > rates[0]
    assert any(record.version == generation.version for record in NgramStore(tmp_path, "abc").read())
