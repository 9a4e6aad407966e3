"""Request bodies of OpenAI's API, parsed strictly: unsupported fields and values are refused, not ignored.

Fields beyond OpenAI's: `top_k`, `ignore_eos`, `speculation` (false: the target generates alone), `on_link_loss`, and,
as in vLLM, `documents`, `add_generation_prompt`, `continue_final_message` and `chat_template_kwargs`. Tools are given
to the model's chat template; a call that the model writes is returned as the text that it is.
"""

from __future__ import annotations

import contextlib
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from edge_runtime.planning.plan import OnLinkLoss
from edge_runtime.protocol.bundle import SamplingDefaults
from edge_runtime.protocol.sampling import MASK_64, Sampling
from edge_runtime.service.chat_template import ChatOptions, Conversation
from edge_runtime.service.errors import ApiError

# Unsupported fields that clients may nevertheless send, with the values that change nothing.
NEUTRAL_VALUES: dict[str, list[Any]] = {
    "audio": [None],
    "best_of": [None, 1],
    "frequency_penalty": [None, 0],
    "function_call": [None, "none", "auto"],
    "functions": [None, []],
    "logit_bias": [None, {}],
    "logprobs": [None, False],
    "modalities": [None, ["text"]],
    "n": [None, 1],
    "prediction": [None],
    "presence_penalty": [None, 0],
    "response_format": [None, {"type": "text"}],
    "service_tier": [None, "auto", "default"],
    "store": [None, False],
    "suffix": [None, ""],
    "tool_choice": [None, "none", "auto"],
    "top_logprobs": [None, 0],
}
NEUTRAL_MESSAGE_VALUES: dict[str, list[Any]] = {
    "annotations": [None, []],
    "audio": [None],
    "function_call": [None],
    "refusal": [None],
}

OPENAI_DEFAULTS = SamplingDefaults(temperature=1.0, top_k=0, top_p=1.0)

TokenCount = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
# Exactly what `get_prompt` accepts; msgspec cannot distinguish lists by the type of their items.
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 1},
        {"$ref": "#/components/schemas/TokenIds"},
        {"type": "array", "items": {"$ref": "#/components/schemas/TokenIds"}, "minItems": 1, "maxItems": 1},
    ]
}
# Temperatures in between would be greedy but for rounding (see `Sampling`).
TEMPERATURE_SCHEMA = {"anyOf": [{"const": 0}, {"minimum": 0.001}]}
TOOL_SCHEMA = {
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
# What `ChatMessage.for_template` and `ChatTemplate.render` demand beyond the types.
MESSAGE_SCHEMA = {
    "anyOf": [
        {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]},
        {"properties": {"tool_calls": {"type": "array", "minItems": 1}}, "required": ["tool_calls"]},
    ]
}
CONVERSATION_SCHEMA = {
    "not": {
        "properties": {"add_generation_prompt": {"const": True}, "continue_final_message": {"const": True}},
        "required": ["add_generation_prompt", "continue_final_message"],
    }
}
SEED_SCHEMA = {"minimum": -(1 << 63), "maximum": MASK_64}


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a stream; without effect otherwise.

    Attributes:
        include_usage: add a last chunk with the token counts.
        include_obfuscation: accepted and ignored; it protects against eavesdroppers that see chunk sizes, and the
            stream normally stays on loopback.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Fields that both endpoints accept.

    Attributes:
        model: target model; absent or empty for the verifier's default.
        max_tokens: maximum length of the answer; the service has a limit of its own, which is also the default.
        temperature, top_p, top_k: see `Sampling`; defaults: the model's own, else OpenAI's: 1, 1 and no limit.
        seed: the same seed reproduces the text; default: drawn at random and returned.
        stop: the text ends before the first of these.
        stream: respond with server-sent events.
        ignore_eos: continue past the end-of-text token, for measurements.
        speculation: false leaves every token to the target; otherwise the planner decides in every round.
        on_link_loss: without a verifier, `wait` for one, let the `draft` model continue alone, or `fail`; default: as
            configured.
    """

    model: str | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2, extra_json_schema=TEMPERATURE_SCHEMA)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] | None = None
    seed: Annotated[int, msgspec.Meta(extra_json_schema=SEED_SCHEMA)] | None = None
    stop: StopString | Annotated[list[StopString], msgspec.Meta(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    speculation: bool | None = None
    on_link_loss: OnLinkLoss | None = None
    user: str | None = None
    n: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None


class CompletionRequest(GenerationRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `POST /v1/completions`. The prompt is one text or its token ids; `echo` returns it as well."""

    prompt: Annotated[str | list[str | int | list[int]], msgspec.Meta(extra_json_schema=PROMPT_SCHEMA)]
    echo: bool | None = None
    best_of: Any = None
    suffix: Any = None


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function's name and its arguments: an object, or the JSON of one; other text stays as it is."""

    name: str
    arguments: str | dict[str, Any] = {}


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call in an earlier message of the assistant."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation. Only a message with `tool_calls` may lack its content."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    refusal: Any = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it: one text, and arguments as objects.

        Raises:
            ValueError: it has neither content nor calls.
        """
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content")
        content = self.content or ""
        message: dict[str, Any] = {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }
        if self.tool_calls:
            message["tool_calls"] = [_call_for_template(call) for call in self.tool_calls]
        for field in ("name", "tool_call_id"):
            if (value := getattr(self, field)) is not None:
                message[field] = value
        return message


class ChatRequest(GenerationRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `POST /v1/chat/completions`.

    Attributes:
        tools: functions that the model may call, for its chat template; left out if `tool_choice` is `none`.
        documents, add_generation_prompt, continue_final_message: see `ChatOptions`.
        chat_template_kwargs: further variables of the chat template.
        max_completion_tokens: the newer name of `max_tokens`.
    """

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    tools: list[Annotated[dict[str, Any], msgspec.Meta(extra_json_schema=TOOL_SCHEMA)]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: TokenCount | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    prediction: Any = None
    response_format: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    top_logprobs: Any = None


R = TypeVar("R", bound=GenerationRequest)


def parse_request(body: bytes, kind: type[R]) -> R:
    """Parse a request body. Raises ApiError (400), which names the invalid or unsupported field."""
    try:
        request = msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error) from None
    _check_neutral(request, NEUTRAL_VALUES, "")
    if isinstance(request, ChatRequest):
        for index, message in enumerate(request.messages):
            _check_neutral(message, NEUTRAL_MESSAGE_VALUES, f"messages[{index}].")
    if request.seed is not None and not SEED_SCHEMA["minimum"] <= request.seed <= SEED_SCHEMA["maximum"]:
        raise ApiError(400, "seed is not a 64-bit integer", param="seed")
    return request


