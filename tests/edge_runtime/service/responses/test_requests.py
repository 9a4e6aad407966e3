"""Requests of the Responses API as chat requests: items, tools, formats, earlier responses, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edge_runtime.service.conversation import ChatMessage, FunctionCall, ToolCall
from edge_runtime.service.errors import ApiError
from edge_runtime.service.parameters import get_logprobs, limit_answer
from edge_runtime.service.requests import parse_request
from edge_runtime.service.responses.requests import ResponsesRequest, ResponseTask, rename_fields, to_chat
from edge_runtime.service.responses.store import ResponseStore
from edge_runtime.service.structured_output import JsonObjectFormat, JsonSchemaFormat, NamedSchema
from edge_runtime.service.tool_calls.output_format import get_allowed_calls

CALL = {"type": "function_call", "call_id": "call_1", "name": "now", "arguments": "{}", "status": "completed"}
NOW = {"type": "function", "name": "now", "parameters": {"type": "object"}, "strict": None, "description": None}


def respond(given: Any, **fields: Any) -> ResponseTask:
    request, _ = parse_request(json.dumps({"input": given, **fields}).encode(), ResponsesRequest)
    return to_chat(request, ResponseStore())


def test_a_text_is_the_users_message_after_the_instructions() -> None:
    task = respond("Hello", instructions="Be brief.")
    assert task.chat.messages == [ChatMessage("system", "Be brief."), ChatMessage("user", "Hello")]
    assert task.messages == [ChatMessage("user", "Hello")]


def test_items_become_messages_as_the_chat_has_them() -> None:
    items = [
        {"role": "developer", "content": "Use tools."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "Wait", "annotations": []}]},
        CALL,
        CALL | {"call_id": "call_2"},
        {"type": "function_call_output", "call_id": "call_1", "output": "12:00"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "12:01"}]},
        {"type": "reasoning", "summary": []},
        CALL | {"call_id": "call_3"},
    ]
    calls = [ToolCall(FunctionCall("now", "{}"), f"call_{index}") for index in (1, 2, 3)]
    assert respond(items).messages == [
        ChatMessage("developer", "Use tools."),
        ChatMessage("user", "What"),
        ChatMessage("assistant", "Wait", tool_calls=calls[:2], reasoning_content="Hm."),
        ChatMessage("tool", "12:00", tool_call_id="call_1"),
        ChatMessage("tool", "12:01", tool_call_id="call_2"),
        ChatMessage("assistant", tool_calls=calls[2:]),
    ]


def test_tools_and_choices_are_those_of_the_chat() -> None:
    def allowed(choice: Any) -> Any:
        chat = respond("x", tools=[NOW], tool_choice=choice, parallel_tool_calls=False).chat
        calls = get_allowed_calls(chat.tools, chat.tool_choice, chat.parallel_tool_calls)
        return [tool.name for tool in calls.tools], calls.required

    assert respond("x", tools=[NOW]).chat.tools == [
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    ]
    assert allowed(None) == allowed("auto") == (["now"], False)
    assert allowed("none") == ([], False)
    assert allowed({"type": "function", "name": "now"}) == allowed("required") == (["now"], True)
    allowed_tools = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    assert allowed(allowed_tools) == (["now"], True)


def test_formats_effort_limits_and_logprobs() -> None:
    schema = {"type": "object"}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    assert respond("x", text={"format": form}).chat.response_format == JsonSchemaFormat(NamedSchema(schema))
    assert respond("x", text={"format": {"type": "json_object"}}).chat.response_format == JsonObjectFormat()
    assert respond("x", text={"verbosity": "low"}).chat.response_format is None
    assert respond("x", reasoning={"effort": "low", "summary": "auto"}).chat.reasoning_effort == "low"
    assert limit_answer(respond("x", max_output_tokens=5).chat, 10, context=100, maximum=0) == 5
    assert limit_answer(respond("x").chat, 10, context=100, maximum=0) == 90
    assert get_logprobs(respond("x").chat) == 0
    assert get_logprobs(respond("x", include=["reasoning.encrypted_content"]).chat) == 0
    assert get_logprobs(respond("x", include=["message.output_text.logprobs"]).chat) == 1
    assert get_logprobs(respond("x", top_logprobs=3).chat) == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"type": ["x"]}]}, "input[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "input[0].id"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        respond(**({"given": fields.pop("input", "x")} | fields))
    assert caught.value.status == 400
    assert caught.value.body.error.param == param


def test_errors_of_the_chat_have_the_names_of_this_endpoint() -> None:
    error = ApiError(400, "your messages: response_format is wrong", param="response_format", code="invalid_grammar")
    renamed = rename_fields(error)
    assert renamed.body.error.message == "your input: text.format is wrong"
    assert (renamed.body.error.param, renamed.body.error.code) == ("text.format", "invalid_grammar")
    assert rename_fields(ApiError(503, "busy", retry_after=3)).retry_after == 3
