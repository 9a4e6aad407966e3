"""What those who asked see of a link that goes and comes back."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.common import http_server
from edge_runtime.decoding import offline
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service import routes, sse
from tests.edge_runtime.service.conftest import Both, both
from tests.edge_runtime.service.test_faults import until

PROMPT = "def read_config(path):\n"
ORDER: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that are kept alive are not waited for."""
    monkeypatch.setattr(http_server, "GRACE_SECONDS", 0.2)


async def target_text(pair: Both) -> str:
    extra = {"ignore_eos": True, "speculation": False}
    answer = await pair.client.completions.create(
        model="", prompt=PROMPT, max_tokens=200, temperature=0, extra_body=extra
    )
    return answer.choices[0].text


async def chunks(pair: Both, path: str = "completions", **changes: Any) -> AsyncIterator[dict[str, Any] | str]:
    """The chunks of a stream, and its comments."""
    async with (
        httpx.AsyncClient(timeout=60.0) as client,
        client.stream("POST", f"{pair.url}/v1/{path}", json=ORDER | {"stream": True} | changes) as response,
    ):
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))
            elif line.startswith(":"):
                yield line


class Page:
    """Shows a stream as its documentation says."""

    def __init__(self) -> None:
        self.text = ""
        self.unverified = 0
        self.most = 0
        self.took_back = 0

    def show(self, chunk: dict[str, Any]) -> None:
        withdrawn = chunk.get("withdrawn", 0)
        assert withdrawn <= self.unverified
        self.took_back += withdrawn
        choice = chunk["choices"][0]
        piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
        self.text = self.text[: len(self.text) - withdrawn] + piece
        if "timings" not in chunk:
            self.unverified = chunk.get("unverified", 0)
            self.most = max(self.most, self.unverified)
        assert self.unverified <= len(self.text)

    @property
    def verified(self) -> str:
        return self.text[: len(self.text) - self.unverified]


async def test_unverified_text_is_marked_and_corrected(
    target: Target, draft: OnnxDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "OFFLINE_PAUSE_SECONDS", 0.1)
    async with both(target, draft) as pair:
        wanted = await target_text(pair)
        page, steps = Page(), iter([pair.cloud.stop, pair.cloud.start])
        step = next(steps)
        async for chunk in chunks(pair, on_link_loss="draft"):
            assert isinstance(chunk, dict)
            page.show(chunk)
            assert wanted.startswith(page.verified)
            if step and (page.unverified >= 60 if step == pair.cloud.start else len(page.text) >= 60):
                await step()
                step = next(steps, None)
        assert step is None
        assert page.text == wanted
        assert page.most >= 60
        assert page.unverified == 0
        assert chunk["timings"]["unverified_n"] == 0
        assert (chunk["timings"]["withdrawn_n"] > 0) == (page.took_back > 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_an_answer_that_ends_without_its_verifier_says_so(
    target: Target, draft: OnnxDraft, path: str, stream: bool
) -> None:
    async with both(target, draft) as pair:
        await pair.cloud.stop()
        order: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "on_link_loss": "draft"}
        order |= {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": PROMPT}]}
        if stream:
            page = Page()
            async with (
                httpx.AsyncClient(timeout=60.0) as client,
                client.stream("POST", f"{pair.url}/v1/{path}", json=order | {"stream": True}) as response,
            ):
                lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
            for line in lines:
                page.show(json.loads(line.removeprefix("data: ")))
            last = json.loads(lines[-1].removeprefix("data: "))
            assert page.unverified == len(page.text) > 0
        else:
            async with httpx.AsyncClient(timeout=60.0) as client:
                last = (await client.post(f"{pair.url}/v1/{path}", json=order)).json()
            choice = last["choices"][0]
            text = choice["text"] if path == "completions" else choice["message"]["content"]
            assert last["unverified"] == len(text) > 0
            assert last["usage"]["completion_tokens"] == 24
        assert last["timings"]["unverified_n"] == 24
        assert last["timings"]["predicted_n"] == 0
        assert last["choices"][0]["finish_reason"] == "length"


async def test_a_stop_string_in_unverified_text_ends_it(target: Target, draft: OnnxDraft) -> None:
    async with both(target, draft) as pair:
        await pair.cloud.stop()
        order = ORDER | {"on_link_loss": "draft", "max_tokens": 40, "temperature": 1, "seed": 3}
        async with httpx.AsyncClient(timeout=60.0) as client:
            text = (await client.post(f"{pair.url}/v1/completions", json=order)).json()["choices"][0]["text"]
            stop = next(text[i : i + 4] for i in range(10, 40) if text.index(text[i : i + 4]) == i)
            answer = (await client.post(f"{pair.url}/v1/completions", json=order | {"stop": stop})).json()
        assert answer["choices"][0] == {
            "text": text[: text.index(stop)],
            "index": 0,
            "logprobs": None,
            "finish_reason": "stop",
        }
        assert answer["unverified"] == text.index(stop)
        assert 0 < answer["timings"]["unverified_n"] < 40


async def test_waiting_says_that_it_waits(target: Target, draft: OnnxDraft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "FIRST_TEXT_SECONDS", 0.3)
    monkeypatch.setattr(sse, "WAITING_SECONDS", 0.3)
    async with both(target, draft) as pair:
        wanted = await target_text(pair)
        await pair.cloud.stop()
        page, comments = Page(), 0
        async for chunk in chunks(pair):
            if isinstance(chunk, str):
                comments += 1
                if comments == 2:
                    await pair.cloud.start()
            else:
                page.show(chunk)
        assert comments >= 2
        assert page.text == wanted
        assert page.most == 0


async def test_failing_is_told_at_once(target: Target, draft: OnnxDraft) -> None:
    async with both(target, draft, deadline=600.0) as pair:
        await pair.cloud.stop()
        started = time.monotonic()
        with pytest.raises(openai.APIStatusError) as caught:
            extra = {"on_link_loss": "fail"}
            await pair.client.completions.create(model="", prompt=PROMPT, extra_body=extra)
        assert (caught.value.status_code, caught.value.code) == (503, "connection_refused")
        assert time.monotonic() - started < 20


async def test_an_answer_that_nobody_awaits_any_more_does_not_wait(target: Target, draft: OnnxDraft) -> None:
    """A client that goes while the link is lost frees its place."""
    async with both(target, draft) as pair:
        await pair.cloud.stop()
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(f"{pair.url}/v1/completions", json=ORDER, timeout=0.5)
        await until(lambda: not pair.service.queue.running)
