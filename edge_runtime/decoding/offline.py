"""What the draft says while no verifier can be reached: shown as unverified, and verified when the link is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from edge_runtime.decoding.draft_worker import Drafter
from edge_runtime.planning.plan import Plan
from edge_runtime.protocol import messages
from edge_runtime.protocol.sampling import accepted_length
from edge_runtime.verifier.client import VerifierClient

T = TypeVar("T")

# Seconds of silence after which a link with a fault counts as lost: broken connections are replaced in less.
PATIENCE_SECONDS = 0.5
# Between two looks whether the link is lost, and whether it is back.
GLANCE_SECONDS, BREATH_SECONDS = 0.1, 0.005
# Tokens that are drafted before anybody looks whether the link is back.
STRIDE = Plan(4, reason="no verifier can be reached")


class Alone:
    """The unverified end of a text.

    Attributes:
        tail: tokens behind the verified ones; empty as long as there is a verifier.
        withdrawn: how many were shown that the target would not have said.
        finish: `stop` or `length` where the tail is the text's end, else empty.
    """

    def __init__(self, drafter: Drafter, end_ids: frozenset[int]) -> None:
        """
        Args:
            end_ids: tokens that may end a text; which of them does, only the target knows.
        """
        self.tail: list[int] = []
        self.withdrawn = 0
        self.finish = ""
        self._drafter = drafter
        self._end_ids = end_ids

    async def extend(self, ids: list[int], left: int) -> bool:
        """Drafts a few tokens behind `ids` and the tail.

        Args:
            left: tokens that the text may still grow by, the tail's among them.

        Returns:
            Whether the tail is longer now. Raises DraftError.
        """
        room = left - len(self.tail)
        further = (await self._drafter.propose(ids + self.tail, STRIDE, min(STRIDE.draft, room))).tokens
        for token in further:
            self.tail.append(token)
            if token in self._end_ids:
                self.finish = "stop"
                break
        else:
            self.finish = "length" if len(self.tail) >= left else ""
        return bool(further)

    def verify(self, verified: list[int], *, over: bool) -> None:
        """The target says what stands at the beginning of the tail; where the text is `over`, that is all of it."""
        same = accepted_length(self.tail, verified)
        if over or same < len(verified):
            self.withdrawn += len(self.tail) - same
            same = len(self.tail)
        self.tail = self.tail[same:]
        self.finish = ""

    @property
    def plan(self) -> Plan:
        """The round that has the tail verified."""
        return Plan(min(len(self.tail), messages.MOST_DRAFT), reason="has verified what was drafted alone")


def link_watch(client: VerifierClient) -> Callable[[], bool]:
    """Whether the link looks lost, as long as nothing is heard from now on."""
    started = time.monotonic()

    def lost() -> bool:
        silent = time.monotonic() - started > PATIENCE_SECONDS
        return silent and (client.trouble is not None or client.meter.stalled)

    return lost


async def heard(source: AsyncGenerator[T, None], lost: Callable[[], bool]) -> AsyncGenerator[T | None, None]:
    """What comes from `source`; and None, again and again, while nothing does and the link is lost."""
    try:
        while True:
            coming = asyncio.ensure_future(anext(source))
            try:
                while not (await asyncio.wait({coming}, timeout=BREATH_SECONDS if lost() else GLANCE_SECONDS))[0]:
                    if lost():
                        yield None
                item = await coming
            except StopAsyncIteration:
                return
            finally:
                coming.cancel()
                await asyncio.wait({coming})
            yield item
    finally:
        await source.aclose()
