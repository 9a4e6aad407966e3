"""Grammars of answers with tool calls and reasoning, in llguidance's Lark syntax (see `protocol.grammar`).

Where a call is required, the grammar admits nothing but calls in the model's form, with arguments that are valid by the
tools' JSON schemas. Where calls are optional, text is free until the marker that begins a call; from there on the same
holds. Reasoning before the answer is free in either case.

JSON is written as `json.dumps` does, which is how chat templates write it and models were trained: one space after
commas and colons, none elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from tokenizers import Tokenizer

from edge_runtime.protocol.errors import GrammarError
from edge_runtime.protocol.grammar import find_problem
from edge_runtime.service.tool_calls.forms import (
    ParameterMarkers,
    ReasoningForm,
    ToolCallForm,
    array_brackets,
    object_brackets,
)

# What models write between reasoning and answer.
GAP = r"\n{0,2}"
# Any text; a `.` alone does not match newlines.
ANY_TEXT = "(?s:.*)"
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Schemas of a tool that is not strict may use keywords that llguidance does not know; these are not enforced.
LENIENT = {"lenient": True}
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# Further calls after the first. Chosen: a weak model that must call would otherwise do so until the answer is full.
MORE_CALLS = "{0,15}"
# Keywords that constrain nothing. The grammar travels to the verifier.
ANNOTATIONS = frozenset({"title", "description", "default", "examples", "$comment", "$schema", "deprecated"})
# Keywords beside which `additionalProperties: false` would change what is valid.
COMBINATIONS = frozenset({"allOf", "anyOf", "oneOf", "if", "not", "$ref", "patternProperties", "additionalProperties"})


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of its arguments; empty for a function without any.
        strict: the client relies on valid arguments, so a schema that cannot be enforced is an error.
    """

    name: str
    parameters: dict[str, Any] = {}
    strict: bool = False


class AnswerShape(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer may consist of.

    Attributes:
        form: how calls are written.
        tools: those that may be called; if there are none, the answer contains no calls.
        required: the answer consists of calls; otherwise of text, calls, or text and then calls.
        parallel: several calls are allowed.
        reasoning: how the model thinks; None if it does not, or has finished in the prompt.
        in_reasoning: the prompt ends within the reasoning; otherwise reasoning is optional.
        text_grammar: what text without calls must match, as `Sampling.grammar`; empty for any text.
    """

    form: ToolCallForm
    tools: list[Tool]
    required: bool = False
    parallel: bool = True
    reasoning: ReasoningForm | None = None
    in_reasoning: bool = False
    text_grammar: str = ""


class AddedTokens(msgspec.Struct, frozen=True):
    """Tokens outside the ordinary vocabulary, as llguidance treats them: a text in a grammar does not match these.

    Attributes:
        ids: by their text.
        text_ids: those which ordinary text may contain, such as the HTML tags in Gemma's vocabulary.
    """

    ids: dict[str, int] = {}
    text_ids: dict[str, int] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> AddedTokens:
        """Those of a tokenizer, by llguidance's rule: the special ones, and all that look like <this>."""
        ids, text_ids = {}, {}
        for index, token in tokenizer.get_added_tokens_decoder().items():
            looks_special = token.content.startswith("<") and token.content.endswith(">")
            if token.special or looks_special:
                ids[token.content] = index
            if looks_special and not token.special:
                text_ids[token.content] = index
        return cls(ids, text_ids)


def build_grammar(shape: AnswerShape, added: AddedTokens) -> str:
    """Return the grammar of such answers; empty if any text is allowed.

    Raises:
        GrammarError: the parameters of a strict tool are no schema that can be enforced.
    """
    if not shape.tools and not shape.text_grammar:
        return ""
    builder = _GrammarBuilder(shape, added)
    lark = builder.build()
    if not shape.text_grammar:
        return lark
    return json.dumps({"grammars": [{"name": "answer", "lark_grammar": lark}, *_named(shape.text_grammar)]})


def reduce_schema(schema: Any) -> Any:
    """Return a JSON schema without annotations that admits no properties but the declared ones.

    A model would otherwise be free to invent some, where the schema does not say otherwise. All that the result admits
    is valid by the original.
    """
    if not isinstance(schema, dict):
        return schema
    closed = {keyword: value for keyword, value in schema.items() if keyword not in ANNOTATIONS}
    for keyword in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(keyword), dict):
            closed[keyword] = {name: reduce_schema(value) for name, value in schema[keyword].items()}
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            closed[keyword] = reduce_schema(schema[keyword])
    for keyword in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(schema.get(keyword), list):
            closed[keyword] = [reduce_schema(value) for value in schema[keyword]]
    if "properties" in schema and not COMBINATIONS & schema.keys():
        closed["additionalProperties"] = False
    return closed


