"""Continuous batching: what joins a forward, prefill in chunks and in turns, and how long a forward waits."""

from __future__ import annotations

import asyncio

import pytest

from cloud_verifier.engine.sessions import Session
from cloud_verifier.model.target import Target
from edge_runtime.protocol.messages import PROTOCOL_VERSION, RoundRequest
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.engine.recording_target import ENDLESS, RecordingTarget, running_scheduler, submit_opening
from tests.cloud_verifier.protocol_client import TIMEOUT_SECONDS
from tests.models import VOCABULARY_SIZE


async def test_waiting_rounds_share_a_forward(tiny: Target) -> None:
    target = RecordingTarget(tiny)
    async with running_scheduler(target) as scheduler:
        target.may_run.clear()
        replies = [
            submit_opening(scheduler, target, prompt=[7], draft=[5] * k, siblings={0: [9]} if k else {})[1]
            for k in range(5)
        ]
        await asyncio.sleep(0.1)
        target.may_run.set()
        for reply in replies:
            await reply.result()
        # The first forward may have started before the others were submitted.
        assert len(target.forwards) <= 2
        assert sorted(rows for forward in target.forwards for rows in forward) == [1, 3, 4, 5, 6]


async def test_a_long_prompt_does_not_delay_other_rounds(tiny: Target, reference_text: ReferenceText) -> None:
    target = RecordingTarget(tiny)
    prompt = [(7 * i + 3) % VOCABULARY_SIZE for i in range(500)]
    async with running_scheduler(target) as scheduler:
        target.may_run.clear()
        _, long = submit_opening(scheduler, target, prompt=prompt)
        _, short = submit_opening(scheduler, target, prompt=[7], n=3)
        target.may_run.set()
        assert (await short.result()).tokens == reference_text([7], 3)
        assert (await long.result()).tokens == reference_text(prompt, 1)
    assert all(sum(forward) <= target.runner.max_prefill_rows + 1 for forward in target.forwards)
    # The three tokens of the short text came from forwards that also prefilled a part of the prompt.
    assert [len(forward) for forward in target.forwards].count(2) >= 2


async def test_prompts_of_principals_are_prefilled_in_turns(tiny: Target) -> None:
    target = RecordingTarget(tiny)
    async with running_scheduler(target, reuse_prefixes=False) as scheduler:
        target.may_run.clear()
        long = [(7 * i + 3) % VOCABULARY_SIZE for i in range(500)]
        flood = [submit_opening(scheduler, target, prompt=long, owner="flood")[1] for _ in range(8)]
        _, small = submit_opening(scheduler, target, prompt=long, owner="small")
        target.may_run.set()
        await small.result()
        # It has had every second turn, and not its share of nine prompts.
        assert sum(reply.done for reply in flood) <= 1
        await asyncio.gather(*(reply.result() for reply in flood))


@pytest.mark.slow
async def test_a_forward_waits_for_sessions_that_are_expected(tiny: Target) -> None:
    target = RecordingTarget(tiny)
    async with running_scheduler(target, window=3600.0) as scheduler:
        sessions = [submit_opening(scheduler, target, sampling=ENDLESS) for _ in range(3)]
        for _, reply in sessions:
            await reply.result()

        async def run_round(session: Session, number: int, pause: float) -> None:
            await asyncio.sleep(pause)
            reply = session.begin_round(RoundRequest(PROTOCOL_VERSION, number, len(session.ids), draft=[5]))
            scheduler.submit(session, reply)
            await reply.result()

        # The scheduler learns that the rounds arrive 50 ms apart; a busy machine makes some of them later.
        for number in range(1, 50):
            before = len(target.forwards)
            await asyncio.gather(*(run_round(session, number, 0.05 * i) for i, (session, _) in enumerate(sessions)))
            # Without waiting there would be three.
            if len(target.forwards) - before < 3:
                break
        else:
            pytest.fail("no rounds share a forward")
        # A session that does not come back is waited for once, and only until it is late.
        await asyncio.wait_for(run_round(sessions[0][0], number + 1, 0.0), TIMEOUT_SECONDS)
