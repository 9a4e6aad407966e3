"""The rounds that are being played: no more than can be answered soon, and none any more when the end comes.

A batch begins with everybody at once, so a queue is where rounds have no token yet. What an opening takes to read its
prompt by itself is no waiting, and is taken to be what others took lately.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from cloud_verifier.engine.sessions import Answer
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode

# So few waiting rounds are no queue: a slow target may take this long over one forward.
FEW = 4
# How much the latest prompt says about how long the next one takes.
LATEST = 0.2
# Of the longest wait: from this share on no texts begin, so that those that have begun can go on.
OPENING_SHARE = 0.5
RETRY_SECONDS = 1


class _Waiting(NamedTuple):
    answer: Answer
    since: float
    prompt: int


class InFlight:
    """Rounds from their submission to their end, on the event loop.

    Attributes:
        draining: nothing new is played.
    """

    def __init__(self, max_queue_seconds: float) -> None:
        """
        Args:
            max_queue_seconds: that the round which has waited longest may have waited; while it has waited longer, new
                ones are refused. Openings are, from half of that on, whether rounds wait or openings.
        """
        self.draining = False
        self._max_queue_seconds = max_queue_seconds
        self._playing: set[Answer] = set()
        self._rounds: deque[_Waiting] = deque()
        self._openings: deque[_Waiting] = deque()
        # Of a prompt, for each of its tokens; None while nobody knows.
        self._reading_seconds: float | None = None
        self._exchanges = 0
        self._none_left = asyncio.Event()
        self._none_left.set()

    def __len__(self) -> int:
        return len(self._playing)

    @property
    def waiting(self) -> int:
        """How many have no token yet."""
        return sum(_waits(each) for each in (*self._rounds, *self._openings))

    @property
    def queue_seconds(self) -> float:
        """How long the round, or the opening, has waited that has waited longest: what a new one would, about."""
        return max(self._waited(self._rounds), self._waited(self._openings))

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
        # Texts that have begun do not wait for those that begin: a forward has room for both.
        queues = (self._rounds, self._openings) if opening else (self._rounds,)
        waited = max(self._waited(queue) for queue in queues)
        if waited > most and self.waiting > FEW:
            raise VerifierRefused(
                ErrorCode.OVERLOADED,
                f"rounds wait {waited:.1f} s for their turn; try again shortly",
                503,
                retry_after=RETRY_SECONDS,
            )

    def enter(self, answer: Answer, prompt: int = 0) -> None:
        """A round has been submitted; `prompt`: tokens that have to be read before."""
        self._playing.add(answer)
        queue = self._openings if prompt else self._rounds
        queue.append(_Waiting(answer, time.monotonic(), prompt))
        self._none_left.clear()

    def leave(self, answer: Answer, prompt: int = 0) -> None:
        """It is over."""
        self._playing.discard(answer)
        if prompt and answer.told:
            took = 1e-4 * answer.so_far().prefill_100us / prompt
            known = took if self._reading_seconds is None else self._reading_seconds
            self._reading_seconds = known + LATEST * (took - known)
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

    def _waited(self, queue: deque[_Waiting]) -> float:
        """How long the oldest of `queue` has waited."""
        while queue and not _waits(queue[0]):
            queue.popleft()
        if not queue or (queue[0].prompt and self._reading_seconds is None):
            return 0.0
        reading = queue[0].prompt * (self._reading_seconds or 0.0)
        return max(0.0, time.monotonic() - queue[0].since - reading)

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


def _waits(each: _Waiting) -> bool:
    return not each.answer.told and not each.answer.done


class Counted:
    """An ASGI application whose requests `in_flight` knows of, streams to their end."""

    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._in_flight.exchange() if scope["type"] == "http" else contextlib.nullcontext():
            await self._app(scope, receive, send)
