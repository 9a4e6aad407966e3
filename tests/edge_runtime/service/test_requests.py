"""Request bodies: which fields and values are accepted, ignored and refused, and what they mean."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import edge_runtime
from edge_runtime.protocol.bundle import SamplingDefaults
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.service import field_policy
from edge_runtime.service.chat_template import ChatOptions
from edge_runtime.service.conversation import get_conversation
from edge_runtime.service.errors import ApiError
from edge_runtime.service.field_policy import IGNORED_FIELDS, REFUSED_FIELDS, show_names
from edge_runtime.service.field_reference import render_reference
from edge_runtime.service.parameters import (
    UNKNOWN_CONTEXT_TOKENS,
    ChoicePlan,
    get_chat_options,
    get_choices,
    get_logprobs,
    get_prompts,
    get_sampling,
    get_stop_strings,
    limit_answer,
)
from edge_runtime.service.requests import (
    ChatRequest,
    CompletionRequest,
    EndpointRequest,
    GenerationRequest,
    parse_request,
)
from edge_runtime.service.responses.requests import ResponsesRequest, to_chat
from edge_runtime.service.responses.store import ResponseStore
from edge_runtime.service.tool_calls.output_format import get_allowed_calls


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(json.dumps({"prompt": "x"} | fields).encode(), CompletionRequest)[0]


def chat(*messages: Any, **fields: Any) -> ChatRequest:
    return parse_request(json.dumps({"messages": list(messages)} | fields).encode(), ChatRequest)[0]


def read_parameters(request: GenerationRequest) -> None:
    """Evaluate everything that a request means."""
    get_sampling(request)
    get_choices(request)
    get_logprobs(request)
    get_stop_strings(request)
    limit_answer(request, 10, context=100, maximum=0)
    if isinstance(request, CompletionRequest):
        assert get_prompts(request)
    if isinstance(request, ChatRequest):
        get_conversation(request.messages)
        get_chat_options(request)
        get_allowed_calls(request.tools, request.tool_choice, request.parallel_tool_calls)


def test_a_last_message_of_the_assistant_is_continued() -> None:
    hello, reply = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "wor"}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    continued = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    assert get_chat_options(chat(hello, reply)) == continued
    assert get_chat_options(chat(hello, reply, add_generation_prompt=True)) == ChatOptions()
    assert get_chat_options(chat(hello, call)) == ChatOptions()
    assert get_chat_options(chat(reply, hello)) == ChatOptions()


def test_reasoning_effort_is_a_variable_of_the_template() -> None:
    hello = {"role": "user", "content": "hello"}
    options = get_chat_options(chat(hello, reasoning_effort="high"))
    assert options.variables == {"reasoning_effort": "high", "enable_thinking": True}
    options = get_chat_options(chat(hello, reasoning_effort="none", chat_template_kwargs={"date_string": "x"}))
    assert options.variables == {"reasoning_effort": "none", "enable_thinking": False, "date_string": "x"}


def deep_tool(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


HELLO = {"role": "user", "content": "hello"}
# What a request to each endpoint needs.
ENDPOINTS: dict[type[EndpointRequest], dict[str, Any]] = {
    CompletionRequest: {"prompt": "x"},
    ChatRequest: {"messages": [HELLO]},
    ResponsesRequest: {"input": "x"},
}
BAD_CALL = {"function": {"name": "f", "arguments": "[1"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 129}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": -(1 << 63) - 1}, "seed"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [1, "b"]}, "prompt"),
        ({"prompt": ["b", 1]}, "prompt"),
        ({"prompt": ["b", [1]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1 << 40]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"speculation": "no"}, "speculation"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"use_beam_search": 0}, "use_beam_search"),
        ({"mirostat": 2}, "mirostat"),
        ({"repeat_penalty": 1.1}, "repeat_penalty"),
        ({"n_predict": 5}, "n_predict"),
    ],
)
def test_invalid_and_unsupported_values_are_refused_by_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_parameters(completion(**fields))
    error = caught.value.body.error
    assert (caught.value.status, error.type, error.param) == (400, "invalid_request_error", param)
    assert param.split("[")[0] in error.message
    assert error.code


@pytest.mark.parametrize(
    ("request_body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role"),
        ({"messages": [HELLO, {"role": "user"}]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [HELLO | {"tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [HELLO], "tools": [TOOL, {}]}, "tools[1]"),
        ({"messages": [HELLO], "tools": [{"type": "function", "function": {}}]}, "tools[0]"),
        ({"messages": [HELLO], "tools": [TOOL, TOOL]}, "tools[1]"),
        ({"messages": [HELLO], "tools": [deep_tool(70)]}, "tools[0]"),
        ({"messages": [HELLO], "tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"messages": [HELLO], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [HELLO], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [HELLO], "logprobs": 2}, "logprobs"),
        ({"messages": [HELLO], "best_of": 2}, "best_of"),
        ({"messages": [HELLO], "modalities": ["text", "audio"]}, "modalities"),
        ({"messages": [HELLO], "functions": [{"name": "f"}]}, "functions"),
    ],
)
def test_unsupported_conversations_are_refused_by_field(request_body: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_parameters(parse_request(json.dumps(request_body).encode(), ChatRequest)[0])
    assert (caught.value.status, caught.value.body.error.param) == (400, param)


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio"}])
def test_parts_other_than_text_are_refused_in_a_sentence(part: dict[str, Any]) -> None:
    body = {"messages": [HELLO, {"role": "user", "content": [{"type": "text", "text": "see"}, part]}]}
    with pytest.raises(ApiError, match="reads texts only") as caught:
        parse_request(json.dumps(body).encode(), ChatRequest)
    assert caught.value.body.error.param == "messages[1].content[1].type"


def test_tools_and_their_calls_reach_the_template_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, "ü"]}'}}
    request = chat(
        HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call, {"function": {"name": "g", "arguments": ""}}, BAD_CALL],
        },
        {"role": "tool", "content": "7", "tool_call_id": "1"},
        tools=[TOOL],
        documents=[{"title": "t", "text": "x"}],
        chat_template_kwargs={"enable_thinking": False},
    )
    assert get_conversation(request.messages) == [
        HELLO,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1, "ü"]}}},
                {"type": "function", "function": {"name": "g", "arguments": {}}},
                {"type": "function", "function": {"name": "f", "arguments": "[1"}},
            ],
        },
        {"role": "tool", "content": "7", "tool_call_id": "1"},
    ]
    options = get_chat_options(request)
    assert (options.tools, options.documents) == ([TOOL], [{"title": "t", "text": "x"}])
    assert options.variables == {"enable_thinking": False}
    assert get_chat_options(chat(HELLO, tools=[TOOL], tool_choice="none")).tools is None
    assert get_chat_options(chat(HELLO, continue_final_message=True)).add_generation_prompt is False


def test_fields_without_effect_are_accepted_and_named() -> None:
    body = {"prompt": "x", "user": "me", "store": True, "cache_prompt": 1, "suffix": "", "brand_new": [1], "n": 1}
    request, ignored = parse_request(json.dumps(body).encode(), CompletionRequest)
    assert (request.n, ignored) == (1, ["user", "store", "cache_prompt", "suffix", "brand_new"])
    parts = [{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "b"}]
    reply = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": [], "annotations": [], "audio": None}
    chat_request = chat(
        reply,
        {"role": "user", "content": parts, "name": "me"},
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        modalities=["text"],
        store=False,
        metadata={"a": "b"},
        stream_options={"include_usage": True, "include_obfuscation": False},
    )
    assert [message["content"] for message in get_conversation(chat_request.messages)] == ["yes", "ab"]
    assert get_chat_options(chat_request) == ChatOptions()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in ENDPOINTS
        for name in sorted(IGNORED_FIELDS | REFUSED_FIELDS.keys())
        if name not in kind.__struct_fields__
    ],
)
def test_every_field_that_is_not_implemented_may_be_null_or_neutral(kind: type[EndpointRequest], name: str) -> None:
    required = ENDPOINTS[kind]
    neutral = REFUSED_FIELDS[name].neutral if name in REFUSED_FIELDS else ("anything", 7, {"a": []})
    for value in (None, *neutral):
        request, _ = parse_request(json.dumps(required | {name: value}).encode(), kind)
        read_parameters(to_chat(request, ResponseStore()).chat if isinstance(request, ResponsesRequest) else request)


def test_only_unknown_fields_are_logged_without_their_values(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "edge_runtime")
    field_policy.log_unknown(["user", "suffix"])
    assert caplog.messages == []
    field_policy.log_unknown(["user", "line\nbreak", "ü"])
    assert caplog.messages == ["unknown fields of a request were ignored: line\\nbreak, \\xfc"]


@given(names=st.lists(st.text(), max_size=40))
def test_names_of_fields_fit_into_a_header(names: list[str]) -> None:
    shown = show_names(names)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= 20 * (40 * 10 + 2) + 5


def test_the_fields_of_the_readme_are_those_of_the_structs() -> None:
    assert render_reference() in (Path(edge_runtime.__file__).parent / "README.md").read_text()


def test_a_field_is_implemented_ignored_or_refused() -> None:
    implemented = {*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__}
    assert not implemented & IGNORED_FIELDS
    assert not IGNORED_FIELDS & REFUSED_FIELDS.keys()
    # `best_of`, for one, is implemented by one endpoint and refused by the others.
    for kind in ENDPOINTS:
        refused = {name for name, field in REFUSED_FIELDS.items() if kind.endpoint in field.endpoints}
        assert not refused & set(kind.__struct_fields__)


def test_prompts_are_accepted_in_all_formats() -> None:
    formats = ["a", ["a"], ["a", "b"], [1, 2], [[1, 2]], [[1], [2]]]
    assert [get_prompts(completion(prompt=prompt)) for prompt in formats] == [
        ["a"],
        ["a"],
        ["a", "b"],
        [[1, 2]],
        [[1, 2]],
        [[1], [2]],
    ]


def test_sampling_defaults_match_openai_and_seeds_are_signed() -> None:
    assert get_sampling(completion(seed=7)) == Sampling(1.0, 0, 1.0, 7)
    request = completion(temperature=0, top_p=0.5, top_k=3, seed=-1, ignore_eos=True)
    assert get_sampling(request) == Sampling(0.0, 3, 0.5, (1 << 64) - 1, True)
    assert get_sampling(completion(seed=0)).seed == 0
    assert all(get_sampling(completion()).seed < 1 << 53 for _ in range(100))


def test_every_sampling_parameter_has_its_field() -> None:
    request = completion(
        seed=1,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={"5": 2, "70": -100},
        min_tokens=3,
        stop_token_ids=[9],
    )
    expected = Sampling(
        temperature=1.0,
        seed=1,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={5: 2, 70: -100},
        min_tokens=3,
        stop_ids=[9],
    )
    assert get_sampling(request) == expected


def test_values_that_other_servers_take_for_off_are_off() -> None:
    sampling = get_sampling(completion(temperature=1e-5, top_k=-1, seed=1))
    assert sampling == Sampling(0.0, 0, 1.0, 1)


def test_the_sampling_defaults_of_the_model_come_before_openai_s() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_k=20)
    assert get_sampling(completion(seed=7), defaults) == Sampling(0.6, 20, 1.0, 7)
    request = completion(temperature=0, top_k=0, top_p=0.5, seed=7)
    assert get_sampling(request, defaults) == Sampling(0.0, 0, 0.5, 7)
    assert (
        get_stop_strings(completion()),
        get_stop_strings(completion(stop="a")),
        get_stop_strings(completion(stop=["a", "b"])),
    ) == (
        [],
        ["a"],
        ["a", "b"],
    )


def test_choices_and_log_probabilities() -> None:
    assert get_choices(completion()) == ChoicePlan(1, 1)
    assert get_choices(completion(n=3)) == ChoicePlan(3, 3)
    assert get_choices(completion(n=2, best_of=3)) == ChoicePlan(3, 2)
    requests = [completion(), completion(logprobs=0), completion(logprobs=5), chat(HELLO, logprobs=False)]
    requests += [chat(HELLO, logprobs=True), chat(HELLO, logprobs=True, top_logprobs=2)]
    assert [get_logprobs(request) for request in requests] == [0, 1, 6, 0, 1, 3]


@pytest.mark.parametrize(
    ("asked", "context", "maximum", "tokens"),
    [
        (None, 100, 0, 90),
        (-1, 100, 0, 90),
        (-1, 100, 50, 50),
        (20, 100, 0, 20),
        (200, 100, 0, 90),
        (20, 100, 8, 8),
        (0, 100, 0, 0),
        (0, 5, 0, 0),
        (7, 0, 0, 7),
        (None, 0, 9, 9),
        (None, 0, 0, UNKNOWN_CONTEXT_TOKENS),
    ],
)
def test_an_answer_may_fill_what_the_context_leaves(asked: int | None, context: int, maximum: int, tokens: int) -> None:
    request = completion() if asked is None else completion(max_tokens=asked)
    assert limit_answer(request, 10, context=context, maximum=maximum) == tokens
    newer = chat(HELLO, max_tokens=3, max_completion_tokens=asked)
    if asked is not None:
        assert limit_answer(newer, 10, context=context, maximum=maximum) == tokens


def test_a_prompt_that_fills_the_context_is_refused_in_openai_s_words() -> None:
    with pytest.raises(ApiError) as caught:
        limit_answer(chat(HELLO), 100, context=100, maximum=0)
    error = caught.value.body.error
    assert (caught.value.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
    assert error.message.startswith(
        "This model's maximum context length is 100 tokens. However, your messages resulted in 100 tokens."
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, *REFUSED_FIELDS, "user", "else"]
)
VALID = {
    "prompt": st.sampled_from(["x", ["x", "y"], [1, 2], [[1], [2]]]),
    "messages": st.just([HELLO]),
    "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-100, 100), max_size=3),
    "n": st.integers(1, 5),
    "max_tokens": st.integers(-1, 5),
}


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
@given(
    body=st.binary(max_size=60)
    | st.builds(
        lambda valid, other: json.dumps(valid | other).encode(),
        st.fixed_dictionaries({}, optional=VALID),
        st.dictionaries(FIELDS, JSON, max_size=4),
    )
)
@example(body=b'{"prompt":' * 100_000)
@example(body=b'{"prompt":"\\ud800"}')
@example(body=b'{"prompt":"x","temperature":1e999}')
@example(body=b'{"prompt":"x","seed":' + b"9" * 5000 + b"}")
@example(body=b'{"prompt":"x","use_beam_search":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
def test_garbage_is_parsed_or_refused(kind: type[GenerationRequest], body: bytes) -> None:
    try:
        request, ignored = parse_request(body, kind)
        read_parameters(request)
        assert show_names(ignored).isascii()
    except ApiError as refusal:
        assert refusal.status == 400
        assert msgspec.json.encode(refusal.body)
