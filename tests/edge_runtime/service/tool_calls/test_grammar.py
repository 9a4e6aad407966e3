"""Grammars admit exactly the calls of the tools, in every form, whether its markers are single tokens or text."""

from __future__ import annotations

import functools
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer

from edge_runtime.protocol.errors import GrammarError
from edge_runtime.protocol.grammar import CompiledGrammar, GrammarMatcher, GrammarTokenizer, define_tokenizer
from edge_runtime.protocol.grammar_sources import from_json_schema
from edge_runtime.service.tool_calls.forms import REASONING_FORMS, TOOL_CALL_FORMS, ToolCallForm, format_calls
from edge_runtime.service.tool_calls.grammar import AddedTokens, AnswerShape, Tool, build_grammar, reduce_schema
from edge_runtime.service.tool_calls.parser import OutputParser, merge_calls
from tests.byte_tokenizer import byte_tokenizer

WEATHER = {
    "type": "object",
    "properties": {
        "place": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "at": {"$ref": "#/$defs/point"},
    },
    "required": ["place"],
    "$defs": {"point": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}},
}
TOOLS = [
    Tool("get_weather", WEATHER),
    Tool("now"),
    Tool("get", {"properties": {"x": {"type": "boolean"}}}, strict=True),
]
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("get_weather", {"place": "Łódź, {x} <b>", "days": 2, "unit": "celsius", "at": [1.5, -2]}),
    ("now", {}),
    ("get", {"x": True}),
]
INVALID: list[tuple[str, dict[str, Any]]] = [
    ("get_weather", {"days": 2}),
    ("get_weather", {"place": "x", "days": "two"}),
    ("get_weather", {"place": "x", "unit": "kelvin"}),
    ("get_weather", {"place": "x", "at": [1]}),
    ("get_weather", {"place": "x", "invented": 1}),
    ("now", {"x": 1}),
    ("nowhere", {}),
    ("gets", {}),
]
THINK = REASONING_FORMS[1]
CASES = pytest.mark.parametrize(
    ("form", "as_tokens"),
    [
        pytest.param(form, flag, id=f"{form.name}-{'tokens' if flag else 'text'}")
        for form in TOOL_CALL_FORMS
        for flag in (False, True)
    ],
)


