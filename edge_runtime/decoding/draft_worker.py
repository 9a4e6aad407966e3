"""The draft at work for one text: in a thread of its own, on time and ahead of time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import msgspec

from edge_runtime.draft.model import NOTHING, DraftContext, OnnxDraft, Proposal
from edge_runtime.ngram_cache.lookup import Memory
from edge_runtime.planning.plan import UNNAMED, Plan, Watched
from edge_runtime.protocol.errors import DraftError
from edge_runtime.protocol.sampling import Sampling

log = logging.getLogger(__name__)

T = TypeVar("T")


class Ahead(msgspec.Struct, frozen=True):
    """What was drafted while a round was in flight.

    Attributes:
        guess: the target's own token, as the draft guesses it.
        proposal: tokens behind it.
    """

    guess: int
    proposal: Proposal


class Watch(msgspec.Struct):
    """What the draft does beside a stream, a token at a time.

    Attributes:
        plan: of the stream.
        guesses: what came of them so far, of consecutive tokens.
        seconds: that the draft worked.
        over: it ends at the next step.
        working: the last of its jobs.
    """

    plan: Plan
    guesses: list[Watched] = []
    seconds: float = 0.0
    over: bool = False
    working: Future[None] | None = None


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
        self._watch: Watch | None = None

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
        """Drafts on behind `ids` and `proposal`, until `halted`.

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
            further = self._propose(text, plan, min(1 + plan.ahead, left), proposal.survival)
            if len(further.tokens) < 2:
                return None
            guess = further.tokens[0]
            # These are known by now: naming them costs no step of the draft.
            return Ahead(guess, self._propose([*text, guess], plan, len(further.tokens) - 1))

        return await self._run(draft)

    def watch(self, ids: list[int], plan: Plan) -> None:
        """The cloud is about to go on behind `ids`: reads them meanwhile, and guesses along if that is planned."""
        watch = self._watch = Watch(plan)
        text = list(ids)
        watch.working = self._thread.submit(self._read, watch, text)

    def see(self, ids: list[int], tokens: list[int]) -> None:
        """Where the draft is to guess along: `tokens` came behind `ids`. Before it may `learn` them."""
        watch = self._watch
        if watch and watch.plan.watch and not watch.over:
            watch.working = self._thread.submit(self._guess_along, watch, list(ids), tokens)

    def look_away(self) -> tuple[list[Watched], float]:
        """Ends what `watch` began, at the draft's next step. Returns what came of it, and how long the draft worked."""
        watch = self._watch
        if watch is None:
            return [], 0.0
        watch.over = True
        return list(watch.guesses), watch.seconds

    async def rest(self) -> None:
        """Until a step is over that `look_away` has left under way."""
        watch, self._watch = self._watch, None
        if watch and watch.working:
            await asyncio.wrap_future(watch.working)

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
        self.look_away()
        if self._context.recall:
            self._thread.submit(self._context.recall.end)
        self._thread.shutdown(wait=False)

    async def _run(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, job)

    def _read(self, watch: Watch, ids: list[int]) -> None:
        """Reads `ids`, in the draft's thread; nobody is to hear of it where that fails, but who drafts next."""
        started = time.perf_counter()
        try:
            if len(ids) <= self._context.limit:
                self._context.follow(ids, lambda: watch.over)
        except DraftError as error:
            log.debug("not watching: %s", error)
            watch.over = True
        watch.seconds += time.perf_counter() - started

    def _guess_along(self, watch: Watch, ids: list[int], tokens: list[int]) -> None:
        """Guesses each of `tokens` behind `ids` and those before it, likewise."""
        for index, token in enumerate(tokens):
            text = ids + tokens[:index]
            if watch.over or len(text) > self._context.limit:
                return
            started = time.perf_counter()
            try:
                guess = self._context.propose(text, 1, self._sampling, siblings=watch.plan.siblings)
            except DraftError as error:
                log.debug("not watching: %s", error)
                watch.over = True
                return
            named = guess.tokens + guess.siblings.get(0, [])
            rank = named.index(token) if token in named else UNNAMED
            watch.seconds += time.perf_counter() - started
            watch.guesses.append((guess.confidences[0], rank))

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
