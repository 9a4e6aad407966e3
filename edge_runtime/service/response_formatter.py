"""Fills OpenAI's response bodies from answers: complete ones, and the chunks of streams."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import msgspec
from tokenizers import Tokenizer

from edge_runtime.decoding import token_bytes
from edge_runtime.service.answer import NO_CHANGE, Answer, TextChange
from edge_runtime.service.answer_group import AnswerGroup
from edge_runtime.service.errors import ApiError
from edge_runtime.service.logprob_buffer import ShownToken
from edge_runtime.service.openai_schema import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionTokensDetails,
    Delta,
    Finish,
    FunctionDelta,
    MessageToolCall,
    PromptTokensDetails,
    ResponseChunk,
    Timings,
    ToolCallDelta,
    TopTokenLogprob,
    Usage,
    WholeResponse,
)
from edge_runtime.service.sse import AnswerFormatter, ServerEvent
from edge_runtime.service.tool_calls.parser import CallDelta

DONE_EVENT = b"data: [DONE]\n\n"


class ResponseFormatter(AnswerFormatter, ABC):
    """Formats answers as completions of one kind or the other.

    Attributes:
        id: of the response; it and the creation time are the same in all chunks.
    """

    end_mark = DONE_EVENT
    id_prefix: str
    response_type: type[WholeResponse[Any]]
    chunk_type: type[ResponseChunk[Any]]

    def __init__(self, tokenizer: Tokenizer, logprobs: int, include_usage: bool) -> None:
        """
        Args:
            logprobs: 0, or 1 + the number of most probable tokens whose log-probabilities are shown.
            include_usage: announce the usage chunk with `usage: null` in all other chunks.
        """
        self.id = self.id_prefix + secrets.token_hex(12)
        self._tokenizer = tokenizer
        self._shown_logprobs = logprobs
        self._created = int(time.time())
        self._usage: msgspec.UnsetType | None = None if include_usage else msgspec.UNSET

    @abstractmethod
    def make_choice(self, answer: Answer, change: TextChange, index: int) -> msgspec.Struct:
        """Return a choice of a complete response as for one choice alone.

        Args:
            change: the whole text.
        """

    @abstractmethod
    def make_chunk_choice(self, answer: Answer, change: TextChange, index: int, *, first: bool) -> msgspec.Struct:
        """Return the choice of a chunk that has text as for one choice alone."""

    @abstractmethod
    def make_last_chunk_choice(self, answer: Answer, index: int) -> msgspec.Struct:
        """Return the choice of a chunk that has the finish reason of a choice as for one choice alone."""

    def format_response(self, group: AnswerGroup) -> msgspec.Struct:
        choices = [
            _with_details(group, answer, self.make_choice(answer, answer.take() or NO_CHANGE, index))
            for index, answer in enumerate(group.choices())
        ]
        unverified = sum(answer.unverified for answer in group.choices()) or msgspec.UNSET
        return self.response_type(
            **self._header(group),
            choices=choices,
            usage=make_usage(group),
            timings=make_timings(group.answers, group.firsts),
            unverified=unverified,
        )

    def begin_stream(self, group: AnswerGroup) -> list[ServerEvent]:
        return []

    def stream_change(self, group: AnswerGroup, index: int, change: TextChange, *, first: bool) -> list[ServerEvent]:
        answer = group.answers[index]
        chunk = self.chunk_type(
            **self._header(group),
            choices=[self.make_chunk_choice(answer, change, index, first=first)],
            usage=self._usage,
            unverified=change.unverified or msgspec.UNSET,
            withdrawn=change.withdrawn or msgspec.UNSET,
        )
        return [ServerEvent(chunk)]

    def end_choice(self, group: AnswerGroup, index: int) -> list[ServerEvent]:
        """Return the finish reason of one answer, and its timings."""
        answer = group.answers[index]
        choice = _with_details(group, answer, self.make_last_chunk_choice(answer, index))
        chunk = self.chunk_type(
            **self._header(group),
            choices=[choice],
            usage=self._usage,
            timings=make_timings([answer], [answer]),
            unverified=answer.unverified or msgspec.UNSET,
        )
        return [ServerEvent(chunk)]

    def end_stream(self, group: AnswerGroup) -> list[ServerEvent]:
        """Return the token counts alone, if they were announced."""
        if self._usage is msgspec.UNSET:
            return []
        return [ServerEvent(self.chunk_type(**self._header(group), choices=[], usage=make_usage(group)))]

    def stream_error(self, error: ApiError) -> ServerEvent:
        return ServerEvent(error.body, "error")

    def _header(self, group: AnswerGroup) -> dict[str, Any]:
        return {"id": self.id, "created": self._created, **describe_origin(group)}


class CompletionFormatter(ResponseFormatter):
    """Formats responses of `/v1/completions`."""

    id_prefix = "cmpl-"
    response_type, chunk_type = Completion, CompletionChunk

    def __init__(
        self, tokenizer: Tokenizer, logprobs: int, include_usage: bool, echoes: list[str], choices_per_prompt: int
    ) -> None:
        """
        Args:
            echoes: text that precedes the answers to each prompt.
        """
        super().__init__(tokenizer, logprobs, include_usage)
        self._echoes = echoes
        self._choices_per_prompt = choices_per_prompt

    def make_choice(self, answer: Answer, change: TextChange, index: int) -> CompletionChoice:
        echo = self._echo(index)
        logprobs = self._logprobs(change.tokens, len(echo))
        return CompletionChoice(echo + change.text, index, logprobs, finish_reason(answer))

    def make_chunk_choice(self, answer: Answer, change: TextChange, index: int, *, first: bool) -> CompletionChoice:
        echo = self._echo(index)
        logprobs = self._logprobs(change.tokens, len(echo))
        return CompletionChoice(echo + change.text if first else change.text, index, logprobs)

    def make_last_chunk_choice(self, answer: Answer, index: int) -> CompletionChoice:
        return CompletionChoice("", index, finish_reason=finish_reason(answer))

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._choices_per_prompt]

    def _logprobs(self, tokens: tuple[ShownToken, ...], offset: int) -> CompletionLogprobs | None:
        if not self._shown_logprobs:
            return None
        top = [{_token_text(self._tokenizer, token)[0]: value for token, value in each.logprobs.top} for each in tokens]
        return CompletionLogprobs(
            tokens=[_token_text(self._tokenizer, each.token)[0] for each in tokens],
            token_logprobs=[each.logprobs.logprob for each in tokens],
            top_logprobs=top if self._shown_logprobs > 1 else None,
            text_offset=[offset + each.offset for each in tokens],
        )


class ChatFormatter(ResponseFormatter):
    """Formats responses of `/v1/chat/completions`."""

    id_prefix = "chatcmpl-"
    response_type, chunk_type = ChatCompletion, ChatChunk

    def make_choice(self, answer: Answer, change: TextChange, index: int) -> ChatChoice:
        logprobs = self._logprobs(change.tokens)
        calls = [MessageToolCall(call.id, CalledFunction(call.name, call.arguments)) for call in change.calls]
        message = AssistantMessage(
            content=change.text or (None if calls else ""),
            reasoning_content=change.reasoning or msgspec.UNSET,
            tool_calls=calls or msgspec.UNSET,
        )
        return ChatChoice(message, finish_reason(answer), index, logprobs)

    def make_chunk_choice(self, answer: Answer, change: TextChange, index: int, *, first: bool) -> ChatChunkChoice:
        other = bool(change.reasoning or change.calls)
        delta = Delta(
            role="assistant" if first else msgspec.UNSET,
            content=msgspec.UNSET if other and not change.text else change.text,
            reasoning_content=change.reasoning or msgspec.UNSET,
            tool_calls=[_call_delta(call) for call in change.calls] or msgspec.UNSET,
        )
        return ChatChunkChoice(delta, index=index, logprobs=self._logprobs(change.tokens))

    def make_last_chunk_choice(self, answer: Answer, index: int) -> ChatChunkChoice:
        return ChatChunkChoice(Delta(), finish_reason(answer), index)

    def _logprobs(self, tokens: tuple[ShownToken, ...]) -> ChatLogprobs | None:
        if not self._shown_logprobs:
            return None
        return ChatLogprobs(describe_tokens(self._tokenizer, tokens))


def describe_origin(group: AnswerGroup) -> dict[str, Any]:
    """Return the fields that say what reproduces a response: the model, its exact version, and the seed."""
    first = group.answers[0]
    version = next((answer.version for answer in group.answers if answer.version), "")
    return {
        "model": first.request.model or version.partition("@")[0],
        "system_fingerprint": version,
        "seed": _signed(first.request.sampling.seed),
    }


def describe_tokens(tokenizer: Tokenizer, tokens: Iterable[ShownToken]) -> list[ChatTokenLogprob]:
    """Return the log-probabilities of tokens of a message."""
    described = []
    for shown in tokens:
        text, data = _token_text(tokenizer, shown.token)
        top = [
            TopTokenLogprob(other, logprob, list(other_data))
            for token, logprob in shown.logprobs.top
            for other, other_data in [_token_text(tokenizer, token)]
        ]
        described.append(ChatTokenLogprob(text, shown.logprobs.logprob, list(data), top))
    return described


def finish_reason(answer: Answer) -> Finish:
    """Return OpenAI's finish reason of a complete answer."""
    if answer.finish != "stop":
        return "length"
    return "tool_calls" if answer.calls else "stop"


