"""One answer: turns generated tokens into text and buffers the text for a reader of any speed."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable
from contextlib import aclosing

import msgspec
from tokenizers import Tokenizer

from edge_runtime.decoding import Detokenizer, Generation, VerifiedTokens
from edge_runtime.planning.plan import OnLinkLoss
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.service.shown_tokens import ShownToken, ShownTokens
from edge_runtime.service.stop_strings import StopStringFilter


class AnswerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate.

    Attributes:
        prompt: token ids.
        stop_strings: the text ends before the first of these.
        include_stop: keep the stop string or stop token at the end of the text.
        model: target model; empty for the verifier's default.
        speculation: False leaves every token to the target; True lets the planner decide.
        on_link_loss: see `Generation`.
        logprobs: see `OpenRequest`.
        id: of the response, which may have several answers.
        request_id: of the request: the client's, or one that was made up.
    """

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    stop_strings: list[str]
    include_stop: bool = False
    model: str = ""
    speculation: bool = True
    on_link_loss: OnLinkLoss = "wait"
    logprobs: int = 0
    id: str = ""
    request_id: str = ""


class TextChange(msgspec.Struct, frozen=True):
    """A change of an answer's text; sizes in characters.

    Attributes:
        text: to be appended after removing what is withdrawn.
        withdrawn: size of the end of the previous text that is removed: unverified text that the target rejected.
        unverified: size of the end of the new text that only the draft model has generated.
        tokens: newly verified tokens whose text is shown, if the request asked for log-probabilities. They may belong
            to text that was shown before, unverified.
    """

    text: str
    withdrawn: int = 0
    unverified: int = 0
    tokens: tuple[ShownToken, ...] = ()

    def then(self, later: TextChange) -> TextChange:
        """Return both changes as one."""
        cut = min(later.withdrawn, len(self.text))
        text = self.text[: len(self.text) - cut] + later.text
        return TextChange(text, self.withdrawn + later.withdrawn - cut, later.unverified, self.tokens + later.tokens)


class AnswerAbandoned(Exception):
    """The client disconnected before the answer was complete."""


