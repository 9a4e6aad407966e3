"""`GET /events` of a running service: complete, resumable, protected by keys, and ended with the service."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import httpx
import openai
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.decoding import offline
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.service.auth import AccessRules
from edge_runtime.service.monitoring.dashboard_state import DashboardState
from edge_runtime.service.monitoring.events import (
    AnswerFinished,
    AnswerStarted,
    BoardInfo,
    GaugeSample,
    PlanChosen,
    RoundFinished,
    TokensAdded,
)
from edge_runtime.service.state import ServiceLimits
from tests.edge_runtime.service.conftest import board_process, service_pair
from tests.edge_runtime.service.monitoring.event_stream import (
    collect_events,
    open_stream,
    parse_events,
    read_history,
    read_until,
)

PROMPT = "def read_config(path):\n"
REQUEST = {"model": "", "prompt": PROMPT, "temperature": 0.7, "seed": 5, "extra_body": {"ignore_eos": True}}


@pytest.mark.slow
def test_an_answer_is_reported_from_start_to_end(url: str, client: openai.OpenAI) -> None:
    with open_stream(url) as stream:
        first = next(stream)
        assert isinstance(first.event, BoardInfo)
        assert (first.id, first.event.ready, first.event.privacy) == ("", True, "loopback")
        history = read_history(stream)
        answer = client.completions.create(**REQUEST, max_tokens=32)
        received = read_until(stream, AnswerFinished)
    numbers = [int(item.id.removeprefix(first.event.feed + "-")) for item in history + received]
    assert numbers == sorted(set(numbers))
    started = [item.event for item in received if isinstance(item.event, AnswerStarted)][-1]
    assert (started.prompt, started.temperature, started.seed, started.speculation) == (PROMPT, 0.7, 5, True)
    events = [item.event for item in received if getattr(item.event, "answer", 0) == started.answer]
    texts = [text for event in events if isinstance(event, TokensAdded) for text in event.accepted + event.own]
    assert "".join(texts) == answer.choices[0].text
    rounds = [event for event in events if isinstance(event, RoundFinished)]
    assert len([event for event in events if isinstance(event, PlanChosen)]) >= len(rounds) == answer.timings["rounds"]
    assert {event.reason for event in events if isinstance(event, PlanChosen)} == {"fixed"}
    assert sum(event.accepted for event in rounds) == answer.timings["draft_n_accepted"]
    assert sum(event.accepted + event.own for event in rounds) >= len(texts) == 32
    assert all(event.sent > 10 and event.received > 10 and event.verifier_seconds > 0 for event in rounds)
    finished = events[-1]
    assert isinstance(finished, AnswerFinished)
    assert (finished.outcome, finished.tokens, finished.rounds) == ("length", 32, len(rounds))
    assert finished.drafted == answer.timings["draft_n"]


@pytest.mark.slow
def test_corrected_tokens_follow_rejected_drafts(url: str, client: openai.OpenAI) -> None:
    with open_stream(url) as stream:
        read_history(stream)
        client.completions.create(**REQUEST | {"temperature": 1.0}, max_tokens=32)
        events = [item.event for item in read_until(stream, AnswerFinished)]
    kinds: list[str] = []
    accepted = 0
    for event in events:
        if isinstance(event, AnswerStarted):
            kinds, accepted = [], 0
        if isinstance(event, TokensAdded):
            kinds += ["accepted"] * len(event.accepted) + ["own"] * len(event.own)
            accepted += len(event.accepted)
        if isinstance(event, RoundFinished):
            assert (event.corrected is not None) == (event.accepted < event.drafted)
            if event.corrected is not None:
                # The last round may have more tokens than the limit of the answer lets in.
                assert event.corrected == len(kinds) - min(event.own, len(kinds) - event.corrected)
                assert kinds[event.corrected] == "own"
    assert 0 < accepted < len(kinds) == 32


@pytest.mark.slow
def test_late_subscribers_get_the_history_and_returning_ones_resume(url: str, client: openai.OpenAI) -> None:
    with open_stream(url) as stream:
        read_history(stream)
        client.completions.create(**REQUEST, max_tokens=8)
        received = read_until(stream, AnswerFinished)
    with open_stream(url) as stream:
        next(stream)
        history = read_history(stream)
    by_id = {item.id: item for item in history}
    assert all(by_id[item.id] == item for item in received)
    middle = received[len(received) // 2].id
    with open_stream(url, {"last-event-id": middle}) as stream:
        assert isinstance(next(stream).event, BoardInfo)
        resumed = read_until(stream, AnswerFinished)
    assert resumed == received[len(received) // 2 + 1 :][: len(resumed)]
    # An id of another log, from before a restart, is ignored.
    with open_stream(url, {"last-event-id": "feedbeef-999999"}) as stream:
        assert [next(stream).id for _ in range(3)][1:] == [history[0].id, history[1].id]


@pytest.mark.slow
def test_without_speculation_all_tokens_are_the_targets_own(url: str, client: openai.OpenAI) -> None:
    with open_stream(url) as stream:
        read_history(stream)
        client.completions.create(**REQUEST | {"extra_body": {"speculation": False}}, max_tokens=6)
        events = [item.event for item in read_until(stream, AnswerFinished)]
    started = max(index for index, event in enumerate(events) if isinstance(event, AnswerStarted))
    plan = next(event for event in events[started:] if isinstance(event, PlanChosen))
    assert (plan.draft, plan.own, plan.reason) == (0, 6, "the request switched speculation off")
    tokens = [event for event in events[started:] if isinstance(event, TokensAdded)]
    assert sum(len(event.own) for event in tokens) == 6
    assert not any(event.accepted for event in tokens)


@pytest.mark.slow
def test_events_require_a_key(verifier: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n")
    options = ("--api-key-file", str(tmp_path / "keys"), "--policy", "fixed", "--threads", "1")
    with board_process(verifier, *options) as (_, url):
        for headers in ({}, {"authorization": "Bearer wrong"}):
            refused = httpx.get(f"{url}/events", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        # The page itself contains no data.
        assert httpx.get(f"{url}/").status_code == 200
        with open_stream(url, {"authorization": "Bearer first-key"}) as stream:
            assert isinstance(next(stream).event, BoardInfo)


@pytest.mark.slow
async def test_a_link_fault_is_reported_until_the_verifier_is_back(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft, deadline=0.3) as pair:
        await pair.verifier.stop()
        with contextlib.suppress(openai.APIStatusError):
            await pair.client.completions.create(**REQUEST, max_tokens=2)
        metrics = pair.service.metrics.render().decode()
        assert 'flexspec_link_faults_total{fault="connection_refused"} 1.0' in metrics
        async with httpx.AsyncClient() as client:
            received = await collect_events(client, pair.url, AnswerFinished, GaugeSample)
            finished = next(item.event for item in received if isinstance(item.event, AnswerFinished))
            assert finished.outcome == "connection_refused"
            assert pair.verifier.url in finished.message
            assert pair.verifier.url in received[-1].event.fault
            await pair.verifier.start()
            pair.service.client.deadline = 300.0
            await pair.client.completions.create(**REQUEST, max_tokens=2)
            assert pair.service.monitoring.sampler.sample().fault == ""


@pytest.mark.slow
async def test_unverified_tokens_are_reported_and_corrected(
    target: Target, draft: OnnxDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "LINK_LOSS_SECONDS", 0.1)
    # The toy draft would otherwise have drafted the whole text before the verifier is back.
    monkeypatch.setattr(offline, "OFFLINE_PAUSE_SECONDS", 0.1)
    body = {"prompt": PROMPT, "max_tokens": 120, "temperature": 0, "ignore_eos": True, "stream": True}
    async with service_pair(target, draft) as pair, httpx.AsyncClient(timeout=300.0) as client:
        text, stopped, restarted = "", False, False
        async with client.stream(
            "POST", f"{pair.url}/v1/completions", json=body | {"on_link_loss": "draft"}
        ) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                text = text[: len(text) - chunk.get("withdrawn", 0)] + chunk["choices"][0]["text"]
                if not stopped and len(text) > 40:
                    stopped = True
                    await pair.verifier.stop()
                elif not restarted and chunk.get("unverified"):
                    restarted = True
                    await pair.verifier.start()
        dashboard, unverified_counts, verified = DashboardState(), [], ""
        for item in await collect_events(client, pair.url, AnswerFinished):
            dashboard.apply(item.event)
            if isinstance(item.event, TokensAdded):
                unverified_counts.append(len(item.event.unverified))
                verified += "".join(item.event.accepted + item.event.own)
        metrics = pair.service.metrics.render().decode()
    withdrawn = sum(kind == "withdrawn" for kind, _ in dashboard.tokens)
    assert f"flexspec_withdrawn_tokens_total {withdrawn:.1f}\n" in metrics
    assert max(unverified_counts) > unverified_counts[-1] == 0
    assert verified == text
    shown = "".join(token for kind, token in dashboard.tokens if kind in ("accepted", "own", "corrected"))
    assert shown == text


async def test_streams_end_with_the_service(target: Target, draft: OnnxDraft) -> None:
    async with (
        service_pair(target, draft) as pair,
        httpx.AsyncClient() as client,
        client.stream("GET", f"{pair.url}/events") as response,
    ):
        pieces = response.aiter_text()
        await anext(pieces)
        await pair.service.drain(0.0)
        async with asyncio.timeout(300):
            async for _ in pieces:
                pass


async def test_subscribers_must_authenticate_again_after_reconfiguration(target: Target, draft: OnnxDraft) -> None:
    async with service_pair(target, draft) as pair, httpx.AsyncClient() as client:
        async with client.stream("GET", f"{pair.url}/events") as response:
            pieces = response.aiter_text()
            await anext(pieces)
            board = pair.service.state.board
            assert board is not None
            pair.service.reconfigure(ServiceLimits(max_new_tokens=9), AccessRules(frozenset({"other"})), board)
            async with asyncio.timeout(300):
                async for _ in pieces:
                    pass
        assert (await client.get(f"{pair.url}/events")).status_code == 401
        headers = {"authorization": "Bearer other"}
        async with client.stream("GET", f"{pair.url}/events", headers=headers) as response:
            (first,) = parse_events((await anext(response.aiter_text())).partition("\n\n")[0] + "\n\n")
            assert first.event.max_new_tokens == 9
