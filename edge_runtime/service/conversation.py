"""The messages of `/v1/chat/completions`, and their form for chat templates."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import msgspec

from edge_runtime.service.chat_template import Conversation
from edge_runtime.service.errors import ApiError

# What `ChatMessage.for_template` and `ChatTemplate.render` demand beyond the types.
MESSAGE_SCHEMA = {
    "anyOf": [
        {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]},
        {"properties": {"tool_calls": {"type": "array", "minItems": 1}}, "required": ["tool_calls"]},
    ]
}


class TextPart(msgspec.Struct, frozen=True):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(msgspec.Struct, frozen=True):
    """A function's name and its arguments: an object, or the JSON of one; other text stays as it is."""

    name: str
    arguments: str | dict[str, Any] = {}


class ToolCall(msgspec.Struct, frozen=True):
    """A call in an earlier message of the assistant."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of a conversation. Only one with `tool_calls` may lack its content. Other fields are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

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
        for field in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, field)) is not None:
                message[field] = value
        return message


def get_conversation(messages: list[ChatMessage]) -> Conversation:
    """Return the messages for the chat template. Raises ApiError (400), which names the message."""
    conversation = []
    for index, message in enumerate(messages):
        try:
            conversation.append(message.for_template())
        except ValueError as error:
            raise ApiError(400, f"messages[{index}]: {error}", param=f"messages[{index}]") from None
    return conversation


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        # OpenAI's clients send JSON; templates write objects, each in its own way.
        with contextlib.suppress(msgspec.MsgspecError, RecursionError):
            arguments = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    function = {"name": call.function.name, "arguments": arguments}
    identity = {} if call.id is None else {"id": call.id}
    return {**identity, "type": call.type, "function": function}
