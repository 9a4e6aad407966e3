"""One answer: turns generated tokens into text and buffers the text for a reader of any speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing

import msgspec
from tokenizers import Tokenizer

from edge_runtime.decoding import Detokenizer, Generation, VerifiedTokens
from edge_runtime.planning.plan import OnLinkLoss
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.service.answer_text import AnswerText
from edge_runtime.service.logprob_buffer import LogprobBuffer, ShownToken
from edge_runtime.service.tool_calls.output_format import PLAIN_TEXT, OutputFormat
from edge_runtime.service.tool_calls.parser import CallDelta, merge_calls


class AnswerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate.

    Attributes:
        prompt: token ids.
        stop_strings: the text ends before the first of these.
        output: how the text is read: what is reasoning, and what are tool calls.
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
    output: OutputFormat = PLAIN_TEXT
    include_stop: bool = False
    model: str = ""
    speculation: bool = True
    on_link_loss: OnLinkLoss = "wait"
    logprobs: int = 0
    id: str = ""
    request_id: str = ""


class TextChange(msgspec.Struct, frozen=True):
    """A change of an answer's text, its content; sizes in characters.

    Attributes:
        text: to be appended after removing what is withdrawn.
        withdrawn: size of the end of the previous text that is removed: unverified text that the target rejected.
        unverified: size of the end of the new text that only the draft model has generated.
        tokens: newly verified tokens whose text is shown, if the request asked for log-probabilities. They may belong
            to text that was shown before, unverified.
        reasoning: to be appended to the reasoning. Like calls, it is verified, unless the answer ends unverified.
        calls: new calls, and further pieces of calls.
    """

    text: str
    withdrawn: int = 0
    unverified: int = 0
    tokens: tuple[ShownToken, ...] = ()
    reasoning: str = ""
    calls: list[CallDelta] = []

    def then(self, later: TextChange) -> TextChange:
        """Return both changes as one."""
        cut = min(later.withdrawn, len(self.text))
        text = self.text[: len(self.text) - cut] + later.text
        return TextChange(
            text,
            withdrawn=self.withdrawn + later.withdrawn - cut,
            unverified=later.unverified,
            tokens=self.tokens + later.tokens,
            reasoning=self.reasoning + later.reasoning,
            calls=merge_calls(self.calls, later.calls),
        )

    def parts(self) -> list[TextChange]:
        """Return the change as changes of one kind each: reasoning, then content, then the start or a piece of a call.

        Many clients look at the first call of a chunk alone, and expect its arguments after its name.
        """
        calls: list[CallDelta] = []
        for call in self.calls:
            if call.id:
                calls.append(msgspec.structs.replace(call, arguments=""))
            if call.arguments:
                calls.append(CallDelta(call.index, arguments=call.arguments))
        content = msgspec.structs.replace(self, reasoning="", calls=[])
        parts = [TextChange("", reasoning=self.reasoning, unverified=self.unverified)] if self.reasoning else []
        if content != TextChange("", unverified=self.unverified):
            parts.append(content)
        parts += [TextChange("", calls=[call], unverified=self.unverified) for call in calls]
        return parts or [content]


NO_CHANGE = TextChange("")


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
        given_up: why the answer is to end before it is complete; None if its client left.
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
        self.given_up: Exception | None = None
        # More than one if the draft model failed and the target continued alone.
        self._generations: list[Generation] = []
        hidden = () if request.include_stop else request.sampling.stop_ids
        self._detokenizer = Detokenizer(tokenizer, request.prompt, request.output.visible, hidden)
        self._text = AnswerText(request.output, request.stop_strings, request.include_stop)
        self._logprobs = LogprobBuffer()
        # The unverified end of the text shown so far.
        self._tail = ""
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
    def calls(self) -> int:
        """Number of tool calls so far."""
        return self._text.calls

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the reasoning, its markers included."""
        return self._text.reasoning_tokens

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
        return self._logprobs.wire_bytes

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the tokens, if the request asked for log-probabilities."""
        return self._logprobs.mean

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
                if self._text.stopped:
                    self._finish(text, "stop")
                    return
                # Unverified text may be withdrawn, so only its content is shown, and nothing is appended.
                unverified = "".join(self._detokenizer.preview(item.unverified)) if item.unverified else ""
                tail, stopped = self._text.preview(unverified) if item.unverified else ("", False)
                if stopped or (item.unverified and generation.finish):
                    self.unverified_tokens = len(item.unverified)
                    if not stopped:
                        # Nothing follows that could withdraw it.
                        tail = self._text.feed(unverified) + self._text.flush()
                    self._finish(text, "stop" if stopped or self._text.stopped else generation.finish, tail)
                    return
                self._show(text, tail)
        text = self._text.feed(self._detokenizer.flush())
        text += self._text.flush()
        self._finish(text, "stop" if self._text.stopped else generation.finish)

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
            piece = self._detokenizer.step(token)
            if item.logprobs:
                self._logprobs.add(token, len(piece), item.logprobs[index])
            text += self._text.feed(piece)
            if self._text.stopped:
                break
        return text

    def _finish(self, text: str, finish: str, tail: str = "") -> None:
        """Show the last verified `text`, and the unverified `tail` after it."""
        self.finish = finish
        tokens = self._logprobs.finish(self._text.shown, stopped=finish == "stop" and not tail)
        self._show(text, tail, tokens)

    def _show(self, text: str, tail: str = "", tokens: tuple[ShownToken, ...] = ()) -> None:
        """Replace the unverified tail that was shown before by verified `text` and a new unverified `tail`."""
        before, self._tail = self._tail, tail
        after, common = text + tail, 0
        while common < min(len(before), len(after)) and before[common] == after[common]:
            common += 1
        tokens = tokens or self._logprobs.take(self._text.shown)
        change = TextChange(after[common:], len(before) - common, len(tail), tokens, *self._text.take())
        if not (change.text or change.reasoning or change.calls or tokens) and len(before) == len(tail):
            return
        self.first_seconds = self.first_seconds or self._elapsed()
        self._unread = self._unread.then(change) if self._unread else change
        self._changed.set()

    def _elapsed(self) -> float:
        return time.perf_counter() - self._created
