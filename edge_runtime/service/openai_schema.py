"""Response bodies in OpenAI's format: complete answers, the chunks of a stream, and lists of models.

Fields beyond OpenAI's: `seed`, which reproduces the text, and `timings`, named as in llama.cpp's server.
`system_fingerprint` is the exact target version once it is known.

If the draft model continued alone because no verifier was reachable, `unverified` is the number of characters at the
end of the text so far that are not verified. In a chunk, `withdrawn` is the number of characters to remove from the end
of the text before the chunk's own are appended.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from typing import Any, Generic, Literal, TypeVar

import msgspec

from edge_runtime.service.answer import Answer, TextChange

Finish = Literal["stop", "length"]
# Omitted if it is 0.
Count = int | msgspec.UnsetType
Choice = TypeVar("Choice")


class Usage(msgspec.Struct, frozen=True):
    """Tokens of the request and of its answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timings(msgspec.Struct, frozen=True):
    """Times and counts of an answer.

    Attributes:
        prompt_n, predicted_n: tokens of the prompt, and of the answer.
        queued_ms, first_text_ms, predicted_ms: from the request to its slot, to the first text, and to the end.
        predicted_per_second: tokens per second since the request got its slot.
        draft_n, draft_n_accepted: draft tokens, and how many of them the target accepted.
        rounds: requests that the verifier answered.
        unverified_n: tokens at the end of the text that the draft model generated without a verifier.
        withdrawn_n: tokens that were shown unverified and later rejected by the target.
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
    """Fields that all complete answers and chunks share."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    seed: int


