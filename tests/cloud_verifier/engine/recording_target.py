"""A scheduler whose target records its forwards, for tests of the engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.engine.sessions import RoundReply, Session
from cloud_verifier.model.batch import Segment, do_nothing
from cloud_verifier.model.kv_cache import KVCachePool
from cloud_verifier.model.sampling import SampledTokens
from cloud_verifier.model.target import Target
from edge_runtime.protocol.messages import PROTOCOL_VERSION, RoundRequest
from edge_runtime.protocol.sampling import Sampling
from tests.cloud_verifier.protocol_client import GREEDY, PROMPT, TIMEOUT_SECONDS

ENDLESS = Sampling(ignore_eos=True)


class RecordingTarget(Target):
    """A copy of a loaded target that records its forwards, and can be held before the next one or made to fail."""

    def __init__(self, target: Target) -> None:
        vars(self).update(vars(target))
        self.forwards: list[list[int]] = []
        self.continued: list[bool] = []
        self.may_run = threading.Event()
        self.may_run.set()
        self.fails: Callable[[Segment], bool] = lambda piece: False
        self.fails_together = False
        self.failure: Exception = RuntimeError("injected failure")

    def run(
        self,
        pool: KVCachePool,
        pieces: Sequence[Segment],
        meanwhile: Callable[[], object] = do_nothing,
        continues: bool = False,
    ) -> list[SampledTokens | None]:
        meanwhile()
        self.may_run.wait(TIMEOUT_SECONDS)
        if any(map(self.fails, pieces)) or (self.fails_together and len(pieces) > 1):
            raise self.failure
        self.forwards.append([len(piece) for piece in pieces])
        self.continued.append(continues)
        return super().run(pool, pieces)


@asynccontextmanager
async def running_scheduler(target: Target, **options: Any) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(lambda: target, lambda _: None, lambda: 0, **options)
    scheduler.start()
    while scheduler.target is None:  # noqa: ASYNC110 - another thread sets it
        await asyncio.sleep(0.001)
    try:
        yield scheduler
    finally:
        await asyncio.to_thread(scheduler.stop)


def submit_opening(
    scheduler: Scheduler,
    target: Target,
    prompt: list[int] = PROMPT,
    sampling: Sampling = GREEDY,
    *,
    owner: str = "",
    **round: Any,
) -> tuple[Session, RoundReply]:
    """Submit the first round of a new session; returns the session and the reply."""
    reply = RoundReply(RoundRequest(PROTOCOL_VERSION, 0, len(prompt), **round))
    session = Session(list(prompt), sampling, target, reply, owner)
    scheduler.submit(session, reply)
    return session, reply
