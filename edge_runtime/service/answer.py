"""One answer: tokens become text, which waits here for its reader, however slow."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import Callable
from contextlib import aclosing

import msgspec
from tokenizers import Tokenizer

from edge_runtime.decoding import Detokenizer, Generation, VerifiedTokens
from edge_runtime.planning.plan import OnLinkLoss
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.service.stop_strings import StopStringFilter


class AnswerRequest(msgspec.Struct, frozen=True):
    """What is to be written.

    Attributes:
        prompt: token ids.
        stops: the text ends before the first of these.
        model: which target; empty for the verifier's default.
        speculation: the planner decides; else the cloud writes alone.
        on_link_loss: see `Generation`.
    """

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    stops: list[str]
    model: str = ""
    speculation: bool = True
    on_link_loss: OnLinkLoss = "wait"


class TextChange(msgspec.Struct, frozen=True):
    """What became of an answer's text; sizes are in characters.

    Attributes:
        text: comes at its end, once what is withdrawn is gone.
        withdrawn: so much of its end does not hold: the draft had said it alone.
        unverified: so much of its end, now, the draft says alone.
    """

    text: str
    withdrawn: int = 0
    unverified: int = 0

    def then(self, later: TextChange) -> TextChange:
        """Both in one."""
        cut = min(later.withdrawn, len(self.text))
        text = self.text[: len(self.text) - cut] + later.text
        return TextChange(text, self.withdrawn + later.withdrawn - cut, later.unverified)


class AnswerAbandoned(Exception):
    """Nobody wants the answer any more."""


class Answer:
    """The text of one order while it is written, and afterwards.

    Attributes:
        order: what was asked for.
        tokens: how many were generated, up to the one that completed a stop string.
        finish: `stop` or `length`, or empty.
        queued_seconds, first_seconds, seconds: from the order to its place, to its first text, and to its end.
        unverified_tokens: how many at the end the target has not seen.
        error: why it ended before its end.
        done: nothing more comes.
        unwanted: it is to end at the next piece.
    """

    def __init__(self, order: AnswerRequest, tokenizer: Tokenizer) -> None:
        self.request = order
        self.tokens = self.unverified_tokens = 0
        self.finish = ""
        self.queued_seconds = self.first_seconds = self.seconds = 0.0
        self.error: Exception | None = None
        self.done = self.unwanted = False
        # More than one where a draft failed and the cloud went on.
        self._generations: list[Generation] = []
        self._text = Detokenizer(tokenizer)
        self._stops = StopStringFilter(order.stops)
        # What of the text shown so far is unverified.
        self._tail = ""
        self._unread: TextChange | None = None
        self._changed = asyncio.Event()
        self._started = time.perf_counter()

    @property
    def opening(self) -> bool:
        """Whether a session may be open whose name is still on its way here."""
        return bool(self._generations) and not self._generations[-1].version

    @property
    def version(self) -> str:
        """The exact target version, once known."""
        return next((generation.version for generation in self._generations if generation.version), "")

    @property
    def ids(self) -> list[int]:
        """Tokens of the answer so far."""
        return self._generations[-1].ids[len(self.request.prompt) :] if self._generations else []

    @property
    def drafted(self) -> int:
        """Tokens that the board drafted."""
        return sum(generation.statistics.drafted for generation in self._generations)

    @property
    def accepted(self) -> int:
        """How many of them the target accepted."""
        return sum(generation.statistics.accepted for generation in self._generations)

    @property
    def rounds(self) -> int:
        """Requests that the verifier answered."""
        return sum(generation.statistics.rounds for generation in self._generations)

    @property
    def unverified(self) -> int:
        """Characters at the end of the text that the draft says alone."""
        return len(self._tail)

    @property
    def withdrawn_tokens(self) -> int:
        """Tokens that the draft had said alone and the target did not."""
        return sum(generation.statistics.withdrawn for generation in self._generations)

    async def write(self, generation: Generation, hear: Callable[[VerifiedTokens], None]) -> None:
        """Plays `generation` to its end or to a stop string; `hear` is told every piece.

        Raises what the generation raises, and Unwanted.
        """
        self.queued_seconds = self.queued_seconds or self._elapsed()
        self._generations.append(generation)
        async with aclosing(generation.__aiter__()) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                if self.unwanted:
                    raise AnswerAbandoned
                hear(piece)
                text = ""
                for token in piece.accepted + piece.own:
                    self.tokens += 1
                    text += self._stops.feed(self._text.step(token))
                    if self._stops.found:
                        self._show(text)
                        self.finish = "stop"
                        return
                # What may yet turn out to be none is not searched in the finder itself.
                stops = copy.copy(self._stops)
                tail = stops.feed("".join(self._text.preview(piece.unverified))) if piece.unverified else ""
                over = stops.found or (piece.unverified and generation.finish)
                self._show(text, tail + stops.flush() if over else tail)
                if over:
                    self.unverified_tokens = len(piece.unverified)
                    self.finish = "stop" if stops.found else generation.finish
                    return
        self._show(self._stops.flush())
        self.finish = generation.finish

    def end(self, error: Exception | None = None) -> None:
        """Nothing more comes, for `error` if there is one."""
        self.error = error
        self.seconds = self._elapsed()
        self.done = True
        self._changed.set()

    async def begun(self, seconds: float) -> None:
        """Waits, but no longer than so many `seconds`, until there is something to read. Raises the answer's error."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._await_change()
        if self._unread is None and self.error:
            raise self.error

    async def news(self, seconds: float | None = None) -> TextChange | None:
        """What was not read yet, as soon as there is some; None when all was read.

        Raises the answer's error, and TimeoutError: there was nothing for so many `seconds`.
        """
        async with asyncio.timeout(seconds):
            await self._await_change()
        if self._unread is None and self.error:
            raise self.error
        change, self._unread = self._unread, None
        return change

    async def whole(self) -> str:
        """All text that was not read yet, at the end. Raises the answer's error."""
        whole = TextChange("")
        while change := await self.news():
            whole = whole.then(change)
        return whole.text

    async def _await_change(self) -> None:
        while self._unread is None and not self.done:
            self._changed.clear()
            await self._changed.wait()

    def _show(self, text: str, tail: str = "") -> None:
        """Shows verified `text`, and an unverified `tail` behind it, for the tail that was shown before."""
        before, self._tail = self._tail, tail
        after, kept = text + tail, 0
        while kept < min(len(before), len(after)) and before[kept] == after[kept]:
            kept += 1
        change = TextChange(after[kept:], len(before) - kept, len(tail))
        if not change.text and len(before) == len(tail):
            return
        self.first_seconds = self.first_seconds or self._elapsed()
        self._unread = self._unread.then(change) if self._unread else change
        self._changed.set()

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started
