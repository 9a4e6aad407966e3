"""The request body of `POST /v1/responses`, and the chat request that it stands for."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from edge_runtime.protocol.grammar_sources import JsonSchema
from edge_runtime.service.conversation import ChatMessage, FunctionCall, ToolCall
from edge_runtime.service.errors import ApiError
from edge_runtime.service.field_policy import EndpointName
from edge_runtime.service.requests import (
    ChatRequest,
    EndpointRequest,
    TopCount,
    malformed_request,
    means,
)
from edge_runtime.service.responses.store import ResponseStore
from edge_runtime.service.structured_output import JsonObjectFormat, JsonSchemaFormat, NamedSchema, TextFormat
from edge_runtime.service.tool_calls.output_format import (
    TOOL_NAME,
    AllowedFunction,
    AllowedTools,
    AllowedToolsChoice,
    FunctionName,
    NamedToolChoice,
    ToolChoice,
)

# The value of `include` that asks for log-probabilities; others ask for what this service does not have.
INCLUDE_LOGPROBS = "message.output_text.logprobs"
# OpenAI's bounds of metadata, which is returned and kept.
MetadataKey = Annotated[str, msgspec.Meta(max_length=64)]
MetadataValue = Annotated[str, msgspec.Meta(max_length=512)]
# Names of chat requests in errors, and those of this endpoint.
FIELD_NAMES = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens"}


class ContentPart(msgspec.Struct, frozen=True):
    """A text part of an item."""

    type: Literal["input_text", "output_text", "text"]
    text: str


Content = str | list[ContentPart]


class InputMessage(msgspec.Struct, frozen=True):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    type: Literal["message"] = "message"


class InputCall(msgspec.Struct, frozen=True):
    """A call of the model in an earlier turn."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputCallOutput(msgspec.Struct, frozen=True):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class InputReasoningPart(msgspec.Struct, frozen=True):
    """A text of reasoning."""

    text: str
    type: Literal["reasoning_text"] = "reasoning_text"


class InputReasoning(msgspec.Struct, frozen=True):
    """Reasoning of an earlier turn, which the chat template may use. Summaries are ignored."""

    type: Literal["reasoning"]
    content: list[InputReasoningPart] | None = None


class ItemReference(msgspec.Struct, frozen=True):
    """The id of an item of a response that is kept."""

    type: Literal["item_reference"]
    id: str


InputItem = InputMessage | InputCall | InputCallOutput | InputReasoning | ItemReference
INPUT_ITEMS: dict[str, type[InputItem]] = {
    "message": InputMessage,
    "function_call": InputCall,
    "function_call_output": InputCallOutput,
    "reasoning": InputReasoning,
    "item_reference": ItemReference,
}
# Exactly what `_read_items` accepts, except that a schema cannot say whether references resolve.
INPUT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "anyOf": [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in INPUT_ITEMS.values()],
            },
            "minItems": 1,
        },
    ]
}
FUNCTION_SCHEMA = {
    "properties": {
        "type": {"const": "function"},
        "name": {"type": "string", "pattern": f"^{TOOL_NAME.pattern}$"},
        "description": {"type": ["string", "null"]},
        "parameters": {"type": ["object", "null"]},
        "strict": {"type": ["boolean", "null"]},
    },
    "required": ["type", "name"],
}


class NamedFunctionChoice(msgspec.Struct, frozen=True, tag_field="type", tag="function"):
    """The model must call this function."""

    name: str


class AllowedFunctionName(msgspec.Struct, frozen=True):
    """A function that may be called."""

    name: str
    type: Literal["function"] = "function"


class AllowedFunctionsChoice(msgspec.Struct, frozen=True, tag_field="type", tag="allowed_tools"):
    """The model may, or must, call some of the functions."""

    tools: list[AllowedFunctionName]
    mode: Literal["auto", "required"] = "auto"


FunctionChoice = Literal["none", "auto", "required"] | NamedFunctionChoice | AllowedFunctionsChoice


class SchemaTextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    """JSON that matches a schema, whether or not `strict` is set; name and description are not used."""

    schema: JsonSchema
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the text must match; other options are ignored."""

    format: TextFormat | JsonObjectFormat | SchemaTextFormat | None = None


class ReasoningOptions(msgspec.Struct, frozen=True):
    """How much the model thinks; other options are ignored."""

    effort: str | None = None


class ResponsesRequest(EndpointRequest, frozen=True, kw_only=True):
    """The body of `POST /v1/responses`."""

    endpoint: ClassVar[EndpointName] = "responses"

    input: Annotated[
        str | list[dict[str, Any]],
        msgspec.Meta(extra_json_schema=INPUT_SCHEMA),
        means(
            "The user's message, or items: messages, `function_call`, `function_call_output`, `reasoning`, and "
            "`item_reference`."
        ),
    ]
    instructions: Annotated[
        str | None, means("The system message of this response; those of earlier responses do not count.")
    ] = None
    previous_response_id: Annotated[
        str | None, means("The response whose conversation is continued, if it is still kept.")
    ] = None
    store: Annotated[
        bool | None, means("Keep the response and its conversation in the board's memory. Default: true.")
    ] = None
    tools: Annotated[
        list[Annotated[dict[str, Any], msgspec.Meta(extra_json_schema=FUNCTION_SCHEMA)]] | None,
        means("Functions that the model may call; no other kinds of tools."),
    ] = None
    tool_choice: Annotated[
        FunctionChoice | None,
        means("`auto`, `required`, `none`, a function by `name`, or `allowed_tools`; as for chat completions."),
    ] = None
    parallel_tool_calls: Annotated[bool | None, means("false: one call at most. Default: true.")] = None
    text: Annotated[TextOptions | None, means("`format`: `json_schema` with a `schema`, `json_object` or `text`.")] = (
        None
    )
    reasoning: Annotated[ReasoningOptions | None, means("`effort`, as `reasoning_effort`.")] = None
    max_output_tokens: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] | None,
        means("Tokens of the answer at most, reasoning and calls included. Default: what the context leaves."),
    ] = None
    include: Annotated[
        list[str] | None, means(f"`{INCLUDE_LOGPROBS}`: return log-probabilities. Other values are ignored.")
    ] = None
    top_logprobs: Annotated[
        TopCount | None, means("Return log-probabilities, of this many most probable tokens at each position, too.")
    ] = None
    metadata: Annotated[
        Annotated[dict[MetadataKey, MetadataValue], msgspec.Meta(max_length=16)] | None,
        means("Returned with the response."),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, means("Further variables of the chat template, such as `enable_thinking`.")
    ] = None


class ResponseTask(msgspec.Struct, frozen=True):
    """A request, as a chat request.

    Attributes:
        messages: the conversation, to be kept with the response: without instructions.
    """

    request: ResponsesRequest
    chat: ChatRequest
    messages: list[ChatMessage]


def to_chat(request: ResponsesRequest, store: ResponseStore) -> ResponseTask:
    """Return the chat request that stands for a request. Raises ApiError (400)."""
    messages: list[ChatMessage] = []
    if request.previous_response_id is not None:
        previous = store.get(request.previous_response_id)
        if previous is None:
            message = (
                f"there is no response {request.previous_response_id[:80]!r}: it was not stored, or dropped for newer "
                "ones or at a restart; send the whole conversation as input"
            )
            raise ApiError(400, message, param="previous_response_id", code="previous_response_not_found")
        messages = previous.messages
    messages = _append_items(messages, _read_items(request.input, store))
    if not messages:
        raise ApiError(400, "input: there is no message", param="input")
    instructions = [] if request.instructions is None else [ChatMessage("system", request.instructions)]
    chat = ChatRequest(
        **{name: getattr(request, name) for name in EndpointRequest.__struct_fields__},
        messages=instructions + messages,
        tools=[_to_chat_tool(index, tool) for index, tool in enumerate(request.tools or [])] or None,
        tool_choice=_to_chat_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
        response_format=_to_response_format(request.text),
        max_tokens=request.max_output_tokens,
        logprobs=INCLUDE_LOGPROBS in (request.include or []) or bool(request.top_logprobs),
        top_logprobs=request.top_logprobs,
        chat_template_kwargs=request.chat_template_kwargs,
    )
    return ResponseTask(request, chat, messages)


def rename_fields(error: ApiError) -> ApiError:
    """Return an error of the chat request with the names of this endpoint's fields."""
    old = error.body.error

    def rename(text: str) -> str:
        return re.sub(r"\b(?:" + "|".join(FIELD_NAMES) + r")\b", lambda match: FIELD_NAMES[match[0]], text)

    return ApiError(
        error.status,
        rename(old.message),
        param=old.param and rename(old.param),
        code=old.code,
        retry_after=error.retry_after,
    )


