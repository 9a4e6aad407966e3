"""The KV caches of closed sessions: pages are reused, and memory goes back to the system."""

from __future__ import annotations

from cloud_verifier.model.target import Target
from tests.cloud_verifier.conftest import ReferenceText
from tests.cloud_verifier.engine.recording_target import running_scheduler, submit_opening
from tests.cloud_verifier.protocol_client import PROMPT


async def test_cache_pages_of_closed_sessions_are_reused(tiny: Target) -> None:
    async with running_scheduler(tiny) as scheduler:
        for _ in range(5):
            session, reply = submit_opening(scheduler, tiny)
            await reply.result()
            scheduler.release(session)
        (pool,) = scheduler._caches.pools
        assert len(pool.slabs) <= 2


async def test_memory_of_closed_sessions_goes_back(tiny: Target, reference_text: ReferenceText) -> None:
    async with running_scheduler(tiny) as scheduler:
        for _ in range(2):
            opened = [submit_opening(scheduler, tiny, prompt=[*PROMPT, k]) for k in range(8)]
            for session, reply in opened:
                await reply.result()
                scheduler.release(session)
            (pool,) = scheduler._caches.pools
            await scheduler.release_unused_memory(300.0)
            assert scheduler.retained_tokens and any(slab.numel() for slab in pool.slabs)
            # The pages that become free by the first call were not needed until the second.
            for _ in range(2):
                await scheduler.release_unused_memory(0.0)
            assert not scheduler.retained_tokens and not any(slab.numel() for slab in pool.slabs)
        assert (await submit_opening(scheduler, tiny)[1].result()).tokens == reference_text(PROMPT, 1)
