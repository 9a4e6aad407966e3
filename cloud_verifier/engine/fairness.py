"""Fairness among principals: whose round is computed next, and who gets the next place in the session store.

A principal is one token's holder. Work is divided among the principals that have some, however many requests each
sends: one that floods the verifier slows the others no more than one that sends a single request at a time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Protocol, TypeVar, cast

from cloud_verifier.engine.sessions import Session, SessionStore, StoreFull

T = TypeVar("T")

# Requests that may wait for a place, of all principals together. Chosen: each holds its prompt meanwhile.
MAX_WAITING = 128


class OwnedRound(Protocol):
    """What `TurnOrder` orders: a round, whose session has an owner."""

    @property
    def session(self) -> Session: ...


R = TypeVar("R", bound=OwnedRound)


class TurnOrder:
    """Lets principals take turns: the first round of each comes before the second of any."""

    def __init__(self) -> None:
        # By principal: the number of its latest turn. Bounded by the token file.
        self._latest: dict[str, int] = {}
        self._turns = 0

    def sort(self, rounds: Iterable[R]) -> list[R]:
        """Order rounds: by their number among those of their owner, then by how long ago the owner had a turn."""
        rounds = list(rounds)
        owners = [running.session.owner for running in rounds]
        if len(set(owners)) < 2:
            return rounds
        numbers: Counter[str] = Counter()
        keyed: list[tuple[int, int, int, R]] = []
        for index, (running, owner) in enumerate(zip(rounds, owners, strict=True)):
            keyed.append((numbers[owner], self._latest.get(owner, 0), index, running))
            numbers[owner] += 1
        keyed.sort(key=lambda entry: entry[:3])
        return [entry[-1] for entry in keyed]

    def record(self, rounds: Collection[OwnedRound]) -> None:
        """Record that the owners of these rounds had a turn, together."""
        if rounds:
            self._turns += 1
            self._latest.update(dict.fromkeys({running.session.owner for running in rounds}, self._turns))


class _Waiting:
    """A request that waits for a place; `attempt` raises `StoreFull` while there is none."""

    def __init__(self, owner: str, attempt: Callable[[], object]) -> None:
        self.owner = owner
        self.attempt = attempt
        self.result: asyncio.Future[object] = asyncio.get_running_loop().create_future()


class PlaceQueue:
    """Requests that wait until the session store has room for them. Belongs to the event loop.

    Whenever there may be room, the request whose owner holds the smallest share of the store is tried first; among
    those of one owner, the oldest.
    """

    def __init__(self, sessions: SessionStore) -> None:
        self._sessions = sessions
        self._waiting: list[_Waiting] = []
        self._serving = False

    def __len__(self) -> int:
        """Number of requests that wait."""
        return len(self._waiting)

    async def wait(self, owner: str, attempt: Callable[[], T], seconds: float, session: Session | None = None) -> T:
        """Call `attempt` when there may be room until it does not raise `StoreFull`, and return what it returns.

        Args:
            owner: name of the principal.
            attempt: must not wait.
            seconds: how long to wait for room.
            session: the session that the room is for, if it exists; it is not evicted while others run.

        Raises:
            StoreFull: there was no room in time, or too many wait.
            VerifierRefused: whatever `attempt` raises.
        """
        waiting = _Waiting(owner, attempt)
        self._waiting.append(waiting)
        if session:
            session.waiting += 1
        try:
            self._bound()
            self.serve()
            async with asyncio.timeout(seconds):
                # The result is what this very attempt returned.
                return cast(T, await waiting.result)
        except TimeoutError:
            raise StoreFull from None
        finally:
            if session:
                session.waiting -= 1
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    def serve(self) -> None:
        """Try the requests that wait, because there may be room now."""
        # An attempt evicts sessions, whose removal calls this again.
        if self._serving or not self._waiting:
            return
        self._serving = True
        try:
            while self._serve_one():
                pass
        finally:
            self._serving = False

    def _serve_one(self) -> bool:
        """Serve the first request for which there is room; return whether there was one."""
        refused: set[str] = set()
        shares = self._sessions.shares()
        for waiting in sorted(self._waiting, key=lambda waiting: shares.get(waiting.owner, 0.0)):
            # One attempt for each owner: its requests are served in order.
            if waiting.owner in refused or waiting.result.done():
                continue
            try:
                result = waiting.attempt()
            except StoreFull:
                refused.add(waiting.owner)
                continue
            except Exception as error:
                waiting.result.set_exception(error)
            else:
                waiting.result.set_result(result)
            self._waiting.remove(waiting)
            return True
        return False

    def _bound(self) -> None:
        """With too many requests, refuse the newest one of the principal that has most."""
        if len(self._waiting) > MAX_WAITING:
            (owner, _), *_ = Counter(waiting.owner for waiting in self._waiting).most_common(1)
            newest = next(waiting for waiting in reversed(self._waiting) if waiting.owner == owner)
            self._waiting.remove(newest)
            newest.result.set_exception(StoreFull())
