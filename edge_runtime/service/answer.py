"""One answer: turns generated tokens into text and buffers the text for a reader of any speed."""

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


class AnswerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate.

    Attributes:
        prompt: token ids.
        stop_strings: the text ends before the first of these.
        model: target model; empty for the verifier's default.
        speculation: False leaves every token to the target; True lets the planner decide.
        on_link_loss: see `Generation`.
    """

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    stop_strings: list[str]
    model: str = ""
    speculation: bool = True
    on_link_loss: OnLinkLoss = "wait"


class TextChange(msgspec.Struct, frozen=True):
    """A change of an answer's text; sizes in characters.

    Attributes:
        text: to be appended after removing what is withdrawn.
        withdrawn: size of the end of the previous text that is removed: unverified text that the target rejected.
        unverified: size of the end of the new text that only the draft model has generated.
    """

    text: str
    withdrawn: int = 0
    unverified: int = 0

    def then(self, later: TextChange) -> TextChange:
        """Return both changes as one."""
        cut = min(later.withdrawn, len(self.text))
        text = self.text[: len(self.text) - cut] + later.text
        return TextChange(text, self.withdrawn + later.withdrawn - cut, later.unverified)


class AnswerAbandoned(Exception):
    """The client disconnected before the answer was complete."""


class Answer:
    """The text of one request, while it is generated and afterwards. Used on the event loop only.

    Attributes:
        request: what to generate.
        tokens: verified tokens, up to the one that completed a stop string.
        finish: `stop` or `length`; empty until the text is complete.
        queued_seconds, first_seconds, seconds: from the request to its slot, to its first text, and to its end; 0 if
            not reached.
        unverified_tokens: tokens at the end that no verifier has checked.
        error: why the answer failed; None if it did not.
        done: no more text comes.
        abandoned: set to end the answer at the next tokens.
    """

    def __init__(self, request: AnswerRequest, tokenizer: Tokenizer) -> None:
        self.request = request
        self.tokens = self.unverified_tokens = 0
        self.finish = ""
        self.queued_seconds = self.first_seconds = self.seconds = 0.0
        self.error: Exception | None = None
        self.done = self.abandoned = False
        # More than one if the draft model failed and the target continued alone.
        self._generations: list[Generation] = []
        self._detokenizer = Detokenizer(tokenizer, request.prompt)
        self._stop_filter = StopStringFilter(request.stop_strings)
        # The unverified end of the text shown so far.
        self._tail = ""
        self._unread: TextChange | None = None
        self._changed = asyncio.Event()
        self._created = time.perf_counter()

    @property
    def opening(self) -> bool:
        """Whether the verifier may have opened a session whose id has not arrived yet."""
        return bool(self._generations) and not self._generations[-1].version

    @property
    def version(self) -> str:
        """Exact target version; empty before the first reply."""
        return next((generation.version for generation in self._generations if generation.version), "")

    @property
    def ids(self) -> list[int]:
        """Verified token ids of the answer so far."""
        return self._generations[-1].ids[len(self.request.prompt) :] if self._generations else []

    @property
    def drafted(self) -> int:
        """Draft tokens of the board."""
        return sum(generation.statistics.drafted for generation in self._generations)

    @property
    def accepted(self) -> int:
        """Draft tokens that the target accepted."""
        return sum(generation.statistics.accepted for generation in self._generations)

    @property
    def rounds(self) -> int:
        """Requests that the verifier answered."""
        return sum(generation.statistics.rounds for generation in self._generations)

    @property
    def unverified(self) -> int:
        """Characters at the end of the text that only the draft model has generated."""
        return len(self._tail)

    @property
    def withdrawn_tokens(self) -> int:
        """Tokens that were shown as unverified and then rejected by the target."""
        return sum(generation.statistics.withdrawn for generation in self._generations)

    async def consume(self, generation: Generation, on_tokens: Callable[[VerifiedTokens], None]) -> None:
        """Run `generation` to its end or to a stop string; `on_tokens` is called with each of its items.

        Raises the generation's errors, and AnswerAbandoned.
        """
        self.queued_seconds = self.queued_seconds or self._elapsed()
        self._generations.append(generation)
        async with aclosing(generation.__aiter__()) as items:  # type: ignore[type-var]  # it is an async generator
            async for item in items:
                if self.abandoned:
                    raise AnswerAbandoned
                on_tokens(item)
                text = ""
                for token in item.accepted + item.own:
                    self.tokens += 1
                    text += self._stop_filter.feed(self._detokenizer.step(token))
                    if self._stop_filter.found:
                        self._show(text)
                        self.finish = "stop"
                        return
                # Unverified text may be withdrawn, so it goes through a copy of the filter.
                stop_filter = copy.copy(self._stop_filter)
                tail = ""
                if item.unverified:
                    tail = stop_filter.feed("".join(self._detokenizer.preview(item.unverified)))
                complete = stop_filter.found or (item.unverified and generation.finish)
                self._show(text, tail + stop_filter.flush() if complete else tail)
                if complete:
                    self.unverified_tokens = len(item.unverified)
                    self.finish = "stop" if stop_filter.found else generation.finish
                    return
        text = self._stop_filter.feed(self._detokenizer.flush())
        self._show(text + self._stop_filter.flush())
        self.finish = "stop" if self._stop_filter.found else generation.finish

    def complete(self, error: Exception | None = None) -> None:
        """Mark the answer as done, because of `error` if there is one."""
        self.error = error
        self.seconds = self._elapsed()
        self.done = True
        self._changed.set()

    async def wait_for_text(self, seconds: float) -> None:
        """Wait until there is text to read or the answer is done, for at most `seconds`. Raises the answer's error."""
        with contextlib.suppress(TimeoutError):
            await self._wait_for_change(seconds)

    async def read(self, seconds: float | None = None) -> TextChange | None:
        """Wait for unread changes and return them as one; None at the end of the answer.

        Raises the answer's error, and TimeoutError if nothing changes for `seconds`.
        """
        await self._wait_for_change(seconds)
        change, self._unread = self._unread, None
        return change

    async def read_all(self) -> str:
        """Wait for the end of the answer and return all unread text. Raises the answer's error."""
        total = TextChange("")
        while change := await self.read():
            total = total.then(change)
        return total.text

    async def _wait_for_change(self, seconds: float | None) -> None:
        async with asyncio.timeout(seconds):
            while self._unread is None and not self.done:
                self._changed.clear()
                await self._changed.wait()
        if self._unread is None and self.error:
            raise self.error

    def _show(self, text: str, tail: str = "") -> None:
        """Replace the unverified tail that was shown before by verified `text` and a new unverified `tail`."""
        before, self._tail = self._tail, tail
        after, common = text + tail, 0
        while common < min(len(before), len(after)) and before[common] == after[common]:
            common += 1
        change = TextChange(after[common:], len(before) - common, len(tail))
        if not change.text and len(before) == len(tail):
            return
        self.first_seconds = self.first_seconds or self._elapsed()
        self._unread = self._unread.then(change) if self._unread else change
        self._changed.set()

    def _elapsed(self) -> float:
        return time.perf_counter() - self._created