def get_prompt(request: CompletionRequest) -> str | list[int]:
    """Return the prompt text or its token ids. Raises ApiError (400) if there is no prompt or more than one."""
    prompt = request.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]  # type: ignore[assignment]
    if not prompt:
        raise ApiError(400, "the prompt is empty: give at least one token", param="prompt")
    if isinstance(prompt, str):
        return prompt
    if all(isinstance(token, int) and 0 <= token < 1 << 31 for token in prompt):
        return prompt  # type: ignore[return-value]
    raise ApiError(400, "send one prompt per request: a text or a list of token ids", param="prompt")


def get_conversation(request: ChatRequest) -> Conversation:
    """Return the messages for the chat template. Raises ApiError (400), which names the message."""
    conversation = []
    for index, message in enumerate(request.messages):
        try:
            conversation.append(message.for_template())
        except ValueError as error:
            raise ApiError(400, f"messages[{index}]: {error}", param=f"messages[{index}]") from None
    return conversation


def get_chat_options(request: ChatRequest) -> ChatOptions:
    """Return the other inputs of the chat template. Raises ApiError (400) if a tool is not a function with a name."""
    for index, tool in enumerate(request.tools or []):
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            message = f'tools[{index}] is not {{"type": "function", "function": {{"name": ..., ...}}}}'
            raise ApiError(400, message, param=f"tools[{index}]")
    continues = bool(request.continue_final_message)
    starts = request.add_generation_prompt
    return ChatOptions(
        tools=(request.tools or None) if request.tool_choice != "none" else None,
        documents=request.documents,
        add_generation_prompt=not continues if starts is None else starts,
        continue_final_message=continues,
        variables=request.chat_template_kwargs or {},
    )


def get_sampling(request: GenerationRequest, seed: int, defaults: SamplingDefaults = OPENAI_DEFAULTS) -> Sampling:
    """Return the sampling parameters. Raises ApiError (400).

    Args:
        seed: used if the request has none.
        defaults: the model's.
    """

    def choose(name: str) -> Any:
        values = (getattr(source, name) for source in (request, defaults, OPENAI_DEFAULTS))
        return next(value for value in values if value is not None)

    try:
        return Sampling(
            temperature=choose("temperature"),
            top_k=choose("top_k"),
            top_p=choose("top_p"),
            # OpenAI's seeds are signed.
            seed=(seed if request.seed is None else request.seed) & MASK_64,
            ignore_eos=bool(request.ignore_eos),
        )
    except ValueError as error:
        raise ApiError(400, str(error), param="temperature") from None


def get_stop_strings(request: GenerationRequest) -> list[str]:
    """Return the stop strings of the request."""
    return [request.stop] if isinstance(request.stop, str) else list(request.stop or [])


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        # OpenAI's clients send JSON; templates write objects, each in its own way.
        with contextlib.suppress(msgspec.MsgspecError, RecursionError):
            arguments = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    function = {"name": call.function.name, "arguments": arguments}
    identity = {} if call.id is None else {"id": call.id}
    return {**identity, "type": call.type, "function": function}


def _check_neutral(struct: msgspec.Struct, neutral: dict[str, list[Any]], prefix: str) -> None:
    """Raise ApiError (400) if an unsupported field has a value with an effect; `prefix` is the path of the struct."""
    for field in struct.__struct_fields__:
        value = getattr(struct, field)
        if value is None or field not in neutral:
            continue
        # In Python, unlike JSON, True equals 1.
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral[field]):
            allowed = " or ".join(msgspec.json.encode(value).decode() for value in neutral[field] if value is not None)
            raise ApiError(
                400,
                f"{prefix}{field} is not supported: leave it out{f', or send {allowed}' if allowed else ''}",
                param=prefix + field,
                code="unsupported_parameter",
            )


def _malformed(error: Exception) -> ApiError:
    message, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    unknown = re.search(r"(?:unknown|missing required) field `(.+)`", message)
    if unknown:
        path = f"{path}.{unknown[1]}" if path else unknown[1]
    if not path:
        return ApiError(400, f"the body is not a valid JSON request: {message}", code="invalid_json")
    return ApiError(400, f"{path}: {message}", param=path, code="unknown_parameter" if "unknown" in message else None)