class _GrammarBuilder:
    """Collects the rules of one grammar."""

    def __init__(self, shape: AnswerShape, added: AddedTokens) -> None:
        self._shape, self._form = shape, shape.form
        self._added = added
        self._rules: list[str] = []
        structure = shape.form.structure
        if shape.reasoning:
            structure += shape.reasoning.begin + shape.reasoning.end
        others = [index for text, index in added.text_ids.items() if text not in structure]
        # Tokens that text contains although llguidance takes them for special ones.
        self._other = f"<[{','.join(map(str, sorted(others)))}]>" if others else ""

    def build(self) -> str:
        """Return the grammar; its rules are named `start`, `answer`, `calls`, `call`, ..."""
        shape = self._shape
        if shape.reasoning is None:
            self._add("start", "answer")
        else:
            # Free text contains the empty lines after the reasoning itself.
            after = f"/{GAP}/ opened | answer" if shape.tools else "answer"
            if shape.text_grammar:
                after = f"/{GAP}/ answer"
            self._add("thought", self._until(shape.reasoning.end))
            begin = "" if shape.in_reasoning else self._literal(shape.reasoning.begin) + " "
            self._add("start", f"{begin}thought ({after})" + ("" if shape.in_reasoning else " | answer"))
        if shape.required:
            self._add("answer", "opened")
        elif not shape.tools:
            self._add("answer", "@text")
        elif shape.text_grammar:
            self._add("answer", "@text | opened")
        else:
            self._add_optional_calls()
        if shape.tools:
            self._add_calls()
        return "%llguidance {}\n" + "\n".join(self._rules) + "\n"

    @property
    def _opening(self) -> str:
        return self._form.section + self._form.begin

    def _add_optional_calls(self) -> None:
        """Text, or text up to the marker of a call and then calls."""
        opening = self._opening
        if not opening:
            # Without a marker only the start of the text can tell. llguidance's lexer cannot tell after reasoning.
            excluded = rf' & ~/\s*\{{\s*"name"{ANY_TEXT}/' if self._shape.reasoning is None else ""
            self._terminal("FREE", f"/{ANY_TEXT}/{excluded}")
            self._add("answer", f"{self._text('FREE')} | opened")
            return
        trigger = self._form.section or self._form.begin
        rest = self._literal(opening[len(trigger) :])
        self._terminal("FREE", f"/{ANY_TEXT}/ & ~/{ANY_TEXT}{_escape(trigger)}{ANY_TEXT}/")
        if trigger in self._added.ids:
            self._add("answer", f"{self._text('FREE')} ({self._literal(trigger)} {rest} calls)?")
        else:
            before = f"(FREE {self._other})* " if self._other else ""
            self._add("answer", f"{self._text('FREE')} | {before}head {rest} calls")
            self._add("head[lazy]", f"/{ANY_TEXT}{_escape(trigger)}/")

    def _add_calls(self) -> None:
        """All calls, after what opens the first one."""
        form, parallel = self._form, self._shape.parallel
        self._add("opened", self._literal(self._opening) + " calls")
        for index, tool in enumerate(self._shape.tools):
            self._add_tool(index, tool)
        self._add("call", " | ".join(f"call_{index}" for index in range(len(self._shape.tools))))
        end = self._literal(form.end)
        if form.body == "array":
            prefix, suffix = array_brackets(form)
            more = f' (", " call){MORE_CALLS}' if parallel else ""
            self._add("calls", f"{self._literal(prefix)} call{more} {self._literal(suffix)} {end}")
            return
        more = f" ({self._literal(form.separator + form.begin)} call {end}){MORE_CALLS}" if parallel else ""
        first = ""
        if not form.begin and form.optional_begin in self._added.ids:
            first = f"{self._literal(form.optional_begin)}? "
        self._add("calls", f"{first}call {end}{more} {self._literal(form.section_end)}")

    def _add_tool(self, index: int, tool: Tool) -> None:
        form = self._form
        name = f"call_{index}"
        style = JSON_STYLE if tool.strict else JSON_STYLE | LENIENT
        schema = {"type": "object", **(reduce_schema(tool.parameters) or NO_PARAMETERS)}
        enforceable = _is_enforceable(tool, schema, style)
        if form.parameters:
            if not enforceable:
                schema = _with_enforceable_properties(tool, schema, style)
            self._add(name, self._parameters(name, tool, schema, style, form.parameters))
            return
        if not enforceable:
            schema = {"type": "object"}
        if form.body == "array":
            name_key, arguments_key = form.keys
            before, after = f'{{"{name_key}": {_quote(tool.name)}, "{arguments_key}": ', "}"
            if form.id_length:
                # The id is the board's; the model writes one because it was trained to.
                identity = self._literal(', "id": "') + f" /[a-zA-Z0-9]{{{form.id_length}}}/ "
                close = _quote("}")
                after = f"({identity} {_quote(chr(34))} {close} | {close})"
                self._add(name, f"{self._literal(before)} {_json(schema, style)} {after}")
                return
        else:
            before, after = object_brackets(form, tool.name)
        self._add(name, f"{self._literal(before)} {_json(schema, style)} {self._literal(after)}")

    def _parameters(
        self, rule: str, tool: Tool, schema: dict[str, Any], style: dict[str, Any], marks: ParameterMarkers
    ) -> str:
        """The body of a call whose arguments are written one by one, in the order of the schema."""
        parts = [self._literal(marks.name + tool.name + marks.name_end)]
        definitions: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        required = schema.get("required", [])
        for number, (key, value) in enumerate(schema.get("properties", {}).items()):
            name = f"{rule}_{number}"
            start = self._literal(marks.key + key + marks.key_end + marks.value)
            value = definitions | value if isinstance(value, dict) else {}
            self._add(name, f"{start} {self._argument(value, style, marks.value_end)}")
            parts.append(name if key in required else f"{name}?")
        return " ".join([*parts, self._literal(marks.end)])

    def _argument(self, schema: dict[str, Any], style: dict[str, Any], end: str) -> str:
        """The value of one argument. Bounds on the length or form of strings are not enforced."""
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        if values and all(isinstance(value, str) for value in values):
            return f"({' | '.join(self._literal(value) for value in values)}) {self._literal(end)}"
        if schema.get("type") == "string":
            return self._until(end)
        return f"{_json(schema, style)} {self._literal(end)}"

    def _until(self, end: str) -> str:
        """Any text up to and including `end`."""
        first, *_ = self._split(end)
        if first in self._added.ids:
            name = f"TEXT_{len(self._rules)}"
            self._terminal(name, f"/{ANY_TEXT}/")
            return f"{self._text(name)} {self._literal(end)}"
        name = f"until_{len(self._rules)}"
        before = ""
        if self._other:
            self._terminal(f"TEXT_{len(self._rules)}", f"/{ANY_TEXT}/ & ~/{ANY_TEXT}{_escape(end)}{ANY_TEXT}/")
            before = f"(TEXT_{len(self._rules) - 1} {self._other})* "
        self._add(f"{name}[lazy]", f"/{ANY_TEXT}{_escape(end)}/")
        return before + name

    def _text(self, terminal: str) -> str:
        """Text of this terminal, with the tokens in between that llguidance takes for special ones."""
        return f"({terminal} ({self._other} {terminal})*)" if self._other else terminal

    def _literal(self, text: str) -> str:
        """The expression of exactly this text; empty for none."""
        parts = self._split(text)
        return " ".join(f"<[{self._added.ids[part]}]>" if part in self._added.ids else _quote(part) for part in parts)

    def _split(self, text: str) -> list[str]:
        """Split `text` into added tokens and what is between them."""
        if not self._added.ids:
            return [text] if text else []
        pattern = "|".join(re.escape(token) for token in sorted(self._added.ids, key=len, reverse=True))
        return [part for part in re.split(f"({pattern})", text) if part]

    def _add(self, name: str, expression: str) -> None:
        self._rules.append(f"{name}: {expression}")

    def _terminal(self, name: str, expression: str) -> None:
        self._rules.append(f"{name}: {expression}")


