"""What a memory proposes, how far it is believed, and that it changes no text."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from cloud_verifier.model.reference import decode_alone
from cloud_verifier.model.target import Target, load_model
from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.draft.sampler import Guesser
from edge_runtime.ngram_cache.index import Match
from edge_runtime.ngram_cache.lookup import PRIOR, VERSIONS, Hint, Memory, Recall
from edge_runtime.ngram_cache.store import Store
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.protocol.sampling import Sampling, counters
from edge_runtime.verifier.client import VerifierClient
from tests.conftest import serving

SIZE = 300
LOOP = [5, 6, 7, 8, 9, 10, 11, 12]
PROMPTS = ["import os\nimport sys\n\n", "class Queue:\n    def __init__(self", "def add(a, b):\n    return"]


def hint_of(token: int, length: int = 16) -> Hint:
    return Hint(Match(token, length, 1.0, 9), [], False, False, list(PRIOR))


def row(seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(SIZE) * 2).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("trimmed", [False, True])
def test_a_token_gets_its_chance_and_the_others_share_the_rest(temperature: float, trimmed: bool) -> None:
    ids = np.arange(0, 2 * SIZE, 2, dtype=np.int32) if trimmed else np.arange(SIZE, dtype=np.int32)
    guesser = Guesser(counters(ids), ids if trimmed else None)
    drawn, expecting = 0, 0.0
    for position in range(200):
        logits, sampling = row(position), Sampling(temperature, seed=4)
        token = int(ids[np.argsort(logits)[position]])
        hint = hint_of(token)
        mass = np.exp((logits - logits.max()).astype(np.float64) / (temperature or 1.0))
        before = mass / mass.sum()
        at = int(np.flatnonzero(ids == token)[0])
        chosen, sure = guesser.guess(logits, sampling, position, 3, hint)
        plain, _ = guesser.guess(logits, sampling, position, 3)
        assert len(set(chosen)) == 3
        if hint.chance > before[at]:
            drawn += chosen[0] == token
            expecting += hint.chance
            first = int(np.flatnonzero(ids == chosen[0])[0])
            expected = hint.chance if first == at else before[first] * (1 - hint.chance) / (1 - before[at])
            assert sure == pytest.approx(expected, rel=1e-3)
            # The others are as they were among themselves.
            others = [token_ for token_ in chosen if token_ != token]
            assert others == [token_ for token_ in plain if token_ != token][: len(others)]
        else:
            assert chosen == plain
    assert expecting > 30
    if temperature:
        assert abs(drawn - expecting) < 4 * expecting**0.5
    else:
        assert drawn


def test_what_the_draft_cannot_name_is_not_proposed() -> None:
    guesser = Guesser(counters(np.arange(0, 40, 2)), np.arange(0, 40, 2, dtype=np.int32))
    for token in (3, 41, 39, 10**6):
        assert guesser.guess(row(1)[:20], Sampling(), 0, 2, hint_of(token)) == guesser.guess(
            row(1)[:20], Sampling(), 0, 2
        )


def test_top_k_and_top_p_count_with_the_memory() -> None:
    guesser, logits = Guesser(counters(np.arange(SIZE))), row(2)
    least = int(logits.argmin())
    for sampling in (Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.1), Sampling(1.0, top_k=1, top_p=0.1)):
        assert guesser.guess(logits, sampling, 3, 2, hint_of(least))[0] == [least]


def told(memory: Memory, text: list[int], version: str, draft_probability: float = 0.1) -> list[float]:
    """The chances that hints are given along a text."""
    recall, chances = Recall(memory, 4096), []
    recall.learn(text[:2])
    for index in range(2, len(text)):
        hint = recall.hint(text[:index])
        if hint:
            chances.append(hint.chance_beside(draft_probability))
        recall.learn(text[index : index + 1], version)
    recall.end()
    return chances


def test_it_is_believed_as_it_is_right() -> None:
    memory = Memory(SIZE)
    chances = told(memory, LOOP * 40, "v1")
    assert chances[-1] > 0.95 > chances[0]
    # In these texts what followed once never follows again.
    wrong = Memory(SIZE)
    chances = told(wrong, [token for number in range(200) for token in (1, 2, 20 + number)], "v1", 0.9)
    assert chances[-1] < 0.3 < 0.5 < chances[0]


def test_the_same_history_gives_the_same_hints(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    history = [rng.integers(0, 6, 60).tolist() for _ in range(20)]

    def play(memory: Memory) -> list[float]:
        return [chance for number, text in enumerate(history) for chance in told(memory, text, f"v{number % 3}")]

    first = play(Memory(SIZE))
    kept = Memory(SIZE, Store(tmp_path, "abc"))
    assert first == play(kept) == play(Memory(SIZE))
    # A restart changes nothing, either.
    assert told(Memory(SIZE, Store(tmp_path, "abc")), history[3], "v1") == told(kept, history[3], "v1")


def test_guesses_behind_what_was_not_said_teach_nothing() -> None:
    memory, rng = Memory(SIZE), np.random.default_rng(1)
    recall = Recall(memory, 4096)
    recall.learn(LOOP * 3)
    weights = list(memory._weights[""])
    for _ in range(50):
        hint = recall.hint([*LOOP * 3, 5, 6, 99, 5, 6, 7])
        assert hint is not None
        hint.chance_beside(0.5)
    recall.learn([*LOOP, *rng.integers(100, 200, 50).tolist()], "v")
    assert memory._weights["v" if "v" in memory._weights else ""] == weights
    assert not recall._hints


def test_a_conversation_is_remembered_once() -> None:
    memory, text = Memory(SIZE), list(range(200))
    memory.add("v", text)
    for _ in range(5):
        text = [*text, 7, 8, 9]
        memory.add("v", text)
    assert memory.tokens < 201 + 5 * 25


def test_an_answer_that_never_came_is_not_remembered() -> None:
    memory = Memory(SIZE)
    recall = Recall(memory, 4096)
    recall.learn(LOOP)
    recall.end()
    assert memory.tokens == 0


def test_it_is_bounded_whatever_comes() -> None:
    memory = Memory(SIZE, capacity=512)
    for number in range(100):
        memory.add(f"v{number}", list(range(number, number + 100)))
        told(memory, LOOP * 5, f"w{number}")
    assert memory.tokens == 512
    assert len(memory._weights) <= VERSIONS
    assert len(memory._starts) == len(memory._versions) < 60
    recall = Recall(memory, 64)
    recall.learn(LOOP)
    for index in range(300):
        recall.hint([*LOOP, *LOOP[: index % 8], index])
        recall.hint(LOOP * (2 + index % 9))
        recall.learn([index % 7], "v")
    assert len(recall._hints) < 200


def test_several_answers_at_once() -> None:
    memory = Memory(SIZE, capacity=1024)
    chances: list[list[float]] = []
    threads = [
        threading.Thread(
            target=lambda n=number: chances.extend(told(memory, LOOP * 20, f"v{n % 2}") for _ in range(10))
        )
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(chances) == 60
    assert all(row[-1] > 0.9 for row in chances)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
async def test_the_text_is_the_same_and_what_was_said_before_is_guessed(
    temperature: float, family: Path, target_v1: Target, shipped_draft: OnnxDraft, tmp_path: Path
) -> None:
    model = load_model(family / "target-v1", "cpu", "float32")[0]
    memory, accepted = Memory(8192, Store(tmp_path, "abc")), {}
    # What it remembers may be anything.
    rng = np.random.default_rng(3)
    for _ in range(30):
        memory.add("another", rng.integers(0, 8192, 200).tolist())
    plans = [Plan(6, siblings=2), Plan(2, siblings=2, ahead=3, in_flight=2), Plan(8, own=4)]
    async with serving(target_v1) as server, VerifierClient(server.url) as client:
        for prompt, plan in zip(PROMPTS, plans, strict=True):
            ids: list[int] = shipped_draft.tokenizer.encode(prompt).ids
            sampling = Sampling(temperature, seed=21)
            expected = decode_alone(model, ids, sampling, 64, frozenset([0]))
            for turn in range(3):
                generation = Generation(
                    shipped_draft,
                    client,
                    ids,
                    sampling,
                    max_new_tokens=64,
                    planner=FixedPlanner(plan),
                    memory=memory if turn else None,
                )
                known = memory.tokens
                async for _ in generation:
                    pass
                # It is taken down in the draft's thread.
                for _ in range(3000):
                    if not turn or memory.tokens > known:
                        break
                    await asyncio.sleep(0.01)
                assert generation.ids[len(ids) :] == expected
                counted = accepted.setdefault(turn, [0, 0])
                counted[0] += generation.statistics.accepted
                counted[1] += generation.statistics.drafted
    rates = {turn: right / drafted for turn, (right, drafted) in accepted.items()}
    assert rates[2] > rates[0]
    assert any(record.version == generation.version for record in Store(tmp_path, "abc").read())