@functools.cache
def make_tokenizer(form_name: str, as_tokens: bool) -> tuple[Tokenizer, GrammarTokenizer, AddedTokens]:
    """A byte tokenizer, perhaps with a token for each marker of the form and of reasoning, and one of HTML."""
    (form,) = (form for form in TOOL_CALL_FORMS if form.name == form_name)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>")])
    tokenizer.add_tokens([AddedToken("<h1>", special=False)])
    if as_tokens:
        tags = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
        tags += ("<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "[ARGS]")
        marks = {*form.markers, *form.hidden, *(tag for tag in tags if tag in form.structure), THINK.begin, THINK.end}
        special = form.name in ("mistral", "mistral-args", "deepseek")
        tokenizer.add_tokens([AddedToken(mark, special=special) for mark in sorted(marks)])
    grammar_tokenizer = GrammarTokenizer(define_tokenizer(tokenizer), tokenizer.get_vocab_size(), [0])
    return tokenizer, grammar_tokenizer, AddedTokens.of(tokenizer)


def admits(form: ToolCallForm, as_tokens: bool, text: str, **shape: Any) -> bool:
    """Whether the grammar of such answers admits `text`, and no longer one."""
    tokenizer, grammar_tokenizer, added = make_tokenizer(form.name, as_tokens)
    grammar = build_grammar(AnswerShape(form=form, **({"tools": TOOLS} | shape)), added)
    matcher = GrammarMatcher(CompiledGrammar(grammar_tokenizer, grammar))
    ids = [*tokenizer.encode(text).ids, 0]
    for count, token in enumerate(ids):
        mask = matcher.allowed(ids[:count])
        if mask is None or not mask[token >> 3] >> (token & 7) & 1:
            return False
    return True


@CASES
def test_required_calls(form: ToolCallForm, as_tokens: bool) -> None:
    for calls in (CALLS, CALLS[:1], CALLS[2:]):
        assert admits(form, as_tokens, format_calls(form, calls), required=True)
    for call in INVALID:
        assert not admits(form, as_tokens, format_calls(form, [call]), required=True)
    assert not admits(form, as_tokens, "", required=True)
    assert not admits(form, as_tokens, "Let me see.", required=True)
    assert not admits(form, as_tokens, format_calls(form, CALLS) + " Done.", required=True)
    assert not admits(form, as_tokens, format_calls(form, CALLS), required=True, parallel=False)
    assert admits(form, as_tokens, format_calls(form, CALLS[:1]), required=True, parallel=False)


@CASES
def test_optional_calls(form: ToolCallForm, as_tokens: bool) -> None:
    calls = format_calls(form, CALLS)
    for text in ("", "Hello.\n\n<h1>x", '{"a": 1}', "<tool", calls):
        assert admits(form, as_tokens, text)
    for call in INVALID:
        assert not admits(form, as_tokens, format_calls(form, [call]))
        # Without a marker, JSON within a text is text.
        assert admits(form, as_tokens, "Let me see.\n" + format_calls(form, [call])) is not bool(form.begin)
    assert admits(form, as_tokens, "Let me <h1>see.\n\n" + calls)
    assert not admits(form, as_tokens, calls, parallel=False)


@CASES
def test_reasoning_is_free(form: ToolCallForm, as_tokens: bool) -> None:
    calls, thought = format_calls(form, CALLS[:1]), 'Hm: <h1>, {"name": 1}.\n</think>'
    for required in (False, True):
        shape = {"required": required, "reasoning": THINK}
        for gap in ("", "\n\n"):
            assert admits(form, as_tokens, f"<think>\n{thought}{gap}{calls}", **shape)
            assert admits(form, as_tokens, f"{thought}{gap}{calls}", **shape, in_reasoning=True)
        assert admits(form, as_tokens, calls, **shape)
        assert admits(form, as_tokens, thought + "Hello.", **shape, in_reasoning=True) is not required


def test_text_may_have_a_grammar_of_its_own() -> None:
    form = TOOL_CALL_FORMS[2]
    for grammar in (from_json_schema({"type": "array", "items": {"type": "integer"}}), 'start: "[1, 2]"'):
        for reasoning, before in ((None, ""), (THINK, "<think>Hm.</think>\n\n")):
            shape = {"text_grammar": grammar, "reasoning": reasoning}
            assert admits(form, True, before + "[1, 2]", **shape)
            assert admits(form, True, before + "[1, 2]", **shape, tools=[])
            assert admits(form, True, before + format_calls(form, CALLS), **shape)
            assert not admits(form, True, before + "Hello.", **shape)
            assert not admits(form, True, before + format_calls(form, CALLS), **shape, tools=[])
    assert build_grammar(AnswerShape(form=form, tools=[]), AddedTokens()) == ""


@pytest.mark.slow
@pytest.mark.parametrize("form", TOOL_CALL_FORMS, ids=lambda form: form.name)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_whatever_the_grammar_admits_is_a_valid_call(form: ToolCallForm, data: st.DataObject) -> None:
    tokenizer, grammar_tokenizer, added = make_tokenizer(form.name, True)
    grammar = build_grammar(AnswerShape(form=form, tools=TOOLS, required=True, parallel=False), added)
    matcher = GrammarMatcher(CompiledGrammar(grammar_tokenizer, grammar))
    choose = data.draw(st.randoms(use_true_random=False))
    ids: list[int] = []
    while not ids or ids[-1] != 0:
        if len(ids) > 400:
            return
        mask = matcher.allowed(ids)
        assert mask is not None
        allowed = [token for token in range(tokenizer.get_vocab_size()) if mask[token >> 3] >> (token & 7) & 1]
        # Letters, and what ends strings and lists, rather than any byte.
        usual = [token for token in allowed if (tokenizer.id_to_token(token) or "") in 'abc"]}\n<012,']
        ids.append(choose.choice(usual if usual and choose.random() < 0.9 else allowed))
    parser = OutputParser(form, parameters=SCHEMAS)
    text = tokenizer.decode(ids[:-1], skip_special_tokens=False)
    (call,) = merge_calls(parser.feed(text).calls, parser.flush().calls)
    jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


@pytest.mark.parametrize("form", [TOOL_CALL_FORMS[0], TOOL_CALL_FORMS[2]], ids=["qwen3-coder", "hermes"])
@pytest.mark.parametrize("schema", [{"pattern": "(?=a)"}, {"$ref": "#/nowhere"}, {"type": "objekt"}])
def test_a_schema_that_cannot_be_enforced_is_an_error_of_strict_tools(form: ToolCallForm, schema: Any) -> None:
    parameters = {"type": "object", "properties": {"x": schema}}
    calls = format_calls(form, [("get", {"x": 1})])
    lenient = [Tool("get", parameters)]
    assert admits(form, False, calls, tools=lenient, required=True)
    assert admits(form, False, format_calls(form, [("get", {})]), tools=lenient, required=True)
    with pytest.raises(GrammarError, match="the parameters of get cannot be enforced"):
        build_grammar(AnswerShape(form=form, tools=[Tool("get", parameters, strict=True)]), AddedTokens())


def test_objects_are_closed_where_the_schema_does_not_say() -> None:
    schema = {
        "title": "A",
        "properties": {
            "a": {"properties": {"title": {"title": "B"}}},
            "b": {"additionalProperties": {"properties": {"c": True}}},
        },
        "$defs": {"d": {"anyOf": [{"properties": {}}, {"type": "string"}]}, "e": {"$ref": "#", "properties": {}}},
        "items": {"properties": {}, "patternProperties": {"x": {}}},
    }
    closed = reduce_schema(schema)
    assert closed["additionalProperties"] is False
    assert closed["properties"]["a"] == {"properties": {"title": {}}, "additionalProperties": False}
    assert "title" not in closed
    assert closed["properties"]["b"]["additionalProperties"] == {
        "properties": {"c": True},
        "additionalProperties": False,
    }
    assert closed["$defs"]["d"]["anyOf"][0]["additionalProperties"] is False
    assert closed["$defs"]["e"] == schema["$defs"]["e"]  # type: ignore[index]
    assert closed["items"] == schema["items"]
    assert "additionalProperties" not in schema


def test_added_tokens_are_those_that_llguidance_sees() -> None:
    tokenizer = byte_tokenizer()
    contents = ["<a>", "[b]", "<c", "d>", "<|e|>", "<｜f｜>", "<g h>", "<>"]
    tokenizer.add_tokens([AddedToken(content, special=False) for content in contents])
    tokenizer.add_special_tokens([AddedToken(content + "!", special=True) for content in contents])
    added = AddedTokens.of(tokenizer)
    seen = LLTokenizer(tokenizer.to_str(), eos_token=0)
    special = {index for index in range(tokenizer.get_vocab_size()) if seen.is_special_token(index)}
    # Those of the ordinary vocabulary are not added ones, and do not occur in texts.
    assert set(added.ids.values()) == {index for index in special if index >= 300}
    assert added.text_ids.keys() == {"<a>", "<|e|>", "<｜f｜>", "<g h>", "<>"}
