"""Tools in the prompt of a model whose chat template leaves them out.

The tools are described in the system message, with the form of calls that the answer is parsed for, in the words that
Qwen 2.5 was trained on. Earlier calls become text of the assistant, and their results text of the user.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

import msgspec

from edge_runtime.protocol.errors import InputError
from edge_runtime.service.chat_template import ChatOptions, ChatTemplate, Conversation
from edge_runtime.service.tool_calls.forms import ToolCallForm, format_calls, takes_calls, takes_tools

INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, write its name and its arguments as follows:
{example}"""
EXAMPLE_NAME, EXAMPLE_ARGUMENTS = "function-name", {"argument-name": "value"}


def render_prompt(template: ChatTemplate, messages: Conversation, options: ChatOptions, form: ToolCallForm) -> str:
    """Return the text that the model continues; see `ChatTemplate.render`. Raises InputError."""
    try:
        return _render(template, *add_tools(template, messages, options, form))
    except RecursionError:
        raise InputError("arguments of calls, or tools, are nested too deeply") from None


def add_tools(
    template: ChatTemplate, messages: Conversation, options: ChatOptions, form: ToolCallForm
) -> tuple[Conversation, ChatOptions]:
    """Return the conversation and the options for `template`, with tools and calls as text where it takes none."""
    source = template.source(options)
    if not takes_calls(source):
        messages = _calls_as_text(messages, form)
    elif form.id_length:
        messages = [_with_ids_of_length(message, form.id_length) for message in messages]
    if options.tools and not takes_tools(source):
        example = format_calls(form, [(EXAMPLE_NAME, EXAMPLE_ARGUMENTS)])
        tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in options.tools)
        messages = _with_instructions(template, messages, INSTRUCTIONS.format(tools=tools, example=example))
        options = msgspec.structs.replace(options, tools=None)
    return messages, options


def _render(template: ChatTemplate, messages: Conversation, options: ChatOptions) -> str:
    """Render with the arguments of calls as objects, or, where a template such as DeepSeek's wants text, as JSON."""
    try:
        return template.render(messages, options)
    except InputError:
        as_json = [_with_json_arguments(message) for message in messages]
        if as_json == messages:
            raise
        with contextlib.suppress(InputError):
            return template.render(as_json, options)
        raise


def _with_instructions(template: ChatTemplate, messages: Conversation, text: str) -> Conversation:
    """Add `text` to the system message, or to the first message if the template takes no system messages."""
    first, *others = messages
    if first["role"] in ("system", "developer") or not template.takes_system_message:
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *others]
    return [{"role": "system", "content": text}, *messages]


def _calls_as_text(messages: Conversation, form: ToolCallForm) -> Conversation:
    converted: Conversation = []
    for message in messages:
        if message["role"] == "tool":
            response = f"<tool_response>\n{message['content']}\n</tool_response>"
            if converted and converted[-1].get("is_response"):
                converted[-1]["content"] += f"\n{response}"
            else:
                converted.append({"role": "user", "content": response, "is_response": True})
        elif message.get("tool_calls"):
            calls = [_name_and_arguments(call["function"]) for call in message["tool_calls"]]
            parts = [message["content"], format_calls(form, calls)]
            converted.append({"role": "assistant", "content": "\n".join(part for part in parts if part)})
        else:
            converted.append(message)
    return [{key: value for key, value in message.items() if key != "is_response"} for message in converted]


def _name_and_arguments(function: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    arguments = function["arguments"]
    return function["name"], arguments if isinstance(arguments, dict) else {"arguments": arguments}


def _with_ids_of_length(message: dict[str, Any], length: int) -> dict[str, Any]:
    """Replace ids of calls that another service made; the template accepts ids of one length alone."""

    def fit(identity: str) -> str:
        fits = len(identity) == length and identity.isalnum()
        return identity if fits else hashlib.sha256(identity.encode()).hexdigest()[:length]

    message = dict(message)
    if message.get("tool_calls"):
        message["tool_calls"] = [{**call, "id": fit(call.get("id", ""))} for call in message["tool_calls"]]
    if "tool_call_id" in message:
        message["tool_call_id"] = fit(message["tool_call_id"])
    return message


def _with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}
