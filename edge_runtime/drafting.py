"""The draft at work for one text: in a thread of its own, on time and ahead of time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from edge_runtime.contract.coupling import Sampling
from edge_runtime.draft import NOTHING, DraftContext, OnnxDraft, Proposal
from edge_runtime.memory.recall import Memory
from edge_runtime.planning.plan import Plan

T = TypeVar("T")


class Ahead(msgspec.Struct, frozen=True):
    """What was drafted while a round was in flight.

    Attributes:
        guess: the target's own token, as the draft guesses it.
        proposal: tokens behind it.
    """

    guess: int
    proposal: Proposal


class Drafter:
    """Runs a `DraftContext` off the event loop, one job at a time.

    Attributes:
        halted: the job that runs ahead ends at its next step.
    """

    def __init__(self, draft: OnnxDraft, sampling: Sampling, memory: Memory | None = None) -> None:
        self.halted = False
        self._context: DraftContext = draft.context(memory)
        self._sampling = sampling
        self._thread = ThreadPoolExecutor(1, "draft")

    def unread(self, ids: list[int]) -> int:
        """How many of `ids` the draft has still to read. Not while it works."""
        return self._context.unread(ids)

    def ready(self, ids: list[int]) -> int:
        """How many tokens behind `ids` are drafted already. Not while it works."""
        return self._context.ready(ids)

    async def propose(self, ids: list[int], plan: Plan, count: int) -> Proposal:
        """Up to `count` tokens behind `ids`; none where the draft's context is full. Raises DraftError."""
        self.halted = False
        if count < 1 or len(ids) >= self._context.limit:
            return NOTHING
        return await self._run(lambda: self._propose(ids, plan, count))

    async def run_ahead(self, ids: list[int], plan: Plan, proposal: Proposal, left: int) -> Ahead | None:
        """Drafts on behind `ids` and `proposal`, or only reads them where the plan drafts nothing, until `halted`.

        Args:
            left: tokens that the text can take behind the proposal.

        Returns:
            None where there is not even a token behind the guess of the target's own.
        """
        self.halted = False
        text = ids + proposal.tokens
        if len(text) >= self._context.limit:
            return None

        def draft() -> Ahead | None:
            if not plan.draft:
                self._context.follow(text, self._is_halted)
                return None
            further = self._propose(text, plan, min(1 + plan.ahead, left), proposal.survival)
            if len(further.tokens) < 2:
                return None
            guess = further.tokens[0]
            # These are known by now: naming them costs no step of the draft.
            return Ahead(guess, self._propose([*text, guess], plan, len(further.tokens) - 1))

        return await self._run(draft)

    def prepare(self, start: int, count: int) -> None:
        """Uses the time in which a round is in flight for what the next guesses need."""
        if self._sampling.temperature > 0.0:
            self._thread.submit(self._context.prepare, start, count, self._sampling)

    def learn(self, ids: list[int], version: str = "") -> None:
        """The text goes on with `ids`: the prompt, or what `version` has verified. The memory learns them in time."""
        if self._context.recall:
            self._thread.submit(self._context.recall.learn, ids, version)

    def close(self) -> None:
        """Ends the thread, at its next step and once the memory has the text."""
        self.halted = True
        if self._context.recall:
            self._thread.submit(self._context.recall.end)
        self._thread.shutdown(wait=False)

    async def _run(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, job)

    def _is_halted(self) -> bool:
        return self.halted

    def _propose(self, ids: list[int], plan: Plan, count: int, survival: float = 1.0) -> Proposal:
        return self._context.propose(
            ids,
            count,
            self._sampling,
            siblings=plan.siblings,
            sibling_confidence=plan.sibling_confidence,
            min_confidence=plan.min_confidence,
            min_survival=plan.min_survival,
            calibration=plan.calibration,
            survival=survival,
            stopped=self._is_halted,
        )
