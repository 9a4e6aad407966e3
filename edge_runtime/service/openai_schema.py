"""What is answered, in OpenAI's shapes: whole answers, the chunks of a stream, and lists of models.

Beyond OpenAI's fields there are `seed`, with which the same text comes again, and `timings`, named as llama.cpp's
server names them. `system_fingerprint` is the exact target version, once there was one.

Where the draft went on alone for want of a verifier, `unverified` says of how many characters at the end of the text so
far that is true, and `withdrawn` in a chunk how many to take back before its own come.
"""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal, Protocol

import msgspec

from edge_runtime.service.answer import Answer, TextChange

Finish = Literal["stop", "length"]
# Left out where it is 0.
Count = int | msgspec.UnsetType


class Usage(msgspec.Struct, frozen=True):
    """Tokens of the request and of its answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timings(msgspec.Struct, frozen=True):
    """What the answer cost.

    Attributes:
        prompt_n, predicted_n: tokens of the prompt, and of the answer.
        queued_ms, first_text_ms, predicted_ms: from the request to its place in the queue, to the first text, and to
            the end.
        predicted_per_second: tokens, once there was a place.
        draft_n, draft_n_accepted: tokens that the board drafted, and how many of them the target accepted.
        rounds: requests that the verifier answered.
        unverified_n: tokens at the end of the text that the draft said alone, for want of a verifier.
        withdrawn_n: tokens that it had said alone, and that the target corrected when it was back.
    """

    prompt_n: int
    predicted_n: int
    queued_ms: float
    first_text_ms: float
    predicted_ms: float
    predicted_per_second: float
    draft_n: int
    draft_n_accepted: int
    rounds: int
    unverified_n: int
    withdrawn_n: int


class ResponseHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same in all answers and chunks."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    seed: int


class CompletionChoice(msgspec.Struct, frozen=True):
    """The text, or a piece of it. Log probabilities never come."""

    text: str
    index: int = 0
    logprobs: None = None
    finish_reason: Finish | None = None


class Completion(ResponseHeader, frozen=True, kw_only=True):
    """The answer of `POST /v1/completions`."""

    choices: list[CompletionChoice]
    usage: Usage
    timings: Timings
    unverified: Count = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"


class CompletionChunk(ResponseHeader, frozen=True, kw_only=True):
    """One event of its stream. `usage` is there where it was asked for, and not null in the last."""

    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    timings: Timings | msgspec.UnsetType = msgspec.UNSET
    unverified: Count = msgspec.UNSET
    withdrawn: Count = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    """The message that was written."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """The message, and why it ended."""

    message: AssistantMessage
    finish_reason: Finish
    index: int = 0
    logprobs: None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A piece of the message."""

    delta: Delta
    finish_reason: Finish | None = None
    index: int = 0
    logprobs: None = None


class ChatCompletion(ResponseHeader, frozen=True, kw_only=True):
    """The answer of `POST /v1/chat/completions`."""

    choices: list[ChatChoice]
    usage: Usage
    timings: Timings
    unverified: Count = msgspec.UNSET
    object: Literal["chat.completion"] = "chat.completion"


class ChatChunk(ResponseHeader, frozen=True, kw_only=True):
    """One event of its stream; see `CompletionChunk`."""

    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    timings: Timings | msgspec.UnsetType = msgspec.UNSET
    unverified: Count = msgspec.UNSET
    withdrawn: Count = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class OpenAIModel(msgspec.Struct, frozen=True):
    """One target. `version` is exact: it can be asked for, too; `context` is in tokens."""

    id: str
    created: int
    version: str
    context: int
    object: Literal["model"] = "model"
    owned_by: str = "verifier"


class OpenAIModelList(msgspec.Struct, frozen=True):
    """The answer of `GET /v1/models`."""

    data: list[OpenAIModel]
    object: Literal["list"] = "list"


class ResponseFormatter(Protocol):
    """How one endpoint words an answer."""

    def whole(self, answer: Answer, text: str) -> msgspec.Struct:
        """All of it."""

    def chunk(self, answer: Answer, change: TextChange, *, first: bool) -> msgspec.Struct:
        """A piece of the text."""

    def last(self, answer: Answer) -> msgspec.Struct:
        """Why it ended, and what it cost."""

    def usage(self, answer: Answer) -> msgspec.Struct:
        """Nothing but how many tokens it was."""


