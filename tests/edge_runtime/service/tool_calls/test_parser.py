"""Calls, reasoning and content are read from the text that models write, however it is split into pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.service.tool_calls.forms import (
    REASONING_FORMS,
    TOOL_CALL_FORMS,
    ReasoningForm,
    ToolCallForm,
    detect_tool_call_form,
    format_calls,
    tool_call_form,
)
from edge_runtime.service.tool_calls.parser import CallDelta, MessageDelta, OutputParser, merge_calls
from tests.byte_tokenizer import byte_tokenizer

TEMPLATES = Path(__file__).parent.parent / "chat_templates"
PARAMETERS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"place": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}},
        "required": ["place"],
    },
    "now": {"type": "object", "properties": {}},
}
ARGUMENTS = {"place": 'Łódź "x"\n{a}, <b> \\', "days": 2, "tags": ["a}", {"b": "]"}]}
CALLS: list[tuple[str, dict[str, Any]]] = [("get_weather", ARGUMENTS), ("now", {}), ("get_weather", {"place": "b"})]
THINK = REASONING_FORMS[1]
# Pieces of which texts are made that may or may not contain calls and reasoning.
FRAGMENTS = st.sampled_from(
    [
        *("<think>", "</think>", "\n", "\n\n", "  ", "Let me see.", "<b>", "{", '{"name": "now"}', "[", "]", "Action:"),
        *(marker for form in TOOL_CALL_FORMS for marker in (*form.markers, *form.hidden, form.end.strip()) if marker),
        *(format_calls(form, calls) for form in TOOL_CALL_FORMS for calls in (CALLS, CALLS[:1])),
        *("<function=now>", "<arg_key>", '"arguments": {', "```json", "}", ";", '"', "\\"),
    ]
)


def parse(
    text: str, form: ToolCallForm | None, sizes: list[int] | None = None, **options: Any
) -> tuple[MessageDelta, list[MessageDelta]]:
    """Parse `text` in pieces of these sizes, by turns; return the whole message and what was reported when."""
    parser = OutputParser(form, parameters=PARAMETERS, **options)
    deltas, start, turn = [], 0, 0
    while start < len(text):
        size = sizes[turn % len(sizes)] if sizes else 1
        deltas.append(parser.feed(text[start : start + size]))
        start, turn = start + size, turn + 1
    deltas.append(parser.flush())
    calls: list[CallDelta] = []
    for delta in deltas:
        calls = merge_calls(calls, delta.calls)
    content = "".join(delta.content for delta in deltas)
    return MessageDelta(content, "".join(delta.reasoning for delta in deltas), calls), deltas


def read_calls(message: MessageDelta) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


def without_ids(message: MessageDelta) -> tuple[str, str, list[tuple[str, str]]]:
    return message.content, message.reasoning, [(call.name, call.arguments) for call in message.calls]


@pytest.mark.parametrize("form", TOOL_CALL_FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("sizes", [[1], [3, 1], [1000]])
def test_calls_are_read_in_every_form(form: ToolCallForm, sizes: list[int]) -> None:
    message, _ = parse(format_calls(form, CALLS), form, sizes)
    assert (message.content, read_calls(message)) == ("", CALLS)
    assert [call.index for call in message.calls] == [0, 1, 2]
    ids = {call.id for call in message.calls}
    assert len(ids) == 3
    assert all(len(identity) == form.id_length or identity.startswith("call_") for identity in ids)
    single, _ = parse(format_calls(form, CALLS) + " and more", form, sizes, single_call=True)
    assert (single.content, read_calls(single)) == ("", CALLS[:1])


@pytest.mark.parametrize("form", TOOL_CALL_FORMS, ids=lambda form: form.name)
def test_text_and_reasoning_precede_calls(form: ToolCallForm) -> None:
    calls = format_calls(form, CALLS)
    message, _ = parse("<think>\nHm, <b>.\n</think>\n\n" + calls, form, reasoning=THINK)
    assert (message.content, message.reasoning, read_calls(message)) == ("", "Hm, <b>.", CALLS)
    message, _ = parse("Hm.\n</think>\n\nLet me see.", form, reasoning=THINK, in_reasoning=True)
    assert (message.content, message.reasoning) == ("Let me see.", "Hm.")
    # Without a marker, JSON after other text is text.
    if form.begin:
        message, _ = parse("Let me see.\n\n" + calls, form)
        assert (message.content, read_calls(message)) == ("Let me see.", CALLS)


@pytest.mark.slow
@given(st.lists(FRAGMENTS, max_size=8), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.data())
def test_the_message_does_not_depend_on_the_pieces(fragments: list[str], sizes: list[int], data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(TOOL_CALL_FORMS))
    options = {
        "reasoning": data.draw(st.sampled_from([None, THINK])),
        "single_call": data.draw(st.booleans()),
    }
    options["in_reasoning"] = options["reasoning"] is not None and data.draw(st.booleans())
    text = "".join(fragments)
    whole, _ = parse(text, form, [len(text) + 1], **options)
    pieces, _ = parse(text, form, sizes, **options)
    assert without_ids(pieces) == without_ids(whole)


@given(st.text(alphabet='ab <>[]{}"\\\n`:;|', max_size=60))
def test_text_without_calls_is_content(text: str) -> None:
    for form in TOOL_CALL_FORMS:
        message, _ = parse(text, form)
        assert (message.content, message.calls) == (text, [])
    assert parse(text, None)[0].content == text


@pytest.mark.parametrize("form", TOOL_CALL_FORMS, ids=lambda form: form.name)
def test_a_call_is_reported_while_it_is_written(form: ToolCallForm) -> None:
    text = format_calls(form, [("get_weather", {"place": "a long name of a place"})])
    _, deltas = parse(text, form)
    reports = [delta.calls[0] for delta in deltas if delta.calls]
    first, *others = reports
    assert first.name == "get_weather"
    assert first.id
    assert len(others) > 20
    assert all(not call.id and not call.name for call in others)
    # Everything before the name is known is held back, and never shown as content.
    assert not any(delta.content for delta in deltas)


@pytest.mark.parametrize("form", TOOL_CALL_FORMS, ids=lambda form: form.name)
def test_a_text_that_ends_within_a_call_keeps_what_is_known(form: ToolCallForm) -> None:
    text = format_calls(form, CALLS[:1])
    whole = parse(text, form)[0].calls[0].arguments
    for end in range(len(text)):
        message, _ = parse(text[:end], form)
        if message.calls:
            assert message.content == ""
            assert whole.startswith(message.calls[0].arguments)
        else:
            assert message.content in (text[:end], text[:end].removeprefix(form.section))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", "<tool_call>\nnot JSON"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", "<tool_call>[1]</tool_call>"),
        ("mistral-args", "[TOOL_CALLS]" + "x" * 300 + "{"),
        ("mistral-args", "[TOOL_CALLS]two words{}"),
        ("qwen3-coder", "<tool_call>\n<parameter=x>1</parameter>"),
        ("glm", "<tool_call>two words\n"),
        ("glm", "<tool_call>" + "x" * 300),
        ("command-r", "Action: `ls`"),
        ("llama3", '{"name": "Bob", "parameters": {}}'),
        ("llama3", '{"name": "now"'),
        ("llama3", 'Well: {"name": "now", "parameters": {}}'),
        ("llama3", '<|python_tag|>print("x")'),
        ("deepseek", "<｜tool▁call▁begin｜>function x"),
    ],
)
def test_what_is_no_call_is_content(form: str, text: str) -> None:
    message, _ = parse(text, tool_call_form(form))
    assert message.calls == []
    assert message.content == text.removesuffix("</tool_call>") or message.content == text


@pytest.mark.parametrize(
    ("form", "text", "arguments"),
    [
        ("hermes", '<tool_call>{"name":"now","arguments":{"a":[1,{"b":"}"}]}}</tool_call>', '{"a":[1,{"b":"}"}]}'),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>', '{"a": 1}'),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', '{"a": 1}'),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "{}"),
        ("hermes", '<tool_call>{"id": 7, "name": "now"}</tool_call>', "{}"),
        ("hermes", '<tool_call>[{"name": "now", "arguments": {}}]</tool_call>', "{}"),
        ("llama3", ' <|python_tag|>{"type": "function", "name": "now", "parameters": {"a": 1}}', '{"a": 1}'),
        ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {"a": 1}, "id": "abcdefghi"}]', '{"a": 1}'),
        ("mistral-args", '[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{"a": 1}', '{"a": 1}'),
        ("mistral-args", '[TOOL_CALLS]now{"a": 1}', '{"a": 1}'),
        ("granite", '<|tool_call|> [{"name": "now", "arguments": {}}]', "{}"),
        ("qwen3-coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", "{}"),
        (
            "qwen3-coder",
            "<tool_call><function=get_weather><parameter=place>\n12\n\n</parameter><parameter=days>\n 3\n</parameter>"
            "<parameter=tags>\nTrue\n</parameter><parameter=other>\nx y\n</parameter></function></tool_call>",
            '{"place": "12\\n", "days":  3, "tags": true, "other": "x y"}',
        ),
        ("glm", "<tool_call>now<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>", '{"a": 1}'),
    ],
)
def test_variants_of_forms(form: str, text: str, arguments: str) -> None:
    message, _ = parse(text, tool_call_form(form))
    assert (message.content, [call.arguments for call in message.calls]) == ("", [arguments])


def test_previews_show_content_only() -> None:
    form = tool_call_form("hermes")
    parser = OutputParser(form, THINK, parameters=PARAMETERS)
    assert parser.preview("Hello, <b>\n") == "Hello, <b>"
    assert parser.preview("<think>Hm") == ""
    parser.feed("<think>Hm")
    assert parser.preview("m.</think>\n\nHello") == ""
    assert parser.feed("</think>\n\nHello \n").content == "Hello"
    assert parser.preview("you<tool_call>") == " \nyou"
    assert parser.preview("you<tool") == " \nyou"
    parser.feed("<tool_call>")
    assert parser.preview('{"name": "now"}') == ""


# What the model writes, from what its template renders, by the template's name.
ANSWER_STARTS = {
    "hermes-3.tool_use": "<|im_start|>assistant",
    "qwen2.5": "<|im_start|>assistant",
    "llama-3.1": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral-v3": "[/INST]",
    "command-r.tool_use": "<|CHATBOT_TOKEN|>",
    "deepseek-r1": "<｜Assistant｜>",
}
ANSWER_ENDS = ("<|im_end|>", "<|eot_id|>", "</s>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>")


@pytest.mark.parametrize("model", ANSWER_STARTS)
def test_calls_are_read_as_templates_of_released_models_render_them(model: str) -> None:
    transformers = pytest.importorskip("transformers")
    source = (TEMPLATES / f"{model}.jinja").read_text()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), chat_template=source, bos_token="<s>", eos_token="</s>"
    )
    calls = CALLS[:1] if model == "llama-3.1" else CALLS[:2]
    identities = ["abcdef123", "abcdef124"]
    tool_calls = [
        {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
        for identity, (name, arguments) in zip(identities, calls, strict=False)
    ]
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": "A tool.",
                "parameters": {
                    "type": "object",
                    "properties": {key: {"type": "string", "description": "x"} for key in schema.get("properties", {})},
                },
            },
        }
        for name, schema in PARAMETERS.items()
    ]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": tool_calls}]
    rendered = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert isinstance(rendered, str)
    answer = rendered.rpartition(ANSWER_STARTS[model])[2]
    end = min(at for text in ANSWER_ENDS if (at := answer.find(text)) >= 0)
    form = detect_tool_call_form(source)
    assert form is not None
    message, _ = parse(answer[:end], form, [5])
    assert (message.content.strip(), read_calls(message)) == ("", calls)
    # Our own writing of calls is the template's, up to ids.
    if not form.id_length:
        compact = {ord(space): None for space in " \n"}
        assert format_calls(form, calls).translate(compact) == answer[:end].translate(compact)


def test_other_reasoning_markers() -> None:
    mistral: ReasoningForm = REASONING_FORMS[0]
    message, _ = parse("[THINK]Hm.[/THINK]Hello", None, reasoning=mistral)
    assert (message.content, message.reasoning) == ("Hello", "Hm.")
    assert mistral.is_open("<s>[INST]Hi[/INST][THINK]")
    assert THINK.is_open("<|im_start|>assistant\n<think>\n")
    assert THINK.is_closed("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not THINK.is_closed("<|im_start|>assistant\n")
