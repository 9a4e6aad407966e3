"""The draft beside a stream: what it makes of the cloud's tokens, and that nobody waits for it."""

from __future__ import annotations

import asyncio

import pytest

from cloud_verifier.model.target import Target
from edge_runtime.decoding.draft_worker import Drafter
from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import UNNAMED, Conditions, Outcome, Plan
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from tests.conftest import serving

TEXT = "def read_config(path):\n"
SIBLINGS = 3
STREAM = Plan(0, own=48, siblings=SIBLINGS, watch=True)


class Listening:
    """Plays one plan, and keeps what came of it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.outcomes: list[Outcome] = []

    def plan(self, conditions: Conditions) -> Plan:
        return self._plan

    def observe(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


async def streamed(target: Target, draft: OnnxDraft, sampling: Sampling, plan: Plan) -> tuple[list[int], list[Outcome]]:
    planner = Listening(plan)
    async with serving(target) as server, VerifierClient(server.url) as client:
        prompt = draft.tokenizer.encode(TEXT).ids
        generation = Generation(draft, client, prompt, sampling, max_new_tokens=48, planner=planner)
        async for _ in generation:
            pass
    return generation.ids, planner.outcomes


@pytest.mark.parametrize("sampling", [Sampling(ignore_eos=True), Sampling(0.7, seed=3, ignore_eos=True)])
async def test_it_guesses_what_it_would_have_drafted(
    target_v1: Target, shipped_draft: OnnxDraft, sampling: Sampling
) -> None:
    ids, (outcome,) = await streamed(target_v1, shipped_draft, sampling, STREAM)
    start = len(ids) - 48
    # Frames come every 50 ms, and those that come last are not waited for.
    assert 0 < len(outcome.watched) <= outcome.own == 48
    assert outcome.ahead_seconds > 0 and not outcome.drafted
    context = shipped_draft.context()
    for index, (confidence, rank) in enumerate(outcome.watched):
        guess = context.propose(ids[: start + index], 1, sampling, siblings=SIBLINGS)
        named = guess.tokens + guess.siblings.get(0, [])
        token = ids[start + index]
        assert rank == (named.index(token) if token in named else UNNAMED)
        assert confidence == pytest.approx(guess.confidences[0], abs=1e-5)


async def test_it_only_reads_where_it_is_not_to_guess(target_v1: Target, shipped_draft: OnnxDraft) -> None:
    _, rounds = await streamed(target_v1, shipped_draft, Sampling(ignore_eos=True), Plan(0, own=24, ahead=1))
    assert [outcome.watched for outcome in rounds] == [[], []]
    # The prompt is read by then.
    assert rounds[1].conditions.unread <= 24


async def test_nobody_waits_for_it(shipped_draft: OnnxDraft) -> None:
    """It is left behind by a text that is said faster than it can read, and ends within a step."""
    drafter = Drafter(shipped_draft, Sampling())
    ids = shipped_draft.tokenizer.encode(TEXT).ids
    try:
        drafter.watch(ids, STREAM)
        drafter.see(ids, [300] * 400)
        await asyncio.sleep(0.02)
        assert len(drafter.look_away()[0]) < 400
        await drafter.rest()
        assert drafter.look_away() == ([], 0.0)
        # Behind it the draft is free for what is asked of it.
        assert len((await drafter.propose([*ids, 300], Plan(4), 4)).tokens) == 4
    finally:
        drafter.close()


async def test_a_text_beyond_the_draft_s_context_is_not_watched(shipped_draft: OnnxDraft) -> None:
    drafter = Drafter(shipped_draft, Sampling())
    limit = shipped_draft.manifest.architecture.context
    try:
        drafter.watch([7] * (limit - 3), STREAM)
        drafter.see([7] * (limit - 3), [9] * 10)
        assert drafter._watch and drafter._watch.working
        await asyncio.wrap_future(drafter._watch.working)
        watched, _ = drafter.look_away()
        assert len(watched) == 4
    finally:
        drafter.close()
