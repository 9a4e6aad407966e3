"""Forms are recognized by chat templates; what the prompt and the request say decides how an answer is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import AddedToken

from edge_runtime.protocol.bundle import ChatFormat
from edge_runtime.protocol.errors import GrammarError
from edge_runtime.service.chat_template import ChatOptions, ChatTemplate, Conversation
from edge_runtime.service.tool_calls.forms import (
    REASONING_FORMS,
    ReasoningFormName,
    ToolCallFormName,
    tool_call_form,
)
from edge_runtime.service.tool_calls.grammar import Tool
from edge_runtime.service.tool_calls.output_format import (
    AllowedCalls,
    OutputFormat,
    OutputForms,
    find_forms,
    make_grammar,
    make_output_format,
)
from edge_runtime.settings import table
from tests.byte_tokenizer import byte_tokenizer

TEMPLATES = Path(__file__).parent.parent / "chat_templates"
THINK = REASONING_FORMS[1]
NO_CALLS = AllowedCalls()
HELLO: Conversation = [{"role": "user", "content": "What does <think> mean?"}]
# What the chat templates of released models show, and templates that were written after others.
FORMS = {
    "command-r.tool_use": ("command-r", None),
    "deepseek-r1": ("deepseek", "think"),
    "gemma-2": ("hermes", None),
    "granite-3": ("granite", None),
    "hermes-3.tool_use": ("hermes", None),
    "llama-3.1": ("llama3", None),
    "mistral-v3": ("mistral", None),
    "qwen2.5": ("hermes", None),
    "smollm2": ("hermes", None),
    "smollm3": ("hermes", "think"),
}
SIGNS = {
    "<tool_call>\n<function=a>\n<parameter=b>": "qwen3-coder",
    "<tool_call>a\n<arg_key>b</arg_key>": "glm",
    "[TOOL_CALLS]a[ARGS]{}": "mistral-args",
    "<｜tool▁call▁begin｜>a<｜tool▁sep｜>{}": "deepseek-v3.1",
    "<|python_tag|>": "llama3",
}


@pytest.mark.parametrize("model", FORMS)
def test_forms_are_recognized_by_the_template(model: str) -> None:
    template = ChatTemplate(ChatFormat({"default": (TEMPLATES / f"{model}.jinja").read_text()}), Path("bundle"))
    forms = find_forms(template)
    assert (forms.tool_calls.name, forms.reasoning and forms.reasoning.name) == FORMS[model]
    assert forms.single_call is (model == "llama-3.1")
    other = find_forms(template, "glm", "mistral")
    assert (other.tool_calls.name, other.reasoning and other.reasoning.name) == ("glm", "mistral")
    assert find_forms(template, reasoning="none").reasoning is None


@pytest.mark.parametrize("source", SIGNS)
def test_other_forms_have_signs_of_their_own(source: str) -> None:
    assert find_forms(ChatTemplate(ChatFormat({"default": source}), Path("bundle"))).tool_calls.name == SIGNS[source]


def test_the_template_for_tools_is_looked_at() -> None:
    templates = {"default": "", "tool_use": "[TOOL_CALLS]"}
    assert find_forms(ChatTemplate(ChatFormat(templates), Path("bundle"))).tool_calls.name == "mistral"


def test_settings_name_all_forms() -> None:
    assert set(get_args(table.ToolCallFormSetting)) == {"auto", *get_args(ToolCallFormName)}
    assert set(get_args(table.ReasoningFormSetting)) == {"auto", *get_args(ReasoningFormName)}


def make(prompt: str, calls: AllowedCalls = NO_CALLS, messages: Conversation = HELLO, **changes: Any) -> OutputFormat:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<think>"), AddedToken("<tool_call>"), AddedToken("<other>")])
    options = ChatOptions(continue_final_message=messages[-1]["role"] == "assistant", add_generation_prompt=False)
    forms = OutputForms(tool_call_form("hermes"), THINK, **changes)
    return make_output_format(forms, calls, tokenizer, prompt=prompt, conversation=messages, options=options)


def test_the_prompt_may_have_begun_or_ended_the_reasoning() -> None:
    output = make("user: What does <think> mean?\nassistant:")
    assert (output.reasoning, output.in_reasoning, output.form) == (THINK, False, None)
    assert make("assistant:\n<think>\n").in_reasoning
    assert make("assistant:\n<think>\n\n</think>\n\n").reasoning is None
    assert make("assistant:\n<think>\n\n</think>\n\n").new_parser() is None
    continued: Conversation = [*HELLO, {"role": "assistant", "content": "<think>Hm"}]
    assert make("assistant: <think>Hm", messages=continued).in_reasoning
    answered: Conversation = [*HELLO, {"role": "assistant", "content": "<think>Hm</think>It"}]
    assert make("assistant: It", messages=answered).reasoning is None


def test_markers_that_are_special_tokens_are_visible() -> None:
    calls = AllowedCalls([Tool("now")])
    assert make("", calls).visible == {300, 301}
    assert make("").visible == {300}
    assert make("", calls).single_call is False
    assert make("", calls, single_call=True).single_call
    assert make("", AllowedCalls([Tool("now")], single=True)).single_call


def test_optional_calls_of_too_many_tools_are_not_constrained() -> None:
    schema = {"type": "object", "properties": {f"p{index}": {"enum": ["x" * 1000]} for index in range(100)}}
    for strict in (False, True):
        tools = [Tool(f"t{index}", schema, strict) for index in range(3)]
        output = make("", AllowedCalls(tools))
        if strict:
            with pytest.raises(GrammarError, match="send fewer tools"):
                make_grammar(output, AllowedCalls(tools), byte_tokenizer())
        else:
            assert make_grammar(output, AllowedCalls(tools), byte_tokenizer()) == ""
            with pytest.raises(GrammarError, match="send fewer tools"):
                make_grammar(output, AllowedCalls(tools, required=True), byte_tokenizer())
    text = 'start: "x"'
    assert make_grammar(make("</think>"), AllowedCalls(), byte_tokenizer(), text) == text
    assert "think" in make_grammar(make(""), AllowedCalls(), byte_tokenizer(), text)
