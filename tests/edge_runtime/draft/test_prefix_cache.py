"""KV caches of ended texts: what the next text takes, copies and leaves, and that its drafts do not change."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cloud_verifier.model.target import Target
from edge_runtime.decoding import Generation
from edge_runtime.draft.model import DraftContext, OnnxDraft
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier import VerifierClient
from tests.conftest import serving

CHAT = [40, 41, 42, 50, 60, 61, 62, 63, 70, 71]
SAMPLINGS = [Sampling(), Sampling(0.8, seed=3)]


@pytest.fixture
def draft(tiny_bundle: Path) -> OnnxDraft:
    """A draft of either kind of graph, with nothing in its prefix cache."""
    return OnnxDraft.load(tiny_bundle, threads=1, verify=False)


def end_text(draft: OnnxDraft, ids: list[int]) -> None:
    context = draft.new_context()
    context.prefill(ids)
    context.close()


def begin_text(draft: OnnxDraft, ids: list[int]) -> DraftContext:
    context = draft.new_context()
    context.reuse_prefix(ids)
    return context


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", [[*CHAT, 5, 6], CHAT, CHAT[:7], [*CHAT[:8], 9], [*CHAT[:2], 9, 9], [9, 9]], ids=str)
def test_drafts_after_a_reused_prefix_are_the_same(draft: OnnxDraft, sampling: Sampling, prompt: list[int]) -> None:
    end_text(draft, CHAT)
    context = begin_text(draft, prompt)
    reused = len(context.ids)
    assert context.ids == prompt[:reused]
    assert context.tokens_to_prefill(prompt) == len(prompt) - reused
    assert reused == sum(1 for index in range(len(prompt)) if prompt[: index + 1] == CHAT[: index + 1])
    fresh = draft.new_context().propose(prompt, 6, sampling)
    assert context.propose(prompt, 6, sampling).tokens == fresh.tokens


def test_two_texts_with_one_prefix_do_not_disturb_each_other(draft: OnnxDraft) -> None:
    end_text(draft, CHAT)
    # This one shares little of the chat: the cache is copied, and stays for the chat's next turn.
    other = begin_text(draft, [*CHAT[:3], 7, 8])
    chat = begin_text(draft, [*CHAT, 7])
    assert (len(other.ids), len(chat.ids), len(draft.prefix_cache)) == (3, 10, 0)
    for context, ids in ((other, [*CHAT[:3], 7, 8]), (chat, [*CHAT, 7])):
        assert context.propose(ids, 5, Sampling()).tokens == draft.new_context().propose(ids, 5, Sampling()).tokens
    assert begin_text(draft, CHAT).ids == []


def test_a_longer_text_replaces_its_beginning(draft: OnnxDraft) -> None:
    for ids in (CHAT[:4], [9, 9, 9], CHAT, []):
        end_text(draft, ids)
    assert [kept.ids for kept in draft.prefix_cache._kept] == [[9, 9, 9], CHAT]


def test_the_least_recently_used_caches_go_beyond_the_bound(draft: OnnxDraft) -> None:
    end_text(draft, CHAT)
    size = draft.prefix_cache.used_bytes
    assert size > 0
    draft.prefix_cache.max_bytes = 3 * size
    for first in (1, 2):
        end_text(draft, [first] * len(CHAT))
    # Copied from, and thereby used.
    assert begin_text(draft, CHAT[:2]).ids == CHAT[:2]
    end_text(draft, [3] * len(CHAT))
    assert [kept.ids[0] for kept in draft.prefix_cache._kept] == [2, CHAT[0], 3]
    assert draft.prefix_cache.used_bytes <= 3 * size
    draft.prefix_cache.max_bytes = 0
    end_text(draft, [4, 4])
    assert len(draft.prefix_cache) == 0


def test_a_copy_is_as_large_as_its_text_needs(draft: OnnxDraft) -> None:
    """Beyond the first buffer of the fused graph, which is doubled on demand."""
    ids = [(7 * index) % 250 + 1 for index in range(400)]
    end_text(draft, ids)
    copied, prompt = begin_text(draft, ids[:150]), [*ids[:150], 5]
    assert len(draft.prefix_cache) == 1
    assert copied.propose(prompt, 4, Sampling()).tokens == draft.new_context().propose(prompt, 4, Sampling()).tokens
    end_text(draft, [*ids, 5])
    longer = begin_text(draft, [*ids, 5, 6])
    assert len(longer.ids) == 401


@pytest.mark.slow
async def test_the_next_turn_finds_its_history_on_both_ends(target_v1: Target, family: Path) -> None:
    draft = OnnxDraft.load(family / "bundle", threads=1)
    sampling = Sampling(ignore_eos=True)
    async with serving(target_v1) as server, VerifierClient(server.url) as client:

        async def generate(prompt: list[int]) -> Generation:
            planner = FixedPlanner(Plan(3, continuation=2))
            generation = Generation(draft, client, prompt, sampling, max_new_tokens=12, planner=planner)
            assert generation._worker.tokens_to_prefill(prompt) <= unread
            async for _ in generation:
                pass
            return generation

        prompt = draft.tokenizer.encode("def read_config(path):\n" * 4).ids
        unread = len(prompt)
        first = await generate(prompt)
        assert first.statistics.cached_prompt_tokens == 0
        while not len(draft.prefix_cache):  # noqa: ASYNC110 - the draft's thread sets it
            await asyncio.sleep(0.001)
        # The last verified tokens may not have been drafted, and the draft of the last round may have been wrong.
        unread = 2 + 12
        second = await generate([*first.ids, *prompt[:2]])
        assert len(prompt) <= second.statistics.cached_prompt_tokens < len(first.ids)


def test_the_cache_of_another_owner_is_not_taken(draft: OnnxDraft) -> None:
    context = draft.new_context()
    context.reuse_prefix(CHAT, "kitchen")
    context.prefill(CHAT)
    context.close()
    lengths = []
    for owner in ("garage", "", "kitchen"):
        other = draft.new_context()
        other.reuse_prefix([*CHAT, 5], owner)
        lengths.append(len(other.ids))
    assert lengths == [0, 0, len(CHAT)]
