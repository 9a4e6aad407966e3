"""The speculative decoding loop of one answer: plan, draft, verify, commit, until the text ends.

    while the text continues:
        plan K and n
        draft K tokens, with the noise that the target will be sampled with
        the verifier accepts those that equal the target's own choice, and generates n tokens after them
            meanwhile the draft may work ahead, and the next round may be sent before this one is answered

The text is a function of target version, prompt and sampling parameters alone. The draft, the plans and the link decide
only how fast it arrives; nothing here may change a token. The limits of a round are in
`planning.round_rules`, which the simulator shares.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import msgspec

from edge_runtime.decoding.draft_worker import DraftWorker, ThreadedDraftWorker
from edge_runtime.decoding.offline import OfflineDraft, make_loss_detector, poll_link_loss
from edge_runtime.decoding.statistics import GenerationStatistics
from edge_runtime.draft import OnnxDraft, Proposal
from edge_runtime.ngram_cache import NgramCache
from edge_runtime.planning.plan import (
    FIXED_PLAN,
    Conditions,
    FixedPlanner,
    OnLinkLoss,
    Outcome,
    Plan,
    Planner,
    ShadowGuess,
    Surroundings,
)
from edge_runtime.planning.round_rules import limit_continuation, limit_draft, limit_early_draft
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Sampling, validate_prompt
from edge_runtime.verifier import EarlyRound, RoundUpdate, VerifierClient, VerifierSession

log = logging.getLogger(__name__)

# Bound of the prompt's ids if there is no draft whose vocabulary limits them: ids are 31-bit on the wire.
ID_LIMIT = 1 << 31


class VerifiedTokens(msgspec.Struct, frozen=True):
    """Newly verified tokens, in the order of the text.

    Attributes:
        accepted: draft tokens that the target accepted.
        own: the target's own tokens after them.
        unverified: everything that now follows the verified text without having been verified: offline draft tokens,
            to be taken back if a later piece differs. Empty while a verifier answers.
    """

    accepted: list[int]
    own: list[int]
    unverified: list[int] = []


class ProposedRound(msgspec.Struct):
    """A round whose tokens have been drafted.

    Attributes:
        proposal: the draft.
        outcome: what is known of the outcome before the reply.
        sent: clock time in seconds when the request was sent; for an early round when the previous one was answered.
        request: the request, if it was sent before the previous round was answered.
        expected_token: last token of the text for which such a request is valid; the verifier checks the same.
    """

    proposal: Proposal
    outcome: Outcome
    sent: float
    request: EarlyRound | None = None
    expected_token: int = -1


class Generation:
    """One answer. Iterate over it for tokens as they are verified; leaving the loop early cancels the rest.

    Attributes:
        ids: prompt and verified tokens so far.
        statistics: cost so far.
        finish: `stop` (the target ended the text), `length` (max_new_tokens or the context is exhausted), or empty. If
            there are unverified tokens, the draft model decided it.
    """

    def __init__(
        self,
        draft: OnnxDraft | None,
        client: VerifierClient,
        prompt: list[int],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        planner: Planner | None = None,
        model: str = "",
        surroundings: Callable[[], Surroundings] | None = None,
        on_link_loss: OnLinkLoss = "wait",
        ngram_cache: NgramCache | None = None,
    ) -> None:
        """
        Args:
            draft: None leaves every token to the target.
            prompt: at least one id.
            planner: None for a fixed plan; unused without a draft.
            model: target model; empty for the verifier's default.
            surroundings: current probe readings; called before every round, so it must be fast. None uses only the
                round-trip time of the connection.
            on_link_loss: without a verifier, `wait` for one until the client's deadline and continue the text; let the
                `draft` continue alone, unverified, until one is back; or `fail` at once.
            ngram_cache: verified text that improves the drafts, and to which this text is added.

        Raises:
            InputError: the prompt is empty or has an id outside the draft's vocabulary, or max_new_tokens < 1.
        """
        if max_new_tokens < 1:
            raise InputError(f"nothing to generate: max_new_tokens is {max_new_tokens}")
        validate_prompt(prompt, draft.manifest.architecture.vocabulary_size if draft else ID_LIMIT)
        self.ids = list(prompt)
        self.statistics = GenerationStatistics()
        self.finish = ""
        self._left = max_new_tokens
        self._temperature = sampling.temperature
        self._surroundings = surroundings or (lambda: Surroundings(client.meter.rtt_seconds))
        self._client = client
        if draft:
            self._planner = planner or FixedPlanner(FIXED_PLAN)
            self._worker: DraftWorker = ThreadedDraftWorker(draft, sampling, ngram_cache)
        else:
            self._planner = FixedPlanner(Plan(0, continuation=max_new_tokens, reason="there is no draft"))
            self._worker = DraftWorker()
        self._drafts_offline = draft is not None and on_link_loss == "draft"
        special = draft.manifest.vocabulary.special_ids.values() if draft and not sampling.ignore_eos else ()
        self._offline = OfflineDraft(self._worker, frozenset(special))
        # The round that was sent before the one in flight was answered.
        self._next: ProposedRound | None = None
        self._session = VerifierSession(
            client,
            prompt,
            sampling,
            model=model,
            vocabulary=draft.manifest.vocabulary.hash if draft else "",
            draft=draft.manifest.shared.identity if draft else "",
            patient=on_link_loss != "fail",
        )

    @property
    def unverified(self) -> list[int]:
        """Tokens that the draft model generated after `ids` without a verifier."""
        return self._offline.tail

    @property
    def version(self) -> str:
        """Exact target version; empty before the first reply."""
        return self._session.version

    async def __aiter__(self) -> AsyncIterator[VerifiedTokens]:
        """Yield tokens as they are verified. Raises VerifierError and DraftError."""
        started = time.perf_counter()
        retries = self._client.retries
        self._client.meter.take()
        self._worker.append_verified(list(self.ids))
        try:
            while not self.finish:
                async for piece in self._run_round(await self._prepare_round()):
                    statistics = self.statistics
                    if not statistics.tokens and not piece.unverified:
                        statistics.first_token_seconds = time.perf_counter() - started
                    statistics.tokens += len(piece.accepted) + len(piece.own)
                    yield piece
        finally:
            self._worker.close()
            if self._next and self._next.request:
                self._next.request.drop()
            self._session.close()
            self._count_bytes()
            self.statistics.retries = self._client.retries - retries
            self.statistics.recoveries = self._session.recoveries
            known = self.statistics.seconds - self.statistics.loop_seconds
            self.statistics.loop_seconds = time.perf_counter() - started - known

    async def _prepare_round(self) -> ProposedRound:
        """Plan and draft the next round, or take the one that was sent early if the text came out as it assumed."""
        early, self._next = self._next, None
        if early and early.request:
            if (early.outcome.conditions.position, early.expected_token) == (len(self.ids), self.ids[-1]):
                early.sent = time.perf_counter()
                return early
            early.request.drop()
        started = time.perf_counter()
        await self._worker.wait_until_idle()
        wait_seconds = time.perf_counter() - started
        conditions = self._conditions(self.ids, self._left)
        plan = self._offline.plan if self._offline.tail else self._plan(conditions)
        started = time.perf_counter()
        proposal = await self._worker.propose(self.ids, plan, limit_draft(plan, self._left))
        draft_seconds = time.perf_counter() - started
        return _make_round(plan, conditions, proposal, wait_seconds=wait_seconds, draft_seconds=draft_seconds)

    async def _run_round(self, round: ProposedRound) -> AsyncIterator[VerifiedTokens]:
        """Have one round verified; yield its tokens and let the planner learn from the outcome."""
        plan, proposal = round.outcome.plan, round.proposal
        attempts = self._count_attempts()
        accepted = own = sibling = 0
        first_seconds = ahead_seconds = 0.0
        n = limit_continuation(plan, self._left, len(proposal.tokens))
        ahead: asyncio.Future[float] | None = None
        if plan.shadows_stream:
            self._worker.start_shadow(self.ids, plan)
        elif plan.drafts_ahead:
            ahead = asyncio.ensure_future(self._draft_ahead(plan, proposal))
        if proposal.tokens and not ahead:
            # The next round starts at least one token later; if all tokens are accepted, its draft ends 2K + 1 later.
            self._worker.precompute_noise(len(self.ids) + 1, 2 * plan.draft + 1)
        try:
            update: RoundUpdate | None = None
            async for news in self._verify(round, n):
                if news is None:
                    if ahead:
                        self._worker.cancel_ahead()
                        ahead_seconds = await ahead
                    self._worker.stop_shadow()
                    if await self._extend_offline():
                        yield VerifiedTokens([], [], list(self.unverified))
                    if self.finish:
                        return
                    continue
                update = news
                first_seconds = first_seconds or time.perf_counter() - round.sent
                accepted += len(update.accepted)
                if update.own and not own:
                    siblings = proposal.siblings.get(accepted, [])
                    sibling = siblings.index(update.own[0]) + 1 if update.own[0] in siblings else 0
                own += len(update.own)
                piece = self._commit(update)
                if piece.accepted or piece.own:
                    yield piece
        finally:
            if ahead:
                self._worker.cancel_ahead()
                ahead_seconds = await ahead
        assert update is not None
        watched: list[ShadowGuess] = []
        if not plan.draft:
            watched, ahead_seconds = self._worker.stop_shadow()
        exchange_seconds = time.perf_counter() - round.sent
        sent, received = self._count_bytes()
        frame = update.frame
        outcome = msgspec.structs.replace(
            round.outcome,
            accepted=accepted,
            own_tokens=own,
            sibling=sibling,
            first_seconds=first_seconds,
            exchange_seconds=exchange_seconds,
            queue_seconds=frame.queue_100us / 1e4,
            forward_seconds=frame.forward_100us / 1e4,
            prefill_seconds=frame.prefill_100us / 1e4,
            further_forwards=frame.further,
            ahead_seconds=ahead_seconds,
            shadow_guesses=watched,
            sent=sent,
            received=received,
            repeated=self._count_attempts() > attempts,
        )
        self.statistics.add_round(outcome)
        self.statistics.close_calls += frame.close_calls
        self._planner.observe(outcome)
        self.finish = self.finish or self._session.finish

    async def _verify(self, round: ProposedRound, n: int) -> AsyncGenerator[RoundUpdate | None, None]:
        """Yield the verifier's replies to a round, and None repeatedly while the draft has to continue offline."""
        proposal = round.proposal
        replies = self._session.run_round(
            proposal.tokens, siblings=proposal.siblings, n=n, stream=n > 1, early=round.request
        )
        polled = poll_link_loss(replies, make_loss_detector(self._client)) if self._drafts_offline else replies
        async with aclosing(polled) as updates:
            async for update in updates:
                yield update

    async def _extend_offline(self) -> bool:
        """Draft on without a verifier; return whether there are more tokens to show."""
        grown = await self._offline.extend(self.ids, self._left)
        self.finish = self._offline.finish
        if self.finish:
            self.statistics.unverified = len(self.unverified)
        return grown

    async def _draft_ahead(self, plan: Plan, proposal: Proposal) -> float:
        """While a round is in flight, draft the next one, and send it early if the plan allows two rounds in flight.

        Returns the seconds that the draft worked.
        """
        started = time.perf_counter()
        text = list(self.ids)
        left = self._left - len(proposal.tokens)
        ahead = await self._worker.draft_ahead(text, plan, proposal, left)
        seconds = time.perf_counter() - started
        answered = self._worker.ahead_cancelled or len(self.ids) > len(text)
        if ahead is None or plan.in_flight < 2 or answered:
            return seconds
        # The next round assumes that the whole draft is accepted and that the bonus token is as guessed.
        assumed = [*proposal.tokens, ahead.bonus_token]
        conditions = self._conditions(text + assumed, left - 1)
        next_plan = self._plan(conditions)
        count = limit_early_draft(next_plan, left - 1, len(ahead.proposal.tokens))
        if not count:
            return seconds
        early = _make_round(next_plan, conditions, ahead.proposal.truncate(count), early=True)
        early.request = self._session.send_early_round(assumed, early.proposal.tokens, early.proposal.siblings)
        if early.request:
            early.expected_token = ahead.bonus_token
            self._next = early
        return seconds

    def _plan(self, conditions: Conditions) -> Plan:
        plan = self._planner.plan(conditions)
        log.debug("position %d: K=%d n=%d, %s", conditions.position, plan.draft, plan.continuation, plan.reason)
        return plan

    def _conditions(self, text: list[int], left: int) -> Conditions:
        return Conditions(
            left=left,
            position=len(text),
            unread=self._worker.tokens_to_prefill(text),
            ready=self._worker.tokens_drafted_ahead(text),
            now=time.monotonic(),
            version=self.version,
            temperature=self._temperature,
            surroundings=self._surroundings(),
        )

    def _commit(self, update: RoundUpdate) -> VerifiedTokens:
        """Append verified tokens to the text, up to max_new_tokens."""
        accepted = update.accepted[: self._left]
        own = update.own[: self._left - len(accepted)]
        verified = accepted + own
        self._left -= len(verified)
        self._worker.shadow(self.ids, verified)
        self._worker.append_verified(verified, self.version)
        self.ids += verified
        if not self._left:
            # A text whose last token falls exactly on the limit keeps the target's finish reason.
            complete = len(verified) == len(update.accepted) + len(update.own)
            self.finish = update.frame.finish if complete and update.frame.finish else "length"
        if self._offline.tail:
            self._offline.verify(verified, ended=bool(self.finish or update.frame.finish))
            self.statistics.withdrawn = self._offline.withdrawn
        return VerifiedTokens(accepted, own, list(self.unverified))

    def _count_attempts(self) -> int:
        """Connections and retries so far, those of other generations that share the client included."""
        return self._client.retries + self._client.meter.opened

    def _count_bytes(self) -> tuple[int, int]:
        """Add the bytes since the last call to the statistics, and return them as (sent, received)."""
        sent, received = self._client.meter.take()
        self.statistics.bytes_sent += sent
        self.statistics.bytes_received += received
        return sent, received


def _make_round(
    plan: Plan,
    conditions: Conditions,
    proposal: Proposal,
    *,
    wait_seconds: float = 0.0,
    draft_seconds: float = 0.0,
    early: bool = False,
) -> ProposedRound:
    """Build the round that is to be sent now, its siblings reduced to what one verification takes."""
    # One node of the verified tree is the last known token.
    proposal = proposal.limit_nodes(messages.MAX_TREE_NODES - 1)
    outcome = Outcome(
        plan,
        conditions,
        confidences=proposal.confidences,
        offered=[len(proposal.siblings.get(index, ())) for index in range(len(proposal.tokens))],
        ready=proposal.drafted_ahead,
        draft_seconds=draft_seconds,
        early=early,
        wait_seconds=wait_seconds,
    )
    return ProposedRound(proposal, outcome, time.perf_counter())
