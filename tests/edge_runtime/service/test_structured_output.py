"""Structured output through the service, by OpenAI's client: the fields of OpenAI, vLLM and llama-server."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from edge_runtime.service.errors import ApiError
from edge_runtime.service.requests import CompletionRequest, parse_request
from edge_runtime.service.structured_output import FREE_TEXT, get_constraint

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 16}, "size": {"type": "integer", "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
PROMPT = "def load(path):\n    return "
GBNF = 'root ::= "(" [a-z]+ ")"\n'
LARK = 'start: "(" /[a-z]+/ ")"\n'


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def complete(client: openai.OpenAI, **fields: Any) -> str:
    completion = client.completions.create(
        model="", prompt=PROMPT, max_tokens=60, temperature=0, seed=4, extra_body=fields
    )
    assert completion.choices[0].finish_reason == "stop"
    return completion.choices[0].text


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "file", "strict": True, "schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        {"guided_json": json.dumps(SCHEMA)},
        {"json_schema": SCHEMA},
    ],
    ids=str,
)
def test_json_matches_the_schema(fields: dict[str, Any], client: openai.OpenAI) -> None:
    text = complete(client, **fields)
    jsonschema.validate(json.loads(text), SCHEMA)
    compact = fields.get("structured_outputs", {}).get("disable_any_whitespace", False)
    assert ('{"name":"' in text) == compact


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": r"^(self|cls)\.\w{2,8}$"}, r"(self|cls)\.\w{2,8}"),
        ({"structured_outputs": {"regex": r"\d{3}"}}, "[0-9]{3}"),
        ({"guided_choice": ["path", "None"]}, "path|None"),
        ({"structured_outputs": {"choice": ["path", "None"]}}, "path|None"),
        ({"guided_grammar": GBNF}, r"\([a-z]+\)"),
        ({"grammar": GBNF}, r"\([a-z]+\)"),
        ({"structured_outputs": {"grammar": LARK}}, r"\([a-z]+\)"),
    ],
    ids=str,
)
def test_text_matches_the_expression(fields: dict[str, Any], pattern: str, client: openai.OpenAI) -> None:
    assert re.fullmatch(pattern, complete(client, **fields))


def test_a_chat_streams_json_and_speculation_changes_nothing(client: openai.OpenAI) -> None:
    response_format: Any = {"type": "json_schema", "json_schema": {"name": "file", "schema": SCHEMA}}
    messages: Any = [{"role": "user", "content": "Describe a file."}]
    texts = []
    for speculation in (True, False):
        stream = client.chat.completions.create(
            model="",
            messages=messages,
            response_format=response_format,
            max_tokens=60,
            seed=5,
            stream=True,
            extra_body={"speculation": speculation},
        )
        texts.append("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
    assert texts[0] == texts[1]
    jsonschema.validate(json.loads(texts[0]), SCHEMA)


def test_any_json_object(client: openai.OpenAI) -> None:
    text = client.completions.create(
        model="", prompt=PROMPT, max_tokens=60, seed=1, extra_body={"response_format": {"type": "json_object"}}
    )
    assert text.choices[0].text.startswith("{")


def test_fields_that_constrain_nothing_are_accepted() -> None:
    for fields in ({}, {"response_format": {"type": "text"}}, {"grammar": ""}, {"guided_json": None}):
        request, ignored = parse_request(json.dumps({"prompt": "x", **fields}).encode(), CompletionRequest)
        assert (get_constraint(request), ignored) == (FREE_TEXT, [])


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "Invalid value 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing required field"),
        ({"guided_choice": []}, "guided_choice", "length >= 1"),
        ({"guided_json": "{"}, "guided_json", "not a JSON schema"),
        ({"guided_json": False}, "guided_json", "no value matches"),
        ({"grammar": "root = x"}, "grammar", "neither Lark"),
        ({"grammar": 'root ::= "a" # ' + "x" * 20_000}, "grammar", "at most 16384"),
        ({"guided_json": {}, "grammar": GBNF}, "grammar", "send one of them"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
    ],
    ids=str,
)
def test_a_request_that_contradicts_itself_is_refused(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError, match=re.escape(message)) as refusal:
        get_constraint(parse_request(json.dumps({"prompt": "x", **fields}).encode(), CompletionRequest)[0])
    assert (refusal.value.status, refusal.value.body.error.param) == (400, param)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_json": {"type": "object", "if": {}}}, "guided_json", 'Unimplemented keys: ["if"]'),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
        ({"guided_regex": "(" * 300 + "a" + ")" * 300}, "guided_regex", "invalid regex"),
        ({"guided_choice": [f"{n} of many" for n in range(3000)]}, "guided_choice", "max is 2000"),
        (
            {"guided_json": {"allOf": [{"type": "string", "pattern": f"^.*a.{{{count}}}$"} for count in range(30)]}},
            "guided_json",
            "too costly",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}},
            "response_format",
            "type",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_grammar_that_cannot_be_used_is_a_400_that_names_the_field(
    fields: dict[str, Any], param: str, message: str, url: str
) -> None:
    response = httpx.post(f"{url}/v1/completions", json={"prompt": PROMPT, **fields}, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "invalid_grammar")
    assert message in error["message"]
