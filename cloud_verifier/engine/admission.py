"""Admission control: sheds load while rounds wait too long, and drains the verifier before it stops.

The scheduler starts on all submitted rounds at once, so the queue is the set of rounds that have no token yet. The time
that an opening spends on prefilling its own prompt is not waiting: it is estimated from recent prompts and subtracted.

Principals take turns in prefilling (`fairness.TurnOrder`), so a principal's openings mostly wait for one another: one
that sends many is refused before others are.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from cloud_verifier.engine.sessions import RoundReply
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode

# Load is not shed while at most this many rounds wait: a slow target may take that long over one forward.
MIN_QUEUED_ROUNDS = 4
# Weight of the latest prompt in the moving average of prefill time per token.
PREFILL_SMOOTHING = 0.2
# New sessions are refused from this share of the longest wait on, so that running ones can go on. Chosen.
OPENING_SHARE = 0.5


class _QueuedRound(NamedTuple):
    reply: RoundReply
    since: float
    prompt_tokens: int

    @property
    def waits(self) -> bool:
        return not self.reply.has_frames and not self.reply.done


class AdmissionController:
    """Tracks rounds from their submission to their end. Belongs to the event loop.

    Attributes:
        draining: no new round is admitted.
    """

    def __init__(self, max_queue_seconds: float) -> None:
        """
        Args:
            max_queue_seconds: longest time that a round may wait for its first token. While one has waited longer, new
                rounds are refused. New sessions are refused from `OPENING_SHARE` of it on, whether rounds or openings
                wait.
        """
        self.draining = False
        self._max_queue_seconds = max_queue_seconds
        self._active: set[RoundReply] = set()
        self._queued_rounds: deque[_QueuedRound] = deque()
        # By name of the principal.
        self._queued_openings: defaultdict[str, deque[_QueuedRound]] = defaultdict(deque)
        # None until the first prompt has been prefilled.
        self._prefill_seconds_per_token: float | None = None
        self._exchanges = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        """Number of rounds in progress."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Number of rounds that have no token yet."""
        return sum(map(_count_waiting, (self._queued_rounds, *self._queued_openings.values())))

    @property
    def queue_seconds(self) -> float:
        """Longest time that a round or an opening has been waiting; about what a new one would wait."""
        return max(map(self._longest_wait, (self._queued_rounds, *self._queued_openings.values())))

    def check(self, *, opening: bool, owner: str = "") -> None:
        """Check whether a new round of the principal `owner` is admitted.

        Raises:
            VerifierRefused: `draining`, or `overloaded` if it would have to wait too long.
        """
        if self.draining:
            raise VerifierRefused(
                ErrorCode.DRAINING,
                "this verifier is shutting down; open the session elsewhere, or here when it is back",
            )
        limit = self._max_queue_seconds * (OPENING_SHARE if opening else 1.0)
        # Rounds of running sessions do not wait for prompts: a forward has room for both.
        wait = self._longest_wait(self._queued_rounds)
        for name, queue in list(self._queued_openings.items()) if opening else ():
            # However many openings of one other principal wait, this principal has every second turn.
            shared_by = 1 if name == owner else max(1, _count_waiting(queue))
            wait = max(wait, self._longest_wait(queue) / shared_by)
            if not queue:
                del self._queued_openings[name]
        if wait > limit and self.waiting > MIN_QUEUED_ROUNDS:
            raise VerifierRefused(ErrorCode.OVERLOADED, f"rounds have been waiting for {wait:.1f} s; try again shortly")

    def register(self, reply: RoundReply, prompt_tokens: int = 0, owner: str = "") -> None:
        """Record a submitted round.

        Args:
            prompt_tokens: length of the prompt that it has to prefill first.
            owner: name of the principal.
        """
        self._active.add(reply)
        queue = self._queued_openings[owner] if prompt_tokens else self._queued_rounds
        queue.append(_QueuedRound(reply, time.monotonic(), prompt_tokens))
        self._idle.clear()

    def unregister(self, reply: RoundReply, prompt_tokens: int = 0) -> None:
        """Record the end of a round. `prompt_tokens` is the number of tokens that it prefilled."""
        self._active.discard(reply)
        if prompt_tokens and reply.has_frames:
            latest = 1e-4 * reply.merged().prefill_100us / prompt_tokens
            average = latest if self._prefill_seconds_per_token is None else self._prefill_seconds_per_token
            self._prefill_seconds_per_token = average + PREFILL_SMOOTHING * (latest - average)
        self._update_idle()

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Count an HTTP request as in flight until the last byte of its response has been sent."""
        self._exchanges += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._exchanges -= 1
            self._update_idle()

    async def drain(self, seconds: float) -> bool:
        """Admit nothing new and wait for rounds and responses in flight, up to `seconds`. Return whether all ended."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _longest_wait(self, queue: deque[_QueuedRound]) -> float:
        while queue and not queue[0].waits:
            queue.popleft()
        if not queue or (queue[0].prompt_tokens and self._prefill_seconds_per_token is None):
            return 0.0
        prefill_seconds = queue[0].prompt_tokens * (self._prefill_seconds_per_token or 0.0)
        return max(0.0, time.monotonic() - queue[0].since - prefill_seconds)

    def _update_idle(self) -> None:
        if not self._active and not self._exchanges:
            self._idle.set()


def _count_waiting(queue: Iterable[_QueuedRound]) -> int:
    return sum(queued.waits for queued in queue)


class InFlightMiddleware:
    """ASGI middleware that registers every request with an admission controller, streams to their end."""

    def __init__(self, app: ASGIApp, admission: AdmissionController) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._admission.exchange() if scope["type"] == "http" else contextlib.nullcontext():
            await self._app(scope, receive, send)