def make_usage(group: AnswerGroup) -> Usage:
    """Count the tokens of a response."""
    prompt = sum(len(answer.request.prompt) for answer in group.firsts)
    completion = sum(answer.tokens + answer.unverified_tokens for answer in group.answers)
    cached = PromptTokensDetails(sum(answer.cached_tokens for answer in group.firsts))
    reasoning = CompletionTokensDetails(sum(answer.reasoning_tokens for answer in group.answers))
    return Usage(prompt, completion, prompt + completion, cached, reasoning)


def make_timings(answers: list[Answer], firsts: list[Answer]) -> Timings:
    """Return the times and counts of answers together.

    Args:
        firsts: one of the answers for each prompt, whose prompts count.
    """
    queued, end = min(answer.queued_seconds for answer in answers), max(answer.seconds for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    asked = any(answer.request.logprobs for answer in answers)
    return Timings(
        prompt_n=sum(len(answer.request.prompt) for answer in firsts),
        cache_n=sum(answer.cached_tokens for answer in firsts),
        predicted_n=tokens,
        queued_ms=round(1e3 * queued, 3),
        first_text_ms=round(1e3 * min(answer.first_seconds for answer in answers), 3),
        predicted_ms=round(1e3 * end, 3),
        predicted_per_second=round(tokens / max(end - queued, 1e-9), 3),
        draft_n=sum(answer.drafted for answer in answers),
        draft_n_accepted=sum(answer.accepted for answer in answers),
        rounds=sum(answer.rounds for answer in answers),
        unverified_n=sum(answer.unverified_tokens for answer in answers),
        withdrawn_n=sum(answer.withdrawn_tokens for answer in answers),
        logprobs_bytes=sum(answer.logprobs_bytes for answer in answers) if asked else msgspec.UNSET,
    )


def _token_text(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    data = token_bytes(tokenizer, token)
    return data.decode("utf-8", "replace"), data


def _call_delta(call: CallDelta) -> ToolCallDelta:
    if not call.id:
        return ToolCallDelta(call.index, FunctionDelta(call.arguments))
    return ToolCallDelta(call.index, FunctionDelta(call.arguments, call.name), call.id, "function")


def _with_details(group: AnswerGroup, answer: Answer, choice: msgspec.Struct) -> msgspec.Struct:
    """Add what else is known of one answer to its choice if the response has several."""
    if len(group.answers) == 1:
        return choice
    unverified = answer.unverified or msgspec.UNSET
    return msgspec.structs.replace(choice, seed=_signed(answer.request.sampling.seed), unverified=unverified)


def _signed(seed: int) -> int:
    """Return a seed as OpenAI's clients send it: negative if the top one of its 64 bits is set."""
    return seed - (1 << 64) if seed >> 63 else seed
