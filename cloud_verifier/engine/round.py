"""A round in progress: which forward it needs next, and what it does with the sampled tokens.

A round is a generator. It yields the work that it needs run and is sent the tokens that the model sampled. It yields
None to let other rounds proceed while it works on the CPU. Everything but its construction runs in the scheduler's
thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

import msgspec

from cloud_verifier.engine.outbox import Outbox
from cloud_verifier.engine.own_drafts import OwnDraftPlanner
from cloud_verifier.engine.session_caches import SessionCaches
from cloud_verifier.engine.sessions import RoundReply, Session
from cloud_verifier.model.batch import Segment, SegmentRunner
from cloud_verifier.model.runner import PendingPrefill, RoundWork
from cloud_verifier.model.sampling import SampledTokens
from cloud_verifier.model.speculation import OwnDraft, Speculation
from cloud_verifier.model.tree import TokenTree
from edge_runtime.protocol.errors import GrammarError, VerifierRefused
from edge_runtime.protocol.messages import MAX_TREE_NODES, PROTOCOL_VERSION, STREAM_FRAME_SECONDS, Frame, TokenLogprobs


class TimedDraft(NamedTuple):
    """What the verifier drafted for itself.

    Attributes:
        by_model: its draft model drafted it, in `seconds`.
        left_out: that could have drafted, but it would not have paid.
    """

    draft: OwnDraft
    by_model: bool = False
    seconds: float = 0.0
    left_out: bool = False


NO_DRAFT = TimedDraft(OwnDraft([]))


class ActiveRound:
    """One round in progress.

    Args:
        caches: the KV caches of all sessions.
        current_speculation: returns the verifier's own draft model, or None; called before every forward, because it
            depends on the load.
        own_drafts: plans what that drafts.
        session_load: returns the percentage of session slots in use, which every frame reports.
        outbox: takes frames and errors for the event loop.

    Attributes:
        work: what has to run before the next `advance`; None if the round only yielded.
        done: the round has ended.
        continues: `work` is a single token, and the one that the target samples after it is going to be the next work,
            unless it ends the text.
        forward_seconds: duration of its forwards, also of those that ran only a part of `work`, and of drafting between
            them; without the prefill, once that has ended.
        submitted_at: time of construction, by `time.perf_counter`.
    """

    def __init__(
        self,
        session: Session,
        reply: RoundReply,
        *,
        caches: SessionCaches,
        current_speculation: Callable[[], Speculation | None],
        own_drafts: OwnDraftPlanner,
        session_load: Callable[[], int],
        outbox: Outbox,
    ) -> None:
        self.session = session
        self.reply = reply
        self.work: RoundWork = None
        self.done = False
        self.continues = False
        self.submitted_at = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._caches = caches
        self._current_speculation = current_speculation
        self._own_drafts = own_drafts
        self._session_load = session_load
        self._outbox = outbox
        self._last_frame_at = 0.0
        self._out_of_memory_since: float | None = None
        self._prefill_seconds = 0.0
        self.forward_seconds = 0.0
        self._further_forwards = 0
        self._unsent_tokens: list[int] = []
        self._unsent_close_calls: list[tuple[int, float]] = []
        self._unsent_logprobs: list[TokenLogprobs] = []
        self._steps = self._execute()

    @property
    def runner(self) -> SegmentRunner:
        """The runner of the model that `work` is for."""
        runner = self.work.runner if isinstance(self.work, Segment) else None
        return runner or self.session.target.runner

    def advance(self, sampled: SampledTokens | None, seconds: float) -> None:
        """Continue to the next `work`, after a forward of `seconds` that sampled `sampled`.

        Any exception propagates; the caller then fails the round.
        """
        self.forward_seconds += seconds
        self._out_of_memory_since = None
        try:
            self.work = self._steps.send(sampled)
        except StopIteration:
            self.work, self.done = None, True

    def may_wait_for_memory(self, seconds: float) -> bool:
        """Record that the KV cache has no memory for `work`; return whether it has had none for less than `seconds`."""
        now = time.perf_counter()
        if self._out_of_memory_since is None:
            self._out_of_memory_since = now
        return now - self._out_of_memory_since < seconds

    def fail(self, error: VerifierRefused) -> None:
        """End the round with an error."""
        self.work, self.done = None, True
        self._outbox.post(self._loop, self.reply.fail, error)

    def _execute(self) -> Generator[RoundWork, SampledTokens | None, None]:
        session, request = self.session, self.reply.executed_request
        while request.round == 0 and not self._caches.begin(session):
            yield None
        yield from self._prefill()
        self._prefill_seconds, self.forward_seconds = self.forward_seconds, 0.0
        draft = request.draft[: self._max_draft_length()]
        siblings = {index: ids for index, ids in request.siblings.items() if index < len(draft)}
        if session.target.runner.exact:
            siblings = {}
        accepted, tokens = yield from self._verify(draft, siblings, left=request.n)
        remaining = request.n - len(tokens)
        self._emit(accepted, tokens, more=not session.finish and remaining > 0)
        while not session.finish and remaining > 0:
            own = NO_DRAFT
            if session.processor or self._current_speculation():
                own = yield from self._draft(min(remaining - 1, self._max_draft_length()), remaining)
            draft, started = own.draft.tokens, time.perf_counter()
            accepted, tokens = yield from self._verify(draft, own.draft.siblings, left=remaining)
            self._further_forwards += 1
            self._learn(own, time.perf_counter() - started, accepted, tokens)
            tokens = draft[:accepted] + tokens
            remaining -= len(tokens)
            self._emit(0, tokens, more=not session.finish and remaining > 0)

    def _prefill(self) -> Generator[RoundWork, SampledTokens | None, None]:
        """Extend the KV cache to all ids except the last."""
        session = self.session
        session.target.prepare_cache(session.cache, len(session.ids))
        if uncached := session.ids[session.cache.length : -1]:
            yield PendingPrefill(uncached)

    def _max_draft_length(self) -> int:
        return self.session.target.draft_limit(len(self.session.ids))

    def _draft(self, count: int, left: int) -> Generator[RoundWork, SampledTokens | None, TimedDraft]:
        """Draft up to `count` tokens: those that the grammar forces, else with the verifier's own draft model.

        Returns an empty draft if neither can, or if that would take longer than it saves in the `left` tokens of the
        round.
        """
        session, speculation = self.session, self._current_speculation()
        # A forward takes no more nodes than the tree of a board.
        forced_limit = min(count, MAX_TREE_NODES - 1)
        if session.processor and (forced := session.processor.forced_after(session.ids, forced_limit)):
            return TimedDraft(OwnDraft(forced))
        # A version may have another vocabulary than the one that the draft was loaded for.
        if speculation is None or speculation.vocabulary != session.target.vocabulary or count < 1:
            return NO_DRAFT
        if session.draft and not session.draft.can_draft(session.ids):
            return NO_DRAFT
        plan = self._own_drafts.plan(
            session.target.version,
            session.sampling,
            session.own_draft_streak,
            longest=speculation.max_draft_tokens,
            siblings=speculation.has_siblings and not session.target.runner.exact,
            unread=session.draft.unread_tokens(session.ids) if session.draft else len(session.ids),
            left=left,
        )
        if not plan.draft:
            return TimedDraft(OwnDraft([]), left_out=True)
        plan = msgspec.structs.replace(plan, draft=min(plan.draft, count))
        if session.draft is None:
            session.draft = speculation.new_session_draft(session.owner)
        began = time.perf_counter()
        steps = session.draft.propose(session.ids, plan, session.sampling, session.processor)
        sampled: SampledTokens | None = None
        while True:
            started = time.perf_counter()
            try:
                work = steps.send(sampled)
            except StopIteration as end:
                draft: OwnDraft = end.value
                return TimedDraft(draft, by_model=True, seconds=time.perf_counter() - began)
            except GrammarError:
                # On the draft's path; the target's own may be another.
                return NO_DRAFT
            finally:
                self.forward_seconds += time.perf_counter() - started
            sampled = yield work

    def _learn(self, own: TimedDraft, verify_seconds: float, accepted: int, tokens: list[int]) -> None:
        """Let later drafts follow from this one, its verification, and the target's tokens after the accepted ones."""
        session = self.session
        if self._current_speculation():
            self._own_drafts.learn_verification(own.draft, verify_seconds, left_out=own.left_out)
        if own.by_model:
            session.own_draft_streak = self._own_drafts.learn_draft(
                session.target.version,
                session.sampling,
                session.own_draft_streak,
                own.draft,
                seconds=own.seconds,
                accepted=accepted,
                tokens=tokens,
            )

    def _verify(
        self, draft: list[int], siblings: Mapping[int, list[int]], *, left: int
    ) -> Generator[RoundWork, SampledTokens | None, tuple[int, list[int]]]:
        """Verify `draft` in one forward, extend the text by the target's tokens, and roll the KV cache back.

        Args:
            left: the target's own tokens that the round still needs.

        Returns the accepted length, and the target's own tokens after the accepted ones.
        """
        session, target = self.session, self.session.target
        yield from self._prefill()
        tree = TokenTree(session.ids[-1], len(session.ids), draft, siblings)
        if session.processor:
            session.processor.sync_to(session.ids)
        streams = not (draft or session.processor or self._current_speculation())
        self.continues = streams and left > 1 and self._max_draft_length() > 0
        sampled = yield target.tree_segment(
            session.cache, tree, session.sampling, processor=session.processor, logprobs=session.logprobs
        )
        self.continues = False
        assert sampled is not None
        verification = tree.verify(sampled.__getitem__, session.end_ids)
        self._caches.keep(session, verification.rows)
        session.ids += draft[: verification.accepted] + verification.tokens
        # At most one token exceeds the context: the bonus token after a sibling.
        excess = max(0, len(session.ids) - target.context)
        if excess:
            del session.ids[-excess:]
        if verification.ended and not excess:
            session.finish = "stop"
        elif len(session.ids) == target.context:
            session.finish = "length"
        threshold = target.close_call_margin
        self._unsent_close_calls += [
            (position, round(margin, 9)) for position, margin in verification.margins if margin < threshold
        ]
        self._unsent_logprobs += verification.logprobs[: len(verification.logprobs) - excess]
        return verification.accepted, verification.tokens[: len(verification.tokens) - excess]

    def _emit(self, accepted: int, tokens: list[int], more: bool) -> None:
        """Push a frame with all unsent tokens: the first and the last at once, others at `STREAM_FRAME_SECONDS`."""
        self._unsent_tokens += tokens
        now = time.perf_counter()
        if more and self._last_frame_at and now - self._last_frame_at < STREAM_FRAME_SECONDS:
            return
        self._last_frame_at = now
        busy_seconds = self._prefill_seconds + self.forward_seconds
        frame = Frame(
            PROTOCOL_VERSION,
            self.reply.request.round,
            accepted=accepted,
            tokens=self._unsent_tokens,
            queue_100us=round(1e4 * max(0.0, now - self.submitted_at - busy_seconds)),
            forward_100us=round(1e4 * self.forward_seconds),
            load=self._session_load(),
            finish=self.session.finish,
            more=more,
            close_calls=self._unsent_close_calls,
            prefill_100us=round(1e4 * self._prefill_seconds),
            further=0 if more else self._further_forwards,
            logprobs=self._unsent_logprobs,
        )
        self._unsent_tokens, self._unsent_close_calls, self._unsent_logprobs = [], [], []
        self._outbox.post(self._loop, self.reply.push, frame)
