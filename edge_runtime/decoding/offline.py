"""Offline drafting: unverified tokens while no verifier can be reached, verified once the link is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from edge_runtime.decoding.draft_worker import DraftWorker
from edge_runtime.planning.plan import Plan
from edge_runtime.protocol import messages
from edge_runtime.protocol.sampling import accepted_length
from edge_runtime.verifier import VerifierClient

T = TypeVar("T")

# A link with a fault counts as lost after this much silence. Chosen: broken connections are replaced in less.
LINK_LOSS_SECONDS = 0.5
# Interval of checks whether the link is lost; and, while it is, pause between two offline drafts, in which a reply is
# noticed. Chosen.
LINK_CHECK_SECONDS, OFFLINE_PAUSE_SECONDS = 0.1, 0.005
# Tokens that are drafted between two checks whether the link is back.
OFFLINE_PLAN = Plan(4, reason="no verifier can be reached")


class OfflineDraft:
    """The unverified tail of a text.

    Attributes:
        tail: draft tokens after the verified text; empty while a verifier answers.
        withdrawn: number of tokens of the tail that the target has rejected so far.
        finish: finish reason if the text ends with the tail (`stop` or `length`), else empty.
    """

    def __init__(self, worker: DraftWorker, end_ids: frozenset[int]) -> None:
        """
        Args:
            end_ids: tokens that may end a text; only the target knows which of them really do.
        """
        self.tail: list[int] = []
        self.withdrawn = 0
        self.finish = ""
        self._worker = worker
        self._end_ids = end_ids

    async def extend(self, ids: list[int], left: int) -> bool:
        """Draft a few tokens after `ids` and the tail; return whether the tail grew. Raises DraftError.

        Args:
            left: tokens that may still be generated after `ids`, the tail included.
        """
        room = left - len(self.tail)
        further = (await self._worker.propose(ids + self.tail, OFFLINE_PLAN, min(OFFLINE_PLAN.draft, room))).tokens
        for token in further:
            self.tail.append(token)
            if token in self._end_ids:
                self.finish = "stop"
                break
        else:
            self.finish = "length" if len(self.tail) >= left else ""
        return bool(further)

    def verify(self, verified: list[int], *, ended: bool) -> None:
        """Compare the tail with tokens that the target has verified in its place.

        Args:
            verified: the tokens that now follow the text; the tail is withdrawn from the first that differs.
            ended: whether the text ends with them; the rest of the tail is then withdrawn.
        """
        matching = accepted_length(self.tail, verified)
        if ended or matching < len(verified):
            self.withdrawn += len(self.tail) - matching
            matching = len(self.tail)
        self.tail = self.tail[matching:]
        self.finish = ""

    @property
    def plan(self) -> Plan:
        """Plan of the round that verifies the tail."""
        return Plan(min(len(self.tail), messages.MAX_DRAFT_TOKENS), reason="verifies what was drafted offline")


def make_loss_detector(client: VerifierClient) -> Callable[[], bool]:
    """Return a function that says whether the link looks lost, provided that nothing has arrived since this call."""
    started = time.monotonic()

    def is_lost() -> bool:
        silent = time.monotonic() - started > LINK_LOSS_SECONDS
        return silent and (client.trouble is not None or client.meter.stalled)

    return is_lost


async def poll_link_loss(
    source: AsyncGenerator[T, None], is_lost: Callable[[], bool]
) -> AsyncGenerator[T | None, None]:
    """Yield the items of `source`, and None repeatedly while it yields nothing and the link is lost."""
    try:
        while True:
            pending = asyncio.ensure_future(anext(source))
            try:
                while True:
                    pause = OFFLINE_PAUSE_SECONDS if is_lost() else LINK_CHECK_SECONDS
                    if (await asyncio.wait({pending}, timeout=pause))[0]:
                        break
                    if is_lost():
                        yield None
                item = await pending
            except StopAsyncIteration:
                return
            finally:
                pending.cancel()
                await asyncio.wait({pending})
            yield item
    finally:
        await source.aclose()
