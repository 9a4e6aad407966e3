"""Reports of answers: unverified and withdrawn tokens, whole characters, and no references to the answer."""

from __future__ import annotations

import gc
import weakref

import pytest

from edge_runtime.decoding.generation import VerifiedTokens
from edge_runtime.draft.model import OnnxDraft
from edge_runtime.protocol.sampling import Sampling
from edge_runtime.service.answer import Answer, AnswerRequest
from edge_runtime.service.monitoring.event_log import EventLog
from edge_runtime.service.monitoring.events import AnswerFinished, AnswerStarted, Event, TokensAdded
from edge_runtime.service.monitoring.reporter import AnswerReporter, ServiceTotals
from tests.edge_runtime.service.monitoring.event_stream import parse_events

PROMPT = "def read_config(path):\n"


def make_reporter(draft: OnnxDraft, prompt: str = PROMPT) -> tuple[EventLog, AnswerReporter]:
    event_log = EventLog()
    request = AnswerRequest(
        prompt=draft.tokenizer.encode(prompt).ids, sampling=Sampling(), max_new_tokens=8, stop_strings=[]
    )
    answer = Answer(request, draft.tokenizer)
    return event_log, AnswerReporter(event_log, ServiceTotals(), answer, draft.tokenizer)


def start_reporter(draft: OnnxDraft) -> tuple[EventLog, AnswerReporter]:
    event_log, reporter = make_reporter(draft)
    reporter.report_start()
    return event_log, reporter


def logged_events(event_log: EventLog, event_type: type[Event]) -> list[Event]:
    """Return the events of this type in the log, encoded and decoded."""
    received = [item.event for entry in event_log._events for item in parse_events(entry.encode("x").decode())]
    return [event for event in received if isinstance(event, event_type)]


async def test_unverified_tokens_are_shown_and_withdrawn(draft: OnnxDraft) -> None:
    def encode(text: str) -> list[int]:
        ids: list[int] = draft.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    a, b, c, d = encode("\n")[:1], encode("    return")[:1], encode(" config")[:1], encode(" path")[:1]
    event_log, reporter = start_reporter(draft)
    reporter.report_tokens(VerifiedTokens(a, [], []))
    reporter.report_tokens(VerifiedTokens([], [], b))
    reporter.report_tokens(VerifiedTokens([], [], b + c))
    # The verifier is back: it accepts the first token, replaces the second, and the draft model continues after it.
    reporter.report_tokens(VerifiedTokens(b, d, c))
    reporter.report_tokens(VerifiedTokens([], [], []))
    text = {id_: draft.tokenizer.decode([id_]) for (id_,) in (a, b, c, d)}
    first, second, third, fourth, fifth = logged_events(event_log, TokensAdded)
    assert (first.accepted, second.unverified, third.unverified) == (
        [text[a[0]]],
        [text[b[0]]],
        [text[b[0]], text[c[0]]],
    )
    assert second.withdrawn == third.withdrawn == []
    assert (fourth.accepted, fourth.own) == ([text[b[0]]], [text[d[0]]])
    assert (fourth.withdrawn, fourth.unverified) == ([text[c[0]]], [text[c[0]]])
    assert (fifth.withdrawn, fifth.unverified) == ([text[c[0]]], [])


@pytest.mark.slow
async def test_logged_events_keep_no_reference_to_the_answer(draft: OnnxDraft) -> None:
    """The events have not been read yet, so the log still has the functions that build them."""
    event_log, reporter = start_reporter(draft)
    reporter.report_tokens(VerifiedTokens([1], [2], [3]))
    reporter.report_end("stop")
    answer = weakref.ref(reporter._answer)
    del reporter
    gc.collect()
    assert answer() is None
    for event_type in (TokensAdded, AnswerStarted, AnswerFinished):
        assert len(logged_events(event_log, event_type)) == 1


async def test_characters_that_span_tokens_are_reported_whole(draft: OnnxDraft) -> None:
    text = "naïve größe 字 🦊"
    ids = draft.tokenizer.encode(text, add_special_tokens=False).ids
    event_log, reporter = start_reporter(draft)
    for id_ in ids:
        reporter.report_tokens(VerifiedTokens([id_], [], []))
    reported = "".join(piece for event in logged_events(event_log, TokensAdded) for piece in event.accepted)
    assert reported == draft.tokenizer.decode(ids)


async def test_only_the_end_of_a_long_prompt_is_reported(draft: OnnxDraft) -> None:
    event_log, reporter = make_reporter(draft, "import os\n" * 400)
    reporter.report_end("cancelled")
    assert not event_log._events, "the answer never started"
    reporter.report_start()
    (started,) = logged_events(event_log, AnswerStarted)
    assert started.prompt_tokens == len(reporter._answer.request.prompt) > 500
    assert started.prompt.startswith("… ")
    assert started.prompt.endswith("import os\n")
    assert len(started.prompt) < 3000


def test_tokens_are_decoded_only_when_events_are_read(draft: OnnxDraft) -> None:
    """Without a subscriber, a report costs no decoding."""
    event_log, reporter = start_reporter(draft)
    for _ in range(1000):
        reporter.report_tokens(VerifiedTokens([1, 2, 3], [4], []))
    assert reporter._transcript._texts == []
    assert len(logged_events(event_log, TokensAdded)) == 1000
    assert len(reporter._transcript._texts) == 4000
