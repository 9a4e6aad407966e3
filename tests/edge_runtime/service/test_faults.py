"""What happens when something goes away: the client, the verifier, the draft, or time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.common import http_server
from edge_runtime.draft.model import DraftContext, OnnxDraft
from edge_runtime.ngram_cache.lookup import NgramCache
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.protocol.errors import DraftError
from edge_runtime.service.chat_template import load_chat_template
from edge_runtime.service.state import ServiceLimits
from tests.edge_runtime.service.conftest import Both, both, bundle_with

PROMPT = "def read_config(path):\n"
LONG = {"model": "", "prompt": PROMPT, "max_tokens": 1000, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that are kept alive are not waited for."""
    monkeypatch.setattr(http_server, "GRACE_SECONDS", 0.2)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about"
        await asyncio.sleep(0.01)


def metric(pair: Both, name: str) -> float:
    lines = pair.service.metrics.render().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("speculation", [True, False])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_the_answer_and_its_session(
    target: Target, draft: OnnxDraft, stream: bool, speculation: bool
) -> None:
    async with both(target, draft, ServiceLimits(max_concurrent=1)) as pair:
        body = {"prompt": PROMPT, "stream": stream, "ignore_eos": True, "speculation": speculation, "max_tokens": 1000}
        async with httpx.AsyncClient() as client:
            if stream:
                async with client.stream("POST", f"{pair.url}/v1/completions", json=body) as response:
                    async for line in response.aiter_lines():
                        assert line.startswith("data: {")
                        break
                    assert pair.cloud.sessions == 1
            else:
                asking = asyncio.create_task(client.post(f"{pair.url}/v1/completions", json=body))
                await until(lambda: pair.cloud.sessions == 1)
                asking.cancel()
        await until(lambda: pair.cloud.sessions == 0)
        await until(lambda: metric(pair, 'flexspec_requests_total{outcome="cancelled"}') == 1)
        # The place is free for others.
        answer = await pair.client.completions.create(**LONG | {"max_tokens": 2})
        assert answer.usage.completion_tokens == 2


