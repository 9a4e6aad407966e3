"""Response bodies in OpenAI's format: complete answers, the chunks of a stream, and lists of models.

Fields beyond OpenAI's: `seed`, which reproduces the text (of the first choice; with several choices each has its own),
and `timings`, named as in llama.cpp's server. `system_fingerprint` is the exact target version once it is known.
`response_formatter` fills them.

If the draft model continued alone because no verifier was reachable, `unverified` is the number of characters at the
end of the text so far that are not verified; of several choices, each has its own, and the response the sum. In a
chunk, `withdrawn` is the number of characters to remove from the end of the text before the chunk's own are appended.
"""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

import msgspec

Finish = Literal["stop", "length", "tool_calls"]
# Omitted if it is 0.
Count = int | msgspec.UnsetType
# Of a choice; omitted if there is only one.
ChoiceSeed = int | msgspec.UnsetType
Choice = TypeVar("Choice")


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Tokens of the prompts that the verifier had in its KV cache, from earlier requests."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """Tokens of the answers that are reasoning, its markers included."""

    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of the prompts, each counted once, and of all answers that were generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Timings(msgspec.Struct, frozen=True):
    """Times and counts of an answer, or of all answers of a response.

    Attributes:
        prompt_n, cache_n, predicted_n: tokens of the prompt, those of them that the verifier had in its KV cache, and
            tokens of the answer.
        queued_ms, first_text_ms, predicted_ms: from the request to its slot, to the first text, and to the last end.
        predicted_per_second: tokens per second since the request got its slot.
        draft_n, draft_n_accepted: draft tokens, and how many of them the target accepted.
        rounds: requests that the verifier answered.
        unverified_n: tokens at the end of the text that the draft model generated without a verifier.
        withdrawn_n: tokens that were shown unverified and later rejected by the target.
        logprobs_bytes: size of the log-probabilities on the wire from the verifier; only if they were asked for.
    """

    prompt_n: int
    cache_n: int
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
    logprobs_bytes: int | msgspec.UnsetType = msgspec.UNSET


class ResponseHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that all complete answers and chunks share."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    seed: int


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a text or of a piece of it, by token.

    Attributes:
        token_logprobs: of the tokens of the text.
        top_logprobs: of the most probable tokens at each position, by their text; null if none were asked for.
        text_offset: where each token begins in the text of the choice, in characters.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TopTokenLogprob(msgspec.Struct, frozen=True):
    """A probable token. `bytes` are UTF-8; `token` alone cannot show a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopTokenLogprob, frozen=True):
    """A token of a message, and the most probable tokens in its place."""

    top_logprobs: list[TopTokenLogprob] = []


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a message or of a piece of it."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionChoice(msgspec.Struct, frozen=True):
    """The text or a piece of it."""

    text: str
    index: int = 0
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None
    seed: ChoiceSeed = msgspec.UNSET
    unverified: Count = msgspec.UNSET


class CalledFunction(msgspec.Struct, frozen=True):
    """The name of the function to call, and the JSON of its arguments."""

    name: str
    arguments: str


class MessageToolCall(msgspec.Struct, frozen=True):
    """A call in a complete message."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class FunctionDelta(msgspec.Struct, frozen=True):
    """A piece of the JSON of a call's arguments; the name comes with the first one."""

    arguments: str
    name: str | msgspec.UnsetType = msgspec.UNSET


class ToolCallDelta(msgspec.Struct, frozen=True):
    """The part of a call that a chunk adds; id and type come with the first one."""

    index: int
    function: FunctionDelta
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of the message that a chunk adds."""

    role: Literal["assistant"] | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallDelta] | msgspec.UnsetType = msgspec.UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    """The generated message. Content is null if there are calls alone."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[MessageToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """The message and its finish reason."""

    message: AssistantMessage
    finish_reason: Finish
    index: int = 0
    logprobs: ChatLogprobs | None = None
    seed: ChoiceSeed = msgspec.UNSET
    unverified: Count = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A piece of the message."""

    delta: Delta
    finish_reason: Finish | None = None
    index: int = 0
    logprobs: ChatLogprobs | None = None
    seed: ChoiceSeed = msgspec.UNSET
    unverified: Count = msgspec.UNSET


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
