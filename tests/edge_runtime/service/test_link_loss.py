"""What clients see when the link to the verifier is lost and comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.decoding import offline
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service import routes, sse
from tests.edge_runtime.service.conftest import ServicePair, service_pair, wait_until

PROMPT = "def read_config(path):\n"
BODY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}


async def generate_target_text(pair: ServicePair) -> str:
    extra = {"ignore_eos": True, "speculation": False}
    answer = await pair.client.completions.create(
        model="", prompt=PROMPT, max_tokens=200, temperature=0, extra_body=extra
    )
    return answer.choices[0].text


async def stream_chunks(
    pair: ServicePair, path: str = "completions", **changes: Any
) -> AsyncIterator[dict[str, Any] | str]:
    """Yield the chunks of a stream as objects and its comments as text."""
    async with (
        httpx.AsyncClient(timeout=300.0) as client,
        client.stream("POST", f"{pair.url}/v1/{path}", json=BODY | {"stream": True} | changes) as response,
    ):
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))
            elif line.startswith(":"):
                yield line


class StreamedText:
    """Applies the chunks of a stream as the documentation of the API describes."""

    def __init__(self) -> None:
        self.text = ""
        self.unverified = 0
        self.max_unverified = 0
        self.withdrawn = 0

    def apply(self, chunk: dict[str, Any]) -> None:
        withdrawn = chunk.get("withdrawn", 0)
        assert withdrawn <= self.unverified
        self.withdrawn += withdrawn
        choice = chunk["choices"][0]
        piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
        self.text = self.text[: len(self.text) - withdrawn] + piece
        if "timings" not in chunk:
            self.unverified = chunk.get("unverified", 0)
            self.max_unverified = max(self.max_unverified, self.unverified)
        assert self.unverified <= len(self.text)

    @property
    def verified(self) -> str:
        return self.text[: len(self.text) - self.unverified]


@pytest.mark.slow
async def test_unverified_text_is_marked_and_corrected(
    target: Target, draft: OnnxDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "OFFLINE_PAUSE_SECONDS", 0.1)
    async with service_pair(target, draft) as pair:
        wanted = await generate_target_text(pair)
        shown, steps = StreamedText(), iter([pair.verifier.stop, pair.verifier.start])
        step, tokens = next(steps), ""
        async for chunk in stream_chunks(pair, on_link_loss="draft", logprobs=1):
            assert isinstance(chunk, dict)
            shown.apply(chunk)
            assert wanted.startswith(shown.verified)
            # Tokens have log-probabilities once they are verified, also if their text was shown before.
            if logprobs := chunk["choices"][0]["logprobs"]:
                assert logprobs["text_offset"][:1] in ([], [len(tokens)])
                tokens += "".join(logprobs["tokens"])
            assert tokens == shown.verified
            if step and (shown.unverified >= 60 if step == pair.verifier.start else len(shown.text) >= 60):
                await step()
                step = next(steps, None)
        assert step is None
        assert shown.text == wanted
        assert shown.max_unverified >= 60
        assert shown.unverified == 0
        assert chunk["timings"]["unverified_n"] == 0
        assert tokens == wanted
        assert (chunk["timings"]["withdrawn_n"] > 0) == (shown.withdrawn > 0)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_an_answer_completed_without_a_verifier_is_marked_unverified(
    target: Target, draft: OnnxDraft, path: str, stream: bool
) -> None:
    async with service_pair(target, draft) as pair:
        await pair.verifier.stop()
        body: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "on_link_loss": "draft"}
        body |= {"prompt": PROMPT} if path == "completions" else {"messages": [{"role": "user", "content": PROMPT}]}
        if stream:
            shown = StreamedText()
            async with (
                httpx.AsyncClient(timeout=300.0) as client,
                client.stream("POST", f"{pair.url}/v1/{path}", json=body | {"stream": True}) as response,
            ):
                lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
            for line in lines:
                shown.apply(json.loads(line.removeprefix("data: ")))
            last = json.loads(lines[-1].removeprefix("data: "))
            assert shown.unverified == len(shown.text) > 0
        else:
            async with httpx.AsyncClient(timeout=300.0) as client:
                last = (await client.post(f"{pair.url}/v1/{path}", json=body)).json()
            choice = last["choices"][0]
            text = choice["text"] if path == "completions" else choice["message"]["content"]
            assert last["unverified"] == len(text) > 0
            assert last["usage"]["completion_tokens"] == 24
        assert last["timings"]["unverified_n"] == 24
        assert last["timings"]["predicted_n"] == 0
        assert last["choices"][0]["finish_reason"] == "length"


@pytest.mark.slow
async def test_each_of_several_choices_says_how_much_of_it_is_unverified(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair:
        await pair.verifier.stop()
        body = BODY | {"on_link_loss": "draft", "max_tokens": 8, "temperature": 1, "seed": 3, "n": 2}
        async with httpx.AsyncClient(timeout=300.0) as client:
            answer = (await client.post(f"{pair.url}/v1/completions", json=body)).json()
        sizes = [len(choice["text"]) for choice in answer["choices"]]
        assert [choice["unverified"] for choice in answer["choices"]] == sizes
        assert answer["unverified"] == sum(sizes) > 0


@pytest.mark.slow
async def test_a_stop_string_in_unverified_text_ends_the_answer(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair:
        await pair.verifier.stop()
        body = BODY | {"on_link_loss": "draft", "max_tokens": 40, "temperature": 1, "seed": 3}
        async with httpx.AsyncClient(timeout=300.0) as client:
            text = (await client.post(f"{pair.url}/v1/completions", json=body)).json()["choices"][0]["text"]
            stop = next(text[i : i + 4] for i in range(4, len(text) - 8) if text.index(text[i : i + 4]) == i)
            answer = (await client.post(f"{pair.url}/v1/completions", json=body | {"stop": stop})).json()
        assert answer["choices"][0] == {
            "text": text[: text.index(stop)],
            "index": 0,
            "logprobs": None,
            "finish_reason": "stop",
        }
        assert answer["unverified"] == text.index(stop)
        assert 0 < answer["timings"]["unverified_n"] < 40


@pytest.mark.slow
async def test_a_waiting_stream_sends_comments(
    target: Target, draft: OnnxDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "FIRST_TEXT_SECONDS", 0.3)
    monkeypatch.setattr(sse, "WAITING_SECONDS", 0.3)
    async with service_pair(target, draft) as pair:
        wanted = await generate_target_text(pair)
        await pair.verifier.stop()
        shown, comments = StreamedText(), 0
        async for chunk in stream_chunks(pair):
            if isinstance(chunk, str):
                comments += 1
                if comments == 2:
                    await pair.verifier.start()
            else:
                shown.apply(chunk)
        assert comments >= 2
        assert shown.text == wanted
        assert shown.max_unverified == 0


async def test_fail_on_link_loss_does_not_wait_for_the_deadline(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft, deadline=3600.0) as pair:
        await pair.verifier.stop()
        # The limit is far below the deadline.
        with pytest.raises(openai.APIStatusError) as caught:
            extra = {"on_link_loss": "fail"}
            async with asyncio.timeout(300):
                await pair.client.completions.create(model="", prompt=PROMPT, extra_body=extra)
        assert (caught.value.status_code, caught.value.code) == (503, "connection_refused")


@pytest.mark.slow
async def test_a_disconnected_client_frees_its_slot_while_the_link_is_lost(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair:
        await pair.verifier.stop()
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(f"{pair.url}/v1/completions", json=BODY, timeout=0.5)
        await wait_until(lambda: not pair.service.queue.running)
