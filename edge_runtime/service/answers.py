"""One answer: verified tokens become text, which waits here for its reader, however slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing

import msgspec
from tokenizers import Tokenizer

from edge_runtime.contract.coupling import Sampling
from edge_runtime.decoding import Generation, Piece
from edge_runtime.detokenising import Detokeniser
from edge_runtime.service.text import StopFinder


class Order(msgspec.Struct, frozen=True):
    """What is to be written.

    Attributes:
        prompt: token ids.
        stops: the text ends before the first of these.
        model: which target; empty for the verifier's default.
        speculation: the planner decides; else the cloud writes alone.
    """

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    stops: list[str]
    model: str = ""
    speculation: bool = True


class Unwanted(Exception):
    """Nobody wants the answer any more."""


class Answer:
    """The text of one order while it is written, and afterwards.

    Attributes:
        order: what was asked for.
        tokens: how many were generated, up to the one that completed a stop string.
        finish: `stop` or `length`, or empty.
        queued_seconds, first_seconds, seconds: from the order to its place, to its first text, and to its end.
        error: why it ended before its end.
        done: nothing more comes.
        unwanted: it is to end at the next piece.
    """

    def __init__(self, order: Order, tokenizer: Tokenizer) -> None:
        self.order = order
        self.tokens = 0
        self.finish = ""
        self.queued_seconds = self.first_seconds = self.seconds = 0.0
        self.error: Exception | None = None
        self.done = self.unwanted = False
        # More than one where a draft failed and the cloud went on.
        self._generations: list[Generation] = []
        self._text = Detokeniser(tokenizer)
        self._stops = StopFinder(order.stops)
        self._unread: list[str] = []
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
        return self._generations[-1].ids[len(self.order.prompt) :] if self._generations else []

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

    async def write(self, generation: Generation, hear: Callable[[Piece], None]) -> None:
        """Plays `generation` to its end or to a stop string; `hear` is told every piece.

        Raises what the generation raises, and Unwanted.
        """
        self.queued_seconds = self.queued_seconds or self._elapsed()
        self._generations.append(generation)
        async with aclosing(generation.__aiter__()) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                if self.unwanted:
                    raise Unwanted
                hear(piece)
                for token in piece.accepted + piece.own:
                    self.tokens += 1
                    self._show(self._stops.feed(self._text.step(token)))
                    if self._stops.found:
                        self.finish = "stop"
                        return
        self._show(self._stops.end())
        self.finish = generation.finish

    def end(self, error: Exception | None = None) -> None:
        """Nothing more comes, for `error` if there is one."""
        self.error = error
        self.seconds = self._elapsed()
        self.done = True
        self._changed.set()

    async def news(self) -> str:
        """Text that was not read yet, as soon as there is some; empty when all was read. Raises the answer's error."""
        while not self._unread and not self.done:
            self._changed.clear()
            await self._changed.wait()
        if not self._unread and self.error:
            raise self.error
        text = "".join(self._unread)
        self._unread.clear()
        return text

    async def whole(self) -> str:
        """All text that was not read yet, at the end. Raises the answer's error."""
        pieces = []
        while piece := await self.news():
            pieces.append(piece)
        return "".join(pieces)

    def _show(self, text: str) -> None:
        if text:
            self.first_seconds = self.first_seconds or self._elapsed()
            self._unread.append(text)
            self._changed.set()

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started
