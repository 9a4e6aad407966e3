"""Grammars of llguidance (`Sampling.grammar`) from what people write: JSON schemas, regular expressions, choices, GBNF
and Lark.

Nothing is compiled here: whether the result is valid, `grammar.GrammarTokenizer.compile` finds out.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from edge_runtime.protocol.errors import GrammarError

# How JSON is laid out: as Python's `json.dumps` does, and most JSON in what models read. A grammar that leaves
# whitespace to the model forces far fewer tokens, and lets a weak model write nothing else.
JSON_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# The formats of strings that llguidance enforces. By JSON Schema's default any other one is an annotation, such as
# pydantic's `path` and `password`; llguidance would refuse it.
FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"))
# Keywords whose values are schemas by name, and those whose values are data.
_NAMED_SCHEMAS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_DATA = frozenset(("enum", "const", "default", "examples", "x-guidance"))
# The converter of GBNF is written in Python and takes time that grows with the square of the number of rules.
MAX_GBNF_CHARACTERS = 1 << 14

JsonSchema = dict[str, Any] | bool


def from_json_schema(schema: JsonSchema | str, layout: dict[str, Any] | None = None) -> str:
    """Return the grammar of the JSON values that match `schema`, written with `layout`.

    Properties come in the order of the schema. Its keyword `x-guidance` has precedence over `layout`.

    Args:
        schema: a JSON schema, or the text of one.
        layout: options of llguidance's JSON compiler; None for `JSON_LAYOUT`.

    Raises:
        GrammarError: not a JSON schema.
    """
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema, type=JsonSchema)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise GrammarError(f"not a JSON schema: {error}") from None
    if schema is False:
        raise GrammarError("no value matches the schema false")
    # llguidance takes objects alone.
    try:
        text = msgspec.json.encode({} if schema is True else _without_other_formats(schema)).decode()
    except RecursionError:
        raise GrammarError("the JSON schema is nested too deeply") from None
    # 8 MB of memory: imported with the first grammar, here and below.
    from llguidance import LLMatcher

    # A plain dictionary, where llguidance declares a typed one.
    options: Any = JSON_LAYOUT if layout is None else layout
    return LLMatcher.grammar_from_json_schema(text, defaults=options)


def _without_other_formats(value: Any, *, is_schema: bool = True) -> Any:
    """Drop the formats that llguidance does not know.

    Args:
        value: a schema, a list of schemas, or, unless `is_schema`, schemas by name.
    """
    if isinstance(value, list):
        return [_without_other_formats(item) for item in value]
    if not isinstance(value, dict):
        return value
    if not is_schema:
        return {name: _without_other_formats(schema) for name, schema in value.items()}
    return {
        keyword: content
        if keyword in _DATA
        else _without_other_formats(content, is_schema=keyword not in _NAMED_SCHEMAS)
        for keyword, content in value.items()
        if keyword != "format" or not isinstance(content, str) or content in FORMATS
    }


def from_regex(regex: str) -> str:
    r"""Return the grammar of the texts that match the regular expression `regex` as a whole (syntax of Rust's regex).

    `\d` is a digit from 0 to 9: those of all scripts are hardly ever meant.
    """
    from llguidance import LLMatcher, regex_to_lark

    # A match of the whole text is at its start and its end anyway, and llguidance refuses anchors.
    regex = regex.removeprefix("^")
    if re.search(r"(?<!\\)(\\\\)*\$$", regex):
        regex = regex[:-1]
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(regex, 'd')}/")


def from_choices(choices: list[str]) -> str:
    """Return the grammar of exactly these texts. Raises GrammarError if there are none."""
    if not choices:
        raise GrammarError("there is nothing to choose from")
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark("start: " + " | ".join(msgspec.json.encode(text).decode() for text in choices))


def from_grammar(text: str) -> str:
    """Return a grammar in the syntax of Lark or of llama.cpp (GBNF) in that of llguidance.

    Raises:
        GrammarError: not GBNF, or too long.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    if text.lstrip().startswith("{"):
        # llguidance's own.
        return text
    if is_lark_syntax(text):
        return LLMatcher.grammar_from_lark(text)
    if len(text) > MAX_GBNF_CHARACTERS:
        raise GrammarError(f"a GBNF grammar of {len(text)} characters; at most {MAX_GBNF_CHARACTERS}")
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(text))
    except Exception as error:  # the converter raises bare Exception, IndexError and RecursionError, too
        raise GrammarError(f"neither Lark (a rule `start: ...`) nor GBNF (a rule `root ::= ...`): {error}") from None
