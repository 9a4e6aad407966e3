"""Requests are admitted before there is work for them, and memory goes back: a real board, small numbers."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service.state import ServiceLimits
from tests.edge_runtime.service.conftest import board_process, service_pair, wait_until

pytestmark = pytest.mark.usefixtures("short_grace")

# The toy target has a context of 2048 tokens.
LONG_TEXT = "the board drafts, the verifier accepts\n" * 5000
SHORT = {"prompt": "def f(", "max_tokens": 2}


class BusyTokenizer:
    """Holds the tokenizer's thread of a service, as a flood of large prompts would."""

    def __init__(self) -> None:
        self.running, self.finish = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.running.set()
        assert self.finish.wait(300)


async def test_requests_wait_for_the_tokenizer_in_the_queue(target: Target, draft: OnnxDraft) -> None:
    limits = ServiceLimits(max_concurrent=1, max_waiting=1)
    async with service_pair(target, draft, limits) as pair, httpx.AsyncClient(base_url=pair.url, timeout=300) as client:
        busy, queue = BusyTokenizer(), pair.service.queue
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        holding = asyncio.create_task(pair.service._routes._prompt_tokenizer.run(busy, never))
        await asyncio.to_thread(busy.running.wait)
        try:
            one = asyncio.create_task(client.post("/v1/completions", json=SHORT))
            messages = [{"role": "user", "content": LONG_TEXT}]
            two = asyncio.create_task(client.post("/v1/chat/completions", json={"messages": messages}))
            await wait_until(lambda: queue.waiting == 2)
            # Both places are taken, so nothing is rendered or tokenized for others.
            for path, body in (
                ("/v1/completions", SHORT),
                ("/v1/completions", {"prompt": LONG_TEXT}),
                ("/v1/chat/completions", {"messages": messages}),
                ("/v1/responses", {"input": LONG_TEXT}),
            ):
                refused = await client.post(path, json=body)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
                assert int(refused.headers["retry-after"]) >= 1
            assert (await client.get("/healthz")).status_code == 200
            # Whoever leaves makes room at once.
            two.cancel()
            await wait_until(lambda: queue.waiting == 1)
        finally:
            busy.finish.set()
        await holding
        assert (await one).json()["usage"]["completion_tokens"] == 2
        assert (queue.running, queue.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {"prompt": LONG_TEXT}, "prompt"),
        ("/v1/completions", {"prompt": ["short", LONG_TEXT]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG_TEXT}]}, "messages"),
        ("/v1/responses", {"input": LONG_TEXT}, "input"),
    ],
)
async def test_a_prompt_that_cannot_fit_is_refused_by_its_length(
    target: Target, draft: OnnxDraft, path: str, body: dict[str, object], field: str
) -> None:
    async with service_pair(target, draft) as pair, httpx.AsyncClient(base_url=pair.url, timeout=300) as client:
        # The context is known from here on.
        await client.get("/v1/models")
        refused = await client.post(path, json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field)
        assert (
            f"maximum context length is {target.context} tokens. However, your {field} resulted in at least"
            in (error["message"])
        )
        assert (pair.service.queue.running, pair.service.queue.waiting) == (0, 0)
        # Nothing is generated, so any length will do.
        counted = await client.post("/v1/completions", json={"prompt": LONG_TEXT, "max_tokens": 0})
        assert counted.json()["usage"]["prompt_tokens"] == len(draft.tokenizer.encode(LONG_TEXT))
        assert counted.json()["model"] == target.name


async def test_a_prompt_that_cannot_fit_takes_no_place_in_the_queue(target: Target, draft: OnnxDraft) -> None:
    limits = ServiceLimits(max_concurrent=1, max_waiting=0)
    async with service_pair(target, draft, limits) as pair, httpx.AsyncClient(base_url=pair.url, timeout=300) as client:
        await client.get("/v1/models")
        for place in pair.service.queue.reserve():
            for prompt in (LONG_TEXT, [5] * target.context):
                refused = await client.post("/v1/completions", json={"prompt": prompt})
                assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
            assert (await client.post("/v1/completions", json=SHORT)).status_code == 429
            place.leave()
        assert (await client.post("/v1/completions", json=SHORT)).status_code == 200


@pytest.mark.slow
def test_the_memory_of_large_prompts_goes_back(verifier: str) -> None:
    options = ("--threads", "1", "--draft-prefix-cache", "0", "--max-waiting", "8")
    with board_process(verifier, *options) as (process, url), httpx.Client(base_url=url, timeout=300) as client:
        board = psutil.Process(process.pid)
        assert client.post("/v1/completions", json=SHORT).status_code == 200
        before = board.memory_info().rss

        def ask(_: int) -> int:
            return client.post("/v1/completions", json={"prompt": LONG_TEXT, "max_tokens": 0}).status_code

        with ThreadPoolExecutor(20) as threads:
            statuses = list(threads.map(ask, range(20)))
        assert statuses.count(200) >= 9 and set(statuses) <= {200, 429}
        assert board.memory_info().rss < 1.25 * before
