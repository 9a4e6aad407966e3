"""The rounds that are being played: no more than the engine can begin soon, and none any more when the end comes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from cloud_verifier.sessions import Answer
from edge_runtime.contract.errors import VerifierRefused
from edge_runtime.contract.wire import ErrorCode

# So few waiting rounds are no queue: a slow target may take this long over one forward.
FEW = 4
# Of the longest wait: from this share on no texts begin, so that those that have begun can go on.
OPENING_SHARE = 0.5
RETRY_SECONDS = 1


class _Waiting(NamedTuple):
    answer: Answer
    since: float


class InFlight:
    """Rounds from their submission to their end, on the event loop.

    Attributes:
        draining: nothing new is played.
    """

    def __init__(self, max_queue_seconds: float) -> None:
        """
        Args:
            max_queue_seconds: that the round which has waited longest may have waited; while it has waited longer, new
                ones are refused. Openings are, from half of that on.
        """
        self.draining = False
        self._max_queue_seconds = max_queue_seconds
        self._playing: set[Answer] = set()
        self._waiting: deque[_Waiting] = deque()
        self._exchanges = 0
        self._none_left = asyncio.Event()
        self._none_left.set()

    def __len__(self) -> int:
        return len(self._playing)

    @property
    def waiting(self) -> int:
        """How many the engine has not begun with."""
        return sum(not each.answer.started and not each.answer.done for each in self._waiting)

    @property
    def queue_seconds(self) -> float:
        """How long the round that has waited longest for the engine has waited: what a new one would, about."""
        while self._waiting and (self._waiting[0].answer.started or self._waiting[0].answer.done):
            self._waiting.popleft()
        return time.monotonic() - self._waiting[0].since if self._waiting else 0.0

    def check(self, *, opening: bool) -> None:
        """Raises VerifierRefused: `draining`, or `overloaded` where a new round would have to wait for too long."""
        if self.draining:
            raise VerifierRefused(
                ErrorCode.DRAINING,
                "this verifier is about to end; open the session elsewhere, or here when it is back",
                503,
                retry_after=RETRY_SECONDS,
            )
        most = self._max_queue_seconds * (OPENING_SHARE if opening else 1.0)
        waited = self.queue_seconds
        if waited > most and len(self._waiting) > FEW:
            raise VerifierRefused(
                ErrorCode.OVERLOADED,
                f"rounds wait {waited:.1f} s for their turn; try again shortly",
                503,
                retry_after=RETRY_SECONDS,
            )

    def enter(self, answer: Answer) -> None:
        """A round has been submitted."""
        self._playing.add(answer)
        self._waiting.append(_Waiting(answer, time.monotonic()))
        self._none_left.clear()

    def leave(self, answer: Answer) -> None:
        """It is over."""
        self._playing.discard(answer)
        self._look()

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """A request, until the last byte of its answer is on its way."""
        self._exchanges += 1
        self._none_left.clear()
        try:
            yield
        finally:
            self._exchanges -= 1
            self._look()

    def _look(self) -> None:
        if not self._playing and not self._exchanges:
            self._none_left.set()

    async def drain(self, seconds: float) -> bool:
        """From now on plays nothing new. Returns when all rounds are over and told, or after `seconds`; whether they
        were."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._none_left.wait()
        except TimeoutError:
            return False
        return True


class Counted:
    """An ASGI application whose requests `in_flight` knows of, streams to their end."""

    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._in_flight.exchange() if scope["type"] == "http" else contextlib.nullcontext():
            await self._app(scope, receive, send)
