"""Faults: a client that disconnects, a verifier that stops, a draft model that fails, a service that drains."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import msgspec
import openai
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.draft.model import DraftContext, OnnxDraft
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.protocol.bundle import ChatFormat
from edge_runtime.protocol.errors import DraftError
from edge_runtime.service.chat_template import load_chat_template
from edge_runtime.service.state import ServiceLimits
from tests.edge_runtime.service.conftest import read_metric, service_pair, wait_until, write_chat_bundle

PROMPT = "def read_config(path):\n"
LONG_REQUEST = {"model": "", "prompt": PROMPT, "max_tokens": 1000, "temperature": 0, "extra_body": {"ignore_eos": True}}
# Long for one round, and short to wait for.
IN_PROGRESS_SECONDS = 5.0


@pytest.mark.parametrize("speculation", [True, False])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnected_client_ends_the_answer_and_its_session(
    target: Target, draft: OnnxDraft, stream: bool, speculation: bool
) -> None:
    async with service_pair(target, draft, ServiceLimits(max_concurrent=1)) as pair:
        body = {"prompt": PROMPT, "stream": stream, "ignore_eos": True, "speculation": speculation, "max_tokens": 1000}
        async with httpx.AsyncClient() as client:
            if stream:
                async with client.stream("POST", f"{pair.url}/v1/completions", json=body) as response:
                    async for line in response.aiter_lines():
                        assert line.startswith("data: {")
                        break
                    assert pair.verifier.sessions == 1
            else:
                request = asyncio.create_task(client.post(f"{pair.url}/v1/completions", json=body))
                await wait_until(lambda: pair.verifier.sessions == 1)
                request.cancel()
        await wait_until(lambda: pair.verifier.sessions == 0)
        await wait_until(lambda: read_metric(pair, 'flexspec_requests_total{outcome="cancelled"}') == 1)
        # The slot is free again.
        answer = await pair.client.completions.create(**LONG_REQUEST | {"max_tokens": 2})
        assert answer.usage.completion_tokens == 2


async def test_a_client_that_leaves_the_queue_is_never_served(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft, ServiceLimits(max_concurrent=1, max_waiting=1)) as pair:
        stream = await pair.client.completions.create(**LONG_REQUEST, stream=True)
        await anext(aiter(stream))
        async with httpx.AsyncClient() as client:
            waiting = asyncio.create_task(client.post(f"{pair.url}/v1/completions", json={"prompt": PROMPT}))
            await wait_until(lambda: read_metric(pair, "flexspec_requests_waiting") == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                await pair.client.completions.create(model="", prompt=PROMPT)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            waiting.cancel()
        await wait_until(lambda: read_metric(pair, "flexspec_requests_waiting") == 0)
        await stream.close()
        await wait_until(lambda: read_metric(pair, "flexspec_requests_running") == 0)
        await wait_until(lambda: pair.verifier.sessions == 0)


@pytest.mark.slow
async def test_an_unreachable_verifier(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair:
        (model,) = (await pair.client.models.list()).data
        await pair.verifier.stop()
        pair.service.client.deadline = 0.3
        with pytest.raises(openai.APIStatusError) as caught:
            await pair.client.completions.create(model="", prompt=PROMPT, stream=True)
        assert (caught.value.status_code, caught.value.code) == (503, "connection_refused")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        # The last known models are still listed.
        assert (await pair.client.models.list()).data[0].id == model.id
        await pair.verifier.start()
        pair.service.client.deadline = 300.0
        answer = await pair.client.completions.create(**LONG_REQUEST | {"max_tokens": 2})
        assert answer.usage.completion_tokens == 2


@pytest.mark.slow
async def test_a_verifier_that_stops_in_mid_stream(target: Target, draft: OnnxDraft) -> None:
    # A round that is under way keeps the deadline with which it began.
    async with service_pair(target, draft, deadline=IN_PROGRESS_SECONDS) as pair:
        body = {"prompt": PROMPT, "stream": True, "max_tokens": 1000, "ignore_eos": True}
        async with (
            httpx.AsyncClient() as client,
            client.stream("POST", f"{pair.url}/v1/completions", json=body) as response,
        ):
            lines = []
            async for line in response.aiter_lines():
                if not lines:
                    pair.service.client.deadline = 0.3
                    await pair.verifier.stop()
                lines.append(line)
        *_, event, data, end = lines
        assert (event, end) == ("event: error", "")
        assert json.loads(data.removeprefix("data: "))["error"]["code"] == "connection_refused"
        assert "data: [DONE]" not in lines
        await pair.verifier.start()
        pair.service.client.deadline = IN_PROGRESS_SECONDS
        stream = await pair.client.completions.create(**LONG_REQUEST, stream=True)
        with pytest.raises(openai.APIError, match="no usable answer"):
            async for _ in stream:
                pair.service.client.deadline = 0.3
                await pair.verifier.stop()


class FailingDraft(OnnxDraft):
    """The example draft model, which runs out of memory after some draft tokens."""

    def __init__(self, draft: OnnxDraft, tokens_left: int) -> None:
        vars(self).update(vars(draft))
        self.tokens_left = tokens_left

    def new_context(self) -> DraftContext:
        context = super().new_context()
        draft_token = context._draft_token

        def failing(*arguments: object) -> object:
            self.tokens_left -= 1
            if self.tokens_left < 0:
                raise DraftError("the draft failed at position 1: out of memory")
            return draft_token(*arguments)  # type: ignore[arg-type]

        context._draft_token = failing  # type: ignore[method-assign, assignment]
        return context


@pytest.mark.slow
@pytest.mark.parametrize("plan", [Plan(4), Plan(2, draft_ahead=3, in_flight=2)], ids=["on time", "ahead"])
async def test_the_target_completes_the_answer_when_the_draft_fails(
    target: Target, draft: OnnxDraft, plan: Plan
) -> None:
    request = LONG_REQUEST | {"max_tokens": 40}
    async with service_pair(target, draft) as pair:
        expected = await pair.client.completions.create(**request)
    for tokens in (0, 9):
        failing = FailingDraft(draft, tokens)
        async with service_pair(target, failing, planner=FixedPlanner(plan)) as pair:
            answer = await pair.client.completions.create(**request)
            assert answer.choices[0].text == expected.choices[0].text
            assert answer.usage == expected.usage
            assert failing.tokens_left < 0
            assert read_metric(pair, 'flexspec_cloud_rounds_total{reason="draft_failed"}') >= 1


@pytest.mark.slow
async def test_a_full_context_ends_the_answer_with_length(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair:
        prompt = [5] * (target.context - 6)
        answer = await pair.client.completions.create(**LONG_REQUEST | {"prompt": prompt})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.total_tokens <= target.context + 1
        assert read_metric(pair, 'flexspec_cloud_rounds_total{reason="no_room"}') <= 1


@pytest.mark.slow
async def test_draining_cancels_answers_that_take_too_long(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair:
        stream = await pair.client.completions.create(**LONG_REQUEST, stream=True)
        chunks = aiter(stream)
        await anext(chunks)
        drain = asyncio.create_task(pair.service.drain(0.2))
        with pytest.raises(openai.InternalServerError) as caught:
            await pair.client.completions.create(**LONG_REQUEST)
        assert (caught.value.status_code, caught.value.code) == (503, "stopping")
        with pytest.raises(openai.APIError, match="the service was stopped"):
            async for _ in chunks:
                pass
        await drain
        await wait_until(lambda: pair.verifier.sessions == 0)


async def test_the_service_is_not_ready_before_the_draft_is_loaded(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair, httpx.AsyncClient(base_url=pair.url) as client:
        board, pair.service.state.board = pair.service.state.board, None
        assert (await client.get("/healthz")).status_code == 200
        for response in (await client.get("/readyz"), await client.post("/v1/completions", json={"prompt": "x"})):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "starting")
            assert response.headers["retry-after"] == "1"
        pair.service.state.board = board
        assert (await client.get("/readyz")).status_code == 200


async def test_readiness_follows_the_link_and_what_happens_without_it(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair, httpx.AsyncClient(base_url=pair.url) as client:
        assert (await client.get("/readyz")).text == "ready\n"
        await pair.verifier.stop()
        await pair.service.client.check()
        refused = await client.get("/readyz")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "connection_refused")
        assert pair.verifier.url in refused.json()["error"]["message"] and refused.headers["retry-after"]
        board = pair.service.state.board
        pair.service.state.board = msgspec.structs.replace(board, on_link_loss="draft")
        alone = await client.get("/readyz")
        assert alone.status_code == 200 and alone.text.startswith("ready, from the draft model alone: no verifier")
        assert pair.service.monitoring.sampler.sample().fault == pair.service.client.link_state.reason != ""
        assert read_metric(pair, "flexspec_link_verifier_reachable") == 0
        pair.service.state.board = board
        await pair.verifier.start()
        await pair.service.client.check()
        assert (await client.get("/readyz")).text == "ready\n"
        assert pair.service.monitoring.sampler.sample().fault == ""
        assert read_metric(pair, "flexspec_link_verifier_reachable") == 1


@pytest.mark.slow
async def test_the_chat_template_of_the_bundle_is_used(target: Target, draft: OnnxDraft, tmp_path: Path) -> None:
    template = "{% for m in messages %}<|endoftext|>{{ m.content }}{% endfor %}"
    chat_template = load_chat_template(write_chat_bundle(tmp_path, ChatFormat({"default": template})))
    async with service_pair(target, draft, chat_template=chat_template) as pair:
        options = {"model": "", "temperature": 0, "max_tokens": 8}
        message = await pair.client.chat.completions.create(messages=[{"role": "user", "content": PROMPT}], **options)
        text = await pair.client.completions.create(prompt=f"<|endoftext|>{PROMPT}", **options)
        assert message.choices[0].message.content == text.choices[0].text
        assert message.usage.prompt_tokens == 1 + len(draft.tokenizer.encode(PROMPT).ids)


async def test_api_keys(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft, keys=frozenset({"right", "gr\u00f6\u00dfer"}), key="right") as pair:
        assert (await pair.client.models.list()).data
        async with httpx.AsyncClient(base_url=pair.url) as client:
            for path, status in (("/v1/models", 401), ("/v1/nothing", 404), ("/healthz", 200), ("/metrics", 200)):
                assert (await client.get(path, headers={"host": "board.example"})).status_code == status
            umlaut = "Bearer gr\u00f6\u00dfer".encode()
            assert (await client.get("/v1/models", headers={b"authorization": umlaut})).status_code == 200
