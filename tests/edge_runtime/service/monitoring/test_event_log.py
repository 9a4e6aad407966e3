"""What the board tells those who watch it: all of it, to those who may hear it, and nothing that piles up."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import msgspec
import openai
import pytest

from cloud_verifier.model.target import Target
from edge_runtime.common import http_server
from edge_runtime.decoding import offline
from edge_runtime.decoding.generation import VerifiedTokens
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.planning.board_profile import find_profile
from edge_runtime.planning.plan import Surroundings
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.service.admission import AdmissionQueue
from edge_runtime.service.answer import Answer, AnswerRequest
from edge_runtime.service.errors import ApiError
from edge_runtime.service.monitoring import event_log as feeding
from edge_runtime.service.monitoring.dashboard_state import DashboardState
from edge_runtime.service.monitoring.event_log import EventLog
from edge_runtime.service.monitoring.events import (
    AnswerFinished,
    AnswerStarted,
    AnyEvent,
    BoardInfo,
    Event,
    GaugeSample,
    PlanChosen,
    RoundFinished,
    TokensAdded,
)
from edge_runtime.service.monitoring.gauges import GaugeSampler, classify_privacy
from edge_runtime.service.monitoring.prometheus import ServiceMetrics
from edge_runtime.service.monitoring.reporter import AnswerReporter, ServiceTotals
from edge_runtime.service.sse import EventStream
from edge_runtime.service.state import ServiceLimits
from edge_runtime.verifier.client import VerifierClient
from tests.edge_runtime.service.conftest import board_process, both

PROMPT = "def read_config(path):\n"
ORDER = {"model": "", "prompt": PROMPT, "temperature": 0.7, "seed": 5, "extra_body": {"ignore_eos": True}}


class Line(msgspec.Struct):
    """One event as it came."""

    id: str
    news: Event


def parsed(text: str) -> Iterator[Line]:
    """The events of a stream, strictly."""
    *blocks, rest = text.split("\n\n")
    assert rest == ""
    for block in blocks:
        if block.startswith(": "):
            continue
        *named, data = block.split("\n")
        assert len(named) <= 1
        name = named[0].removeprefix("id: ") if named else ""
        yield Line(name, msgspec.json.decode(data.removeprefix("data: "), type=AnyEvent))


@contextlib.contextmanager
def watching(url: str, headers: dict[str, str] | None = None) -> Iterator[Iterator[Line]]:
    """The stream of a board."""

    def lines(response: httpx.Response) -> Iterator[Line]:
        rest = ""
        for piece in response.iter_text():
            *blocks, rest = (rest + piece).split("\n\n")
            for block in blocks:
                yield from parsed(block + "\n\n")

    with httpx.stream("GET", f"{url}/events", headers=headers, timeout=20) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield lines(response)


def until(lines: Iterator[Line], kind: type[Event]) -> list[Line]:
    """All lines up to the first of this kind."""
    heard = []
    for line in lines:
        heard.append(line)
        if isinstance(line.news, kind):
            return heard
    raise AssertionError(f"the stream ended without {kind.__name__}")


def until_now(lines: Iterator[Line]) -> list[Line]:
    """All lines of the history."""
    now, heard = time.time(), []
    while not heard or heard[-1].news.at < now:
        heard += until(lines, GaugeSample)
    return heard


def test_an_answer_from_its_prompt_to_its_end(url: str, client: openai.OpenAI) -> None:
    with watching(url) as lines:
        first = next(lines)
        assert isinstance(first.news, BoardInfo)
        assert (first.id, first.news.ready, first.news.privacy) == ("", True, "loopback")
        before = until_now(lines)
        answer = client.completions.create(**ORDER, max_tokens=32)
        heard = until(lines, AnswerFinished)
    numbers = [int(line.id.removeprefix(first.news.feed + "-")) for line in before + heard]
    assert numbers == sorted(set(numbers))
    begun = [line.news for line in heard if isinstance(line.news, AnswerStarted)][-1]
    assert (begun.prompt, begun.temperature, begun.seed, begun.speculation) == (PROMPT, 0.7, 5, True)
    about = [line.news for line in heard if getattr(line.news, "answer", 0) == begun.answer]
    texts = [text for news in about if isinstance(news, TokensAdded) for text in news.accepted + news.own]
    assert "".join(texts) == answer.choices[0].text
    rounds = [news for news in about if isinstance(news, RoundFinished)]
    assert len([news for news in about if isinstance(news, PlanChosen)]) >= len(rounds) == answer.timings["rounds"]
    assert {news.reason for news in about if isinstance(news, PlanChosen)} == {"fixed"}
    assert sum(news.accepted for news in rounds) == answer.timings["draft_n_accepted"]
    assert sum(news.accepted + news.own for news in rounds) >= len(texts) == 32
    assert all(news.sent > 10 and news.received > 10 and news.verifier_seconds > 0 for news in rounds)
    ended = about[-1]
    assert isinstance(ended, AnswerFinished)
    assert (ended.outcome, ended.tokens, ended.rounds) == ("length", 32, len(rounds))
    assert ended.drafted == answer.timings["draft_n"]


def test_each_token_is_of_the_kind_that_its_round_says(url: str, client: openai.OpenAI) -> None:
    with watching(url) as lines:
        until_now(lines)
        client.completions.create(**ORDER | {"temperature": 1.0}, max_tokens=32)
        heard = [line.news for line in until(lines, AnswerFinished)]
    kinds: list[str] = []
    accepted = 0
    for news in heard:
        if isinstance(news, AnswerStarted):
            kinds, accepted = [], 0
        if isinstance(news, TokensAdded):
            kinds += ["accepted"] * len(news.accepted) + ["own"] * len(news.own)
            accepted += len(news.accepted)
        if isinstance(news, RoundFinished):
            assert (news.corrected is not None) == (news.accepted < news.drafted)
            if news.corrected is not None:
                # The last round may say more than the answer's limit lets in.
                assert news.corrected == len(kinds) - min(news.own, len(kinds) - news.corrected)
                assert kinds[news.corrected] == "own"
    assert 0 < accepted < len(kinds) == 32


def test_who_comes_late_hears_the_last_minutes_and_who_comes_back_goes_on(url: str, client: openai.OpenAI) -> None:
    with watching(url) as lines:
        until_now(lines)
        client.completions.create(**ORDER, max_tokens=8)
        heard = until(lines, AnswerFinished)
    with watching(url) as lines:
        next(lines)
        late = until_now(lines)
    known = {line.id: line for line in late}
    assert all(known[line.id] == line for line in heard)
    middle = heard[len(heard) // 2].id
    with watching(url, {"last-event-id": middle}) as lines:
        assert isinstance(next(lines).news, BoardInfo)
        after = until(lines, AnswerFinished)
    assert after == heard[len(heard) // 2 + 1 :][: len(after)]
    # The feed of another life of the service is another.
    with watching(url, {"last-event-id": "feedbeef-999999"}) as lines:
        assert [next(lines).id for _ in range(3)][1:] == [late[0].id, late[1].id]


def test_without_a_draft_the_tokens_are_the_targets_own(url: str, client: openai.OpenAI) -> None:
    with watching(url) as lines:
        until_now(lines)
        client.completions.create(**ORDER | {"extra_body": {"speculation": False}}, max_tokens=6)
        heard = [line.news for line in until(lines, AnswerFinished)]
    begun = max(index for index, news in enumerate(heard) if isinstance(news, AnswerStarted))
    plan = next(news for news in heard[begun:] if isinstance(news, PlanChosen))
    assert (plan.draft, plan.own, plan.reason) == (0, 6, "the request switched speculation off")
    tokens = [news for news in heard[begun:] if isinstance(news, TokensAdded)]
    assert sum(len(news.own) for news in tokens) == 6
    assert not any(news.accepted for news in tokens)


def test_prompts_and_answers_are_for_those_with_a_key(verifier: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n")
    options = ("--api-key-file", str(tmp_path / "keys"), "--policy", "fixed", "--threads", "1")
    with board_process(verifier, *options) as (_, url):
        for headers in ({}, {"authorization": "Bearer wrong"}):
            refused = httpx.get(f"{url}/events", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        # The page itself knows nothing.
        assert httpx.get(f"{url}/").status_code == 200
        with watching(url, {"authorization": "Bearer first-key"}) as lines:
            assert isinstance(next(lines).news, BoardInfo)


async def test_a_verifier_that_is_gone_is_told_until_it_is_back(target: Target, draft: OnnxDraft) -> None:
    async with both(target, draft, deadline=0.3) as pair:
        await pair.cloud.stop()
        with contextlib.suppress(openai.APIStatusError):
            await pair.client.completions.create(**ORDER, max_tokens=2)
        gauges = pair.service.metrics.render().decode()
        assert 'flexspec_link_faults_total{fault="connection_refused"} 1.0' in gauges
        async with httpx.AsyncClient() as client:
            heard = await some(client, pair.url, AnswerFinished, GaugeSample)
            ended = next(line.news for line in heard if isinstance(line.news, AnswerFinished))
            assert ended.outcome == "connection_refused"
            assert heard[-1].news.fault == ended.message != ""
            await pair.cloud.start()
            for _ in range(20):
                with contextlib.suppress(openai.APIStatusError):
                    await pair.client.completions.create(**ORDER, max_tokens=2)
                    break
            assert pair.service.monitoring.sampler.sample().fault == ""


async def test_what_the_draft_says_alone_is_told_as_such_and_comes_out_right(
    target: Target, draft: OnnxDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "OFFLINE_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(http_server, "GRACE_SECONDS", 0.2)
    body = {"prompt": PROMPT, "max_tokens": 120, "temperature": 0, "ignore_eos": True, "stream": True}
    async with both(target, draft) as pair, httpx.AsyncClient(timeout=60.0) as client:
        text, stopped, started = "", False, False
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
                    await pair.cloud.stop()
                elif not started and chunk.get("unverified"):
                    started = True
                    await pair.cloud.start()
        onlooker, tails, verified = DashboardState(), [], ""
        for line in await some(client, pair.url, AnswerFinished):
            onlooker.apply(line.news)
            if isinstance(line.news, TokensAdded):
                tails.append(len(line.news.unverified))
                verified += "".join(line.news.accepted + line.news.own)
        page = pair.service.metrics.render().decode()
    withdrawn = sum(kind == "withdrawn" for kind, _ in onlooker.tokens)
    assert f"flexspec_withdrawn_tokens_total {withdrawn:.1f}\n" in page
    assert max(tails) > tails[-1] == 0
    assert verified == text
    # Some characters stand over two tokens, and are whole only in the text.
    shown = "".join(token for kind, token in onlooker.tokens if kind in ("accepted", "own", "corrected"))
    assert shown == text


async def some(client: httpx.AsyncClient, url: str, *kinds: type[Event]) -> list[Line]:
    """The events up to one of each of `kinds`, in this order."""
    text, wanted = "", list(kinds)
    async with client.stream("GET", f"{url}/events") as response:
        async for piece in response.aiter_text():
            text += piece
            heard, wanted = list(parsed(text[: text.rfind("\n\n") + 2])), list(kinds)
            for index, line in enumerate(heard):
                if isinstance(line.news, wanted[0]):
                    wanted.pop(0)
                if not wanted:
                    return heard[: index + 1]
    raise AssertionError("the stream ended")


async def test_watchers_end_with_the_service(target: Target, draft: OnnxDraft) -> None:
    async with (
        both(target, draft) as pair,
        httpx.AsyncClient() as client,
        client.stream("GET", f"{pair.url}/events") as response,
    ):
        pieces = response.aiter_text()
        await anext(pieces)
        await pair.service.drain(0.0)
        async with asyncio.timeout(5):
            async for _ in pieces:
                pass


# The ring


def moment(number: int) -> PlanChosen:
    return PlanChosen(at=float(number), answer=number, draft=0, own=1, reason="")


def stream(feed: EventLog, after: str = "") -> tuple[AsyncIterator[bytes], asyncio.Future[None]]:
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    return feed.stream(moment(0), after, gone), gone


async def test_nothing_is_worked_out_before_somebody_asks_and_then_once() -> None:
    feed, made = EventLog(), []
    for number in (1, 2):
        feed.append(lambda number=number: made.append(number) or moment(number))
    assert made == []
    for _ in range(2):
        watcher, _ = stream(feed)
        await anext(watcher)
        assert [line.news.answer for line in parsed((await anext(watcher)).decode())] == [1, 2]
        await watcher.aclose()
    assert made == [1, 2]


async def test_the_history_is_bounded_and_who_falls_behind_it_is_dropped() -> None:
    feed = EventLog()
    watcher, _ = stream(feed)
    await anext(watcher)
    feed.append(lambda: moment(1))
    await anext(watcher)
    for number in range(2, feeding.MAX_EVENTS + 10):
        feed.append(lambda number=number: moment(number))
    with pytest.raises(StopAsyncIteration):
        while True:
            await anext(watcher)
    late, _ = stream(feed)
    await anext(late)
    heard = []
    while len(heard) < feeding.MAX_EVENTS:
        heard += parsed((await anext(late)).decode())
    assert [line.news.answer for line in heard] == list(range(10, feeding.MAX_EVENTS + 10))
    # Gauges have a ring of their own, that moments do not push out.
    assert len(feed._events) == feeding.MAX_EVENTS
    await late.aclose()


async def test_a_watcher_that_goes_leaves_nothing_behind_and_there_are_not_too_many() -> None:
    feed = EventLog()
    watchers = [stream(feed) for _ in range(feeding.MAX_SUBSCRIBERS)]
    for watcher, _ in watchers:
        feed.check_capacity()
        await anext(watcher)
    with pytest.raises(ApiError, match="already watch this board") as refused:
        feed.check_capacity()
    assert (refused.value.status, refused.value.retry_after) == (429, feeding.RETRY_SECONDS)
    ending = [asyncio.create_task(anext(watcher, b"end")) for watcher, _ in watchers]
    await asyncio.sleep(0)
    for _, gone in watchers:
        gone.set_result(None)
    assert await asyncio.gather(*ending) == [b"end"] * len(watchers)
    feed.check_capacity()
    assert not feed._subscribers


async def test_with_other_keys_who_watches_must_show_one_again(target: Target, draft: OnnxDraft) -> None:
    async with both(target, draft) as pair, httpx.AsyncClient() as client:
        async with client.stream("GET", f"{pair.url}/events") as response:
            pieces = response.aiter_text()
            await anext(pieces)
            board = pair.service.state.board
            assert board is not None
            pair.service.reconfigure(ServiceLimits(max_new_tokens=9), frozenset({"other"}), board)
            async with asyncio.timeout(5):
                async for _ in pieces:
                    pass
        assert (await client.get(f"{pair.url}/events")).status_code == 401
        headers = {"authorization": "Bearer other"}
        async with client.stream("GET", f"{pair.url}/events", headers=headers) as response:
            (greeting,) = parsed((await anext(response.aiter_text())).partition("\n\n")[0] + "\n\n")
            assert greeting.news.max_new_tokens == 9


async def test_who_takes_nothing_is_dropped() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"data: {}\n\n"

    async def stalled(message: dict[str, object]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    gone = asyncio.create_task(asyncio.sleep(60))
    async with asyncio.timeout(5):
        await EventStream(endless(), gone, 0.05)({}, None, stalled)  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert gone.cancelled()


async def test_silence_is_broken_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "KEEPALIVE_SECONDS", 0.01)
    watcher, _ = stream(EventLog())
    await anext(watcher)
    assert await anext(watcher) == b": still here\n\n"


# Reports


def reporter(draft: OnnxDraft, totals: ServiceTotals | None = None) -> tuple[EventLog, AnswerReporter]:
    feed = EventLog()
    order = AnswerRequest(
        prompt=draft.tokenizer.encode(PROMPT).ids, sampling=Sampling(), max_new_tokens=8, stop_strings=[]
    )
    telling = AnswerReporter(feed, totals or ServiceTotals(), Answer(order, draft.tokenizer), draft.tokenizer)
    telling.report_start()
    return feed, telling


def told(feed: EventLog, kind: type[Event]) -> list[Event]:
    """What was added, in JSON and back."""
    lines = [line.news for kept in feed._events for line in parsed(kept.encode("x").decode())]
    return [news for news in lines if isinstance(news, kind)]


async def test_unverified_tokens_are_shown_and_withdrawn(draft: OnnxDraft) -> None:
    def ids(text: str) -> list[int]:
        found: list[int] = draft.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    a, b, c, d = ids("\n")[:1], ids("    return")[:1], ids(" config")[:1], ids(" path")[:1]
    feed, telling = reporter(draft)
    telling.report_tokens(VerifiedTokens(a, [], []))
    telling.report_tokens(VerifiedTokens([], [], b))
    telling.report_tokens(VerifiedTokens([], [], b + c))
    # The verifier is back: it agrees to the first, says another second, and the draft has gone on behind that.
    telling.report_tokens(VerifiedTokens(b, d, c))
    telling.report_tokens(VerifiedTokens([], [], []))
    text = {id_: draft.tokenizer.decode([id_]) for (id_,) in (a, b, c, d)}
    first, second, third, fourth, fifth = told(feed, TokensAdded)
    assert (first.accepted, second.unverified, third.unverified) == (
        [text[a[0]]],
        [text[b[0]]],
        [text[b[0]], text[c[0]]],
    )
    assert second.withdrawn == third.withdrawn == []
    assert (fourth.accepted, fourth.own) == ([text[b[0]]], [text[d[0]]])
    assert (fourth.withdrawn, fourth.unverified) == ([text[c[0]]], [text[c[0]]])
    assert (fifth.withdrawn, fifth.unverified) == ([text[c[0]]], [])


async def test_what_is_kept_keeps_no_answer(draft: OnnxDraft) -> None:
    """Nobody has asked yet what happened, and the answer is gone with all that it was made with."""
    feed, telling = reporter(draft)
    telling.report_tokens(VerifiedTokens([1], [2], [3]))
    telling.report_end("stop")
    answer = weakref.ref(telling._answer)
    del telling
    gc.collect()
    assert answer() is None
    assert len(told(feed, TokensAdded)) == len(told(feed, AnswerStarted)) == len(told(feed, AnswerFinished)) == 1


async def test_characters_that_span_tokens_come_whole(draft: OnnxDraft) -> None:
    word = "naïve größe 字 🦊"
    ids = draft.tokenizer.encode(word, add_special_tokens=False).ids
    feed, telling = reporter(draft)
    for id_ in ids:
        telling.report_tokens(VerifiedTokens([id_], [], []))
    assert "".join(text for news in told(feed, TokensAdded) for text in news.accepted) == draft.tokenizer.decode(ids)


async def test_a_long_prompt_is_told_by_its_end(draft: OnnxDraft) -> None:
    feed = EventLog()
    order = AnswerRequest(
        prompt=draft.tokenizer.encode("import os\n" * 400).ids, sampling=Sampling(), max_new_tokens=8, stop_strings=[]
    )
    telling = AnswerReporter(feed, ServiceTotals(), Answer(order, draft.tokenizer), draft.tokenizer)
    telling.report_end("cancelled")
    assert not feed._events, "it never began"
    telling.report_start()
    (begun,) = told(feed, AnswerStarted)
    assert begun.prompt_tokens == len(order.prompt) > 500
    assert begun.prompt.startswith("… ")
    assert begun.prompt.endswith("import os\n")
    assert len(begun.prompt) < 3000


# Gauges


async def gauges(
    known: Surroundings | None, profile: str = "", draft_seconds: float = 0.0
) -> tuple[GaugeSample, GaugeSampler]:
    async with VerifierClient("https://verifier.example") as client:
        totals = ServiceTotals()
        pulse = GaugeSampler(EventLog(), totals, AdmissionQueue(1, 1), client)
        pulse.surroundings = None if known is None else lambda: known
        pulse.power = find_profile(profile).power if profile else None
        pulse.sample()
        pulse._last_sample -= 2.0
        totals.draft_seconds += draft_seconds
        return pulse.sample(), pulse


async def test_sensors_that_a_board_lacks_are_absent_and_not_zero() -> None:
    for known in (None, Surroundings()):
        taken, pulse = await gauges(known)
        assert pulse.joules == {}
        raw = json.loads(msgspec.json.encode(taken))
        absent = {
            "joules",
            "watts",
            "energy",
            "battery_joules",
            "battery_percent",
            "celsius",
            "throttled",
            "rtt_seconds",
        }
        assert not raw.keys() & absent
        assert raw["privacy"] == "tls"


async def test_joules_are_the_sensors_or_else_modelled() -> None:
    taken, pulse = await gauges(Surroundings(watts=7.0, battery_percent=63.0), "raspberry-pi-5")
    assert (taken.watts, taken.energy, taken.battery_percent) == (7.0, "sensor", 63.0)
    assert taken.joules == pytest.approx(14.0, rel=0.1)
    assert set(pulse.joules) == {"sensor"}
    power = find_profile("raspberry-pi-5").power
    assert power is not None
    idle, _ = await gauges(Surroundings(), "raspberry-pi-5")
    half, pulse = await gauges(Surroundings(), "raspberry-pi-5", draft_seconds=1.0)
    busy, _ = await gauges(Surroundings(), "raspberry-pi-5", draft_seconds=50.0)
    async with VerifierClient("http://127.0.0.1:1") as client:
        page = ServiceMetrics(AdmissionQueue(1, 1), client, pulse).render().decode()
    assert f'flexspec_board_energy_joules_total{{source="profile"}} {pulse.joules["profile"]!r}\n' in page
    assert "flexspec_board_power_watts" not in page, "that is for sensors"
    assert (idle.watts, busy.watts) == (power.idle_watts, power.busy_watts)
    assert half.watts == pytest.approx((power.idle_watts + power.busy_watts) / 2, rel=0.05)
    assert (half.energy, set(pulse.joules)) == ("profile", {"profile"})


async def test_a_board_that_slept_did_not_draw_all_the_while() -> None:
    async with VerifierClient("http://127.0.0.1:1") as client:
        pulse = GaugeSampler(EventLog(), ServiceTotals(), AdmissionQueue(1, 1), client)
        pulse.surroundings = lambda: Surroundings(watts=5.0)
        pulse._last_sample -= 3600.0
        assert pulse.sample().joules == 0.0


@pytest.mark.parametrize(
    ("url", "who"),
    [
        ("https://a.example", "tls"),
        ("http://127.0.0.1:1", "loopback"),
        ("http://a.example", "clear"),
        ("HTTPS://a", "tls"),
    ],
)
def test_who_can_read_on_the_way(url: str, who: str) -> None:
    assert classify_privacy(url) == who


def test_it_costs_little_when_nobody_watches(draft: OnnxDraft) -> None:
    """An order of magnitude below what a round's own Python costs."""
    _, telling = reporter(draft)
    piece = VerifiedTokens([1, 2, 3], [4], [])
    started = time.thread_time()
    for _ in range(1000):
        telling.report_tokens(piece)
    assert (time.thread_time() - started) / 1000 < 2e-4
