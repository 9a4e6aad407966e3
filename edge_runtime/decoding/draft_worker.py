"""The draft model at work for one generation: a thread that drafts on demand, ahead of time, and in shadow.

`DraftWorker` is the interface that the decoding loop uses, and drafts nothing; `ThreadedDraftWorker` runs a
`DraftContext` off the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import msgspec

from edge_runtime.draft import EMPTY_PROPOSAL, DraftContext, OnnxDraft, Proposal
from edge_runtime.planning.plan import UNRANKED, Plan, ShadowGuess
from edge_runtime.planning.round_rules import limit_ahead
from edge_runtime.protocol.errors import DraftError
from edge_runtime.protocol.logits_processing import SequenceProcessor
from edge_runtime.protocol.sampling import Sampling

log = logging.getLogger(__name__)

T = TypeVar("T")


class AheadDraft(msgspec.Struct, frozen=True):
    """Tokens drafted while a round was in flight.

    Attributes:
        bonus_token: the draft's guess of the bonus token.
        proposal: draft tokens that follow it, at least one.
    """

    bonus_token: int
    proposal: Proposal


class DraftWorker:
    """Drafts for one generation. All methods are called on the event loop's thread.

    This base class has no draft model: it drafts nothing and leaves every token to the target.

    Attributes:
        ahead_cancelled: whether `cancel_ahead` was called since the last draft was requested.
    """

    ahead_cancelled = False

    def tokens_to_prefill(self, ids: list[int]) -> int:
        """Return how many of `ids` the draft model still has to prefill. Only while the worker is idle."""
        return len(ids)

    def tokens_drafted_ahead(self, ids: list[int]) -> int:
        """Return how many tokens after `ids` are drafted already. Only while the worker is idle."""
        return 0

    async def propose(self, ids: list[int], plan: Plan, count: int) -> Proposal:
        """Draft up to `count` tokens after `ids`; none if the draft's context is full. Raises DraftError."""
        return EMPTY_PROPOSAL

    async def draft_ahead(self, ids: list[int], plan: Plan, proposal: Proposal, left: int) -> AheadDraft | None:
        """Continue drafting after `ids` and `proposal`, until `cancel_ahead`. Raises DraftError.

        Args:
            left: tokens that may still be generated after the proposal.

        Returns:
            None if no token was drafted after the guess of the bonus token.
        """
        return None

    def cancel_ahead(self) -> None:
        """End `draft_ahead` at the draft's next step."""
        self.ahead_cancelled = True

    def start_shadow(self, ids: list[int], plan: Plan) -> None:
        """Prefill `ids` while the target generates; predict its tokens as well if the plan says `shadow`."""

    def shadow(self, ids: list[int], tokens: list[int]) -> None:
        """Predict `tokens`, which the target generated after `ids`, if `start_shadow` asked for it."""

    def stop_shadow(self) -> tuple[list[ShadowGuess], float]:
        """End shadow drafting at the draft's next step.

        Returns:
            The predictions of consecutive tokens so far, and the seconds that the draft worked on them.
        """
        return [], 0.0

    async def wait_until_idle(self) -> None:
        """Wait for the step that `stop_shadow` may have left running."""

    def precompute_noise(self, start: int, count: int) -> None:
        """Compute the noise of `count` positions from `start` on in the background."""

    def close(self) -> None:
        """End the thread at its next step."""


class ShadowRun(msgspec.Struct):
    """Shadow drafting during one round.

    Attributes:
        guesses: predictions of consecutive tokens so far.
        seconds: time that the draft worked.
        stopped: no further step is started.
        job: the last job submitted to the thread.
    """

    plan: Plan
    guesses: list[ShadowGuess] = []
    seconds: float = 0.0
    stopped: bool = False
    job: Future[None] | None = None


