"""A target that thinks, writes text and then calls a tool, of its own accord: what clients get of it, with any plan.

Its weights make every token the successor of the one before, so that the text is known, and nothing forces it.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cloud_verifier.model.target import Target
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.service.chat_template import load_chat_template
from export.bundle.build import BundleConfig, make_bundle
from tests.edge_runtime.conftest import TEXT
from tests.edge_runtime.service.conftest import ServicePair, service_pair
from tests.models import CHAT_TEMPLATE, byte_tokenizer

pytestmark = pytest.mark.slow

# The answer, each piece a token that occurs once; the marker of calls is a special one. What a grammar leaves no choice
# about is split as llguidance splits it.
ANSWER = ["<think>", "\n\nHm,", " a tool", " {.", " \n\n", "</think>", "\n\n", "Let me", " see {", " \n", "<tool_call>"]
CALL = [
    '\n{"name": "get_weather", "arguments": {"place": "',
    "Ro",
    "me",
    '"',
    ', "days": ',
    "12",
    "}",
    "}\n</tool_call>",
]
SPECIAL = ("<|im_start|>", "<|im_end|>", "<tool_call>")
WEATHER = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["place", "days"],
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}]
MESSAGES: list[Any] = [{"role": "user", "content": "Will it rain?"}]
REQUEST: dict[str, Any] = {"model": "", "messages": MESSAGES, "tools": TOOLS, "temperature": 0, "max_tokens": 64}


class Weather(pydantic.BaseModel):
    """The arguments of the tool, as the client declares it: a strict one."""

    place: str
    days: int


def save_scripted_target(path: Path) -> Path:
    """Save a target that continues a conversation with ANSWER and CALL."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(content) for content in SPECIAL])
    tokenizer.add_tokens([AddedToken(piece, special=False) for piece in ANSWER + CALL if piece not in SPECIAL])
    ids = [tokenizer.token_to_id(piece) for piece in ["Ċ", *ANSWER, *CALL, "<|im_end|>"]]
    size = tokenizer.get_vocab_size()
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.token_to_id("<|im_start|>"),
        eos_token_id=ids[-1],
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids[-1]] = 0.1
        for token, successor in itertools.pairwise(ids):
            model.lm_head.weight[successor, token] = 1.0
    model.save_pretrained(path)
    # As in Qwen 3's template, the form of calls shows.
    template = CHAT_TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content }}{% if tools and loop.first %}{{ tools }}{% endif %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<tool_call>"],
        chat_template=template + "{# <think> <tool_call> #}",
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scripted")
    target = save_scripted_target(directory / "target")
    make_bundle(BundleConfig(target, target, "concat", "fp32", TEXT), directory / "bundle", lambda step: None)
    return directory


@pytest.fixture(
    params=[Plan(0, continuation=64), Plan(5, continuation=1), Plan(3, continuation=4)],
    ids=["streaming", "K=5", "K=3, n=4"],
)
async def pair(scripted: Path, request: pytest.FixtureRequest) -> AsyncIterator[ServicePair]:
    target = Target(scripted / "target", device="cpu", dtype=torch.float32)
    draft = OnnxDraft.load(scripted / "bundle", threads=1)
    template = load_chat_template(scripted / "bundle")
    async with service_pair(target, draft, chat_template=template, planner=FixedPlanner(request.param)) as service:
        yield service


async def test_reasoning_text_and_call_are_separated(pair: ServicePair) -> None:
    answer = await pair.client.chat.completions.create(**REQUEST)
    choice, usage = answer.choices[0], answer.usage
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content == "Hm, a tool {."  # type: ignore[attr-defined]
    assert choice.message.content == "Let me see {"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"place": "Rome", "days": 12}')
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 6
    chunks = [chunk async for chunk in await pair.client.chat.completions.create(**REQUEST, stream=True)]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    kinds = [
        "reasoning" if getattr(delta, "reasoning_content", None) else "content" if delta.content else "call"
        for delta in deltas
        if delta.tool_calls or delta.content or getattr(delta, "reasoning_content", None)
    ]
    assert list(dict.fromkeys(kinds)) == ["reasoning", "content", "call"]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see {"
    arguments = [delta.tool_calls[0].function.arguments for delta in deltas if delta.tool_calls]  # type: ignore[union-attr]
    assert "".join(arguments) == call.function.arguments  # type: ignore[arg-type]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_the_client_accumulates_a_stream(pair: ServicePair) -> None:
    request = {name: value for name, value in REQUEST.items() if name != "tools"}
    tools = [openai.pydantic_function_tool(Weather, name="get_weather")]
    async with pair.client.chat.completions.stream(**request, tools=tools) as stream:
        kinds = [event.type async for event in stream]
        message = (await stream.get_final_completion()).choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert message.content == "Let me see {"
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments == Weather(place="Rome", days=12)


async def test_a_response_has_the_same_as_items(pair: ServicePair) -> None:
    tools: list[Any] = [{"type": "function", **TOOLS[0]["function"]}]
    request: dict[str, Any] = {"model": "", "input": MESSAGES, "tools": tools, "temperature": 0}
    whole = await pair.client.responses.create(**request)
    async with pair.client.responses.stream(**request) as stream:
        kinds = [event.type async for event in stream]
        streamed = await stream.get_final_response()
    assert [kind for kind in dict.fromkeys(kinds) if "delta" in kind] == [
        *("response.reasoning_text.delta", "response.output_text.delta", "response.function_call_arguments.delta")
    ]
    for response in (whole, streamed):
        thought, message, call = response.output
        assert thought.content[0].text == "Hm, a tool {."  # type: ignore[union-attr,index]
        assert response.output_text == "Let me see {"
        assert message.type == "message"
        assert (call.name, call.arguments) == ("get_weather", '{"place": "Rome", "days": 12}')  # type: ignore[union-attr]
        assert response.usage is not None
        assert response.usage.output_tokens_details.reasoning_tokens == 6
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}  # type: ignore[union-attr]
    following = await pair.client.responses.create(
        model="", input=[result], previous_response_id=whole.id, temperature=0
    )
    assert following.status == "completed"


async def test_stop_strings_end_the_content_alone(pair: ServicePair) -> None:
    choice = (await pair.client.chat.completions.create(**REQUEST, stop=["{"])).choices[0]
    assert choice.message.reasoning_content == "Hm, a tool {."  # type: ignore[attr-defined]
    assert (choice.message.content, choice.message.tool_calls) == ("Let me see ", None)
    assert choice.finish_reason == "stop"


async def test_without_tools_the_markers_are_no_calls(pair: ServicePair) -> None:
    choice = (await pair.client.chat.completions.create(**REQUEST | {"tool_choice": "none"})).choices[0]
    assert choice.message.tool_calls is None
    # The special token is no text.
    assert choice.message.content == "Let me see { \n" + "".join(CALL)


async def test_calls_that_the_schema_forbids_are_corrected(pair: ServicePair) -> None:
    schema = WEATHER | {"properties": {"place": {"type": "string"}, "days": {"type": "integer", "maximum": 7}}}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": schema}}]
    choice = (await pair.client.chat.completions.create(**REQUEST | {"tools": tools, "max_tokens": 40})).choices[0]
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function.arguments.startswith('{"place": "Rome", "days": ')
    assert "12" not in choice.message.tool_calls[0].function.arguments


async def test_required_calls_may_follow_reasoning(pair: ServicePair) -> None:
    choice = (await pair.client.chat.completions.create(**REQUEST | {"tool_choice": "required"})).choices[0]
    assert choice.message.reasoning_content == "Hm, a tool {."  # type: ignore[attr-defined]
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
