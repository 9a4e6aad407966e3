"""Sessions and answers by themselves, without engine and network."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from typing import Any

import pytest

from cloud_verifier.engine.sessions import RoundReply, Session, SessionStore
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import PROTOCOL_VERSION, ErrorCode, Frame, RoundRequest
from edge_runtime.protocol.sampling import Sampling


def request(number: int = 0, position: int = 3, **changes: Any) -> RoundRequest:
    return RoundRequest(PROTOCOL_VERSION, number, position, **changes)


@pytest.fixture
def session_of(tiny: Target) -> Callable[..., Session]:
    return functools.partial(a_session, tiny)


def a_session(target: Target, length: int = 3, *, playing: bool = False) -> Session:
    """A session of `length` tokens whose first round is over, unless it is `playing`."""
    answer = RoundReply(request(position=length))
    session = Session(list(range(length)), Sampling(), target, answer)
    if not playing:
        answer.push(Frame(PROTOCOL_VERSION, 0, tokens=[7]))
        session.ids.append(7)
    return session


def filled(store: SessionStore, *sessions: Session) -> SessionStore:
    for session in sessions:
        store.add(f"key of {session.id}", session)
    return store


def code_of(caught: pytest.ExceptionInfo[VerifierRefused]) -> tuple[str, int, dict[str, object]]:
    return caught.value.code, caught.value.status, caught.value.detail


async def test_readers_see_all_frames_whenever_they_come() -> None:
    answer = RoundReply(request(n=3))
    early = asyncio.create_task(answer.result())
    await asyncio.sleep(0)
    answer.push(Frame(PROTOCOL_VERSION, 0, 2, [5], 1, 10, 50, "", True, [(4, 0.5)]))
    middle = asyncio.create_task(answer.result())
    await asyncio.sleep(0)
    assert not answer.done
    assert not early.done()
    answer.push(Frame(PROTOCOL_VERSION, 0, 0, [6, 7], 2, 20, 60, "stop", False, [(6, 0.25)]))
    expected = Frame(PROTOCOL_VERSION, 0, 2, [5, 6, 7], 2, 20, 60, "stop", False, [(4, 0.5), (6, 0.25)])
    assert answer.done
    assert [await early, await middle, await answer.result()] == [expected] * 3
    assert len([frame async for frame in answer.frames()]) == 2


async def test_a_failure_reaches_every_reader_after_the_frames_there_are() -> None:
    answer = RoundReply(request())
    answer.push(Frame(PROTOCOL_VERSION, 0, tokens=[5], more=True))
    waiting = asyncio.create_task(answer.result())
    await asyncio.sleep(0)
    answer.fail(VerifierRefused(ErrorCode.SESSION_LOST, "gone", 404))
    for reader in (waiting, answer.result()):
        with pytest.raises(VerifierRefused, match="gone"):
            await reader
    frames = answer.frames()
    assert (await anext(frames)).tokens == [5]
    with pytest.raises(VerifierRefused, match="gone"):
        await anext(frames)


async def test_an_answer_that_is_complete_cannot_fail_any_more() -> None:
    answer = RoundReply(request())
    answer.push(Frame(PROTOCOL_VERSION, 0, tokens=[5]))
    answer.fail(VerifierRefused(ErrorCode.SESSION_LOST, "gone", 404))
    assert (await answer.result()).tokens == [5]


async def test_a_frame_that_comes_after_the_failure_does_not_undo_it() -> None:
    """The engine may push once more before it sees that the session was closed."""
    answer = RoundReply(request())
    answer.fail(VerifierRefused(ErrorCode.SESSION_LOST, "gone", 404))
    answer.push(Frame(PROTOCOL_VERSION, 0, tokens=[5]))
    with pytest.raises(VerifierRefused, match="gone"):
        await answer.result()


def test_next_round(session_of: Callable[..., Session]) -> None:
    session = session_of()
    assert session.recorded_reply(request(1, 4, draft=[1])) is None
    assert session.recorded_reply(request()) is session.reply
    assert session.recorded_reply(request(stream=True)) is session.reply


def test_the_round_before_one_that_was_sent_ahead_may_be_asked_for_again(session_of: Callable[..., Session]) -> None:
    session = session_of()
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
    session_of: Callable[..., Session], round_request: RoundRequest, code: str, detail: dict[str, int]
) -> None:
    session = session_of()
    with pytest.raises(VerifierRefused) as caught:
        session.recorded_reply(round_request)
    assert code_of(caught) == (code, 409, detail)
    assert session.ids == [0, 1, 2, 7]


def test_no_next_round_while_one_is_playing(session_of: Callable[..., Session]) -> None:
    session = session_of(playing=True)
    with pytest.raises(VerifierRefused) as caught:
        session.recorded_reply(request(1, 3))
    assert code_of(caught) == (ErrorCode.ROUND_OUT_OF_ORDER, 409, {"expected": 0})
    assert session.recorded_reply(request()) is session.reply


def test_no_next_round_after_the_end(session_of: Callable[..., Session]) -> None:
    session = session_of()
    session.finish = "length"
    with pytest.raises(VerifierRefused, match=r"ended \(length\)") as caught:
        session.recorded_reply(request(1, 4))
    assert caught.value.code == ErrorCode.SESSION_FINISHED
    assert session.recorded_reply(request()) is session.reply


def test_ids_are_unguessable(session_of: Callable[..., Session]) -> None:
    ids = {session_of().id for _ in range(100)}
    assert len(ids) == 100
    assert all(len(session_id) >= 12 for session_id in ids)


def test_a_session_is_found_by_id_and_key_until_it_is_removed(session_of: Callable[..., Session]) -> None:
    store, session = SessionStore(5, 100, 60), session_of()
    store.add("its key", session)
    assert store.get(session.id) is store.find_by_key("its key") is session
    assert (len(store), store.load) == (1, 20)
    store.remove(session.id)
    store.remove(session.id)
    assert (len(store), store.load, store.find_by_key("its key")) == (0, 0, None)
    assert session.closed
    with pytest.raises(VerifierRefused) as caught:
        store.get(session.id)
    assert code_of(caught) == (ErrorCode.SESSION_LOST, 404, {})


async def test_removing_a_session_in_mid_round_tells_its_reader(session_of: Callable[..., Session]) -> None:
    session = session_of(playing=True)
    store = filled(SessionStore(5, 100, 60), session)
    reader = asyncio.create_task(session.reply.result())
    await asyncio.sleep(0)
    store.remove(session.id)
    with pytest.raises(VerifierRefused, match="closed"):
        await reader


def test_a_session_that_the_engine_gave_up_is_lost(session_of: Callable[..., Session]) -> None:
    session = session_of()
    store = filled(SessionStore(5, 100, 60), session)
    session.closed = True
    with pytest.raises(VerifierRefused) as caught:
        store.get(session.id)
    assert caught.value.code == ErrorCode.SESSION_LOST
    assert len(store) == 0


def test_a_key_whose_session_the_engine_gave_up_can_open_another(session_of: Callable[..., Session]) -> None:
    store, failed, second = SessionStore(5, 100, 60), session_of(), session_of()
    store.add("the key", failed)
    failed.closed = True
    store.add("the key", second)
    store.remove(failed.id)
    assert store.find_by_key("the key") is second
    store.remove(second.id)


def test_the_least_recently_used_goes_first(session_of: Callable[..., Session]) -> None:
    one, two, three = session_of(), session_of(), session_of()
    store = filled(SessionStore(2, 100, 60), one, two)
    store.get(one.id)
    filled(store, three)
    assert [session.closed for session in (one, two, three)] == [False, True, False]
    assert store.evictions == 1


def test_tokens_of_all_sessions_together_are_bounded(session_of: Callable[..., Session]) -> None:
    small, large = session_of(9), session_of(59)
    store = filled(SessionStore(100, 100, 60), small, large)
    filled(store, session_of(30))
    assert [small.closed, large.closed] == [True, False]
    store.make_room(0, 9)
    assert not large.closed
    store.make_room(0, 10)
    assert large.closed


def test_idle_sessions_go_when_others_come(session_of: Callable[..., Session]) -> None:
    idle, fresh = session_of(), session_of()
    store = filled(SessionStore(100, 1000, 60), idle, fresh)
    idle.used_at = time.monotonic() - 61
    filled(store, session_of())
    assert [idle.closed, fresh.closed] == [True, False]


def test_playing_sessions_are_never_evicted(session_of: Callable[..., Session]) -> None:
    playing, resting = session_of(playing=True), session_of()
    store = filled(SessionStore(2, 100, 60), playing, resting)
    playing.used_at -= 1000
    filled(store, second := session_of(playing=True))
    assert [playing.closed, resting.closed] == [False, True]
    with pytest.raises(VerifierRefused) as caught:
        filled(store, session_of())
    assert code_of(caught) == (ErrorCode.OVERLOADED, 503, {})
    assert not second.closed
    assert len(store) == 2
