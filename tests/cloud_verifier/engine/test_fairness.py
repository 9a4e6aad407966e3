"""Fairness among principals: turns, evictions, and requests that wait for room in the store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from cloud_verifier.engine import fairness
from cloud_verifier.engine.fairness import PlaceQueue, TurnOrder
from cloud_verifier.engine.sessions import ACTIVE_SECONDS, RoundReply, Session, SessionStore, StoreFull
from cloud_verifier.model.limits import VerifierLimits
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import PROTOCOL_VERSION, ErrorCode, Frame, RoundRequest
from edge_runtime.protocol.sampling import Sampling

MakeSession = Callable[..., Session]


class NamedRound(NamedTuple):
    """A round as `TurnOrder` sees it."""

    session: SimpleNamespace
    name: str


def rounds_of(*names: str) -> list[NamedRound]:
    """A round for each name, whose first letter is the owner."""
    return [NamedRound(SimpleNamespace(owner=name[0]), name) for name in names]


@pytest.fixture
def new_session(tiny: Target) -> MakeSession:
    def new_session(owner: str, length: int = 4, *, running: bool = False, n: int = 1) -> Session:
        reply = RoundReply(RoundRequest(PROTOCOL_VERSION, 0, length, n=n))
        session = Session([5] * length, Sampling(), tiny, reply, owner)
        if not running:
            reply.push(Frame(PROTOCOL_VERSION, 0, tokens=[7]))
            session.ids.append(7)
        return session

    return new_session


def fill(store: SessionStore, *sessions: Session) -> None:
    for session in sessions:
        store.add(session.id, session)


def open_sessions(sessions: list[Session]) -> list[int]:
    return [index for index, session in enumerate(sessions) if not session.closed]


# Turns


def test_the_first_round_of_each_owner_comes_before_the_second_of_any() -> None:
    order = TurnOrder().sort(rounds_of("a1", "a2", "a3", "b1", "b2", "c1"))
    assert [running.name for running in order] == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_owners_take_turns_whatever_number_of_rounds_each_has() -> None:
    order, waiting, served = TurnOrder(), rounds_of(*(f"a{i}" for i in range(9)), "b1", "b2"), []
    while waiting:
        first = order.sort(waiting)[0]
        served.append(first.name)
        order.record([first])
        waiting.remove(first)
    assert served[:5] == ["a0", "b1", "a1", "b2", "a2"]


# Evictions


@pytest.mark.parametrize(
    "limits",
    [VerifierLimits(max_sessions=8), VerifierLimits(max_tokens=8 * 5)],
    ids=["full of sessions", "full of tokens"],
)
def test_sessions_of_whoever_holds_most_are_evicted_first(new_session: MakeSession, limits: VerifierLimits) -> None:
    store = SessionStore(limits)
    small = [new_session("small") for _ in range(2)]
    flood = [new_session("flood") for _ in range(60)]
    fill(store, *small, *flood)
    assert open_sessions(small) == [0, 1]
    assert open_sessions(flood) == list(range(54, 60))
    newcomers = [new_session("new") for _ in range(9)]
    fill(store, *newcomers)
    # Half of the room is as much as anyone gets who takes it from others that use it.
    assert [len(store.owned_by(name)) for name in ("small", "flood", "new")] == [2, 3, 3]
    assert open_sessions(newcomers) == [6, 7, 8]


def test_a_session_in_use_is_not_lost_to_one_who_holds_more(new_session: MakeSession) -> None:
    store = SessionStore(VerifierLimits(max_sessions=4))
    small = new_session("small")
    fill(store, small, *(new_session("flood", running=True) for _ in range(3)))
    with pytest.raises(StoreFull) as caught:
        fill(store, new_session("flood"))
    assert caught.value.code == ErrorCode.OVERLOADED
    assert not small.closed
    small.last_used_at -= ACTIVE_SECONDS + 1
    fill(store, new_session("flood"))
    assert small.closed


def test_what_a_round_in_progress_will_add_is_reserved(new_session: MakeSession) -> None:
    store = SessionStore(VerifierLimits(max_tokens=100))
    fill(store, new_session("a", 10, running=True, n=60))
    with pytest.raises(StoreFull):
        fill(store, new_session("b", 35))
    fill(store, new_session("b", 29))
    with pytest.raises(VerifierRefused, match="room for 100") as caught:
        fill(store, new_session("b", 100))
    assert not isinstance(caught.value, StoreFull)


def test_a_session_that_waits_for_room_is_evicted_only_if_no_other_runs(new_session: MakeSession) -> None:
    store = SessionStore(VerifierLimits(max_sessions=2))
    waiting, running = new_session("a"), new_session("b", running=True)
    fill(store, waiting, running)
    waiting.waiting = 1
    waiting.last_used_at -= ACTIVE_SECONDS + 1
    with pytest.raises(StoreFull):
        fill(store, new_session("c"))
    running.reply.push(Frame(PROTOCOL_VERSION, 0, tokens=[7]))
    store.remove(running.id)
    fill(store, new_session("b"), new_session("c"))
    assert waiting.closed


# Waiting for room


class Openings:
    """Openings at a store of two places, which `serve` may find room for, and the order in which they were served."""

    def __init__(self, new_session: MakeSession) -> None:
        self._new_session = new_session
        self.store = SessionStore(VerifierLimits(max_sessions=2))
        self.places = PlaceQueue(self.store)
        self.opened: list[str] = []
        self.sessions: list[Session] = []

    def open(self, owner: str) -> Session:
        session = self._new_session(owner, running=True)
        fill(self.store, session)
        self.opened.append(owner)
        self.sessions.append(session)
        return session

    def start(self, owner: str, seconds: float = 60.0) -> asyncio.Task[Session]:
        return asyncio.create_task(self.places.wait(owner, lambda: self.open(owner), seconds))

    def end_one(self) -> None:
        self.store.remove(self.sessions.pop(0).id)
        self.places.serve()


@pytest.fixture
async def openings(new_session: MakeSession) -> Openings:
    return Openings(new_session)


async def test_openings_that_wait_are_served_fairly(openings: Openings) -> None:
    tasks = [openings.start("flood") for _ in range(8)]
    await asyncio.sleep(0)
    assert openings.opened == ["flood", "flood"]
    tasks.append(openings.start("small"))
    await asyncio.sleep(0)
    for _ in range(3):
        openings.end_one()
    assert openings.opened == ["flood", "flood", "small", "flood", "flood"]
    for _ in range(4):
        openings.end_one()
    assert {session.owner for session in await asyncio.gather(*tasks)} == {"flood", "small"}
    assert len(openings.places) == 0


async def test_an_opening_waits_only_so_long(openings: Openings) -> None:
    await asyncio.gather(openings.start("a"), openings.start("a"))
    with pytest.raises(StoreFull):
        await openings.start("b", 0.01)
    assert len(openings.places) == 0
    abandoned = openings.start("b")
    await asyncio.sleep(0)
    abandoned.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await abandoned
    openings.end_one()
    assert openings.opened == ["a", "a"]


async def test_with_too_many_waiting_whoever_has_most_is_refused(
    openings: Openings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fairness, "MAX_WAITING", 3)
    await asyncio.gather(openings.start("a"), openings.start("a"))
    flood = [openings.start("flood") for _ in range(3)]
    small = openings.start("small")
    await asyncio.sleep(0)
    await asyncio.wait({flood[2]})
    assert isinstance(flood[2].exception(), StoreFull)
    for task in (flood[0], small, flood[1]):
        openings.end_one()
        await task
    assert openings.opened == ["a", "a", "flood", "small", "flood"]


async def test_other_errors_of_an_attempt_end_the_wait(openings: Openings) -> None:
    def fail() -> None:
        raise VerifierRefused(ErrorCode.DRAINING, "no more")

    with pytest.raises(VerifierRefused, match="no more"):
        await openings.places.wait("a", fail, 60.0)