class CompletionFormatter:
    """Words answers of `/v1/completions`.

    Args:
        echo: what the text begins with.
        usage: chunks say that usage is to come.
    """

    def __init__(self, echo: str, usage: bool) -> None:
        self._head = _Heads("cmpl-")
        self._echo = echo
        self._usage: msgspec.UnsetType | None = None if usage else msgspec.UNSET

    def whole(self, answer: Answer, text: str) -> msgspec.Struct:
        choice = CompletionChoice(self._echo + text, finish_reason=_finish(answer))
        return Completion(**self._head.of(answer), choices=[choice], **_cost(answer))

    def chunk(self, answer: Answer, change: TextChange, *, first: bool) -> msgspec.Struct:
        choice = CompletionChoice(self._echo + change.text if first else change.text)
        return CompletionChunk(**self._head.of(answer), choices=[choice], usage=self._usage, **_standing(change))

    def last(self, answer: Answer) -> msgspec.Struct:
        choice = CompletionChoice("", finish_reason=_finish(answer))
        cost = _cost(answer) | {"usage": self._usage}
        return CompletionChunk(**self._head.of(answer), choices=[choice], **cost)

    def usage(self, answer: Answer) -> msgspec.Struct:
        return CompletionChunk(**self._head.of(answer), choices=[], usage=_usage(answer))


class ChatFormatter:
    """Words answers of `/v1/chat/completions`; see `CompletionFormatter`."""

    def __init__(self, usage: bool) -> None:
        self._head = _Heads("chatcmpl-")
        self._usage: msgspec.UnsetType | None = None if usage else msgspec.UNSET

    def whole(self, answer: Answer, text: str) -> msgspec.Struct:
        choice = ChatChoice(AssistantMessage(text), _finish(answer))
        return ChatCompletion(**self._head.of(answer), choices=[choice], **_cost(answer))

    def chunk(self, answer: Answer, change: TextChange, *, first: bool) -> msgspec.Struct:
        delta = Delta("assistant", change.text) if first else Delta(content=change.text)
        choices = [ChatChunkChoice(delta)]
        return ChatChunk(**self._head.of(answer), choices=choices, usage=self._usage, **_standing(change))

    def last(self, answer: Answer) -> msgspec.Struct:
        choice = ChatChunkChoice(Delta(), _finish(answer))
        cost = _cost(answer) | {"usage": self._usage}
        return ChatChunk(**self._head.of(answer), choices=[choice], **cost)

    def usage(self, answer: Answer) -> msgspec.Struct:
        return ChatChunk(**self._head.of(answer), choices=[], usage=_usage(answer))


class _Heads:
    """The head of one answer's messages, which say the same throughout."""

    def __init__(self, prefix: str) -> None:
        self._id = prefix + secrets.token_hex(12)
        self._created = int(time.time())

    def of(self, answer: Answer) -> dict[str, Any]:
        return {
            "id": self._id,
            "created": self._created,
            "model": answer.request.model or answer.version.partition("@")[0],
            "system_fingerprint": answer.version,
            "seed": answer.request.sampling.seed,
        }


def _finish(answer: Answer) -> Finish:
    return "stop" if answer.finish == "stop" else "length"


def _standing(change: TextChange) -> dict[str, Any]:
    return {"unverified": change.unverified or msgspec.UNSET, "withdrawn": change.withdrawn or msgspec.UNSET}


def _cost(answer: Answer) -> dict[str, Any]:
    """What a whole answer says of itself, and the last chunk."""
    return {
        "usage": _usage(answer),
        "timings": _timings(answer),
        "unverified": answer.unverified or msgspec.UNSET,
    }


def _usage(answer: Answer) -> Usage:
    prompt, written = len(answer.request.prompt), answer.tokens + answer.unverified_tokens
    return Usage(prompt, written, prompt + written)


def _timings(answer: Answer) -> Timings:
    writing = max(answer.seconds - answer.queued_seconds, 1e-9)
    return Timings(
        len(answer.request.prompt),
        answer.tokens,
        round(1e3 * answer.queued_seconds, 3),
        round(1e3 * answer.first_seconds, 3),
        round(1e3 * answer.seconds, 3),
        round(answer.tokens / writing, 3),
        answer.drafted,
        answer.accepted,
        answer.rounds,
        answer.unverified_tokens,
        answer.withdrawn_tokens,
    )