class Answer:
    """The text of one choice, while it is generated and afterwards. Used on the event loop only.

    Attributes:
        request: what to generate.
        tokens: verified tokens, up to the one that completed a stop string.
        finish: `stop` or `length`; empty until the text is complete.
        queued_seconds, first_seconds, seconds: from the request to its slot, to its first text, and to its end; 0 if
            not reached.
        unverified_tokens: tokens at the end that no verifier has checked.
        opened: set when the verifier has the prompt in its KV cache, or the answer is done.
        error: why the answer failed; None if it did not.
        done: no more text comes.
        abandoned: set to end the answer at the next tokens.
    """

    def __init__(self, request: AnswerRequest, tokenizer: Tokenizer, changed: asyncio.Event | None = None) -> None:
        """
        Args:
            changed: set whenever there is text to take, and at the end.
        """
        self.request = request
        self.tokens = self.unverified_tokens = 0
        self.finish = ""
        self.queued_seconds = self.first_seconds = self.seconds = 0.0
        self.opened = asyncio.Event()
        self.error: Exception | None = None
        self.done = self.abandoned = False
        # More than one if the draft model failed and the target continued alone.
        self._generations: list[Generation] = []
        self._detokenizer = Detokenizer(tokenizer, request.prompt)
        self._stop_filter = StopStringFilter(request.stop_strings, request.include_stop)
        self._silent = frozenset(() if request.include_stop else request.sampling.stop_ids)
        self._shown_tokens = ShownTokens()
        # Characters of verified text shown so far, and the unverified end of the text shown so far.
        self._length, self._tail = 0, ""
        self._unread: TextChange | None = None
        self._changed = changed or asyncio.Event()
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
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the verifier had in its KV cache."""
        return self._generations[0].statistics.cached_prompt_tokens if self._generations else 0

    @property
    def unverified(self) -> int:
        """Characters at the end of the text that only the draft model has generated."""
        return len(self._tail)

    @property
    def withdrawn_tokens(self) -> int:
        """Tokens that were shown as unverified and then rejected by the target."""
        return sum(generation.statistics.withdrawn for generation in self._generations)

    @property
    def logprobs_bytes(self) -> int:
        """Size of the log-probabilities on the wire from the verifier."""
        return self._shown_tokens.wire_bytes

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the tokens, if the request asked for log-probabilities."""
        return self._shown_tokens.mean

    async def consume(self, generation: Generation, on_tokens: Callable[[VerifiedTokens], None]) -> None:
        """Run `generation` to its end or to a stop string; `on_tokens` is called with each of its items.

        Raises the generation's errors, and AnswerAbandoned.
        """
        self.queued_seconds = self.queued_seconds or self._elapsed()
        self._generations.append(generation)
        async with aclosing(generation.__aiter__()) as items:  # type: ignore[type-var]  # it is an async generator
            async for item in items:
                self.opened.set()
                if self.abandoned:
                    raise AnswerAbandoned
                on_tokens(item)
                text = self._append(item)
                if self._stop_filter.found:
                    self._finish(text, "stop")
                    return
                # Unverified text may be withdrawn, so it goes through a copy of the filter.
                stop_filter = copy.copy(self._stop_filter)
                tail = ""
                if item.unverified:
                    tail = stop_filter.feed("".join(self._detokenizer.preview(item.unverified)))
                complete = stop_filter.found or (item.unverified and generation.finish)
                if complete:
                    self.unverified_tokens = len(item.unverified)
                    finish = "stop" if stop_filter.found else generation.finish
                    self._finish(text, finish, tail + stop_filter.flush())
                    return
                self._show(text, tail)
        text = self._stop_filter.feed(self._detokenizer.flush())
        text += self._stop_filter.flush()
        self._finish(text, "stop" if self._stop_filter.found else generation.finish)

    def complete(self, error: Exception | None = None) -> None:
        """Mark the answer as done, because of `error` if there is one."""
        self.error = error
        self.seconds = self._elapsed()
        self.done = True
        self.opened.set()
        self._changed.set()

    @property
    def has_text(self) -> bool:
        """Whether there are changes to take."""
        return self._unread is not None

    def take(self) -> TextChange | None:
        """Return all changes since the last call as one; None if there are none."""
        change, self._unread = self._unread, None
        return change

    def _append(self, item: VerifiedTokens) -> str:
        """Append verified tokens up to the one that completes a stop string; return the text that can be shown now."""
        text = ""
        for index, token in enumerate(item.accepted + item.own):
            self.tokens += 1
            piece = self._detokenizer.step(token) if token not in self._silent else ""
            if item.logprobs:
                self._shown_tokens.add(token, len(piece), item.logprobs[index])
            text += self._stop_filter.feed(piece)
            if self._stop_filter.found:
                break
        return text

    def _finish(self, text: str, finish: str, tail: str = "") -> None:
        """Show the last verified `text`, and the unverified `tail` after it."""
        tokens = self._shown_tokens.finish(self._length + len(text), stopped=finish == "stop" and not tail)
        self.finish = finish
        self._show(text, tail, tokens)

    def _show(self, text: str, tail: str = "", tokens: tuple[ShownToken, ...] = ()) -> None:
        """Replace the unverified tail that was shown before by verified `text` and a new unverified `tail`."""
        before, self._tail = self._tail, tail
        after, common = text + tail, 0
        while common < min(len(before), len(after)) and before[common] == after[common]:
            common += 1
        self._length += len(text)
        tokens = tokens or self._shown_tokens.take(self._length)
        change = TextChange(after[common:], len(before) - common, len(tail), tokens)
        if not change.text and len(before) == len(tail) and not tokens:
            return
        self.first_seconds = self.first_seconds or self._elapsed()
        self._unread = self._unread.then(change) if self._unread else change
        self._changed.set()

    def _elapsed(self) -> float:
        return time.perf_counter() - self._created
