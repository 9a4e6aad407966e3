"""`/v1/responses` over HTTP, with the `openai` client: the same text as the chat, streamed, with tools and a memory."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service.state import ServiceLimits
from tests.edge_runtime.service.conftest import service_pair, wait_until

REQUEST: dict[str, Any] = {"model": "", "temperature": 0.7, "extra_body": {"seed": 5}}
QUESTION = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
ADD = {"type": "function", "name": "add", "parameters": SCHEMA, "strict": True}


def ask_chat(client: openai.OpenAI, messages: list[Any], **fields: Any) -> Any:
    return client.chat.completions.create(messages=messages, **(REQUEST | fields))


@pytest.mark.slow
def test_the_text_is_that_of_the_chat_and_of_a_stream(client: openai.OpenAI) -> None:
    chat = ask_chat(client, [{"role": "system", "content": "Be brief."}, *QUESTION], max_tokens=12)
    request = REQUEST | {"input": "Hello", "instructions": "Be brief.", "max_output_tokens": 12}
    response = client.responses.create(**request)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    events: list[Any] = list(client.responses.create(**request, stream=True))
    kinds, final = [event.type for event in events], events[-1].response
    assert kinds[:4] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added")
    ]
    assert kinds[-4:] == [
        *("response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete")
    ]
    assert final.output_text == response.output_text
    assert final.usage == response.usage


def test_a_response_is_kept_continued_and_forgotten(client: openai.OpenAI) -> None:
    first = client.responses.create(**REQUEST, input="Hello", instructions="Be brief.", max_output_tokens=5)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    reply = {"role": "assistant", "content": first.output_text}
    chat = ask_chat(client, [*QUESTION, reply, {"role": "user", "content": "More"}], max_tokens=5)
    second = client.responses.create(**REQUEST, input="More", previous_response_id=first.id, max_output_tokens=5)
    assert second.output_text == chat.choices[0].message.content
    reference: Any = {"type": "item_reference", "id": first.output[0].id}
    again: list[Any] = [*QUESTION, reference, {"role": "user", "content": "More"}]
    third = client.responses.create(**REQUEST, input=again, store=False, max_output_tokens=5)
    assert third.output_text == second.output_text
    client.responses.delete(first.id)
    for action in (client.responses.retrieve, client.responses.delete):
        for response_id in (first.id, third.id):
            with pytest.raises(openai.NotFoundError) as missing:
                action(response_id)
            assert missing.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError) as lost:
        client.responses.create(**REQUEST, input="More", previous_response_id=first.id)
    assert lost.value.code == "previous_response_not_found"


@pytest.mark.slow
def test_structured_output_and_log_probabilities(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}
    response = client.responses.create(**REQUEST, input="Hello", text=form, top_logprobs=2)
    assert json.loads(response.output_text)["n"] in (1, 2)
    part = response.output[0].content[0]  # type: ignore[union-attr,index]
    assert "".join(token.token for token in part.logprobs) == response.output_text  # type: ignore[union-attr]
    assert {len(token.top_logprobs) for token in part.logprobs} == {2}  # type: ignore[union-attr]
    form["format"]["schema"] = {"type": "nonsense"}
    with pytest.raises(openai.BadRequestError, match=r"text\.format") as refused:
        client.responses.create(**REQUEST, input="Hello", text=form)
    assert refused.value.param == "text.format"


def test_embeddings_are_a_clear_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no embeddings") as missing:
        client.embeddings.create(model="", input="x")
    assert missing.value.code == "no_embeddings"


def test_overlong_input_is_worded_as_openai_does(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is .* your input resulted in") as refused:
        client.responses.create(**REQUEST, input="word " * 3000)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")


@pytest.mark.slow
async def test_a_stream_that_fails_ends_with_an_error(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft, ServiceLimits(max_concurrent=1), deadline=1.0) as pair:
        stream = await pair.client.responses.create(model="", input="Hello", stream=True, max_output_tokens=2000)
        kinds = []
        with pytest.raises(openai.APIError) as failed:
            async for event in stream:
                kinds.append(event.type)
                if event.type == "response.output_text.delta":
                    await pair.verifier.stop()
        assert kinds[0] == "response.created"
        assert "response.completed" not in kinds
        assert failed.value.code


async def test_a_stream_is_abandoned_with_its_client(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair:
        stream = await pair.client.responses.create(
            model="", input="Hello", stream=True, extra_body={"ignore_eos": True}, max_output_tokens=100_000
        )
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        await wait_until(lambda: pair.verifier.sessions == 0)
