"""The engine: one thread that owns the target and plays the sessions' rounds, a forward at a time, in turn.

A round is a generator that yields after every forward, so a long continuation or prompt does not stall the others:
the thread goes round the rounds in progress. Everything else of the verifier lives on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from cloud_verifier.sampling import Choices
from cloud_verifier.sessions import Answer, Session
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
        session_load: percent of session slots in use, told to clients in every frame.
    """

    def __init__(self, load: Callable[[], Target], session_load: Callable[[], int]) -> None:
        self._load = load
        self._session_load = session_load
        self._waiting: deque[_Playing] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.target: Target | None = None
        self.failure: BaseException | None = None

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
        playing = _Playing(self._require_target(), session, answer, self._session_load)
        with self._wake:
            self._waiting.append(playing)
            self._wake.notify()

    def _require_target(self) -> Target:
        if self.target is None:
            raise VerifierRefused(ErrorCode.STARTING, "the target is still loading; try again shortly", 503)
        return self.target

    def _run(self) -> None:
        try:
            self.target = self._load()
        except BaseException as error:
            self.failure = error
            return
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                playing = self._waiting.popleft()
            if playing.step():
                with self._wake:
                    self._waiting.append(playing)


class _Playing:
    """One round in progress."""

    def __init__(self, target: Target, session: Session, answer: Answer, session_load: Callable[[], int]) -> None:
        self._target = target
        self._session = session
        self._answer = answer
        self._session_load = session_load
        self._loop = asyncio.get_running_loop()
        self._submitted = time.perf_counter()
        self._told = 0.0
        self._forward_seconds = 0.0
        self._tokens: list[int] = []
        self._close_calls: list[tuple[int, float]] = []
        self._steps = self._play()

    def step(self) -> bool:
        """Runs one forward; False when the round is over."""
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
        session, target, request = self._session, self._target, self._answer.request
        cached = session.cache.get_seq_length()
        prefill = target.prefill(session.ids[cached:-1], session.cache)
        while self._timed(lambda: next(prefill, StopIteration)) is not StopIteration:
            yield
        # A text that is nearly full has no room for the whole draft.
        draft = request.draft[: target.context - len(session.ids) - 1]
        siblings = {index: ids for index, ids in request.siblings.items() if index < len(draft)}
        verdict = self._score(draft, siblings)
        produced = len(verdict.tokens)
        self._tell(verdict.accepted, more=not session.finish and produced < request.n)
        while not session.finish and produced < request.n:
            yield
            self._score([], {})
            produced += 1
            self._tell(0, more=not session.finish and produced < request.n)

    def _score(self, draft: list[int], siblings: dict[int, list[int]]) -> Verdict:
        """One forward: scores the draft, extends the text by what the target says, rolls the rest back."""
        session = self._session
        verdict = self._timed(lambda: self._decide(draft, siblings))
        session.ids += draft[: verdict.accepted] + verdict.tokens
        # The one token that may not fit is a sibling's bonus.
        excess = max(0, len(session.ids) - self._target.context)
        if excess:
            del session.ids[-excess:]
        if verdict.ended and not excess:
            session.finish = "stop"
        elif len(session.ids) == self._target.context:
            session.finish = "length"
        self._tokens += verdict.tokens[: len(verdict.tokens) - excess]
        threshold = CLOSE_CALL[str(self._target.dtype).removeprefix("torch.")]
        self._close_calls += [(p, round(margin, 9)) for p, margin in verdict.margins if margin < threshold]
        return verdict

    def _decide(self, draft: list[int], siblings: dict[int, list[int]]) -> Verdict:
        session, target = self._session, self._target
        tree = Tree(session.ids[-1], len(session.ids), draft, siblings)
        length = session.cache.get_seq_length()
        logits = target.score(tree, session.cache)
        choices = Choices(logits, [p + 1 for p in tree.positions], session.sampling, target.chooser)
        verdict = tree.walk(choices.__getitem__, frozenset() if session.sampling.ignore_eos else target.end_ids)
        target.keep(session.cache, length, verdict.rows)
        return verdict

    def _timed(self, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self._forward_seconds += time.perf_counter() - started

    def _tell(self, accepted: int, more: bool) -> None:
        """Hands the tokens so far to the answer: at once the first and the last time, else now and then."""
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
            queue_100us=round(1e4 * max(0.0, now - self._submitted - self._forward_seconds)),
            forward_100us=round(1e4 * self._forward_seconds),
            load=self._session_load(),
            finish=self._session.finish,
            more=more,
            close_calls=self._close_calls,
        )
        self._tokens, self._close_calls = [], []
        self._loop.call_soon_threadsafe(self._answer.push, frame)
