"""Replies delivered to the wrong session: over HTTP/2, one flipped bit of a stream id does that."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.decoding.generation import Generation
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.plan import FixedPlanner, Plan
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.verifier.client import VerifierClient
from tests.conftest import serving

PROMPTS = ("def read_config(path):\n", "import unittest\n\nclass Test")


class CrossingTransport(httpx.AsyncBaseTransport):
    """Swaps the replies of two concurrent rounds, once.

    Attributes:
        crossed: whether it has done so.
    """

    def __init__(self, *, cross: bool) -> None:
        self.crossed = not cross
        self._inner = httpx.AsyncHTTPTransport(http1=False, http2=True)
        self._first: tuple[bytes, asyncio.Future[bytes]] | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        body = await response.aread()
        if self.crossed or not request.url.path.endswith("/rounds") or not response.is_success:
            return httpx.Response(response.status_code, headers=response.headers, stream=httpx.ByteStream(body))
        if self._first is None:
            self._first = body, asyncio.get_running_loop().create_future()
            return httpx.Response(200, stream=httpx.ByteStream(await self._first[1]))
        other_body, future = self._first
        future.set_result(body)
        self.crossed = True
        return httpx.Response(200, stream=httpx.ByteStream(other_body))

    async def aclose(self) -> None:
        await self._inner.aclose()


async def texts(url: str, draft: OnnxDraft, *, cross: bool) -> list[list[int]]:
    """Generate from both prompts concurrently."""
    transport = CrossingTransport(cross=cross)
    async with VerifierClient(url, transport=transport) as client:

        async def write(prompt: str) -> list[int]:
            ids = draft.tokenizer.encode(prompt).ids
            sampling = Sampling(seed=1, ignore_eos=True)
            generation = Generation(draft, client, ids, sampling, max_new_tokens=24, planner=FixedPlanner(Plan(4)))
            async for _ in generation:
                pass
            return generation.ids

        written = await asyncio.gather(*map(write, PROMPTS))
    assert transport.crossed
    return written


@pytest.mark.slow
async def test_a_reply_to_another_session_does_not_change_the_text(target_v1: Target, shipped_draft: OnnxDraft) -> None:
    async with serving(target_v1) as server:
        assert await texts(server.url, shipped_draft, cross=True) == await texts(server.url, shipped_draft, cross=False)
