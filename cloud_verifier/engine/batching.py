"""Continuous batching: which rounds join the next forward, and how long it waits for rounds that are expected soon.

Every round that has something to be scored joins, whatever its draft length, its siblings, and its version among the
adapters of one base model. Prompts are prefilled in chunks that share a forward with verification, so that no round
waits for a whole prompt.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Collection, Iterable
from typing import NamedTuple

from cloud_verifier.engine.fairness import TurnOrder
from cloud_verifier.engine.prefill_pacing import PrefillPacer
from cloud_verifier.engine.round import ActiveRound
from cloud_verifier.engine.sessions import Session
from cloud_verifier.model.batch import Segment, SegmentRunner
from cloud_verifier.model.runner import PendingPrefill

# Default of how long a forward waits for sessions whose next round is expected soon.
BATCH_WINDOW_SECONDS = 0.002
# A session that is this much later than its usual pause is no longer waited for.
LATE_ARRIVAL_SECONDS = 0.0005


class ScheduledSegment(NamedTuple):
    """A segment of the next forward and the round that it belongs to."""

    round: ActiveRound
    segment: Segment


class BatchSelector:
    """Selects the segments of the next forward.

    Principals take turns where a forward has no room for all, and in prefilling; see `TurnOrder`.

    Attributes:
        pacer: limits how many prompt tokens join a forward.
    """

    def __init__(self) -> None:
        self.pacer = PrefillPacer()
        self._turns, self._prefill_turns = TurnOrder(), TurnOrder()

    def select(self, rounds: Iterable[ActiveRound], *, expecting: bool) -> list[ScheduledSegment]:
        """Return everything pending for the runner of the round whose turn it is, as far as a forward has room.

        Args:
            expecting: further rounds are expected soon, which would wait for a long chunk of a prompt.
        """
        runner: SegmentRunner | None = None
        batch: list[ScheduledSegment] = []
        prefilling: list[ActiveRound] = []
        rows = 0
        for running in self._turns.sort(rounds):
            work = running.work
            if work is None:
                continue
            runner = runner or running.runner
            if running.runner is not runner:
                continue
            if isinstance(work, PendingPrefill):
                prefilling.append(running)
            elif len(batch) < runner.max_segments and (
                rows + len(work.ids) <= (runner.max_round_rows if batch else runner.max_rows)
            ):
                batch.append(ScheduledSegment(running, work))
                rows += len(work.ids)
        if runner is None:
            return []
        alone = not batch and not expecting
        prefill_rows = min(self.pacer.limit(runner, alone=alone), runner.max_rows - rows)
        prefilled: list[ActiveRound] = []
        for running in self._prefill_turns.sort(prefilling)[: runner.max_segments - len(batch)]:
            prefill = running.work
            assert isinstance(prefill, PendingPrefill)
            if prefill_rows < 1:
                break
            session = running.session
            chunk = session.target.prefill_segment(session.cache, prefill.ids[:prefill_rows])
            chunk.next_id = session.ids[session.cache.length + len(chunk)]
            batch.append(ScheduledSegment(running, chunk))
            prefilled.append(running)
            prefill_rows -= len(chunk)
        self._prefill_turns.record(prefilled)
        self._turns.record([member.round for member in batch])
        return batch


class ExpectedRounds:
    """Sessions whose next round is expected after their usual pause.

    Args:
        window: seconds that a forward may wait for them; 0 never waits.
    """

    def __init__(self, window: float) -> None:
        self._window = window
        # Heap of (expected arrival of the next round, tie-breaker, session).
        self._arrivals: list[tuple[float, int, Session]] = []

    def __bool__(self) -> bool:
        return bool(self._arrivals)

    def expect(self, session: Session) -> None:
        """Expect the next round of a session whose round has just ended, if its pauses are known."""
        session.replied_at = time.perf_counter()
        if session.pause_seconds is not None:
            heapq.heappush(self._arrivals, (session.replied_at + session.pause_seconds, id(session), session))

    def delay(self, waiting: Collection[ActiveRound]) -> float:
        """Seconds for which the next forward should wait, within the window of the oldest of the rounds that wait."""
        if not self._arrivals or not waiting:
            return 0.0
        now = time.perf_counter()
        oldest = min(each.submitted_at for each in waiting)
        window_end = min(oldest, now) + self._window
        while self._arrivals and self._arrivals[0][0] < now - LATE_ARRIVAL_SECONDS:
            heapq.heappop(self._arrivals)
        arrivals = [
            arrival
            for arrival, _, session in self._arrivals
            if arrival < window_end and session.reply.done and not session.closed
        ]
        return min(max(arrivals) + LATE_ARRIVAL_SECONDS, window_end) - now if arrivals else 0.0