class CompletionChoice(msgspec.Struct, frozen=True):
    """The text or a piece of it. Log probabilities are not supported."""

    text: str
    index: int = 0
    logprobs: None = None
    finish_reason: Finish | None = None


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of the message that a chunk adds."""

    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    """The generated message."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """The message and its finish reason."""

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


class WholeResponse(ResponseHeader, Generic[Choice], frozen=True, kw_only=True):
    """A complete answer."""

    choices: list[Choice]
    usage: Usage
    timings: Timings
    unverified: Count = msgspec.UNSET


class ResponseChunk(ResponseHeader, Generic[Choice], frozen=True, kw_only=True):
    """One event of a stream. `usage` is present if it was requested, and null in all chunks but the last."""

    choices: list[Choice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    timings: Timings | msgspec.UnsetType = msgspec.UNSET
    unverified: Count = msgspec.UNSET
    withdrawn: Count = msgspec.UNSET


class Completion(WholeResponse[CompletionChoice], frozen=True, kw_only=True):
    """The response of `POST /v1/completions`."""

    object: Literal["text_completion"] = "text_completion"


class CompletionChunk(ResponseChunk[CompletionChoice], frozen=True, kw_only=True):
    """One event of its stream. `usage` is present if it was requested, and null in all chunks but the last."""

    object: Literal["text_completion"] = "text_completion"


class ChatCompletion(WholeResponse[ChatChoice], frozen=True, kw_only=True):
    """The response of `POST /v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"


class ChatChunk(ResponseChunk[ChatChunkChoice], frozen=True, kw_only=True):
    """One event of its stream; see `CompletionChunk`."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class OpenAIModel(msgspec.Struct, frozen=True):
    """One target model. Requests may name its `id` or its exact `version`; `context` is in tokens."""

    id: str
    created: int
    version: str
    context: int
    object: Literal["model"] = "model"
    owned_by: str = "verifier"


class OpenAIModelList(msgspec.Struct, frozen=True):
    """The response of `GET /v1/models`."""

    data: list[OpenAIModel]
    object: Literal["list"] = "list"


class ResponseFormatter(ABC):
    """Formats the answers of one endpoint.

    Args:
        id_prefix: start of the id; it and the creation time are the same in all chunks of an answer.
        include_usage: announce the usage chunk with `usage: null` in all other chunks.
    """

    response_type: type[WholeResponse[Any]]
    chunk_type: type[ResponseChunk[Any]]

    def __init__(self, id_prefix: str, include_usage: bool) -> None:
        self._id = id_prefix + secrets.token_hex(12)
        self._created = int(time.time())
        self._usage: msgspec.UnsetType | None = None if include_usage else msgspec.UNSET

    @abstractmethod
    def make_choice(self, text: str, finish: Finish) -> msgspec.Struct:
        """Return the choice of a complete answer."""

    @abstractmethod
    def make_chunk_choice(self, text: str, *, first: bool = False, finish: Finish | None = None) -> msgspec.Struct:
        """Return the choice of a chunk; the last one has a finish reason and no text."""

    def format_response(self, answer: Answer, text: str) -> msgspec.Struct:
        """Format a complete answer."""
        choice = self.make_choice(text, _finish_reason(answer))
        return self.response_type(**self._header(answer), choices=[choice], **_final_fields(answer))

    def format_chunk(self, answer: Answer, change: TextChange, *, first: bool) -> msgspec.Struct:
        """Format a change of the text."""
        sizes = {"unverified": change.unverified or msgspec.UNSET, "withdrawn": change.withdrawn or msgspec.UNSET}
        fields = self._header(answer) | sizes | {"usage": self._usage}
        return self.chunk_type(**fields, choices=[self.make_chunk_choice(change.text, first=first)])

    def format_last_chunk(self, answer: Answer) -> msgspec.Struct:
        """Format the finish reason and the timings."""
        fields = self._header(answer) | _final_fields(answer) | {"usage": self._usage}
        return self.chunk_type(**fields, choices=[self.make_chunk_choice("", finish=_finish_reason(answer))])

    def format_usage_chunk(self, answer: Answer) -> msgspec.Struct:
        """Format the token counts alone."""
        return self.chunk_type(**self._header(answer), choices=[], usage=_usage(answer))

    def _header(self, answer: Answer) -> dict[str, Any]:
        return {
            "id": self._id,
            "created": self._created,
            "model": answer.request.model or answer.version.partition("@")[0],
            "system_fingerprint": answer.version,
            "seed": answer.request.sampling.seed,
        }


class CompletionFormatter(ResponseFormatter):
    """Formats answers of `/v1/completions`.

    Args:
        echo: prompt text that precedes the generated text.
    """

    response_type, chunk_type = Completion, CompletionChunk

    def __init__(self, echo: str, include_usage: bool) -> None:
        super().__init__("cmpl-", include_usage)
        self._echo = echo

    def make_choice(self, text: str, finish: Finish) -> CompletionChoice:
        return CompletionChoice(self._echo + text, finish_reason=finish)

    def make_chunk_choice(self, text: str, *, first: bool = False, finish: Finish | None = None) -> CompletionChoice:
        return CompletionChoice(self._echo + text if first else text, finish_reason=finish)


class ChatFormatter(ResponseFormatter):
    """Formats answers of `/v1/chat/completions`."""

    response_type, chunk_type = ChatCompletion, ChatChunk

    def __init__(self, include_usage: bool) -> None:
        super().__init__("chatcmpl-", include_usage)

    def make_choice(self, text: str, finish: Finish) -> ChatChoice:
        return ChatChoice(AssistantMessage(text), finish)

    def make_chunk_choice(self, text: str, *, first: bool = False, finish: Finish | None = None) -> ChatChunkChoice:
        if finish:
            return ChatChunkChoice(Delta(), finish)
        return ChatChunkChoice(Delta("assistant", text) if first else Delta(content=text))


def _finish_reason(answer: Answer) -> Finish:
    return "stop" if answer.finish == "stop" else "length"


def _final_fields(answer: Answer) -> dict[str, Any]:
    """Fields of a complete answer and of the last chunk."""
    return {"usage": _usage(answer), "timings": _timings(answer), "unverified": answer.unverified or msgspec.UNSET}


def _usage(answer: Answer) -> Usage:
    prompt, completion = len(answer.request.prompt), answer.tokens + answer.unverified_tokens
    return Usage(prompt, completion, prompt + completion)


def _timings(answer: Answer) -> Timings:
    generation_seconds = max(answer.seconds - answer.queued_seconds, 1e-9)
    return Timings(
        prompt_n=len(answer.request.prompt),
        predicted_n=answer.tokens,
        queued_ms=round(1e3 * answer.queued_seconds, 3),
        first_text_ms=round(1e3 * answer.first_seconds, 3),
        predicted_ms=round(1e3 * answer.seconds, 3),
        predicted_per_second=round(answer.tokens / generation_seconds, 3),
        draft_n=answer.drafted,
        draft_n_accepted=answer.accepted,
        rounds=answer.rounds,
        unverified_n=answer.unverified_tokens,
        withdrawn_n=answer.withdrawn_tokens,
    )
