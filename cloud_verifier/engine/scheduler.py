"""The engine: one thread that owns the targets' caches and runs the sessions' rounds, many to a forward.

Whoever has something to be scored goes into the next forward, whatever its draft's length, its siblings, and its
version among the adapters of one base; who is in the middle of a long prompt goes in with a part of it, so that nobody
waits for a whole one. Everything else of the verifier lives on the event loop.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from cloud_verifier.engine.metrics import Metrics
from cloud_verifier.engine.round import Round
from cloud_verifier.engine.sessions import Answer, Session
from cloud_verifier.model.batch import Piece
from cloud_verifier.model.kv_cache import Pool, PoolFull, Shape
from cloud_verifier.model.runner import Chosen, Reading, Runner
from cloud_verifier.model.speculation import Speculation
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import TargetError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode

log = logging.getLogger(__name__)

T = TypeVar("T")

Make: TypeAlias = Callable[[Path, str, list[Target]], Target]

# A session is expected back when it usually comes; so much later, nobody waits for it any more.
LATE_SECONDS = 0.0005
# Between attempts to forget a version whose closed sessions have rounds that are not over.
UNLOAD_SECONDS = 0.01


# How long a forward waits for sessions that are expected at any moment.
WINDOW_SECONDS = 0.002


class Engine:
    """Runs rounds on targets.

    Args:
        load: makes the first target; called once, in the engine's thread. None where all come by `load`.
        speculate: makes the draft beside it, or None; called likewise.
        session_load: percent of session slots in use, told to clients in every frame.
        tokens: that the texts of all sessions may have together.
        metrics: is told of forwards, and of rounds that begin.
        window: seconds that a forward may wait for sessions that are expected within them; 0 waits for nobody.
        make: makes a target for `load`, from its path, its name, and those that are loaded.

    Attributes:
        target: the first target, once it is loaded and until it is unloaded.
        versions: all targets that are loaded, by their exact version.
        failure: why the first did not load.
    """

    def __init__(
        self,
        load: Callable[[], Target] | None,
        speculate: Callable[[Target], Speculation | None],
        session_load: Callable[[], int],
        tokens: int = 1 << 18,
        metrics: Metrics | None = None,
        window: float = WINDOW_SECONDS,
        make: Make | None = None,
    ) -> None:
        self._load_first = load
        self._make = make
        self._speculate = speculate
        self._session_load = session_load
        self._tokens = tokens
        self._metrics = metrics or Metrics()
        self._window = window
        self._arrived: deque[Round] = deque()
        self._released: deque[Session] = deque()
        self._chores: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._rounds: list[Round] = []
        self._due: list[tuple[float, int, Session]] = []
        self._pools: dict[tuple[Shape, bool], Pool] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stepping_since: float | None = None
        self._versions: dict[str, Target] = {}
        self.target: Target | None = None
        self.speculation: Speculation | None = None
        self.failure: BaseException | None = None

    @property
    def versions(self) -> Mapping[str, Target]:
        return self._versions

    @property
    def stalled_seconds(self) -> float:
        """How long the step in progress has been at it; 0 where there is none, infinite if the thread has ended."""
        since = self._stepping_since
        if not self._thread.is_alive():
            return float("inf")
        return 0.0 if since is None else time.perf_counter() - since

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finishes the forward in progress and ends the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, session: Session, answer: Answer) -> None:
        """Queues the round of `answer`; its frames appear there. Call from the event loop."""
        playing = Round(session, answer, self._keep, self._speculation_now, self._session_load)
        with self._wake:
            self._arrived.append(playing)
            self._wake.notify()

    def release(self, session: Session) -> None:
        """Takes back what a closed session holds, once its round in progress, if any, has ended."""
        self._released.append(session)

    async def load(self, path: Path, name: str) -> Target:
        """Adds the version at `path`, while the others go on being served; it shares what memory it can with them.

        Raises:
            TargetError: it does not load; nothing has changed.
        """
        assert self._make is not None, "this engine serves the one target that it began with"
        target = await asyncio.to_thread(self._make, path, name, list(self._versions.values()))

        def admit() -> Target:
            self._pool(target.runner.shape)
            target.settle()
            self._versions[target.version] = target
            return target

        return await self._between_forwards(admit)

    async def unload(self, version: str) -> None:
        """Forgets a version, which no session is pinned to any more, once its last round has ended."""
        forgotten = await self._between_forwards(lambda: self._forget(version))
        while not forgotten:
            await asyncio.sleep(UNLOAD_SECONDS)
            forgotten = await self._between_forwards(lambda: self._forget(version))

    def _forget(self, version: str) -> bool:
        """Whether that was possible."""
        if any(playing.session.target.version == version for playing in self._rounds):
            return False
        # Pages go back to the pool that they are from, while that is here.
        self._reclaim()
        target = self._versions.pop(version, None)
        if target is not None:
            target.retire()
            if not any(other.runner.shape == target.runner.shape for other in self._versions.values()):
                self._pools.pop((target.runner.shape, False), None)
            if self.target is target:
                self.target = None
        return True

    async def _between_forwards(self, chore: Callable[[], T]) -> T:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._wake:
            self._chores.append((chore, future))
            self._wake.notify()
        return await future

    def _speculation_now(self) -> Speculation | None:
        """The draft beside the target, unless there are so many rounds that the boards should draft."""
        speculation = self.speculation
        return speculation if speculation and len(self._rounds) <= speculation.most_rounds else None

    def _run(self) -> None:
        try:
            if self._load_first is not None:
                self._begin(self._load_first())
        except BaseException as error:
            self.failure = error
            return
        while not self._stopping:
            with self._wake:
                self._wake.wait_for(lambda: self._arrived or self._rounds or self._chores or self._stopping)
                while not self._stopping and (seconds := self._missing_for()) > 0:
                    self._wake.wait(seconds)
            self._stepping_since = time.perf_counter()
            self._step()
            self._stepping_since = None
        for runner in {id(target.runner): target.runner for target in self._versions.values()}.values():
            runner.end()

    def _begin(self, target: Target) -> None:
        self.speculation = self._speculate(target)
        target.settle()
        target.runner.warm(self._pool(target.runner.shape))
        if self.speculation and self.speculation.runner:
            self.speculation.runner.warm(self._pool(self.speculation.runner.shape, drafts=True))
        self._versions[target.version] = target
        # Last, because with it the verifier is ready.
        self.target = target

    def _missing_for(self) -> float:
        """How long to wait for sessions that are expected at any moment. Nobody is waited for beyond the window."""
        if not self._arrived and not self._rounds:
            return 0.0
        now, first = time.perf_counter(), min(r.submitted for r in (*self._arrived, *self._rounds))
        close = min(first, now) + self._window
        while self._due and self._due[0][0] < now - LATE_SECONDS:
            heapq.heappop(self._due)
        coming = [due for due, _, session in self._due if due < close and session.answer.done and not session.closed]
        return min(max(coming) + LATE_SECONDS, close) - now if coming else 0.0

    def _step(self) -> None:
        """Chores, newcomers, one forward, and what follows from it."""
        while self._chores:
            chore, future = self._chores.popleft()
            _settle(future, chore)
        while self._arrived:
            playing = self._arrived.popleft()
            self._metrics.queued(time.perf_counter() - playing.submitted)
            self._rounds.append(playing)
            target = playing.session.target
            if self._versions.get(target.version) is not target:
                # It was unloaded since the session was led to it.
                playing.session.closed = True
            self._proceed(playing, None, 0.0)
        self._reclaim()
        members = self._members()
        for playing in self._rounds:
            if playing.wanted is None and not playing.over:
                self._proceed(playing, None, 0.0)
        if members:
            self._forward(members)
        self._rounds = [playing for playing in self._rounds if not playing.over]

    def _members(self) -> list[tuple[Round, Piece]]:
        """Who goes into the next forward: of the runner of who waits longest, all that have something to be scored."""
        runner: Runner | None = None
        members: list[tuple[Round, Piece]] = []
        readers: list[Round] = []
        rows = 0
        for playing in self._rounds:
            if playing.wanted is None:
                continue
            runner = runner or playing.runner
            if playing.runner is not runner:
                continue
            if isinstance(playing.wanted, Reading):
                readers.append(playing)
            elif rows + len(playing.wanted) <= runner.most_rows and len(members) < runner.most_pieces:
                members.append((playing, playing.wanted))
                rows += len(playing.wanted)
        if runner is None:
            return []
        room = min(runner.prompt_rows, runner.most_rows - rows)
        for playing in readers[: runner.most_pieces - len(members)]:
            reading = playing.wanted
            assert isinstance(reading, Reading)
            if room < 1:
                break
            piece = playing.session.target.reading(playing.session.cache, reading.ids[:room])
            members.append((playing, piece))
            room -= len(piece)
        # Who waits longest comes first, and who was in this one goes to the end of the queue.
        served = {id(playing) for playing, _ in members}
        self._rounds.sort(key=lambda playing: id(playing) in served)
        return members

    def _forward(self, members: list[tuple[Round, Piece]]) -> None:
        """Runs the pieces in one forward; if that fails, each in one of its own, so that one cannot harm another."""
        # For whom it is: the target's forwards are run by one of its versions, a draft's by its runner.
        runner = members[0][1].runner or members[0][0].session.target
        started = time.perf_counter()
        try:
            pool = self._pool_of(members[0][0])
            chosen = runner.run(pool, [piece for _, piece in members])
        except Exception as error:
            if len(members) > 1:
                for member in members:
                    self._forward([member])
                return
            self._fail(members[0][0], error)
            return
        seconds = time.perf_counter() - started
        if members[0][1].runner is None:
            self._metrics.forward(sum(len(piece) for _, piece in members), len(members), seconds)
        for (playing, piece), said in zip(members, chosen, strict=True):
            if piece.stays:
                pool.keep(piece.text, list(range(len(piece))))
            if isinstance(playing.wanted, Reading):
                left = playing.wanted.ids[len(piece) :]
                if left:
                    playing.wanted = Reading(left)
                    playing.add_seconds(seconds)
                    continue
            self._proceed(playing, said, seconds)

    def _proceed(self, playing: Round, chosen: Chosen | None, seconds: float) -> None:
        if playing.session.closed:
            playing.fail(VerifierRefused(ErrorCode.SESSION_LOST, "the session was closed", 404))
            return
        try:
            playing.proceed(chosen, seconds)
        except Exception as error:
            self._fail(playing, error)
        if playing.over:
            session = playing.session
            session.answered_at = time.perf_counter()
            if session.pause is not None:
                heapq.heappush(self._due, (session.answered_at + session.pause, id(session), session))

    def _fail(self, playing: Round, error: Exception) -> None:
        # The cache may hold half a round: the session is lost, and its client opens another.
        playing.session.closed = True
        self.release(playing.session)
        if isinstance(error, PoolFull):
            playing.fail(VerifierRefused(ErrorCode.OVERLOADED, "the cache is full; try again shortly", 503))
            return
        log.error("a round failed", exc_info=error)
        playing.fail(VerifierRefused(ErrorCode.INTERNAL, "the round failed; the verifier's log says why", 500))

    def _pool(self, shape: Shape, drafts: bool = False) -> Pool:
        if (shape, drafts) not in self._pools:
            try:
                self._pools[shape, drafts] = Pool(shape, self._tokens)
            except torch.OutOfMemoryError:
                wanted = self._tokens * shape.bytes_per_token / 2**30
                raise TargetError(
                    f"keys and values of {self._tokens} tokens take {wanted:.1f} GiB, which {shape.device} does not "
                    "have beside the target; lower --max-tokens"
                ) from None
        return self._pools[shape, drafts]

    def _pool_of(self, playing: Round) -> Pool:
        return self._pool(playing.runner.shape, drafts=playing.runner is not playing.session.target.runner)

    def _keep(self, session: Session, rows: list[int]) -> None:
        self._pool(session.target.runner.shape).keep(session.cache, rows)

    def _reclaim(self) -> None:
        """Gives the pages of closed sessions back, but for those whose round is not over yet."""
        busy = {id(playing.session) for playing in self._rounds if not playing.over}
        for _ in range(len(self._released)):
            session = self._released.popleft()
            if id(session) in busy:
                self._released.append(session)
            else:
                self._pool(session.target.runner.shape).release(session.cache)
                guesses, speculation = session.guesses, self.speculation
                if guesses and guesses.text and speculation and speculation.runner:
                    self._pool(speculation.runner.shape, drafts=True).release(guesses.text)


def _settle(future: asyncio.Future[Any], chore: Callable[[], Any]) -> None:
    """Does `chore` and tells its future, on the future's own loop."""
    loop = future.get_loop()
    try:
        result = chore()
    except Exception as error:
        loop.call_soon_threadsafe(_tell, future, None, error)
    else:
        loop.call_soon_threadsafe(_tell, future, result, None)


def _tell(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
