"""Tool calls and reasoning over HTTP, with the `openai` client: whole and streamed, constrained, and offline.

The toy target knows nothing of tools; that its calls are valid is the grammar's doing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol.bundle import ChatFormat
from edge_runtime.service.chat_template import ChatTemplate
from edge_runtime.service.tool_calls.forms import TOOL_CALL_FORMS, format_calls, tool_call_form
from tests.edge_runtime.service.conftest import board_process, service_pair
from tests.edge_runtime.service.test_link_loss import stream_chunks
from tests.models import CHAT_TEMPLATE

pytestmark = pytest.mark.usefixtures("toy_bundle")

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "place": {"enum": ["Rome", "Łódź", "New York"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "detail": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["place", "days"],
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]
SCHEMAS = {"get_weather": WEATHER, "now": {"type": "object", "maxProperties": 0}}
MESSAGES: list[Any] = [{"role": "user", "content": "Will it rain?"}]
# Text with a call, in the words of a grammar: what a model that knows about tools would write.
CALLS: list[tuple[str, dict[str, Any]]] = [("now", {}), ("get_weather", {"place": "Rome", "days": 3})]
CALLING = "start: " + json.dumps("Let me see.\n\n" + format_calls(tool_call_form("hermes"), CALLS))
REQUEST: dict[str, Any] = {"model": "", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 200, "temperature": 0.7}


def read_calls(calls: Any) -> list[tuple[str, Any]]:
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


@pytest.fixture(scope="module")
def url(verifier: str) -> Iterator[str]:
    """URL of a service whose answers have no limit but the request's."""
    with board_process(verifier, "--policy", "fixed", "--threads", "1") as (_, address):
        yield address


def thinking_template(generation_prompt: str) -> ChatTemplate:
    """ChatML of a model that thinks."""
    source = CHAT_TEMPLATE.replace("<|im_start|>assistant\n", generation_prompt) + "{# <think> #}"
    return ChatTemplate(ChatFormat({"default": source}), Path("bundle"))


@pytest.mark.slow
def test_required_calls_are_valid_and_the_same_when_streamed(client: openai.OpenAI) -> None:
    names = set()
    for seed in range(4):
        request = REQUEST | {"tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        choice = client.chat.completions.create(**request).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert choice.message.tool_calls is not None
        (call,) = read_calls(choice.message.tool_calls)
        names.add(call[0])
        first, *others = client.chat.completions.create(**request, stream=True)
        assert first.choices[0].delta.role == "assistant"
        deltas = [
            chunk.choices[0].delta.tool_calls[0] for chunk in [first, *others] if chunk.choices[0].delta.tool_calls
        ]
        assert (deltas[0].index, deltas[0].type, deltas[0].function.name) == (0, "function", call[0])
        assert deltas[0].id.startswith("call_")
        assert deltas[0].function.arguments == ""
        assert all(delta.id is None and delta.function.name is None for delta in deltas[1:])
        assert json.loads("".join(delta.function.arguments for delta in deltas)) == call[1]
        assert not any(chunk.choices[0].delta.content for chunk in [first, *others])
        assert others[-1].choices[0].finish_reason == "tool_calls"
    assert names <= set(SCHEMAS)


def test_a_function_can_be_chosen(client: openai.OpenAI) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    for choice in (
        {"type": "function", "function": {"name": "get_weather"}},
        {"type": "allowed_tools", "allowed_tools": allowed},
    ):
        request = REQUEST | {"tool_choice": choice, "parallel_tool_calls": False}
        answer = client.chat.completions.create(**request).choices[0]
        assert [name for name, _ in read_calls(answer.message.tool_calls)] == ["get_weather"]
        assert answer.finish_reason == "tool_calls"


@pytest.mark.slow
@pytest.mark.parametrize("stop", [None, "{", "me see"])
def test_text_and_calls_in_one_answer(client: openai.OpenAI, stop: str | None) -> None:
    extra = {"structured_outputs": {"grammar": CALLING}}
    request = REQUEST | {"extra_body": extra, "stop": stop, "seed": 1}
    choice = client.chat.completions.create(**request).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**request, stream=True)]
    text = "".join(chunk.delta.content or "" for chunk in chunks)
    names = [call.function.name for chunk in chunks for call in chunk.delta.tool_calls or [] if call.function.name]
    assert chunks[-1].finish_reason == choice.finish_reason
    assert text == (choice.message.content or "")
    if stop == "me see":
        # Stop strings are looked for in the content, and end the answer before its calls.
        assert (text, names, choice.finish_reason) == ("Let ", [], "stop")
    else:
        calls = read_calls(choice.message.tool_calls)
        assert (text, choice.finish_reason) == ("Let me see.", "tool_calls")
        assert calls == CALLS
        assert names == ["now", "get_weather"]


