"""Bodies of the Responses API: the response, its items, and the events of a stream.

Fields beyond OpenAI's are those of chat completions (`openai_schema`): `seed`, `system_fingerprint`, `timings`,
`unverified`, and `withdrawn`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from edge_runtime.service.errors import ErrorObject
from edge_runtime.service.openai_schema import (
    ChatTokenLogprob,
    CompletionTokensDetails,
    Count,
    PromptTokensDetails,
    Timings,
)

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete"]


class OutputTextPart(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    """The text of a message. `logprobs` has an entry for each token if the request asked for them."""

    text: str
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class ReasoningTextPart(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    """The text of the reasoning."""

    text: str


class OutputMessage(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    """A generated message."""

    id: str
    status: ItemStatus
    content: list[OutputTextPart]
    role: Literal["assistant"] = "assistant"


class OutputReasoning(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning"):
    """The reasoning as it was generated; there are no summaries."""

    id: str
    status: ItemStatus
    content: list[ReasoningTextPart]
    summary: list[Any] = []


class OutputCall(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    """A call; `arguments` is JSON."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = OutputMessage | OutputReasoning | OutputCall


class ResponseUsage(msgspec.Struct, frozen=True):
    """Tokens of the prompt and of the answer."""

    input_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens: int
    output_tokens_details: CompletionTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response ends before its text does: at `max_output_tokens`, or at the end of the model's context."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(msgspec.Struct, frozen=True, kw_only=True):
    """The response of `POST /v1/responses`, complete or, at the start of a stream, in progress."""

    id: str
    created_at: int
    status: ResponseStatus
    model: str
    system_fingerprint: str
    seed: int
    instructions: str | None
    max_output_tokens: int | None
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    top_logprobs: int
    metadata: dict[str, str]
    completed_at: int | None = None
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    usage: ResponseUsage | None = None
    background: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    object: Literal["response"] = "response"
    timings: Timings | msgspec.UnsetType = msgspec.UNSET
    unverified: Count = msgspec.UNSET


class DeletedResponse(msgspec.Struct, frozen=True):
    """The response of `DELETE /v1/responses/{id}`."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class StreamedEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """One event of a stream; they are numbered from 0."""

    sequence_number: int


class ResponseCreated(StreamedEvent, frozen=True, kw_only=True, tag="response.created"):
    """The first event."""

    response: ResponseObject


class ResponseInProgress(StreamedEvent, frozen=True, kw_only=True, tag="response.in_progress"):
    """The second event."""

    response: ResponseObject


class ResponseCompleted(StreamedEvent, frozen=True, kw_only=True, tag="response.completed"):
    """The last event of a complete answer."""

    response: ResponseObject


class ResponseIncomplete(StreamedEvent, frozen=True, kw_only=True, tag="response.incomplete"):
    """The last event of an answer that reached a limit."""

    response: ResponseObject


class OutputItemEvent(StreamedEvent, frozen=True, kw_only=True):
    """An item of the output."""

    output_index: int
    item: OutputItem


class OutputItemAdded(OutputItemEvent, frozen=True, kw_only=True, tag="response.output_item.added"):
    """An item begins."""


class OutputItemDone(OutputItemEvent, frozen=True, kw_only=True, tag="response.output_item.done"):
    """An item is complete."""


class PieceEvent(StreamedEvent, frozen=True, kw_only=True):
    """What concerns a part of one item."""

    item_id: str
    output_index: int


class PartEvent(PieceEvent, frozen=True, kw_only=True):
    """A part of the content of an item; each has one."""

    part: OutputTextPart | ReasoningTextPart
    content_index: int = 0


class ContentPartAdded(PartEvent, frozen=True, kw_only=True, tag="response.content_part.added"):
    """The content begins."""


class ContentPartDone(PartEvent, frozen=True, kw_only=True, tag="response.content_part.done"):
    """The content is complete."""


class OutputTextDelta(PieceEvent, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """Text to append, after removing the last `withdrawn` characters."""

    delta: str
    logprobs: list[ChatTokenLogprob]
    content_index: int = 0
    unverified: Count = msgspec.UNSET
    withdrawn: Count = msgspec.UNSET


class OutputTextDone(PieceEvent, frozen=True, kw_only=True, tag="response.output_text.done"):
    """The whole text of a message."""

    text: str
    logprobs: list[ChatTokenLogprob]
    content_index: int = 0


class ReasoningTextDelta(PieceEvent, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    """Reasoning to append."""

    delta: str
    content_index: int = 0


class ReasoningTextDone(PieceEvent, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    """The whole reasoning."""

    text: str
    content_index: int = 0


class ArgumentsDelta(PieceEvent, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    """A piece of the arguments of a call."""

    delta: str


class ArgumentsDone(PieceEvent, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    """All arguments of a call."""

    arguments: str
    name: str


class StreamFailed(StreamedEvent, frozen=True, kw_only=True, tag="error"):
    """An error, which ends the stream. `error` has the same once more, where OpenAI's clients look for it."""

    code: str
    message: str
    param: str | None
    error: ErrorObject


AnyStreamedEvent = (
    ResponseCreated
    | ResponseInProgress
    | ResponseCompleted
    | ResponseIncomplete
    | OutputItemAdded
    | OutputItemDone
    | ContentPartAdded
    | ContentPartDone
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | ArgumentsDelta
    | ArgumentsDone
    | StreamFailed
)