async def test_who_leaves_the_line_is_never_served(target: Target, draft: OnnxDraft) -> None:
    async with both(target, draft, ServiceLimits(max_concurrent=1, max_waiting=1)) as pair:
        stream = await pair.client.completions.create(**LONG, stream=True)
        await anext(aiter(stream))
        async with httpx.AsyncClient() as client:
            waiting = asyncio.create_task(client.post(f"{pair.url}/v1/completions", json={"prompt": PROMPT}))
            await until(lambda: metric(pair, "flexspec_requests_waiting") == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                await pair.client.completions.create(model="", prompt=PROMPT)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            waiting.cancel()
        await until(lambda: metric(pair, "flexspec_requests_waiting") == 0)
        await stream.close()
        await until(lambda: metric(pair, "flexspec_requests_running") == 0)
        assert pair.cloud.sessions == 0


async def test_a_verifier_that_is_not_there(target: Target, draft: OnnxDraft) -> None:
    async with both(target, draft, deadline=0.3) as pair:
        (model,) = (await pair.client.models.list()).data
        await pair.cloud.stop()
        with pytest.raises(openai.APIStatusError) as caught:
            await pair.client.completions.create(model="", prompt=PROMPT, stream=True)
        assert (caught.value.status_code, caught.value.code) == (503, "connection_refused")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        # What it served is known still.
        assert (await pair.client.models.list()).data[0].id == model.id
        await pair.cloud.start()
        answer = await pair.client.completions.create(**LONG | {"max_tokens": 2})
        assert answer.usage.completion_tokens == 2


async def test_a_verifier_that_goes_in_mid_stream(target: Target, draft: OnnxDraft) -> None:
    async with both(target, draft, deadline=0.3) as pair:
        body = {"prompt": PROMPT, "stream": True, "max_tokens": 1000, "ignore_eos": True}
        async with (
            httpx.AsyncClient() as client,
            client.stream("POST", f"{pair.url}/v1/completions", json=body) as response,
        ):
            lines = []
            async for line in response.aiter_lines():
                if not lines:
                    await pair.cloud.stop()
                lines.append(line)
        *_, event, data, end = lines
        assert (event, end) == ("event: error", "")
        assert json.loads(data.removeprefix("data: "))["error"]["code"] == "connection_refused"
        assert "data: [DONE]" not in lines
        await pair.cloud.start()
        stream = await pair.client.completions.create(**LONG, stream=True)
        with pytest.raises(openai.APIError, match="no usable answer"):
            async for _ in stream:
                await pair.cloud.stop()


class Failing(OnnxDraft):
    """The shipped draft, out of memory after a few guesses."""

    def __init__(self, draft: OnnxDraft, guesses: int) -> None:
        vars(self).update(vars(draft))
        self.guesses = guesses

    def new_context(self, memory: NgramCache | None = None) -> DraftContext:
        context = super().new_context(memory)
        draft_token = context._draft_token

        def failing(*arguments: object) -> object:
            self.guesses -= 1
            if self.guesses < 0:
                raise DraftError("the draft failed at position 1: out of memory")
            return draft_token(*arguments)  # type: ignore[arg-type]

        context._draft_token = failing  # type: ignore[method-assign, assignment]
        return context


@pytest.mark.parametrize("plan", [Plan(4), Plan(2, ahead=3, in_flight=2)], ids=["on time", "ahead"])
async def test_a_draft_that_fails_leaves_the_rest_to_the_cloud(target: Target, draft: OnnxDraft, plan: Plan) -> None:
    order = LONG | {"max_tokens": 40}
    async with both(target, draft) as pair:
        expected = await pair.client.completions.create(**order)
    for guesses in (0, 9):
        failing = Failing(draft, guesses)
        async with both(target, failing, planner=FixedPlanner(plan)) as pair:
            answer = await pair.client.completions.create(**order)
            assert answer.choices[0].text == expected.choices[0].text
            assert answer.usage == expected.usage
            assert failing.guesses < 0
            assert metric(pair, 'flexspec_cloud_rounds_total{reason="draft_failed"}') >= 1


async def test_the_end_of_the_context_is_an_end_by_length(target: Target, draft: OnnxDraft) -> None:
    async with both(target, draft) as pair:
        prompt = [5] * (target.context - 6)
        answer = await pair.client.completions.create(**LONG | {"prompt": prompt})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.total_tokens <= target.context + 1
        assert metric(pair, 'flexspec_cloud_rounds_total{reason="no_room"}') <= 1


async def test_draining_cuts_what_takes_too_long(target: Target, draft: OnnxDraft) -> None:
    async with both(target, draft) as pair:
        stream = await pair.client.completions.create(**LONG, stream=True)
        chunks = aiter(stream)
        await anext(chunks)
        draining = asyncio.create_task(pair.service.drain(0.2))
        with pytest.raises(openai.InternalServerError) as caught:
            await pair.client.completions.create(**LONG)
        assert (caught.value.status_code, caught.value.code) == (503, "stopping")
        with pytest.raises(openai.APIError, match="the service was stopped"):
            async for _ in chunks:
                pass
        await draining
        await until(lambda: pair.cloud.sessions == 0)


async def test_before_the_draft_is_loaded_nothing_is_ready(target: Target, draft: OnnxDraft) -> None:
    async with both(target, draft) as pair, httpx.AsyncClient(base_url=pair.url) as client:
        board, pair.service.state.board = pair.service.state.board, None
        assert (await client.get("/healthz")).status_code == 200
        for response in (await client.get("/readyz"), await client.post("/v1/completions", json={"prompt": "x"})):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "starting")
            assert response.headers["retry-after"] == "1"
        pair.service.state.board = board
        assert (await client.get("/readyz")).status_code == 200


async def test_a_template_in_the_bundle_is_used(target: Target, draft: OnnxDraft, tmp_path: Path) -> None:
    template = "{% for m in messages %}<|endoftext|>{{ m.content }}{% endfor %}"
    chat = load_chat_template(bundle_with(tmp_path, template=template))
    async with both(target, draft, chat=chat) as pair:
        options = {"model": "", "temperature": 0, "max_tokens": 8}
        said = await pair.client.chat.completions.create(messages=[{"role": "user", "content": PROMPT}], **options)
        text = await pair.client.completions.create(prompt=f"<|endoftext|>{PROMPT}", **options)
        assert said.choices[0].message.content == text.choices[0].text
        assert said.usage.prompt_tokens == 1 + len(draft.tokenizer.encode(PROMPT).ids)


async def test_keys(target: Target, draft: OnnxDraft) -> None:
    async with both(target, draft, keys=frozenset({"right", "gr\u00f6\u00dfer"}), key="right") as pair:
        assert (await pair.client.models.list()).data
        async with httpx.AsyncClient(base_url=pair.url) as client:
            for path, status in (("/v1/models", 401), ("/v1/nothing", 404), ("/healthz", 200), ("/metrics", 200)):
                assert (await client.get(path, headers={"host": "board.example"})).status_code == status
            umlaut = "Bearer gr\u00f6\u00dfer".encode()
            assert (await client.get("/v1/models", headers={b"authorization": umlaut})).status_code == 200