def _is_enforceable(tool: Tool, schema: dict[str, Any], style: dict[str, Any]) -> bool:
    """Whether llguidance can make arguments of `tool` match `schema`. Raises GrammarError if it must and cannot."""
    problem = find_problem(f"start: {_json(schema, style)}")
    if problem and tool.strict:
        raise GrammarError(f"tools: the parameters of {tool.name} cannot be enforced: {problem}")
    return not problem


def _with_enforceable_properties(tool: Tool, schema: dict[str, Any], style: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose properties are any text where llguidance cannot make arguments match them."""
    definitions: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    properties = {
        key: value if _is_enforceable(tool, definitions | value, style) else {"type": "string"}
        for key, value in schema.get("properties", {}).items()
        if isinstance(value, dict)
    }
    return schema | {"properties": properties}


def _json(schema: dict[str, Any], style: dict[str, Any]) -> str:
    return "%json " + json.dumps(schema | {"x-guidance": style}, ensure_ascii=False)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escape(text: str) -> str:
    """Escape `text` for a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")


def _named(grammar: str) -> Iterable[Mapping[str, Any]]:
    """Return a grammar as a list of grammars that can be added to others; the first is called `text`."""
    if not grammar.lstrip().startswith("{"):
        return [{"name": "text", "lark_grammar": grammar}]
    first, *others = json.loads(grammar)["grammars"]
    return [first | {"name": "text"}, *others]
