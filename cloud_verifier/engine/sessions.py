"""Sessions: the text and the cache of one request, found again by id, evicted when there are too many."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable

import msgspec

from cloud_verifier.engine.rate_limits import Acceptance
from cloud_verifier.model.kv_cache import Text
from cloud_verifier.model.speculation import Guesses
from cloud_verifier.model.target import Target
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, Frame, RoundRequest
from edge_runtime.protocol.sampling import Sampling


class Answer:
    """The frames of one round, as the engine produces them; any number of readers, at any time, see all of them.

    The engine's thread calls `push` and `fail` through the event loop; a reader that is cut off can come back.

    Attributes:
        request: the round, as it was asked for.
        played: as it is played: without its draft where that is not worth verifying.
        on_end: called once, on the event loop, when it is over, well or badly.
    """

    def __init__(self, request: RoundRequest, *, verified: bool = True) -> None:
        self.request = request
        self.played = request if verified else msgspec.structs.replace(request, draft=[], siblings={})
        self.done = False
        self.on_end: Callable[[], None] | None = None
        self._frames: list[Frame] = []
        self._error: VerifierRefused | None = None
        self._changed = asyncio.Event()

    def push(self, frame: Frame) -> None:
        self._frames.append(frame)
        self.done = not frame.more
        self._wake()

    def fail(self, error: VerifierRefused) -> None:
        if not self.done:
            self._error = error
            self.done = True
            self._wake()

    @property
    def told(self) -> bool:
        """Whether there is anything to read yet."""
        return bool(self._frames)

    async def frames(self) -> AsyncIterator[Frame]:
        """All frames from the first, as they come. Raises VerifierRefused if the round failed."""
        index = 0
        while True:
            while index < len(self._frames):
                yield self._frames[index]
                index += 1
            if self._error:
                raise self._error
            if self.done:
                return
            changed = self._changed
            await changed.wait()

    async def over(self) -> None:
        """Returns when the round is, well or badly."""
        while not self.done:
            await self._changed.wait()

    async def whole(self) -> Frame:
        """The round as a single frame. Raises VerifierRefused if it failed."""
        await self.over()
        if self._error:
            raise self._error
        return self.so_far()

    def so_far(self) -> Frame:
        """The frames until now as a single one."""
        frames = self._frames
        if not frames:
            return Frame(self.request.v, self.request.round, more=True)
        last = frames[-1]
        return Frame(
            last.v,
            last.round,
            accepted=frames[0].accepted,
            tokens=[token for frame in frames for token in frame.tokens],
            queue_100us=last.queue_100us,
            forward_100us=last.forward_100us,
            load=last.load,
            finish=last.finish,
            more=last.more,
            close_calls=[call for frame in frames for call in frame.close_calls],
            prefill_100us=last.prefill_100us,
            further=last.further,
        )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        if self.done and self.on_end:
            on_end, self.on_end = self.on_end, None
            on_end()


class Session:
    """One request's text and cache. Belongs to the event loop, except `ids`, `cache` and `guesses`, which belong to the
    engine while a round is running.

    Attributes:
        id: unguessable name in URLs; begins with `wire.mark_of` its key, once it is in a store.
        key: what it was opened with, once it is in a store.
        owner: name of the principal that opened it; empty where nobody is asked who they are.
        draft: the fingerprint that the board's draft was opened with, for the statistics.
        acceptance: whether its drafts are worth verifying.
        ids: all token ids, prompt included.
        cache: what the pool holds: keys and values of all ids but the last.
        guesses: of the draft beside the target, once it had something to draft.
        answer: the latest round; a repeated request gets it again.
        before: the one before, while the latest was sent ahead of its answer, which may yet be asked for again.
        finish: why the text has ended, or empty.
        closed: nobody will read what a running round still produces.
        target: the version that it is pinned to.
        answered_at: when the engine was done with the latest round, by `time.perf_counter`.
        pause: seconds from there to the next round, as they usually are; None before there was one.
    """

    def __init__(self, prompt: list[int], sampling: Sampling, target: Target, answer: Answer, owner: str = "") -> None:
        self.id = secrets.token_urlsafe(9)
        self.key = ""
        self.owner = owner
        self.draft = ""
        self.acceptance = Acceptance()
        self.ids = prompt
        self.sampling = sampling
        self.target = target
        self.cache = Text()
        self.guesses: Guesses | None = None
        self.answer = answer
        self.before: Answer | None = None
        self.finish = ""
        self.closed = False
        self.used_at = time.monotonic()
        self.answered_at: float | None = None
        self.pause: float | None = None

    def begin(self, request: RoundRequest, *, verified: bool = True) -> Answer:
        """Records `request` as the latest round, to be played now; `verified`: with its draft."""
        self.before = self.answer if request.expects else None
        self.answer = Answer(request, verified=verified)
        if self.answered_at is not None:
            pause = max(0.0, time.perf_counter() - self.answered_at)
            self.pause = pause if self.pause is None else 0.7 * self.pause + 0.3 * pause
        return self.answer

    def ahead_of(self, request: RoundRequest) -> Answer | None:
        """The latest round, if it is not over and `request` is the one behind it, sent ahead of its answer."""
        follows = bool(request.expects) and request.round == self.answer.request.round + 1
        return self.answer if follows and not self.answer.done else None

    def next_round(self, request: RoundRequest) -> Answer | None:
        """The recorded answer if `request` repeats the latest round; None if it is the next one, now to be played.

        Raises:
            VerifierRefused: it is neither, or was sent ahead on a wrong guess; the session stays as it was.
        """
        self.used_at = time.monotonic()
        for played in (self.answer, self.before):
            if played and request.round == played.request.round:
                # One that was sent ahead may come late, when the round that was right is known or even played.
                self._check_expected(request, played.request.position)
                # A reader that was cut off may ask again without streaming; that is still the same round.
                if _contents(request) == _contents(played.request):
                    return played
                raise VerifierRefused(
                    ErrorCode.ROUND_CONFLICT, f"round {request.round} was already played with other contents", 409
                )
        latest = self.answer.request
        if request.round != latest.round + 1 or not self.answer.done:
            expected = latest.round + self.answer.done
            raise VerifierRefused(
                ErrorCode.ROUND_OUT_OF_ORDER,
                f"round {request.round} is not the next one; send round {expected}",
                409,
                {"expected": expected},
            )
        if self.finish and request.expects:
            raise _void(request, f"the text has ended ({self.finish})")
        if self.finish:
            raise VerifierRefused(ErrorCode.SESSION_FINISHED, f"the text has ended ({self.finish})", 409)
        self._check_expected(request, len(self.ids))
        if request.position != len(self.ids):
            raise VerifierRefused(
                ErrorCode.WRONG_POSITION,
                f"position {request.position} is not where the text ends; the next token's is {len(self.ids)}",
                409,
                {"expected": len(self.ids)},
            )
        return None

    def _check_expected(self, request: RoundRequest, position: int) -> None:
        """Raises VerifierRefused (`round_void`) unless `request` stands at `position`, behind what it expects there."""
        if request.expects and request.position != position:
            raise _void(request, f"the text goes on at {position}, not {request.position}")
        if request.expects and request.expects != self.ids[position - 1 : position]:
            raise _void(request, f"token {position - 1} is {self.ids[position - 1]}, not {request.expects[0]}")


class SessionStore:
    """Sessions by id and by opening key, least recently used first. To others than its owner a session does not exist.

    Args:
        max_sessions: more than this and the least recently used is evicted.
        max_tokens: bound on the tokens of all sessions together, which is what their caches' memory grows with.
        idle_seconds: sessions unused for longer are evicted.
        forget: told of every session that is here no more.
        page: tokens that a cache grows by at once.
    """

    def __init__(
        self,
        max_sessions: int,
        max_tokens: int,
        idle_seconds: float,
        forget: Callable[[Session], None] = lambda session: None,
        page: int = 1,
    ) -> None:
        self._max_sessions = max_sessions
        self._max_tokens = max_tokens
        self._idle_seconds = idle_seconds
        self._forget = forget
        self._page = page
        self._by_id: OrderedDict[str, Session] = OrderedDict()
        self._by_key: dict[tuple[str, str], Session] = {}
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def load(self) -> int:
        """Share of the session slots in use, percent."""
        return 100 * len(self._by_id) // self._max_sessions

    @property
    def tokens(self) -> int:
        """Of all sessions together."""
        return sum(len(session.ids) for session in self._by_id.values())

    def by_key(self, key: str, owner: str = "") -> Session | None:
        """The session that `owner` has opened with `key`, if it is still here."""
        return self._by_key.get((owner, key))

    def owned_by(self, owner: str) -> list[Session]:
        """Their sessions, the least recently used first."""
        return [session for session in self._by_id.values() if session.owner == owner]

    def of_version(self, version: str) -> list[str]:
        """Ids of the sessions that are pinned to this exact target version."""
        return [session.id for session in self._by_id.values() if session.target.version == version]

    def get(self, session_id: str, owner: str = "") -> Session:
        """Raises VerifierRefused (`session_lost`) if `owner` has no such session, or not any more."""
        session = self._by_id.get(session_id)
        if session is not None and session.closed:
            self.remove(session_id)
        if session is None or session.closed or session.owner != owner:
            raise VerifierRefused(
                ErrorCode.SESSION_LOST, "no such session here (any more); open one with all ids so far", 404
            )
        self._by_id.move_to_end(session_id)
        return session

    def add(self, key: str, session: Session) -> None:
        """Adds a session, evicting others if there are too many.

        Raises:
            VerifierRefused: `overloaded`: every other session is in the middle of a round.
        """
        self.make_room(1, len(session.ids))
        session.id = messages.mark_of(key) + session.id[len(messages.mark_of(key)) :]
        session.key = key
        self._by_id[session.id] = session
        self._by_key[session.owner, key] = session

    def remove(self, session_id: str) -> None:
        """Forgets a session, if it is here; a running round of it stops at its next step."""
        session = self._by_id.pop(session_id, None)
        if session is not None:
            session.closed = True
            self._forget(session)
            session.answer.fail(VerifierRefused(ErrorCode.SESSION_LOST, "the session was closed", 404))
            if self._by_key.get((session.owner, session.key)) is session:
                del self._by_key[session.owner, session.key]

    def _held(self, session: Session) -> int:
        return -(-len(session.ids) // self._page) * self._page

    def make_room(self, sessions: int, tokens: int, spare: Session | None = None) -> None:
        """Evicts idle sessions, then least recently used ones, until so many more fit."""
        now = time.monotonic()
        fixed = [s for s in self._by_id.values() if s is spare or not s.answer.done]
        if len(fixed) + sessions > self._max_sessions or sum(map(self._held, fixed)) + tokens > self._max_tokens:
            raise VerifierRefused(
                ErrorCode.OVERLOADED, "every session slot is in the middle of a round; try again shortly", 503
            )
        held = sum(map(self._held, self._by_id.values()))
        for session in list(self._by_id.values()):
            full = len(self._by_id) + sessions > self._max_sessions or held + tokens > self._max_tokens
            if session is spare or not session.answer.done:
                continue
            if full or now - session.used_at > self._idle_seconds:
                held -= self._held(session)
                self.remove(session.id)
                self.evictions += 1


def _void(request: RoundRequest, why: str) -> VerifierRefused:
    return VerifierRefused(ErrorCode.ROUND_VOID, f"round {request.round} was sent ahead of another text: {why}", 409)


def _contents(request: RoundRequest) -> tuple[object, ...]:
    """What makes two requests the same round. Not `expects`: it was true of both, or one of them is void."""
    return (request.position, request.draft, request.n, request.siblings)