def _read_items(given: str | list[dict[str, Any]], store: ResponseStore) -> list[InputItem]:
    """Return the items of an input, references resolved. Raises ApiError (400), which names the item."""
    if isinstance(given, str):
        return [InputMessage("user", given)]
    items: list[InputItem] = []
    for index, each in enumerate(given):
        item = _read_item(each, f"input[{index}]")
        if isinstance(item, ItemReference):
            stored = store.find_item(item.id)
            if stored is None:
                message = f"input[{index}]: there is no item {item.id[:80]!r}: send the item itself"
                raise ApiError(400, message, param=f"input[{index}].id", code="item_not_found")
            item = _read_item(stored, f"input[{index}]")
        items.append(item)
    return items


def _read_item(item: dict[str, Any], path: str) -> InputItem:
    kind = item.get("type", "message")
    struct = INPUT_ITEMS.get(kind) if isinstance(kind, str) else None
    if struct is None:
        message = f"{path}.type: {str(kind)[:80]!r} is not supported; send one of {', '.join(INPUT_ITEMS)}"
        raise ApiError(400, message, param=f"{path}.type", code="unsupported_parameter")
    try:
        return msgspec.convert(item, struct)
    except msgspec.ValidationError as error:
        raise malformed_request(error, path) from None


def _append_items(messages: list[ChatMessage], items: list[InputItem]) -> list[ChatMessage]:
    """Append items as messages: reasoning and calls become part of the assistant's message to which they belong."""
    messages, reasoning = list(messages), None
    for item in items:
        match item:
            case InputReasoning():
                reasoning = "".join(part.text for part in item.content or []) or None
                continue
            case InputMessage():
                thought = reasoning if item.role == "assistant" else None
                messages.append(ChatMessage(item.role, _join(item.content), reasoning_content=thought))
            case InputCall():
                call = ToolCall(FunctionCall(item.name, item.arguments), item.call_id)
                if not messages or messages[-1].role != "assistant":
                    messages.append(ChatMessage("assistant", reasoning_content=reasoning))
                last = messages[-1]
                messages[-1] = msgspec.structs.replace(last, tool_calls=[*(last.tool_calls or []), call])
            case InputCallOutput():
                messages.append(ChatMessage("tool", _join(item.output), tool_call_id=item.call_id))
        reasoning = None
    return messages


def _join(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _to_chat_tool(index: int, tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        message = f"tools[{index}]: type {str(kind)[:80]!r} is not supported, only 'function'"
        raise ApiError(400, message, param=f"tools[{index}].type", code="unsupported_parameter")
    if not isinstance(tool.get("name"), str):
        raise ApiError(400, f"tools[{index}]: a function needs a name", param=f"tools[{index}].name")
    fields = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in fields if tool.get(name) is not None}}


def _to_chat_choice(choice: FunctionChoice | None) -> ToolChoice | None:
    match choice:
        case NamedFunctionChoice():
            return NamedToolChoice(FunctionName(choice.name))
        case AllowedFunctionsChoice():
            allowed = [AllowedFunction(FunctionName(tool.name)) for tool in choice.tools]
            return AllowedToolsChoice(AllowedTools(allowed, choice.mode))
    return choice


def _to_response_format(text: TextOptions | None) -> TextFormat | JsonObjectFormat | JsonSchemaFormat | None:
    form = text.format if text else None
    return JsonSchemaFormat(NamedSchema(form.schema)) if isinstance(form, SchemaTextFormat) else form
