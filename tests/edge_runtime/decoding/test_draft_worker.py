"""Shadow drafting: what the draft worker predicts next to a stream, and that the stream never waits for it."""

from __future__ import annotations

import asyncio

import pytest

from cloud_verifier.model.target import Target
from edge_runtime.decoding.draft_worker import DraftWorker, ThreadedDraftWorker
from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import EMPTY_PROPOSAL, OnnxDraft
from edge_runtime.planning.plan import UNRANKED, Conditions, Outcome, Plan
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from tests.conftest import serving

TEXT = "def read_config(path):\n"
SIBLINGS = 3
STREAM = Plan(0, continuation=48, siblings=SIBLINGS, shadow=True)


class RecordingPlanner:
    """Returns one plan and records the outcomes."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.outcomes: list[Outcome] = []

    def plan(self, conditions: Conditions) -> Plan:
        return self._plan

    def observe(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


async def stream(target: Target, draft: OnnxDraft, sampling: Sampling, plan: Plan) -> tuple[list[int], list[Outcome]]:
    planner = RecordingPlanner(plan)
    async with serving(target) as server, VerifierClient(server.url) as client:
        prompt = draft.tokenizer.encode(TEXT).ids
        generation = Generation(draft, client, prompt, sampling, max_new_tokens=48, planner=planner)
        async for _ in generation:
            pass
    return generation.ids, planner.outcomes


@pytest.mark.parametrize("sampling", [Sampling(ignore_eos=True), Sampling(0.7, seed=3, ignore_eos=True)])
async def test_shadow_guesses_equal_what_it_would_have_drafted(
    target_v1: Target, shipped_draft: OnnxDraft, sampling: Sampling
) -> None:
    ids, (outcome,) = await stream(target_v1, shipped_draft, sampling, STREAM)
    start = len(ids) - 48
    # The round does not wait for the predictions of its last frames.
    assert 0 < len(outcome.shadow_guesses) <= outcome.own_tokens == 48
    assert outcome.ahead_seconds > 0 and not outcome.drafted
    context = shipped_draft.new_context()
    for index, (confidence, rank) in enumerate(outcome.shadow_guesses):
        guess = context.propose_next(ids[: start + index], sampling, SIBLINGS)
        candidates = guess.tokens + guess.siblings.get(0, [])
        token = ids[start + index]
        assert rank == (candidates.index(token) if token in candidates else UNRANKED)
        assert confidence == pytest.approx(guess.confidences[0], abs=1e-5)


@pytest.mark.slow
async def test_without_watch_it_only_prefills(target_v1: Target, shipped_draft: OnnxDraft) -> None:
    _, rounds = await stream(
        target_v1, shipped_draft, Sampling(ignore_eos=True), Plan(0, continuation=24, draft_ahead=1)
    )
    assert [outcome.shadow_guesses for outcome in rounds] == [[], []]
    # The prompt has been prefilled during the first round.
    assert rounds[1].conditions.unread <= 24


async def test_stopping_does_not_wait_for_the_backlog(shipped_draft: OnnxDraft) -> None:
    """If the stream is faster than the draft, stopping drops the backlog: shadow drafting ends within a step."""
    worker = ThreadedDraftWorker(shipped_draft, [], Sampling())
    ids = shipped_draft.tokenizer.encode(TEXT).ids
    try:
        worker.start_shadow(ids, STREAM)
        worker.shadow(ids, [300] * 400)
        await asyncio.sleep(0.02)
        assert len(worker.stop_shadow()[0]) < 400
        await worker.wait_until_idle()
        assert worker.stop_shadow() == ([], 0.0)
        # Afterwards the draft is free for the next request.
        assert len((await worker.propose([*ids, 300], Plan(4), 4)).tokens) == 4
    finally:
        worker.close()


async def test_shadow_drafting_ends_at_the_draft_context(shipped_draft: OnnxDraft) -> None:
    worker = ThreadedDraftWorker(shipped_draft, [], Sampling())
    limit = shipped_draft.manifest.architecture.context
    try:
        worker.start_shadow([7] * (limit - 3), STREAM)
        worker.shadow([7] * (limit - 3), [9] * 10)
        assert worker._shadow and worker._shadow.job
        await asyncio.wrap_future(worker._shadow.job)
        watched, _ = worker.stop_shadow()
        assert len(watched) == 4
    finally:
        worker.close()


async def test_the_null_worker_drafts_nothing() -> None:
    worker = DraftWorker()
    assert worker.tokens_to_prefill([1, 2, 3]) == 3 and worker.tokens_drafted_ahead([1, 2, 3]) == 0
    assert await worker.propose([1], Plan(4), 4) == EMPTY_PROPOSAL
    assert await worker.draft_ahead([1], Plan(4, draft_ahead=2), EMPTY_PROPOSAL, 8) is None
    worker.start_shadow([1], STREAM)
    worker.shadow([1], [2, 3])
    assert worker.stop_shadow() == ([], 0.0)
