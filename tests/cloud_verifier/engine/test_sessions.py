"""Sessions and round replies, without scheduler and network."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from typing import Any

import pytest

from cloud_verifier.engine.sessions import RoundReply, Session, SessionStore
from cloud_verifier.model.limits import VerifierLimits
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import PROTOCOL_VERSION, ErrorCode, Frame, RoundRequest
from edge_runtime.protocol.sampling import Sampling


def request(number: int = 0, position: int = 3, **changes: Any) -> RoundRequest:
    return RoundRequest(PROTOCOL_VERSION, number, position, **changes)


def new_store(max_sessions: int, max_tokens: int) -> SessionStore:
    return SessionStore(VerifierLimits(max_sessions=max_sessions, max_tokens=max_tokens, idle_seconds=60))


@pytest.fixture
def new_session(tiny: Target) -> Callable[..., Session]:
    return functools.partial(make_session, tiny)


def make_session(target: Target, length: int = 3, *, running: bool = False) -> Session:
    """A session of `length` prompt tokens whose first round has ended, unless it is `running`."""
    reply = RoundReply(request(position=length))
    session = Session(list(range(length)), Sampling(), target, reply)
    if not running:
        reply.push(Frame(PROTOCOL_VERSION, 0, tokens=[7]))
        session.ids.append(7)
    return session


def add_sessions(store: SessionStore, *sessions: Session) -> SessionStore:
    for session in sessions:
        store.add(f"key of {session.id}", session)
    return store


def error_of(caught: pytest.ExceptionInfo[VerifierRefused]) -> tuple[str, int, dict[str, object]]:
    return caught.value.code, caught.value.status, caught.value.detail


async def test_readers_see_all_frames_whenever_they_start() -> None:
    reply = RoundReply(request(n=3))
    early = asyncio.create_task(reply.result())
    await asyncio.sleep(0)
    reply.push(
        Frame(
            v=PROTOCOL_VERSION,
            round=0,
            accepted=2,
            tokens=[5],
            queue_100us=1,
            forward_100us=10,
            load=50,
            finish="",
            more=True,
            close_calls=[(4, 0.5)],
        )
    )
    middle = asyncio.create_task(reply.result())
    await asyncio.sleep(0)
    assert not reply.done
    assert not early.done()
    reply.push(
        Frame(
            v=PROTOCOL_VERSION,
            round=0,
            accepted=0,
            tokens=[6, 7],
            queue_100us=2,
            forward_100us=20,
            load=60,
            finish="stop",
            more=False,
            close_calls=[(6, 0.25)],
        )
    )
    expected = Frame(
        v=PROTOCOL_VERSION,
        round=0,
        accepted=2,
        tokens=[5, 6, 7],
        queue_100us=2,
        forward_100us=20,
        load=60,
        finish="stop",
        more=False,
        close_calls=[(4, 0.5), (6, 0.25)],
    )
    assert reply.done
    assert [await early, await middle, await reply.result()] == [expected] * 3
    assert len([frame async for frame in reply.frames()]) == 2


async def test_a_failure_reaches_every_reader_after_the_recorded_frames() -> None:
    reply = RoundReply(request())
    reply.push(Frame(PROTOCOL_VERSION, 0, tokens=[5], more=True))
    waiting = asyncio.create_task(reply.result())
    await asyncio.sleep(0)
    reply.fail(VerifierRefused(ErrorCode.SESSION_LOST, "gone", 404))
    for reader in (waiting, reply.result()):
        with pytest.raises(VerifierRefused, match="gone"):
            await reader
    frames = reply.frames()
    assert (await anext(frames)).tokens == [5]
    with pytest.raises(VerifierRefused, match="gone"):
        await anext(frames)


async def test_a_complete_reply_cannot_fail() -> None:
    reply = RoundReply(request())
    reply.push(Frame(PROTOCOL_VERSION, 0, tokens=[5]))
    reply.fail(VerifierRefused(ErrorCode.SESSION_LOST, "gone", 404))
    assert (await reply.result()).tokens == [5]


async def test_a_frame_after_the_failure_does_not_undo_it() -> None:
    """The scheduler may push one more frame before it notices that the session was closed."""
    reply = RoundReply(request())
    reply.fail(VerifierRefused(ErrorCode.SESSION_LOST, "gone", 404))
    reply.push(Frame(PROTOCOL_VERSION, 0, tokens=[5]))
    with pytest.raises(VerifierRefused, match="gone"):
        await reply.result()


def test_the_next_round_and_repetitions_of_the_latest(new_session: Callable[..., Session]) -> None:
    session = new_session()
    assert session.recorded_reply(request(1, 4, draft=[1])) is None
    assert session.recorded_reply(request()) is session.reply
    assert session.recorded_reply(request(stream=True)) is session.reply


def test_the_round_before_one_that_was_sent_ahead_may_be_repeated(new_session: Callable[..., Session]) -> None:
    session = new_session()
    first = session.reply
    ahead = session.begin_round(request(1, 4, expects=[7]))
    ahead.done = True
    assert session.recorded_reply(request()) is first
    assert session.recorded_reply(request(1, 4, expects=[7])) is ahead
    with pytest.raises(VerifierRefused) as caught:
        session.recorded_reply(request(0, 3, n=2))
    assert caught.value.code == ErrorCode.ROUND_CONFLICT
    session.begin_round(request(2, 4))
    with pytest.raises(VerifierRefused) as caught:
        session.recorded_reply(request(1, 4, expects=[7]))
    assert caught.value.code == ErrorCode.ROUND_OUT_OF_ORDER


@pytest.mark.parametrize(
    ("round_request", "code", "detail"),
    [
        (request(0, 3, n=2), ErrorCode.ROUND_CONFLICT, {}),
        (request(2, 4), ErrorCode.ROUND_OUT_OF_ORDER, {"expected": 1}),
        (request(1, 3), ErrorCode.WRONG_POSITION, {"expected": 4}),
        (request(1, 5), ErrorCode.WRONG_POSITION, {"expected": 4}),
    ],
)
def test_a_round_that_is_neither_next_nor_latest(
    new_session: Callable[..., Session], round_request: RoundRequest, code: str, detail: dict[str, int]
) -> None:
    session = new_session()
    with pytest.raises(VerifierRefused) as caught:
        session.recorded_reply(round_request)
    assert error_of(caught) == (code, 409, detail)
    assert session.ids == [0, 1, 2, 7]


def test_no_next_round_while_one_is_running(new_session: Callable[..., Session]) -> None:
    session = new_session(running=True)
    with pytest.raises(VerifierRefused) as caught:
        session.recorded_reply(request(1, 3))
    assert error_of(caught) == (ErrorCode.ROUND_OUT_OF_ORDER, 409, {"expected": 0})
    assert session.recorded_reply(request()) is session.reply


def test_no_next_round_after_the_end_of_the_text(new_session: Callable[..., Session]) -> None:
    session = new_session()
    session.finish = "length"
    with pytest.raises(VerifierRefused, match=r"ended \(length\)") as caught:
        session.recorded_reply(request(1, 4))
    assert caught.value.code == ErrorCode.SESSION_FINISHED
    assert session.recorded_reply(request()) is session.reply


def test_session_ids_are_unguessable(new_session: Callable[..., Session]) -> None:
    ids = {new_session().id for _ in range(100)}
    assert len(ids) == 100
    assert all(len(session_id) >= 12 for session_id in ids)


def test_a_session_is_found_by_id_and_key_until_it_is_removed(new_session: Callable[..., Session]) -> None:
    store, session = new_store(5, 100), new_session()
    store.add("its key", session)
    assert store.get(session.id) is store.find_by_key("its key") is session
    assert (len(store), store.load) == (1, 20)
    store.remove(session.id)
    store.remove(session.id)
    assert (len(store), store.load, store.find_by_key("its key")) == (0, 0, None)
    assert session.closed
    with pytest.raises(VerifierRefused) as caught:
        store.get(session.id)
    assert error_of(caught) == (ErrorCode.SESSION_LOST, 404, {})


async def test_removing_a_session_fails_its_running_round(new_session: Callable[..., Session]) -> None:
    session = new_session(running=True)
    store = add_sessions(new_store(5, 100), session)
    reader = asyncio.create_task(session.reply.result())
    await asyncio.sleep(0)
    store.remove(session.id)
    with pytest.raises(VerifierRefused, match="closed"):
        await reader


def test_a_session_closed_by_the_scheduler_is_lost(new_session: Callable[..., Session]) -> None:
    session = new_session()
    store = add_sessions(new_store(5, 100), session)
    session.closed = True
    with pytest.raises(VerifierRefused) as caught:
        store.get(session.id)
    assert caught.value.code == ErrorCode.SESSION_LOST
    assert len(store) == 0


def test_the_key_of_a_session_closed_by_the_scheduler_can_open_another(new_session: Callable[..., Session]) -> None:
    store, failed, second = new_store(5, 100), new_session(), new_session()
    store.add("the key", failed)
    failed.closed = True
    store.add("the key", second)
    store.remove(failed.id)
    assert store.find_by_key("the key") is second
    store.remove(second.id)


def test_the_least_recently_used_session_is_evicted_first(new_session: Callable[..., Session]) -> None:
    one, two, three = new_session(), new_session(), new_session()
    store = add_sessions(new_store(2, 100), one, two)
    store.get(one.id)
    add_sessions(store, three)
    assert [session.closed for session in (one, two, three)] == [False, True, False]
    assert store.evictions == 1


def test_tokens_of_all_sessions_together_are_bounded(new_session: Callable[..., Session]) -> None:
    small, large = new_session(9), new_session(59)
    store = add_sessions(new_store(100, 100), small, large)
    add_sessions(store, new_session(30))
    assert [small.closed, large.closed] == [True, False]
    store.make_room(0, 9)
    assert not large.closed
    store.make_room(0, 10)
    assert large.closed


def test_idle_sessions_are_evicted_when_another_is_added(new_session: Callable[..., Session]) -> None:
    idle, fresh = new_session(), new_session()
    store = add_sessions(new_store(100, 1000), idle, fresh)
    idle.last_used_at = time.monotonic() - 61
    add_sessions(store, new_session())
    assert [idle.closed, fresh.closed] == [True, False]


def test_sessions_with_a_running_round_are_never_evicted(new_session: Callable[..., Session]) -> None:
    busy, idle = new_session(running=True), new_session()
    store = add_sessions(new_store(2, 100), busy, idle)
    busy.last_used_at -= 1000
    add_sessions(store, second := new_session(running=True))
    assert [busy.closed, idle.closed] == [False, True]
    with pytest.raises(VerifierRefused) as caught:
        add_sessions(store, new_session())
    assert error_of(caught) == (ErrorCode.OVERLOADED, 503, {})
    assert not second.closed
    assert len(store) == 2