class ThreadedDraftWorker(DraftWorker):
    """Runs a `DraftContext` in a thread of its own, one job at a time; see `DraftWorker`."""

    def __init__(
        self,
        draft: OnnxDraft,
        prompt: list[int],
        sampling: Sampling,
        *,
        processor: SequenceProcessor | None = None,
    ) -> None:
        """
        Args:
            processor: see `DraftContext.propose`; from now on used in the draft's thread only.
        """
        self._context: DraftContext = draft.new_context()
        self._context.reuse_prefix(prompt)
        self._sampling = sampling
        self._processor = processor
        self._thread = ThreadPoolExecutor(1, "draft")
        self._shadow: ShadowRun | None = None

    def tokens_to_prefill(self, ids: list[int]) -> int:
        return self._context.tokens_to_prefill(ids)

    def tokens_drafted_ahead(self, ids: list[int]) -> int:
        return self._context.tokens_drafted_ahead(ids)

    async def propose(self, ids: list[int], plan: Plan, count: int) -> Proposal:
        self.ahead_cancelled = False
        if count < 1 or len(ids) >= self._context.limit:
            return EMPTY_PROPOSAL
        return await self._run(lambda: self._propose(ids, plan, count))

    async def draft_ahead(self, ids: list[int], plan: Plan, proposal: Proposal, left: int) -> AheadDraft | None:
        self.ahead_cancelled = False
        text = ids + proposal.tokens
        if len(text) >= self._context.limit:
            return None

        def draft() -> AheadDraft | None:
            further = self._propose(text, plan, limit_ahead(plan, left), proposal.survival)
            if len(further.tokens) < 2:
                return None
            bonus_token = further.tokens[0]
            # These tokens are drafted already: proposing them again takes no step of the draft.
            return AheadDraft(bonus_token, self._propose([*text, bonus_token], plan, len(further.tokens) - 1))

        return await self._run(draft)

    def start_shadow(self, ids: list[int], plan: Plan) -> None:
        shadow = self._shadow = ShadowRun(plan)
        shadow.job = self._thread.submit(self._prefill, shadow, list(ids))

    def shadow(self, ids: list[int], tokens: list[int]) -> None:
        shadow = self._shadow
        if shadow and shadow.plan.shadow and not shadow.stopped:
            shadow.job = self._thread.submit(self._predict, shadow, list(ids), tokens)

    def stop_shadow(self) -> tuple[list[ShadowGuess], float]:
        shadow = self._shadow
        if shadow is None:
            return [], 0.0
        shadow.stopped = True
        return list(shadow.guesses), shadow.seconds

    async def wait_until_idle(self) -> None:
        shadow, self._shadow = self._shadow, None
        if shadow and shadow.job:
            await asyncio.wrap_future(shadow.job)

    def precompute_noise(self, start: int, count: int) -> None:
        if self._sampling.temperature > 0.0:
            self._thread.submit(self._context.precompute_noise, start, count, self._sampling)

    def close(self) -> None:
        self.cancel_ahead()
        self.stop_shadow()
        self._thread.submit(self._context.close)
        self._thread.shutdown(wait=False)

    async def _run(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, job)

    def _prefill(self, shadow: ShadowRun, ids: list[int]) -> None:
        """Prefill `ids` on the draft thread. A failure only ends the shadow run; the next `propose` raises it again."""
        started = time.perf_counter()
        try:
            if len(ids) <= self._context.limit:
                self._context.sync_to(ids, lambda: shadow.stopped)
        except DraftError as error:
            log.debug("shadow drafting ends: %s", error)
            shadow.stopped = True
        shadow.seconds += time.perf_counter() - started

    def _predict(self, shadow: ShadowRun, ids: list[int], tokens: list[int]) -> None:
        """Predict each of `tokens` from those before it, on the draft thread; failures as in `_prefill`."""
        for index, token in enumerate(tokens):
            text = ids + tokens[:index]
            if shadow.stopped or len(text) > self._context.limit:
                return
            started = time.perf_counter()
            try:
                guess = self._context.propose_next(
                    text, self._sampling, shadow.plan.siblings, processor=self._processor
                )
            except DraftError as error:
                log.debug("shadow drafting ends: %s", error)
                shadow.stopped = True
                return
            candidates = guess.tokens + guess.siblings.get(0, [])
            rank = candidates.index(token) if token in candidates else UNRANKED
            shadow.seconds += time.perf_counter() - started
            shadow.guesses.append((guess.confidences[0], rank))

    def _propose(self, ids: list[int], plan: Plan, count: int, survival: float = 1.0) -> Proposal:
        def is_cancelled() -> bool:
            return self.ahead_cancelled

        return self._context.propose(
            ids,
            count,
            self._sampling,
            plan,
            processor=self._processor,
            survival=survival,
            should_stop=is_cancelled,
        )
