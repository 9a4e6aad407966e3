"""Sessions: the token ids and KV cache of one text, found again by id and evicted when there are too many."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import msgspec

from cloud_verifier.engine.draft_breaker import DraftCircuitBreaker
from cloud_verifier.model.kv_cache import CachedSequence
from cloud_verifier.model.limits import VerifierLimits
from cloud_verifier.model.speculation import SessionDraft
from cloud_verifier.model.target import Target
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.logits_processing import TokenConstraint, end_ids_of, make_processor
from edge_runtime.protocol.messages import ErrorCode, Frame, RoundRequest
from edge_runtime.protocol.sampling import Sampling

# Weight of the latest pause in the moving average of a session's pause between two rounds.
PAUSE_SMOOTHING = 0.3
# A session that was used within this time is assumed to be in the middle of an answer. Chosen: longer than the pauses
# between the rounds of an answer, and shorter than most pauses between the turns of a chat.
ACTIVE_SECONDS = 30.0


class StoreFull(VerifierRefused):
    """There is no room for a session or its next round until a round in progress ends."""

    def __init__(self) -> None:
        super().__init__(ErrorCode.OVERLOADED, "every session has a round in progress; try again shortly")


class RoundReply:
    """The frames of one round, in the order in which the scheduler produces them.

    Any number of readers, at any time, see all frames from the first, so a client that lost its connection can repeat
    the request. The scheduler's thread calls `push` and `fail` through the event loop.

    Attributes:
        request: the round as the client requested it.
        executed_request: the round as it is executed: without its draft if that is not worth verifying.
        done: the round has ended, successfully or not.
        on_done: called once, on the event loop, when the round ends.
    """

    def __init__(self, request: RoundRequest, *, verify_draft: bool = True) -> None:
        self.request = request
        self.executed_request = request if verify_draft else msgspec.structs.replace(request, draft=[], siblings={})
        self.done = False
        self.on_done: Callable[[], None] | None = None
        self._frames: list[Frame] = []
        self._error: VerifierRefused | None = None
        self._changed = asyncio.Event()

    @property
    def has_frames(self) -> bool:
        return bool(self._frames)

    def push(self, frame: Frame) -> None:
        self._frames.append(frame)
        self.done = not frame.more
        self._notify()

    def fail(self, error: VerifierRefused) -> None:
        """End the round with an error. Does nothing if it has ended already."""
        if not self.done:
            self._error = error
            self.done = True
            self._notify()

    async def frames(self) -> AsyncIterator[Frame]:
        """Yield all frames from the first, as they arrive. Raises VerifierRefused if the round failed."""
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

    async def wait_done(self) -> None:
        """Return when the round has ended, successfully or not."""
        while not self.done:
            await self._changed.wait()

    async def result(self) -> Frame:
        """Wait for the end of the round and return it as a single frame. Raises VerifierRefused if it failed."""
        await self.wait_done()
        if self._error:
            raise self._error
        return self.merged()

    def merged(self) -> Frame:
        """Return the frames so far as a single frame."""
        frames = self._frames
        if not frames:
            return Frame(self.request.v, self.request.round, more=True)
        return msgspec.structs.replace(
            frames[-1],
            accepted=frames[0].accepted,
            tokens=[token for frame in frames for token in frame.tokens],
            close_calls=[call for frame in frames for call in frame.close_calls],
            logprobs=[entry for frame in frames for entry in frame.logprobs],
        )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        if self.done and self.on_done:
            on_done, self.on_done = self.on_done, None
            on_done()


class Session:
    """One text and its KV cache, pinned to one target version.

    Belongs to the event loop, except `ids`, `cache`, `draft`, `own_draft_streak` and `processor`, which belong to the
    scheduler's thread while a round is running.

    Attributes:
        id: unguessable id in URLs. In a store it begins with `messages.session_id_prefix(key)`.
        key: the opening key, set when the session is added to a store.
        owner: name of the principal that opened it; empty for anonymous requests.
        draft_identity: fingerprint of the board's draft, for the metrics.
        draft_breaker: circuit breaker for the drafts of this session.
        ids: all token ids, prompt included.
        logprobs: see `OpenRequest`.
        processor: processes the logits of this text; None if the sampling parameters leave them as they are.
        target: the target version that the session is pinned to.
        end_ids: tokens that end the text.
        cache: keys and values of all ids except the last.
        cached_tokens: how many ids of the prompt were in a KV cache before; see `PrefixCache`.
        draft: state of the verifier's own draft for this text; None until it first drafts.
        own_draft_streak: how many of its latest tokens in a row the target accepted.
        reply: the latest round; a repeated request gets it again.
        previous_reply: the round before it, kept while the latest was sent ahead, since it may be requested again.
        finish: why the text has ended, or empty.
        closed: the session was removed; frames of a running round are discarded.
        waiting: number of requests for its next round that wait for room; see `fairness.PlaceQueue`.
        last_used_at: time of the latest request, by `time.monotonic`.
        replied_at: time at which the scheduler finished the latest round, by `time.perf_counter`.
        pause_seconds: moving average of the time from there to the next round; None before the second round.
    """

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        target: Target,
        reply: RoundReply,
        owner: str = "",
        *,
        generated: int = 0,
        logprobs: int = 0,
        constraint: TokenConstraint | None = None,
    ) -> None:
        """
        Args:
            prompt: all ids so far.
            generated, logprobs: see `OpenRequest`.
            constraint: matcher of the grammar of `sampling`.
        """
        self.id = secrets.token_urlsafe(9)
        self.key = ""
        self.owner = owner
        self.draft_identity = ""
        self.draft_breaker = DraftCircuitBreaker()
        self.ids = prompt
        self.sampling = sampling
        self.logprobs = logprobs
        self.processor = make_processor(sampling, len(prompt) - generated, target.end_ids, constraint)
        self.target = target
        self.end_ids = end_ids_of(sampling, target.end_ids)
        self.cache = CachedSequence()
        self.cached_tokens = 0
        self.draft: SessionDraft | None = None
        self.own_draft_streak = 0
        self.reply = reply
        self.previous_reply: RoundReply | None = None
        self.finish = ""
        self.closed = False
        self.waiting = 0
        self.last_used_at = time.monotonic()
        self.replied_at: float | None = None
        self.pause_seconds: float | None = None

    def begin_round(self, request: RoundRequest, *, verify_draft: bool = True) -> RoundReply:
        """Record `request` as the latest round, which the caller submits now, and return its reply."""
        self.previous_reply = self.reply if request.expects else None
        self.reply = RoundReply(request, verify_draft=verify_draft)
        if self.replied_at is not None:
            pause = max(0.0, time.perf_counter() - self.replied_at)
            average = pause if self.pause_seconds is None else self.pause_seconds
            self.pause_seconds = average + PAUSE_SMOOTHING * (pause - average)
        return self.reply

    def running_predecessor(self, request: RoundRequest) -> RoundReply | None:
        """The latest round, if it is still running and `request` is the next one, sent ahead of its reply."""
        follows = bool(request.expects) and request.round == self.reply.request.round + 1
        return self.reply if follows and not self.reply.done else None

    def recorded_reply(self, request: RoundRequest) -> RoundReply | None:
        """The recorded reply if `request` repeats a round; None if `request` is the next round, to be executed now.

        Raises:
            VerifierRefused: it is neither, or was sent ahead on a wrong expectation. The session does not change.
        """
        self.last_used_at = time.monotonic()
        for recorded in (self.reply, self.previous_reply):
            if recorded and request.round == recorded.request.round:
                # A round that was sent ahead may arrive after the right one is known, or even executed.
                self._check_expectation(request, recorded.request.position)
                # A client that lost its connection may repeat the request without streaming: it is the same round.
                if _round_contents(request) == _round_contents(recorded.request):
                    return recorded
                raise VerifierRefused(
                    ErrorCode.ROUND_CONFLICT, f"round {request.round} was already executed with other contents"
                )
        latest = self.reply.request
        if request.round != latest.round + 1 or not self.reply.done:
            expected = latest.round + self.reply.done
            raise VerifierRefused(
                ErrorCode.ROUND_OUT_OF_ORDER,
                f"round {request.round} is not the next one; send round {expected}",
                detail={"expected": expected},
            )
        if self.finish and request.expects:
            raise _void_error(request, f"the text has ended ({self.finish})")
        if self.finish:
            raise VerifierRefused(ErrorCode.SESSION_FINISHED, f"the text has ended ({self.finish})")
        self._check_expectation(request, len(self.ids))
        if request.position != len(self.ids):
            raise VerifierRefused(
                ErrorCode.WRONG_POSITION,
                f"position {request.position} is not the end of the text; the next token's position is {len(self.ids)}",
                detail={"expected": len(self.ids)},
            )
        return None

    def _check_expectation(self, request: RoundRequest, position: int) -> None:
        """Raises VerifierRefused (`round_void`) unless `request` starts at `position`, after the token it expects."""
        if request.expects and request.position != position:
            raise _void_error(request, f"the text continues at {position}, not {request.position}")
        if request.expects and request.expects != self.ids[position - 1 : position]:
            raise _void_error(request, f"token {position - 1} is {self.ids[position - 1]}, not {request.expects[0]}")


class SessionStore:
    """Sessions by id and by opening key, least recently used first.

    A session is visible only to its owner: to others it does not exist. Room is shared fairly among owners: sessions
    are evicted from whoever holds most.

    Args:
        limits: with more sessions or tokens, sessions are evicted; with more idle time, too.
        on_remove: called with every session that leaves the store.
    """

    def __init__(self, limits: VerifierLimits, on_remove: Callable[[Session], None] = lambda session: None) -> None:
        self._limits = limits
        self._on_remove = on_remove
        self._by_id: OrderedDict[str, Session] = OrderedDict()
        self._by_key: dict[tuple[str, str], Session] = {}
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def max_tokens(self) -> int:
        """Tokens of all sessions together; 0 if that is not known yet."""
        return self._limits.max_tokens

    def set_max_tokens(self, tokens: int) -> None:
        """Set the limit of tokens, before the first session is opened."""
        self._limits = msgspec.structs.replace(self._limits, max_tokens=tokens)

    @property
    def load(self) -> int:
        """Share of the session slots in use, in percent."""
        return 100 * len(self._by_id) // self._limits.max_sessions

    @property
    def tokens(self) -> int:
        """Token ids of all sessions together."""
        return sum(len(session.ids) for session in self._by_id.values())

    def find_by_key(self, key: str, owner: str = "") -> Session | None:
        """The session that `owner` opened with `key`, if it is still in the store and not closed."""
        session = self._by_key.get((owner, key))
        return session if session and not session.closed else None

    def owned_by(self, owner: str) -> list[Session]:
        """The sessions of `owner`, least recently used first."""
        return [session for session in self._by_id.values() if session.owner == owner]

    def ids_of_version(self, version: str) -> list[str]:
        """Ids of the sessions that are pinned to this exact target version."""
        return [session.id for session in self._by_id.values() if session.target.version == version]

    def get(self, session_id: str, owner: str = "") -> Session:
        """Return a session of `owner` and mark it as used. Raises VerifierRefused (`session_lost`)."""
        session = self._by_id.get(session_id)
        if session is not None and session.closed:
            self.remove(session_id)
        if session is None or session.closed or session.owner != owner:
            raise VerifierRefused(
                ErrorCode.SESSION_LOST, "this session does not exist (any more); open a new one with all ids so far"
            )
        self._by_id.move_to_end(session_id)
        return session

    def add(self, key: str, session: Session) -> None:
        """Add a session, evicting others if necessary.

        Raises:
            StoreFull: see `make_room`.
            VerifierRefused: likewise.
        """
        self.make_room(1, self._reserved_tokens(session), session.owner)
        session.id = messages.session_id_prefix(key) + session.id[len(messages.session_id_prefix(key)) :]
        session.key = key
        self._by_id[session.id] = session
        self._by_key[session.owner, key] = session

    def remove(self, session_id: str) -> None:
        """Remove a session, if it exists. A running round of it stops at its next step."""
        session = self._by_id.pop(session_id, None)
        if session is not None:
            session.closed = True
            self._on_remove(session)
            session.reply.fail(VerifierRefused(ErrorCode.SESSION_LOST, "the session was closed"))
            if self._by_key.get((session.owner, session.key)) is session:
                del self._by_key[session.owner, session.key]

    def shares(self) -> dict[str, float]:
        """The dominant share of each owner: of the sessions or of the tokens, whichever it holds more of.

        Dominant resource fairness: Ghodsi et al., NSDI 2011.
        """
        return {owner: holding.share(self._limits) for owner, holding in self._holdings().items()}

    def evict_idle(self, exempt: Session | None = None) -> None:
        """Evict the sessions that have been idle for too long, except `exempt`."""
        before = time.monotonic() - self._limits.idle_seconds
        for session in list(self._by_id.values()):
            if session is not exempt and session.reply.done and session.last_used_at < before:
                self._evict(session)

    def make_room(self, sessions: int, tokens: int, owner: str = "", exempt: Session | None = None) -> None:
        """Evict idle sessions, then others if necessary, until `owner` may have `sessions` and `tokens` more.

        The least recently used session of the owner with the largest share is evicted, counting what `owner` would get.
        From an owner that holds less than `owner` would, only sessions that are not in the middle of an answer are
        taken. Sessions with a round in progress and `exempt` are never evicted, nor, while there are such, those that
        wait for room.

        Raises:
            StoreFull: the sessions that cannot be evicted leave too little room; none was evicted for this.
            VerifierRefused: `context_overflow`: there would not be room in an empty store.
        """
        now = time.monotonic()
        self.evict_idle(exempt)
        present = self._reserved_tokens(exempt) if exempt else 0
        future = self._whole_pages(tokens + (len(exempt.ids) if exempt else 0))
        if future > self._limits.max_tokens:
            limit = self._limits.max_tokens
            raise VerifierRefused(
                ErrorCode.CONTEXT_OVERFLOW,
                f"the session would take {future} tokens, and all sessions of this verifier together have room for "
                f"{limit}; ask for less",
                detail={"limit": limit},
            )
        for session in self._choose_victims(_Holding(sessions, future - present), owner, exempt, now - ACTIVE_SECONDS):
            self._evict(session)

    def _choose_victims(
        self, wanted: _Holding, owner: str, exempt: Session | None, active_since: float
    ) -> list[Session]:
        """The sessions to evict so that `owner` may have `wanted`; see `make_room`.

        Args:
            active_since: sessions that were used since then are in the middle of an answer.
        """
        limits = self._limits
        held = self._holdings()
        held[owner] += wanted
        total = sum(held.values(), _Holding())
        if total.share(limits) <= 1.0:
            return []
        anything_runs = any(not session.reply.done for session in self._by_id.values())
        # By owner, least recently used first.
        candidates: defaultdict[str, deque[Session]] = defaultdict(deque)
        for session in self._by_id.values():
            if session is not exempt and session.reply.done and not (session.waiting and anything_runs):
                candidates[session.owner].append(session)
        victims: list[Session] = []
        while total.share(limits) > 1.0:
            share = held[owner].share(limits)
            largest = max(
                (name for name, queue in candidates.items() if queue),
                key=lambda name: (held[name].share(limits), name == owner),
                default=owner,
            )
            if largest != owner and held[largest].share(limits) <= share:
                unused = (name for name, queue in candidates.items() if queue and queue[0].last_used_at < active_since)
                largest = min(unused, key=lambda name: candidates[name][0].last_used_at, default=owner)
            if not candidates[largest]:
                raise StoreFull
            victim = candidates[largest].popleft()
            victims.append(victim)
            freed = _Holding(-1, -self._reserved_tokens(victim))
            held[largest] += freed
            total += freed
        return victims

    def _holdings(self) -> defaultdict[str, _Holding]:
        """What each owner has."""
        held: defaultdict[str, _Holding] = defaultdict(_Holding)
        for session in self._by_id.values():
            held[session.owner] += _Holding(1, self._reserved_tokens(session))
        return held

    def _evict(self, session: Session) -> None:
        self.remove(session.id)
        self.evictions += 1

    def _reserved_tokens(self, session: Session) -> int:
        """Tokens of the session at the end of its round in progress, if any, rounded up to whole pages."""
        tokens, request = len(session.ids), session.reply.request
        if not session.reply.done:
            end = request.position + len(request.draft) + request.n
            tokens = max(tokens, min(end, session.target.context))
        return self._whole_pages(tokens)

    def _whole_pages(self, tokens: int) -> int:
        return -(-tokens // self._limits.page) * self._limits.page


class _Holding(NamedTuple):
    """What a principal has of a store."""

    sessions: int = 0
    tokens: int = 0

    def __add__(self, other: _Holding) -> _Holding:  # type: ignore[override]
        return _Holding(self.sessions + other.sessions, self.tokens + other.tokens)

    def share(self, limits: VerifierLimits) -> float:
        return max(self.sessions / limits.max_sessions, self.tokens / limits.max_tokens)


def _void_error(request: RoundRequest, why: str) -> VerifierRefused:
    return VerifierRefused(ErrorCode.ROUND_VOID, f"round {request.round} was sent ahead of another text: {why}")


def _round_contents(request: RoundRequest) -> tuple[object, ...]:
    """The fields that identify a round. Not `expects`: it holds for both requests, or one of them is void."""
    return (request.position, request.draft, request.n, request.siblings)