def test_calls_are_optional_by_default(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(**REQUEST | {"tool_choice": choice, "max_tokens": 16, "seed": 3})
        # The toy target writes Python.
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].message.content
        assert answer.choices[0].finish_reason in ("stop", "length")


def test_a_conversation_with_calls_goes_on(client: openai.OpenAI) -> None:
    request = REQUEST | {"tool_choice": "required", "parallel_tool_calls": False}
    message = client.chat.completions.create(**request).choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"rain": true}'}
    # As the client returns it: with null content.
    messages = [*MESSAGES, message, result]
    answer = client.chat.completions.create(**REQUEST | {"messages": messages, "max_tokens": 4})
    longer = client.chat.completions.create(**REQUEST | {"messages": MESSAGES, "max_tokens": 4})
    assert answer.usage.prompt_tokens > longer.usage.prompt_tokens + 20


def test_several_calls_may_be_cut_off_by_the_limit(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**REQUEST | {"tool_choice": "required", "max_tokens": 12}).choices[0]
    assert answer.finish_reason == "length"
    if answer.message.tool_calls:
        assert answer.message.content is None


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "there is no tool 'other'"),
        ({"tool_choice": "required", "tools": []}, "there are no tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, r"tools\[0\]: a name has"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]: not"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "called get_weather, too"),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "strict": True, "parameters": {"not": {}}}}]},
            "not",
        ),
    ],
)
def test_impossible_tools_are_refused(client: openai.OpenAI, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError, match=param):
        client.chat.completions.create(**REQUEST | {"max_tokens": 4} | changes)


@pytest.mark.slow
@pytest.mark.parametrize("form", [form.name for form in TOOL_CALL_FORMS])
async def test_every_form_of_calls(target: Target, draft: OnnxDraft, form: str) -> None:
    async with service_pair(target, draft, tool_call_form=form) as pair:
        request = REQUEST | {"tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
        choice = (await pair.client.chat.completions.create(**request)).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert len(read_calls(choice.message.tool_calls)) == 1


@pytest.mark.slow
async def test_reasoning_may_begin_in_the_prompt(target: Target, draft: OnnxDraft) -> None:
    template = thinking_template("<|im_start|>assistant\n{% if enable_thinking is not false %}<think>\n{% endif %}")
    async with service_pair(target, draft, chat_template=template) as pair:
        request: dict[str, Any] = {"model": "", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
        thinking = (await pair.client.chat.completions.create(**request)).choices[0].message
        assert thinking.reasoning_content  # type: ignore[attr-defined]
        assert thinking.content == ""
        for changes in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
            plain = (await pair.client.chat.completions.create(**request, extra_body=changes)).choices[0].message
            assert plain.content
            assert "reasoning_content" not in plain.model_fields_set
    async with service_pair(target, draft, chat_template=template, reasoning_form="none") as pair:
        assert (await pair.client.chat.completions.create(**request)).choices[0].message.content


async def test_a_last_message_of_the_assistant_is_continued(client: openai.OpenAI) -> None:
    messages: list[Any] = [*MESSAGES, {"role": "assistant", "content": "Because the"}]
    request: dict[str, Any] = {"model": "", "max_tokens": 6, "temperature": 0}
    answer = client.chat.completions.create(**request, messages=messages)
    plain = "User: Will it rain?\n\nAssistant: Because the"
    text = client.completions.create(**request, prompt=plain, stop="\nUser:").choices[0].text
    assert answer.choices[0].message.content == text
    other = client.chat.completions.create(**request, messages=messages, extra_body={"add_generation_prompt": True})
    assert other.usage.prompt_tokens > answer.usage.prompt_tokens


@pytest.mark.slow
async def test_unverified_calls_are_reported_at_the_end_alone(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair:
        await pair.verifier.stop()
        body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
        chunks = [
            chunk
            async for chunk in stream_chunks(pair, "chat/completions", **body, prompt=None, on_link_loss="draft")
            if isinstance(chunk, dict)
        ]
        assert chunks[-1]["choices"][0]["finish_reason"] in ("tool_calls", "length")
        assert chunks[-1]["timings"]["unverified_n"] > 0
        calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
        if chunks[-1]["choices"][0]["finish_reason"] == "tool_calls":
            arguments = "".join(call["function"]["arguments"] for call in calls)
            jsonschema.validate(json.loads(arguments), SCHEMAS[calls[0]["function"]["name"]])
        assert not any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)
