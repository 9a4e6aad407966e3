"""Request bodies: which fields and values are accepted and which are refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.protocol.bundle import SamplingDefaults
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.service.chat_template import ChatOptions
from edge_runtime.service.errors import ApiError
from edge_runtime.service.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    get_chat_options,
    get_conversation,
    get_prompt,
    get_sampling,
    get_stop_strings,
    parse_request,
)


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(json.dumps({"prompt": "x"} | fields).encode(), CompletionRequest)


def chat(*messages: Any, **fields: Any) -> ChatRequest:
    return parse_request(json.dumps({"messages": list(messages)} | fields).encode(), ChatRequest)


HELLO = {"role": "user", "content": "hello"}
BAD_CALL = {"function": {"name": "f", "arguments": "[1"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e-5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": -(1 << 63) - 1}, "seed"),
        ({"stream": True, "stream_options": {"exclude": 1}}, "stream_options.exclude"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": [1, "b"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1 << 40]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompts": "x"}, "prompts"),
        ({"speculation": "no"}, "speculation"),
    ],
)
def test_unsupported_values_are_refused_by_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        request = completion(**fields)
        get_prompt(request)
        get_sampling(request, 0)
    error = caught.value.body.error
    assert (caught.value.status, error.type, error.param) == (400, "invalid_request_error", param)
    assert error.message


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
        ({"messages": [HELLO], "tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [HELLO], "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [HELLO], "prompt": "x"}, "prompt"),
    ],
)
def test_unsupported_conversations_are_refused_by_field(request_body: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        request = parse_request(json.dumps(request_body).encode(), ChatRequest)
        get_conversation(request)
        get_chat_options(request)
    assert (caught.value.status, caught.value.body.error.param) == (400, param)


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
    assert get_conversation(request) == [
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


def test_values_without_effect_are_accepted() -> None:
    request = completion(n=1, best_of=1, logprobs=None, frequency_penalty=0.0, logit_bias={}, user="me", echo=False)
    assert (request.user, get_prompt(request)) == ("me", "x")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    reply = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": [], "annotations": []}
    chat_request = chat(
        {"role": "user", "content": parts, "name": "me"},
        reply,
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        modalities=["text"],
        store=False,
        metadata={"a": "b"},
    )
    assert [message["content"] for message in get_conversation(chat_request)] == ["ab", "yes"]
    assert get_chat_options(chat_request) == ChatOptions()


def test_prompts_are_accepted_in_four_formats() -> None:
    assert [get_prompt(completion(prompt=prompt)) for prompt in ("a", ["a"], [1, 2], [[1, 2]], [5])] == [
        "a",
        "a",
        [1, 2],
        [1, 2],
        [5],
    ]


def test_sampling_defaults_match_openai_and_seeds_are_signed() -> None:
    assert get_sampling(completion(), 7) == Sampling(1.0, 0, 1.0, 7)
    request = completion(temperature=0, top_p=0.5, top_k=3, seed=-1, ignore_eos=True)
    assert get_sampling(request, 7) == Sampling(0.0, 3, 0.5, (1 << 64) - 1, True)
    assert get_sampling(completion(seed=0), 7).seed == 0


def test_the_sampling_defaults_of_the_model_come_before_openai_s() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_k=20)
    assert get_sampling(completion(), 7, defaults) == Sampling(0.6, 20, 1.0, 7)
    assert get_sampling(completion(temperature=0, top_k=0, top_p=0.5), 7, defaults) == Sampling(0.0, 0, 0.5, 7)
    assert (
        get_stop_strings(completion()),
        get_stop_strings(completion(stop="a")),
        get_stop_strings(completion(stop=["a", "b"])),
    ) == (
        [],
        ["a"],
        ["a", "b"],
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, "else"])


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
@given(body=st.binary(max_size=60) | st.dictionaries(FIELDS, JSON, max_size=4).map(lambda v: json.dumps(v).encode()))
@example(body=b'{"prompt":' * 100_000)
@example(body=b'{"prompt":"\\ud800"}')
@example(body=b'{"prompt":"x","temperature":1e999}')
@example(body=b'{"prompt":"x","seed":' + b"9" * 5000 + b"}")
def test_garbage_is_parsed_or_refused(kind: type[GenerationRequest], body: bytes) -> None:
    try:
        request = parse_request(body, kind)
        get_sampling(request, 0)
        if isinstance(request, CompletionRequest):
            assert get_prompt(request)
    except ApiError as refusal:
        assert refusal.status == 400
        assert msgspec.json.encode(refusal.body)
