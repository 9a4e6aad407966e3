"""The engine: one thread that owns the target and plays the sessions' rounds, a forward at a time, in turn.

A round is a generator that yields after every forward, so a long continuation or prompt does not stall the others:
the thread goes round the rounds in progress. Where there is a draft beside the target, a step drafts before its
forward. Everything else of the verifier lives on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from cloud_verifier.metrics import Metrics
from cloud_verifier.sampling import Choices
from cloud_verifier.sessions import Answer, Session
from cloud_verifier.speculation import Speculation
from cloud_verifier.target import Target
from cloud_verifier.tree import CLOSE_CALL, Tree, Verdict
from edge_runtime.contract.errors import VerifierRefused
from edge_runtime.contract.wire import VERSION, ErrorCode, Frame

log = logging.getLogger(__name__)

T = TypeVar("T")

# A streamed continuation sends its tokens at most this often: a frame costs some 25 bytes, an eye sees no difference.
FRAME_SECONDS = 0.02


class Engine:
    """Plays rounds on a target that its own thread loads.

    Args:
        load: makes the target; called once, in the engine's thread.
        speculate: makes the draft beside it, or None; called likewise.
        session_load: percent of session slots in use, told to clients in every frame.
        metrics: is told of forwards, and of rounds that begin.
    """

    def __init__(
        self,
        load: Callable[[], Target],
        speculate: Callable[[Target], Speculation | None],
        session_load: Callable[[], int],
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._load = load
        self._speculate = speculate
        self._session_load = session_load
        self._waiting: deque[_Playing] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.target: Target | None = None
        self.speculation: Speculation | None = None
        self.failure: BaseException | None = None
        self._stepping_since: float | None = None

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
        playing = _Playing(self._require_target(), self.speculation, session, answer, self._session_load, self._metrics)
        with self._wake:
            self._waiting.append(playing)
            self._wake.notify()

    def _require_target(self) -> Target:
        if self.target is None:
            raise VerifierRefused(ErrorCode.STARTING, "the target is still loading; try again shortly", 503)
        return self.target

    def _run(self) -> None:
        try:
            target = self._load()
            self.speculation = self._speculate(target)
            # Last, because with it the verifier is ready.
            self.target = target
        except BaseException as error:
            self.failure = error
            return
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                playing = self._waiting.popleft()
            self._stepping_since = time.perf_counter()
            more = playing.step()
            self._stepping_since = None
            if more:
                with self._wake:
                    self._waiting.append(playing)


class _Playing:
    """One round in progress."""

    def __init__(
        self,
        target: Target,
        speculation: Speculation | None,
        session: Session,
        answer: Answer,
        session_load: Callable[[], int],
        metrics: Metrics,
    ) -> None:
        self._target = target
        self._metrics = metrics
        self._speculation = speculation
        self._session = session
        self._answer = answer
        self._session_load = session_load
        self._loop = asyncio.get_running_loop()
        self._submitted = time.perf_counter()
        self._told = 0.0
        self._prefill_seconds = 0.0
        self._forward_seconds = 0.0
        self._tokens: list[int] = []
        self._close_calls: list[tuple[int, float]] = []
        self._steps = self._play()

    def step(self) -> bool:
        """Runs one forward; False when the round is over."""
        if not self._answer.started:
            self._answer.started = True
            self._metrics.queued(time.perf_counter() - self._submitted)
        try:
            next(self._steps)
        except StopIteration:
            return False
        except Exception:
            log.exception("a round failed")
            # The cache may hold half a round: the session is lost, and its client opens another.
            self._session.closed = True
            error = VerifierRefused(ErrorCode.INTERNAL, "the round failed; the verifier's log says why", 500)
            self._loop.call_soon_threadsafe(self._answer.fail, error)
            return False
        if self._session.closed:
            error = VerifierRefused(ErrorCode.SESSION_LOST, "the session was closed", 404)
            self._loop.call_soon_threadsafe(self._answer.fail, error)
            return False
        return True

    def _play(self) -> Iterator[None]:
        session, target, request = self._session, self._target, self._answer.played
        cached = session.cache.get_seq_length()
        yield from self._counted(target.prefill(session.ids[cached:-1], session.cache))
        self._prefill_seconds, self._forward_seconds = self._forward_seconds, 0.0
        draft = request.draft[: self._room()]
        siblings = {index: ids for index, ids in request.siblings.items() if index < len(draft)}
        accepted, own = self._score(draft, siblings)
        left = request.n - len(own)
        self._tell(accepted, own, more=not session.finish and left > 0)
        while not session.finish and left > 0:
            yield
            guesses = yield from self._guess(min(left - 1, self._room()))
            accepted, own = self._score(guesses, {})
            own = guesses[:accepted] + own
            left -= len(own)
            self._tell(0, own, more=not session.finish and left > 0)

    def _room(self) -> int:
        """How long a draft may be: a text that is nearly full has no room for the whole, and the target's own token."""
        return self._target.context - len(self._session.ids) - 1

    def _guess(self, count: int) -> Generator[None, None, list[int]]:
        """Up to `count` tokens drafted beside the target; none where there is no draft, or nothing worth drafting."""
        session = self._session
        if self._speculation is None or count < 1:
            return []
        if session.guesses is None:
            session.guesses = self._speculation.guesses()
        count = min(count, self._speculation.tokens)
        return (yield from self._counted(session.guesses.behind(session.ids, count, session.sampling)))

    def _score(self, draft: list[int], siblings: dict[int, list[int]]) -> tuple[int, list[int]]:
        """One forward: scores the draft, extends the text by what the target says, rolls the rest back.

        Returns how many draft tokens the target accepted, and its own tokens behind them.
        """
        session = self._session
        started = time.perf_counter()
        verdict = self._decide(draft, siblings)
        seconds = time.perf_counter() - started
        self._forward_seconds += seconds
        self._metrics.forward(1 + len(draft) + sum(map(len, siblings.values())), 1, seconds)
        session.ids += draft[: verdict.accepted] + verdict.tokens
        # The one token that may not fit is a sibling's bonus.
        excess = max(0, len(session.ids) - self._target.context)
        if excess:
            del session.ids[-excess:]
        if verdict.ended and not excess:
            session.finish = "stop"
        elif len(session.ids) == self._target.context:
            session.finish = "length"
        threshold = CLOSE_CALL[str(self._target.dtype).removeprefix("torch.")]
        self._close_calls += [(p, round(margin, 9)) for p, margin in verdict.margins if margin < threshold]
        return verdict.accepted, verdict.tokens[: len(verdict.tokens) - excess]

    def _decide(self, draft: list[int], siblings: dict[int, list[int]]) -> Verdict:
        session, target = self._session, self._target
        tree = Tree(session.ids[-1], len(session.ids), draft, siblings)
        length = session.cache.get_seq_length()
        logits = target.score(tree, session.cache)
        choices = Choices(logits, [p + 1 for p in tree.positions], session.sampling, target.chooser)
        verdict = tree.walk(choices.__getitem__, frozenset() if session.sampling.ignore_eos else target.end_ids)
        target.keep(session.cache, length, verdict.rows)
        return verdict

    def _counted(self, steps: Generator[None, None, T]) -> Generator[None, None, T]:
        """`steps`, and what they return, their time counted as the forwards' is."""
        while True:
            started = time.perf_counter()
            try:
                next(steps)
            except StopIteration as end:
                returned: T = end.value
                return returned
            finally:
                self._forward_seconds += time.perf_counter() - started
            yield

    def _tell(self, accepted: int, own: list[int], more: bool) -> None:
        """Hands the tokens so far to the answer: at once the first and the last time, else now and then."""
        self._tokens += own
        now = time.perf_counter()
        if more and self._told and now - self._told < FRAME_SECONDS:
            return
        self._told = now
        request = self._answer.request
        frame = Frame(
            VERSION,
            request.round,
            accepted=accepted,
            tokens=self._tokens,
            queue_100us=round(1e4 * max(0.0, now - self._submitted - self._prefill_seconds - self._forward_seconds)),
            forward_100us=round(1e4 * self._forward_seconds),
            load=self._session_load(),
            finish=self._session.finish,
            more=more,
            close_calls=self._close_calls,
            prefill_100us=round(1e4 * self._prefill_seconds),
        )
        self._tokens, self._close_calls = [], []
        self._loop.call_soon_threadsafe(self._answer.push, frame)
