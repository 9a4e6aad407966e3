"""Structured output: the fields of a request that constrain the answer, and the grammar that they stand for.

OpenAI's `response_format`; vLLM's `structured_outputs` and the older `guided_*`; llama-server's `grammar` and
`json_schema`. A request may have one of them. All become one grammar of llguidance (`Sampling.grammar`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Protocol

import msgspec

from edge_runtime.draft import OnnxDraft
from edge_runtime.protocol import grammar_sources
from edge_runtime.protocol.errors import GrammarError
from edge_runtime.protocol.grammar_sources import JsonSchema
from edge_runtime.service.errors import ApiError

Choices = Annotated[list[str], msgspec.Meta(min_length=1)]
# A JSON schema, or the text of one.
SchemaOrText = dict[str, Any] | bool | str
JSON_OBJECT: JsonSchema = {"type": "object"}


class TextFormat(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    """Free text."""


class JsonObjectFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_object"):
    """Any JSON object; with `schema`, as in llama-server, one that matches it."""

    schema: dict[str, Any] | None = None


class NamedSchema(msgspec.Struct, frozen=True):
    """A JSON schema. The answer matches it whether or not `strict` is set; name and description are not used."""

    schema: JsonSchema | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema"):
    """JSON that matches a schema."""

    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(msgspec.Struct, frozen=True):
    """vLLM's field: one of the first five. With `json` or `json_object`, the others lay out the JSON.

    Attributes:
        json: a JSON schema.
        regex: a regular expression for the whole text.
        choice: the possible texts.
        grammar: a grammar in the syntax of Lark or GBNF.
        json_object: any JSON object.
        whitespace_pattern: a regular expression for the whitespace between JSON's parts.
        disable_any_whitespace: JSON without whitespace.
        structural_tag, disable_additional_properties: not supported.
    """

    json: SchemaOrText | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    structural_tag: Any = None
    disable_additional_properties: bool | None = None


class ConstrainedRequest(Protocol):
    """The fields of a request that this module reads; see `requests.GenerationRequest`."""

    @property
    def response_format(self) -> ResponseFormat | None: ...
    @property
    def structured_outputs(self) -> StructuredOutputs | None: ...
    @property
    def guided_json(self) -> SchemaOrText | None: ...
    @property
    def guided_regex(self) -> str | None: ...
    @property
    def guided_choice(self) -> list[str] | None: ...
    @property
    def guided_grammar(self) -> str | None: ...
    @property
    def json_schema(self) -> SchemaOrText | None: ...
    @property
    def grammar(self) -> str | None: ...


class OutputConstraint(NamedTuple):
    """A grammar, and the field of the request that it comes from."""

    grammar: str
    field: str

    def refuse(self, error: GrammarError) -> ApiError:
        """The error (400) of a request whose grammar cannot be used."""
        return ApiError(400, f"{self.field}: {error}", param=self.field, code="invalid_grammar")


FREE_TEXT = OutputConstraint("", "")


def get_constraint(request: ConstrainedRequest) -> OutputConstraint:
    """Return what constrains the answer; `FREE_TEXT` if nothing does.

    Raises:
        ApiError: (400) several fields do, or one of them is invalid; the error names it.
    """
    readers: list[tuple[str, Callable[[Any], str], Any]] = [
        ("response_format", _response_format, request.response_format),
        ("structured_outputs", _structured_outputs, request.structured_outputs),
        ("guided_json", _json, request.guided_json),
        ("guided_regex", _regex, request.guided_regex),
        ("guided_choice", _choice, request.guided_choice),
        ("guided_grammar", _grammar, request.guided_grammar),
        ("json_schema", _json, request.json_schema),
        ("grammar", _grammar, request.grammar),
    ]
    constraints = []
    for field, read, value in readers:
        try:
            grammar = read(value)
        except GrammarError as error:
            raise OutputConstraint("", field).refuse(error) from None
        if grammar:
            constraints.append(OutputConstraint(grammar, field))
    if len(constraints) > 1:
        first, second = (constraint.field for constraint in constraints[:2])
        raise ApiError(400, f"{first} and {second} both constrain the answer: send one of them", param=second)
    return constraints[0] if constraints else FREE_TEXT


async def compile_constraint(draft: OnnxDraft, constraint: OutputConstraint) -> None:
    """Compile the grammar for the draft model, which keeps it.

    Raises:
        ApiError: (400) it is invalid or too costly; the error names the field.
    """
    if constraint.grammar:
        try:
            await draft.grammars.compile_in_thread(constraint.grammar)
        except GrammarError as error:
            raise constraint.refuse(error) from None


def _response_format(value: ResponseFormat | None) -> str:
    if isinstance(value, JsonSchemaFormat):
        return _json(True if value.json_schema.schema is None else value.json_schema.schema)
    if isinstance(value, JsonObjectFormat):
        return _json(JSON_OBJECT if value.schema is None else value.schema)
    return ""


def _structured_outputs(value: StructuredOutputs | None) -> str:
    if value is None:
        return ""
    for name in ("structural_tag", "disable_additional_properties"):
        if getattr(value, name):
            path = f"structured_outputs.{name}"
            raise ApiError(400, f"{path} is not supported: leave it out", param=path, code="unsupported_parameter")
    layout: dict[str, Any] | None = None
    if value.whitespace_pattern is not None:
        layout = {"whitespace_pattern": value.whitespace_pattern}
    elif value.disable_any_whitespace:
        layout = {"whitespace_flexible": False}
    grammars = [
        _json(value.json, layout),
        _regex(value.regex),
        _choice(value.choice),
        _grammar(value.grammar),
        _json(JSON_OBJECT, layout) if value.json_object else "",
    ]
    given = [grammar for grammar in grammars if grammar]
    if len(given) != 1:
        message = "structured_outputs needs exactly one of json, regex, choice, grammar and json_object"
        raise ApiError(400, message, param="structured_outputs")
    return given[0]


def _json(schema: SchemaOrText | None, layout: dict[str, Any] | None = None) -> str:
    return "" if schema is None else grammar_sources.from_json_schema(schema, layout)


def _regex(regex: str | None) -> str:
    return "" if regex is None else grammar_sources.from_regex(regex)


def _choice(choices: list[str] | None) -> str:
    return "" if choices is None else grammar_sources.from_choices(choices)


def _grammar(text: str | None) -> str:
    # llama-server and its clients send an empty grammar for none.
    return grammar_sources.from_grammar(text) if text else ""
