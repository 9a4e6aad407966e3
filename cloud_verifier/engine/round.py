"""A round in progress: what it wants of the target next, and what it makes of the target's choices.

A round is a generator that yields what it wants run, and is sent what the target chose. It may yield None to let others
go first while it works on the CPU. Everything here happens in the engine's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator

from cloud_verifier.engine.sessions import Answer, Session
from cloud_verifier.model.batch import Piece
from cloud_verifier.model.runner import Chosen, Reading, Runner, Wanted
from cloud_verifier.model.speculation import Speculation
from cloud_verifier.model.tree import CLOSE_CALL, Tree
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import VERSION, Frame

# A streamed continuation sends its tokens at most this often: a frame costs some 25 bytes, an eye sees no difference.
FRAME_SECONDS = 0.02


class Round:
    """One round in progress.

    Args:
        keep: what `Pool.keep` does, for one text.
        speculation: the draft beside the target; asked before every forward, since it depends on the load.
        session_load: percent of session slots in use, told to the client in every frame.

    Attributes:
        wanted: what is to be run before `proceed`; None where there is nothing.
        over: nothing is wanted any more.
    """

    def __init__(
        self,
        session: Session,
        answer: Answer,
        keep: Callable[[Session, list[int]], None],
        speculation: Callable[[], Speculation | None],
        session_load: Callable[[], int],
    ) -> None:
        self.session = session
        self.answer = answer
        self.wanted: Wanted = None
        self.over = False
        self.submitted = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._keep = keep
        self._speculation = speculation
        self._session_load = session_load
        self._told = 0.0
        self._prefill_seconds = 0.0
        self._forward_seconds = 0.0
        self._further = 0
        self._tokens: list[int] = []
        self._close_calls: list[tuple[int, float]] = []
        self._steps = self._play()

    def proceed(self, chosen: Chosen | None, seconds: float) -> None:
        """Goes on to what is wanted next, after a forward of `seconds` in which `chosen` was said.

        Raises whatever goes wrong; the round is then to be failed.
        """
        self._forward_seconds += seconds
        try:
            self.wanted = self._steps.send(chosen)
        except StopIteration:
            self.wanted, self.over = None, True

    @property
    def runner(self) -> Runner:
        """That what is wanted is for."""
        runner = self.wanted.runner if isinstance(self.wanted, Piece) else None
        return runner or self.session.target.runner

    def add_seconds(self, seconds: float) -> None:
        """Counts a forward that ran a part of what is wanted."""
        self._forward_seconds += seconds

    def fail(self, error: VerifierRefused) -> None:
        """Ends the round badly."""
        self.wanted, self.over = None, True
        self._loop.call_soon_threadsafe(self.answer.fail, error)

    def _play(self) -> Generator[Wanted, Chosen | None, None]:
        session, request = self.session, self.answer.played
        if unread := session.ids[session.cache.length : -1]:
            yield Reading(unread)
        self._prefill_seconds, self._forward_seconds = self._forward_seconds, 0.0
        draft = request.draft[: self._room()]
        siblings = {index: ids for index, ids in request.siblings.items() if index < len(draft)}
        if session.target.runner.exact:
            siblings = {}
        accepted, own = yield from self._score(draft, siblings)
        left = request.n - len(own)
        self._tell(accepted, own, more=not session.finish and left > 0)
        while not session.finish and left > 0:
            guesses = yield from self._guess(min(left - 1, self._room()))
            accepted, own = yield from self._score(guesses, {})
            self._further += 1
            own = guesses[:accepted] + own
            left -= len(own)
            self._tell(0, own, more=not session.finish and left > 0)

    def _room(self) -> int:
        """How long a draft may be: a text that is nearly full has no room for the whole, and the target's own token."""
        return self.session.target.context - len(self.session.ids) - 1

    def _guess(self, count: int) -> Generator[Wanted, Chosen | None, list[int]]:
        """Up to `count` tokens drafted beside the target; none where there is no draft, or nothing worth drafting."""
        session, speculation = self.session, self._speculation()
        # Versions may have other vocabularies than the one that the draft was loaded beside.
        if speculation is None or speculation.vocabulary != session.target.vocabulary or count < 1:
            return []
        if session.guesses is None:
            session.guesses = speculation.guesses()
        steps = session.guesses.behind(session.ids, min(count, speculation.tokens), session.sampling)
        chosen: Chosen | None = None
        while True:
            started = time.perf_counter()
            try:
                wanted = steps.send(chosen)
            except StopIteration as end:
                guesses: list[int] = end.value
                return guesses
            finally:
                self._forward_seconds += time.perf_counter() - started
            chosen = yield wanted

    def _score(
        self, draft: list[int], siblings: dict[int, list[int]]
    ) -> Generator[Wanted, Chosen | None, tuple[int, list[int]]]:
        """One forward: scores the draft, extends the text by what the target says, rolls the rest back.

        Returns how many draft tokens the target accepted, and its own tokens behind them.
        """
        session, target = self.session, self.session.target
        tree = Tree(session.ids[-1], len(session.ids), draft, siblings)
        chosen = yield target.piece(session.cache, tree, session.sampling)
        assert chosen is not None
        verdict = tree.walk(chosen.__getitem__, frozenset() if session.sampling.ignore_eos else target.end_ids)
        self._keep(session, verdict.rows)
        session.ids += draft[: verdict.accepted] + verdict.tokens
        # The one token that may not fit is a sibling's bonus.
        excess = max(0, len(session.ids) - target.context)
        if excess:
            del session.ids[-excess:]
        if verdict.ended and not excess:
            session.finish = "stop"
        elif len(session.ids) == target.context:
            session.finish = "length"
        threshold = CLOSE_CALL[str(target.dtype).removeprefix("torch.")]
        self._close_calls += [(p, round(margin, 9)) for p, margin in verdict.margins if margin < threshold]
        return verdict.accepted, verdict.tokens[: len(verdict.tokens) - excess]

    def _tell(self, accepted: int, own: list[int], more: bool) -> None:
        """Hands the tokens so far to the answer: at once the first and the last time, else now and then."""
        self._tokens += own
        now = time.perf_counter()
        if more and self._told and now - self._told < FRAME_SECONDS:
            return
        self._told = now
        busy = self._prefill_seconds + self._forward_seconds
        frame = Frame(
            VERSION,
            self.answer.request.round,
            accepted=accepted,
            tokens=self._tokens,
            queue_100us=round(1e4 * max(0.0, now - self.submitted - busy)),
            forward_100us=round(1e4 * self._forward_seconds),
            load=self._session_load(),
            finish=self.session.finish,
            more=more,
            close_calls=self._close_calls,
            prefill_100us=round(1e4 * self._prefill_seconds),
            further=0 if more else self._further,
        )
        self._tokens, self._close_calls = [], []
        self._loop.call_soon_threadsafe(self.answer.push, frame)
