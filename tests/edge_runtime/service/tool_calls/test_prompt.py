"""Models whose chat template leaves out tools are told about them, and about earlier calls, in plain text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.protocol.bundle import ChatFormat
from edge_runtime.protocol.errors import InputError
from edge_runtime.service.chat_template import ChatOptions, ChatTemplate, Conversation
from edge_runtime.service.tool_calls.forms import tool_call_form
from edge_runtime.service.tool_calls.output_format import find_forms
from edge_runtime.service.tool_calls.parser import OutputParser
from edge_runtime.service.tool_calls.prompt import render_prompt

TEMPLATES = Path(__file__).parent.parent / "chat_templates"
TOOL = {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object"}}}
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "now", "arguments": {"zone": "<Łódź>"}}}
CONVERSATION: Conversation = [
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"hour": 7}', "tool_call_id": "abcdef123"},
    {"role": "tool", "content": '{"hour": 8}', "tool_call_id": "abcdef124"},
]
WITH_TOOL = ChatOptions(tools=[TOOL])


def read_template(model: str) -> ChatTemplate:
    source = (TEMPLATES / f"{model}.jinja").read_text()
    return ChatTemplate(ChatFormat({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"}), Path("bundle"))


PLAIN = ChatTemplate(ChatFormat(), Path("bundle"))


@pytest.mark.parametrize("template", [read_template("smollm2"), PLAIN], ids=["smollm2", "plain"])
def test_tools_are_described_in_the_system_message(template: ChatTemplate) -> None:
    form = find_forms(template).tool_calls
    assert form.name == "hermes"
    system: Conversation = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    for messages in (CONVERSATION, system):
        text = render_prompt(template, messages, WITH_TOOL, form)
        assert text.index("# Tools") < text.index("What time is it?")
        assert json.dumps(TOOL, ensure_ascii=False) in text
        assert text.count('"hour"') == 2
        # The earlier call is written as the answer is read.
        _, _, call = text.partition("Let me see.\n")
        parser = OutputParser(form)
        (reported,) = parser.feed(call[: call.index("</tool_call>")]).calls
        assert (reported.name, json.loads(reported.arguments)) == ("now", {"zone": "<Łódź>"})
    assert "Be brief.\n\n# Tools" in render_prompt(template, system, WITH_TOOL, form)
    assert "# Tools" not in render_prompt(template, CONVERSATION, ChatOptions(), form)


def test_a_template_without_system_messages_gets_the_tools_in_the_first_message() -> None:
    template = read_template("gemma-2")
    assert not template.takes_system_message
    text = render_prompt(template, CONVERSATION, WITH_TOOL, tool_call_form("hermes"))
    assert text.startswith("<s><start_of_turn>user\nWhat time is it?\n\n# Tools")


@pytest.mark.parametrize("model", ["qwen2.5", "hermes-3.tool_use", "mistral-v3", "llama-3.1"])
def test_templates_with_tools_are_left_alone(model: str) -> None:
    template = read_template(model)
    # Hermes's template demands a description of every parameter.
    messages, tool = CONVERSATION[:3], {**TOOL, "function": {**TOOL["function"], "parameters": {"properties": {}}}}  # type: ignore[dict-item]
    options = ChatOptions(tools=[tool], variables={"date_string": "x"})
    form = find_forms(template).tool_calls
    assert render_prompt(template, messages, options, form) == template.render(messages, options)


def test_ids_of_calls_fit_the_template() -> None:
    template, form = read_template("mistral-v3"), tool_call_form("mistral")
    assert '"id": "abcdef123"' in render_prompt(template, CONVERSATION[:3], ChatOptions(), form)
    call, result = {**CALL, "id": "call_0123456789abcdef"}, {**CONVERSATION[2], "tool_call_id": "call_0123456789abcdef"}
    messages = [CONVERSATION[0], {**CONVERSATION[1], "tool_calls": [call]}, result]
    text = render_prompt(template, messages, ChatOptions(), form)
    (identity,) = re.findall(r'"id": "(\w{9})"', text)
    assert f'"call_id": "{identity}"' in text


def test_arguments_may_be_too_deep() -> None:
    arguments: dict[str, Any] = {}
    # From Python 3.12 on, json itself goes several thousand levels deep.
    for _ in range(100_000):
        arguments = {"a": arguments}
    call = {"id": "x", "type": "function", "function": {"name": "now", "arguments": arguments}}
    messages = [*CONVERSATION[:1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    for template in (PLAIN, read_template("qwen2.5")):
        with pytest.raises(InputError, match=r"nested too deeply|recursion"):
            render_prompt(template, messages, ChatOptions(), tool_call_form("hermes"))


def test_arguments_are_given_as_json_where_a_template_wants_text() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name + c.function.arguments }}{% endfor %}"
        "\n{% endfor %}"
    )
    template = ChatTemplate(ChatFormat({"default": source}), Path("bundle"))
    text = render_prompt(template, CONVERSATION, ChatOptions(), tool_call_form("hermes"))
    assert '<tool_call>now{"zone": "<Łódź>"}' in text
    broken = ChatTemplate(ChatFormat({"default": source + "{{ raise_exception('No.') }}"}), Path("bundle"))
    with pytest.raises(InputError, match="concatenate"):
        render_prompt(broken, CONVERSATION, ChatOptions(), tool_call_form("hermes"))
