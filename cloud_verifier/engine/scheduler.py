"""The batch scheduler: one thread that owns the KV cache pools and runs the rounds of all sessions.

Which rounds join a forward, `batching` says. The rest of the verifier runs on the event loop and its worker threads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from cloud_verifier.engine.batching import BATCH_WINDOW_SECONDS, BatchSelector, ExpectedRounds, ScheduledSegment
from cloud_verifier.engine.metrics import VerifierMetrics
from cloud_verifier.engine.outbox import Outbox
from cloud_verifier.engine.own_drafts import OwnDraftPlanner
from cloud_verifier.engine.round import ActiveRound
from cloud_verifier.engine.session_caches import SessionCaches
from cloud_verifier.engine.sessions import RoundReply, Session
from cloud_verifier.model.batch import SegmentRunner
from cloud_verifier.model.kv_cache import (
    CACHE_TOKENS,
    CachedSequence,
    CachePool,
    CacheShape,
    KVCacheFull,
    affordable_tokens,
)
from cloud_verifier.model.runner import PendingPrefill, device_responds
from cloud_verifier.model.sampling import SampledTokens
from cloud_verifier.model.speculation import Speculation
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import GrammarError, TargetError, VerifierRefused
from edge_runtime.protocol.messages import ErrorCode

log = logging.getLogger(__name__)

T = TypeVar("T")

# Makes a target from its path, its name, and the targets that are loaded, with which it may share memory.
TargetFactory: TypeAlias = Callable[[Path, str, list[Target]], Target]

# Pause between attempts to unload a version while rounds of its closed sessions are still running.
UNLOAD_RETRY_SECONDS = 0.01
# How long a round waits for memory of the KV cache, and the pause between attempts while nothing else runs. Chosen.
CACHE_WAIT_SECONDS, CACHE_RETRY_SECONDS = 3.0, 0.005


class DeviceLostError(TargetError):
    """The device of a target computes nothing any more, and only a new process can use it again."""


def _refusal_after(failure: BaseException) -> VerifierRefused:
    if isinstance(failure, DeviceLostError):
        return VerifierRefused(ErrorCode.INTERNAL, "the verifier's device failed; it is going to restart")
    return VerifierRefused(ErrorCode.INTERNAL, "the target could not be loaded; see the verifier's log")


class Scheduler:
    """Runs rounds on targets, in batches, in a thread of its own.

    Args:
        load_target: makes the initial target; called once, in the scheduler's thread.
        load_speculation: makes the draft model for the initial target, or None; called likewise.
        session_load: returns the percentage of session slots in use, which every frame reports.
        cache_tokens: capacity of the KV cache in tokens, all sessions together; 0 for what memory has room for, see
            `kv_cache.affordable_tokens`.
        on_capacity: called with that capacity in the scheduler's thread, once, before the initial target is ready.
        several: further versions are going to be loaded, so some memory is left to them.
        metrics: observes rounds and forwards.
        window: seconds that a forward may wait for sessions whose next round is expected within them; 0 never waits.
        target_factory: makes the targets of `load`; None if the scheduler serves only the initial target.
        reuse_prefixes: let new sessions begin with the KV caches of others that have a prefix in common with them.

    Attributes:
        versions: all loaded targets, by exact version.
        target: the initial target, from when it is loaded until it is unloaded.
        speculation: the verifier's own draft model, if any.
        failure: why the initial target did not load, or why the thread has ended.
    """

    def __init__(
        self,
        load_target: Callable[[], Target],
        load_speculation: Callable[[Target], Speculation | None],
        session_load: Callable[[], int],
        *,
        cache_tokens: int = CACHE_TOKENS,
        on_capacity: Callable[[int], None] = lambda tokens: None,
        several: bool = False,
        metrics: VerifierMetrics | None = None,
        window: float = BATCH_WINDOW_SECONDS,
        target_factory: TargetFactory | None = None,
        reuse_prefixes: bool = True,
    ) -> None:
        self._load_target = load_target
        self._target_factory = target_factory
        self._load_speculation = load_speculation
        self._session_load = session_load
        self._on_capacity = on_capacity
        self._several = several
        self._metrics = metrics or VerifierMetrics()
        self._submitted: deque[ActiveRound] = deque()
        self._tasks: deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = deque()
        self._running: list[ActiveRound] = []
        # Those whose next tokens the device computes already.
        self._ahead: list[ActiveRound] = []
        self._selector = BatchSelector()
        self._expected = ExpectedRounds(window)
        self._caches = SessionCaches(cache_tokens, reuse_prefixes=reuse_prefixes)
        self._outbox = Outbox()
        # By shape of the KV cache: what takes as long.
        self._own_drafts: dict[CacheShape, OwnDraftPlanner] = defaultdict(
            lambda: OwnDraftPlanner(
                self.speculation.acceptance if self.speculation else {}, self._metrics.observe_own_draft
            )
        )
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._step_started_at: float | None = None
        self.versions: dict[str, Target] = {}
        self.target: Target | None = None
        self.speculation: Speculation | None = None
        self.failure: BaseException | None = None

    @property
    def stalled_seconds(self) -> float:
        """How long the current step has been running; 0 between steps, infinite if the thread has ended."""
        started_at = self._step_started_at
        if not self._thread.is_alive():
            return float("inf")
        return 0.0 if started_at is None else time.perf_counter() - started_at

    @property
    def retained_tokens(self) -> int:
        """Tokens of closed sessions that are kept in KV caches for reuse."""
        return self._caches.retained_tokens

    @property
    def prefix_cache_evictions(self) -> int:
        """Closed sessions whose caches were given up because a pool needed the memory."""
        return self._caches.evictions

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the forward in progress and end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, session: Session, reply: RoundReply) -> None:
        """Queue the round of `reply`, which receives its frames. Call from the event loop."""
        active_round = ActiveRound(
            session,
            reply,
            caches=self._caches,
            current_speculation=self._current_speculation,
            own_drafts=self._own_drafts[session.target.runner.shape],
            session_load=self._session_load,
            outbox=self._outbox,
        )
        with self._wake:
            failure = self.failure
            if failure is None:
                self._submitted.append(active_round)
                self._wake.notify()
                return
        session.closed = True
        reply.fail(_refusal_after(failure))

    def release(self, session: Session) -> None:
        """Free the KV cache of a closed session, or keep it for reuse, once its round in progress has ended."""
        self._caches.release(session)

    async def load(self, path: Path, name: str) -> Target:
        """Load the version at `path` while the others are served. It shares memory with them if it can.

        Raises:
            TargetError: it does not load; nothing has changed.
        """
        assert self._target_factory is not None, "this scheduler serves only its initial target"
        target = await asyncio.to_thread(self._target_factory, path, name, list(self.versions.values()))

        def install() -> Target:
            self._caches.pool(target.runner.shape)
            target.attach_adapter()
            self.versions[target.version] = target
            return target

        return await self._run_between_steps(install)

    async def unload(self, version: str) -> None:
        """Unload a version that no session is pinned to any more, once its last round has ended."""
        while True:
            if await self._run_between_steps(lambda: self._try_unload(version)):
                # A model refers to itself, and the collector rarely looks for such garbage.
                await asyncio.to_thread(gc.collect)
                return
            await asyncio.sleep(UNLOAD_RETRY_SECONDS)

    def _try_unload(self, version: str) -> bool:
        """Unload `version`, unless a round of it is running. Return whether it was unloaded."""
        if any(running.session.target.version == version for running in self._running):
            return False
        # The pages of closed sessions must go back to their pool before the pool is dropped.
        self._free_released_sessions()
        target = self.versions.pop(version, None)
        if target is not None:
            shapes = {other.runner.shape for other in self.versions.values()}
            self._caches.remove(target, last_of_shape=target.runner.shape not in shapes)
            target.detach_adapter()
            if self.target is target:
                self.target = None
        return True

    async def release_unused_memory(self, idle_seconds: float) -> None:
        """Free memory that a peak has left behind; to be called regularly.

        Args:
            idle_seconds: how long KV caches of closed sessions are kept for reuse, where that takes memory.
        """

        def release() -> None:
            self._free_released_sessions()
            self._caches.shrink(idle_seconds)

        await self._run_between_steps(release)

    async def _run_between_steps(self, task: Callable[[], T]) -> T:
        future = concurrent.futures.Future[T]()
        with self._wake:
            self._tasks.append((task, future))
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def _current_speculation(self) -> Speculation | None:
        """The verifier's own draft model; None if there is none, or with more rounds running than it may draft for."""
        speculation = self.speculation
        return speculation if speculation and len(self._running) <= speculation.max_rounds else None

    def _run(self) -> None:
        """Body of the thread."""
        try:
            self._install_initial_target(self._load_target())
        except BaseException as error:
            self.failure = error
            return
        while not self._stopping:
            with self._wake:
                self._wake.wait_for(lambda: self._submitted or self._running or self._tasks or self._stopping)
                while not self._stopping and (seconds := self._expected.delay([*self._submitted, *self._running])) > 0:
                    self._outbox.flush()
                    self._wake.wait(seconds)
            self._step_started_at = time.perf_counter()
            try:
                self._step()
            except DeviceLostError as error:
                self._abandon(error)
                return
            self._step_started_at = None
        self._outbox.flush()
        for runner in {id(target.runner): target.runner for target in self.versions.values()}.values():
            runner.shut_down()

    def _abandon(self, error: DeviceLostError) -> None:
        """Fail all rounds, as the thread is about to end."""
        log.critical("%s", error, exc_info=error.__cause__)
        self.failure = error
        with self._wake:
            rounds = [*self._running, *self._submitted]
        for running in rounds:
            if not running.done:
                running.session.closed = True
                running.fail(_refusal_after(error))
        self._outbox.flush()

    def _install_initial_target(self, target: Target) -> None:
        self.speculation = self._load_speculation(target)
        target.attach_adapter()
        runner: SegmentRunner = target.runner
        if not self._caches.capacity_tokens:
            draft = self.speculation.runner if self.speculation else None
            self._caches.capacity_tokens = affordable_tokens(
                [runner.shape, *([draft.shape] if draft else [])],
                workspace=runner.measure_workspace() + (draft.measure_workspace() if draft else 0),
                several=self._several,
            )
        self._on_capacity(self._caches.capacity_tokens)
        pool = self._caches.pool(runner.shape)
        runner.warm_up(pool)
        if pool.preallocated:
            self._calibrate(target, pool)
        if self.speculation and self.speculation.runner:
            self.speculation.runner.warm_up(self._caches.pool(self.speculation.runner.shape, for_draft=True))
        self.versions[target.version] = target
        # Last: it makes the verifier ready.
        self.target = target

    def _calibrate(self, target: Target, pool: CachePool) -> None:
        """Measure how long prefill takes on an accelerator, so that even the first prompt delays no round for long."""
        rows = min(target.runner.max_prefill_rows, target.context - 1, self._caches.capacity_tokens)
        sequence = CachedSequence()
        # Twice: the first forward of its kind also loads kernels.
        for _ in range(2):
            started = time.perf_counter()
            target.run(pool, [target.prefill_segment(sequence, [0] * rows)])
            seconds = time.perf_counter() - started
        pool.release(sequence)
        self._selector.pacer.calibrate(target.runner, rows, seconds)

    def _step(self) -> None:
        """Run pending tasks, admit submitted rounds, run one forward, and advance the rounds in it.

        Their frames are handed over when the next forward runs, if there is one: until then this thread needs the
        interpreter, which the event loop would take from it.
        """
        self._ahead = [running for running in self._ahead if not running.done]
        # Tasks change what forwards use, and none may run then.
        if self._tasks and not self._ahead:
            self._outbox.flush()
        while self._tasks and not self._ahead:
            task, future = self._tasks.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except Exception as error:
                    future.set_exception(error)
        while self._submitted:
            submitted = self._submitted.popleft()
            self._metrics.queue_seconds.observe(time.perf_counter() - submitted.submitted_at)
            self._running.append(submitted)
            target = submitted.session.target
            if self.versions.get(target.version) is not target:
                # The version was unloaded after the session had been routed to it.
                submitted.session.closed = True
            self._advance(submitted, None, 0.0)
        self._free_released_sessions()
        batch = self._select_batch()
        for running in self._running:
            if running.work is None and not running.done:
                self._advance(running, None, 0.0)
        waits = bool(batch) and not self._run_forward(batch)
        self._running = [running for running in self._running if not running.done]
        if waits or not batch or not self._running:
            self._outbox.flush()
        if waits:
            # From here on, only the end of a session frees memory.
            with self._wake:
                self._wake.wait(CACHE_RETRY_SECONDS)

    def _select_batch(self) -> list[ScheduledSegment]:
        # What is computed already comes first, and what is new joins the forward after it.
        ahead = [running for running in self._ahead if running.work is not None]
        batch = self._selector.select(ahead or self._running, expecting=bool(self._expected))
        if 0 < len(batch) < len(self._running):
            # The list is ordered by waiting time: rounds of this forward go to its end.
            scheduled = {id(member.round) for member in batch}
            self._running.sort(key=lambda running: id(running) in scheduled)
        return batch

    def _run_forward(self, batch: list[ScheduledSegment]) -> bool:
        """Run the batch in one forward. If that fails, run its halves, until only the faulty round fails.

        Returns whether anything was done. Rounds for which the KV cache has no memory left are left as they are.
        """
        # A segment of the draft model names its runner; segments of the target are run by one of its versions.
        first = batch[0]
        runner = first.segment.runner or first.round.session.target
        continues = self._continues(batch)
        self._ahead = []
        started = time.perf_counter()
        try:
            is_draft = first.round.runner is not first.round.session.target.runner
            pool = self._caches.pool(first.round.runner.shape, for_draft=is_draft)
            segments = [member.segment for member in batch]
            sampled_by_segment = runner.run(pool, segments, self._outbox.flush, continues)
        except Exception as error:
            device = first.round.runner.shape.device
            if not device_responds(device):
                raise DeviceLostError(f"{device} is lost: {error}") from error
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            if len(batch) > 1:
                middle = len(batch) // 2
                return sum(self._run_forward(half) for half in (batch[:middle], batch[middle:])) > 0
            if isinstance(error, KVCacheFull) and first.round.may_wait_for_memory(CACHE_WAIT_SECONDS):
                return False
            self._fail(first.round, error)
            return True
        if continues:
            self._ahead = [member.round for member in batch]
        seconds = time.perf_counter() - started
        prefilled = sum(len(segment.ids) for running, segment in batch if isinstance(running.work, PendingPrefill))
        self._selector.pacer.observe(first.round.runner, prefilled, seconds)
        if first.segment.runner is None:
            self._metrics.observe_forward(sum(len(segment.ids) for _, segment in batch), len(batch), seconds)
        for (running, segment), sampled in zip(batch, sampled_by_segment, strict=True):
            if segment.keep_all:
                pool.keep(segment.sequence, list(range(len(segment))))
            if isinstance(running.work, PendingPrefill):
                remaining = running.work.ids[len(segment) :]
                if remaining:
                    running.work = PendingPrefill(remaining)
                    running.forward_seconds += seconds
                    continue
            self._advance(running, sampled, seconds)
        return True

    def _continues(self, batch: list[ScheduledSegment]) -> bool:
        """Whether the next forward will be of the tokens after this one's, as far as is known now."""
        others = self._submitted or self._tasks or self._expected or self._stopping
        if others or len(batch) < len(self._running) or not batch[0].round.runner.runs_ahead:
            return False
        return all(member.round.continues for member in batch)

    def _advance(self, running: ActiveRound, sampled: SampledTokens | None, seconds: float) -> None:
        session = running.session
        if session.closed:
            running.fail(VerifierRefused(ErrorCode.SESSION_LOST, "the session was closed"))
            return
        try:
            running.advance(sampled, seconds)
        except Exception as error:
            self._fail(running, error)
        if running.done:
            self._expected.expect(session)

    def _fail(self, running: ActiveRound, error: Exception) -> None:
        # The cache may hold an incomplete round, so the session is lost and its client opens another.
        running.session.closed = True
        self._caches.forget(running.session)
        self.release(running.session)
        if isinstance(error, KVCacheFull):
            running.fail(VerifierRefused(ErrorCode.OVERLOADED, "the KV cache is full; try again shortly"))
            return
        if isinstance(error, torch.OutOfMemoryError):
            log.error("a round took more memory than there is", exc_info=error)
            running.fail(VerifierRefused(ErrorCode.OVERLOADED, "the verifier ran out of memory; try again shortly"))
            return
        if isinstance(error, GrammarError):
            running.fail(VerifierRefused(ErrorCode.INVALID_GRAMMAR, str(error)))
            return
        log.error("a round failed", exc_info=error)
        running.fail(VerifierRefused(ErrorCode.INTERNAL, "the round failed; see the verifier's log"))

    def _free_released_sessions(self) -> None:
        if not self._caches.has_released:
            return
        busy = {running.session for running in self._running if not running.done}
        self._caches.free_released(busy, self.speculation)
