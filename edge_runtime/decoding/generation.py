"""The speculative loop: plan, draft, verify, commit, until the text is done.

    while the text is not done:
        plan (K, n)
        draft K tokens, with the same noise that the target will be sampled with
        the verifier accepts those that are its own choice, and says n tokens more;
            meanwhile the draft may run ahead, and the next round may be on its way before this one is answered

The text is a function of target version, prompt and sampling alone; the draft, the plans and the link decide only how
soon it comes. Nothing here changes a token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import msgspec

from edge_runtime.decoding.draft_worker import Drafter
from edge_runtime.decoding.offline import Alone, heard, link_watch
from edge_runtime.decoding.statistics import Statistics
from edge_runtime.draft.model import NOTHING, OnnxDraft, Proposal
from edge_runtime.ngram_cache.lookup import Memory
from edge_runtime.planning.plan import (
    FIXED,
    Conditions,
    FixedPlanner,
    OnLinkLoss,
    Outcome,
    Plan,
    Planner,
    Surroundings,
    Watched,
)
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import InputError
from edge_runtime.protocol.sampling import Sampling, check_prompt
from edge_runtime.verifier.client import VerifierClient
from edge_runtime.verifier.session import EarlyRound, Said, VerifierSession

log = logging.getLogger(__name__)


class Piece(msgspec.Struct, frozen=True):
    """Verified tokens, in the order of the text.

    Attributes:
        accepted: tokens that the board had drafted.
        own: tokens of the target's own behind them.
        unverified: all that now stands behind the verified text, for want of a verifier: the draft's alone, and to be
            taken back where the next piece says otherwise. Nothing, normally.
    """

    accepted: list[int]
    own: list[int]
    unverified: list[int] = []


class Round(msgspec.Struct):
    """One round, from its plan to its request.

    Attributes:
        plan, conditions: what was decided, and for what.
        proposal: what was drafted.
        draft_seconds: what drafting took, apart from what was ready.
        sent: when the request went out, by `time.perf_counter`.
        early: the request, where it was sent before the last round was answered.
        position, expected: where the text must end then, and with which token: what the verifier goes by, too.
    """

    plan: Plan
    conditions: Conditions
    proposal: Proposal
    draft_seconds: float
    sent: float
    early: EarlyRound | None = None
    position: int = 0
    expected: int = -1


class Generation:
    """One answer. Iterate over it for pieces as they are verified; leaving the loop early cancels the rest.

    Attributes:
        ids: prompt and verified tokens so far.
        statistics: what it cost so far.
        unverified: what the draft alone has said behind them, where there is no verifier.
        finish: `stop` (the target ended the text), `length` (max_new_tokens or the context is full), or empty. With
            unverified tokens it is the draft that says so.
        version: the exact target version, once known.
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
        memory: Memory | None = None,
    ) -> None:
        """
        Args:
            draft: None leaves everything to the cloud.
            prompt: at least one id.
            planner: None for a fixed plan; not asked where there is no draft.
            model: which target; empty for the verifier's default.
            surroundings: what the probes know now; asked before every round, so it must be quick. None for what the
                connection alone tells.
            on_link_loss: without a verifier, `wait` for one, to the client's deadline, and go on where the text stood;
                let the `draft` go on alone, unverified, until there is one again; or `fail` at once.
            memory: of verified text, which helps the draft guess, and learns this one; None for none.

        Raises:
            InputError: an empty prompt, an id outside the draft's vocabulary, or nothing to generate.
        """
        if max_new_tokens < 1:
            raise InputError(f"nothing to generate: max_new_tokens is {max_new_tokens}")
        vocabulary_size = draft.manifest.architecture.vocabulary_size if draft else 1 << 31
        check_prompt(prompt, vocabulary_size)
        self.ids = list(prompt)
        self.statistics = Statistics()
        self.finish = ""
        self._left = max_new_tokens
        self._temperature = sampling.temperature
        alone = FixedPlanner(Plan(0, own=max_new_tokens, reason="there is no draft"))
        self._planner = (planner or FixedPlanner(FIXED)) if draft else alone
        self._surroundings = surroundings or (lambda: Surroundings(client.meter.rtt_seconds))
        self._client = client
        self._drafter = Drafter(draft, sampling, memory) if draft else None
        self._alone: Alone | None = None
        if draft and self._drafter and on_link_loss == "draft":
            special = [] if sampling.ignore_eos else draft.manifest.vocabulary.special_ids.values()
            self._alone = Alone(self._drafter, frozenset(special))
        # Sent before the round in flight was answered.
        self._next: Round | None = None
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
        return self._alone.tail if self._alone else []

    @property
    def version(self) -> str:
        return self._session.version

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Pieces of the text, as they are verified. Raises VerifierError and DraftError."""
        started = time.perf_counter()
        retries = self._client.retries
        self._client.meter.take()
        if self._drafter:
            self._drafter.learn(list(self.ids))
        try:
            while not self.finish:
                async for piece in self._play(await self._prepare()):
                    statistics = self.statistics
                    if not statistics.tokens and not piece.unverified:
                        statistics.first_token_seconds = time.perf_counter() - started
                    statistics.tokens += len(piece.accepted) + len(piece.own)
                    yield piece
        finally:
            if self._drafter:
                self._drafter.close()
            if self._next and self._next.early:
                self._next.early.drop()
            self._session.close()
            self._count_bytes()
            self.statistics.retries = self._client.retries - retries
            self.statistics.recoveries = self._session.recoveries
            known = self.statistics.seconds - self.statistics.loop_seconds
            self.statistics.loop_seconds = time.perf_counter() - started - known

    async def _prepare(self) -> Round:
        """The next round, ready to be played: the one that is on its way already if the text came out as it assumed."""
        early, self._next = self._next, None
        if early and early.early:
            if (early.position, early.expected) == (len(self.ids), self.ids[-1]):
                early.sent = time.perf_counter()
                return early
            early.early.drop()
        if self._drafter:
            await self._drafter.rest()
        conditions = self._conditions(self.ids, self._left)
        plan = self._alone.plan if self._alone and self._alone.tail else self._decide(conditions)
        if not self._drafter:
            return Round(plan, conditions, NOTHING, 0.0, time.perf_counter())
        started = time.perf_counter()
        # With K tokens accepted there are K + 1 at least, so a longer draft could only be thrown away.
        proposal = await self._drafter.propose(self.ids, plan, min(plan.draft, self._left - 1, messages.MOST_DRAFT))
        proposal = proposal.within(messages.MOST_NODES - 1)
        sent = time.perf_counter()
        return Round(plan, conditions, proposal, sent - started, sent)

    async def _play(self, round: Round) -> AsyncIterator[Piece]:
        """Plays one round; yields its pieces."""
        plan, proposal = round.plan, round.proposal
        drafted, attempts = len(proposal.tokens), self._attempts()
        accepted = own = sibling = 0
        first_seconds = ahead_seconds = 0.0
        n = max(1, min(plan.own, self._left - drafted, messages.MOST_OWN))
        ahead: asyncio.Future[float] | None = None
        if self._drafter and not plan.draft and (plan.ahead or plan.watch):
            self._drafter.watch(self.ids, plan)
        elif self._drafter and plan.ahead:
            ahead = asyncio.ensure_future(self._run_ahead(self._drafter, plan, proposal))
        if self._drafter and drafted and not ahead:
            # The next round begins behind at least one token, and guesses as many as this one, if all are accepted.
            self._drafter.prepare(len(self.ids) + 1, 2 * plan.draft + 1)
        try:
            said: Said | None = None
            async for news in self._listen(proposal, n, round.early):
                if news is None:
                    if self._drafter and ahead:
                        self._drafter.halted = True
                        ahead_seconds = await ahead
                    if self._drafter:
                        self._drafter.look_away()
                    if await self._go_on_alone():
                        yield Piece([], [], list(self.unverified))
                    if self.finish:
                        return
                    continue
                said = news
                first_seconds = first_seconds or time.perf_counter() - round.sent
                accepted += len(said.accepted)
                if said.own and not own:
                    beside = proposal.siblings.get(accepted, [])
                    sibling = beside.index(said.own[0]) + 1 if said.own[0] in beside else 0
                own += len(said.own)
                piece = self._commit(said)
                if piece.accepted or piece.own:
                    yield piece
        finally:
            if self._drafter and ahead:
                self._drafter.halted = True
                ahead_seconds = await ahead
        assert said is not None
        watched: list[Watched] = []
        if self._drafter and not plan.draft:
            watched, ahead_seconds = self._drafter.look_away()
        seconds = time.perf_counter() - round.sent
        sent, received = self._count_bytes()
        frame = said.frame
        outcome = Outcome(
            plan,
            round.conditions,
            accepted,
            own,
            proposal.confidences,
            [len(proposal.siblings.get(index, ())) for index in range(drafted)],
            sibling,
            proposal.ready,
            round.draft_seconds,
            first_seconds,
            seconds,
            frame.queue_100us / 1e4,
            frame.forward_100us / 1e4,
            sent,
            received,
            repeated=self._attempts() > attempts,
            early=round.early is not None,
            prefill_seconds=frame.prefill_100us / 1e4,
            ahead_seconds=ahead_seconds,
            further=frame.further,
            watched=watched,
        )
        self.statistics.add_round(outcome)
        self.statistics.early += round.early is not None
        self.statistics.close_calls += frame.close_calls
        self._planner.observe(outcome)
        self.finish = self.finish or self._session.finish

    async def _listen(self, proposal: Proposal, n: int, early: EarlyRound | None) -> AsyncGenerator[Said | None, None]:
        """What the verifier says to a round; and None, again and again, while the draft has to go on alone."""
        saying = self._session.play(proposal.tokens, siblings=proposal.siblings, n=n, stream=n > 1, early=early)
        async with aclosing(heard(saying, link_watch(self._client)) if self._alone else saying) as news:
            async for said in news:
                yield said

    async def _go_on_alone(self) -> bool:
        """Drafts on without a verifier. Returns whether there is more to show."""
        assert self._alone is not None
        more = await self._alone.extend(self.ids, self._left)
        self.finish = self._alone.finish
        if self.finish:
            self.statistics.unverified = len(self.unverified)
        return more

    async def _run_ahead(self, drafter: Drafter, plan: Plan, proposal: Proposal) -> float:
        """While a round is in flight: drafts on, and sends the next round if that is ready first.

        Returns the seconds that the draft worked.
        """
        started = time.perf_counter()
        before = list(self.ids)
        left = self._left - len(proposal.tokens)
        ahead = await drafter.run_ahead(before, plan, proposal, left)
        seconds = time.perf_counter() - started
        if ahead is None or plan.in_flight < 2 or drafter.halted or len(self.ids) > len(before):
            return seconds
        after = [*proposal.tokens, ahead.guess]
        conditions = self._conditions(before + after, left - 1)
        following = self._decide(conditions)
        drafted = ahead.proposal.first(min(following.draft, left - 2, messages.MOST_DRAFT)).within(
            messages.MOST_NODES - 1
        )
        if not drafted.tokens or following.own > 1:
            return seconds
        early = self._session.play_early(after, drafted.tokens, drafted.siblings)
        if early:
            position = len(before) + len(after)
            self._next = Round(following, conditions, drafted, 0.0, time.perf_counter(), early, position, ahead.guess)
        return seconds

    def _decide(self, conditions: Conditions) -> Plan:
        plan = self._planner.plan(conditions)
        log.debug("position %d: K=%d n=%d, %s", conditions.position, plan.draft, plan.own, plan.reason)
        return plan

    def _conditions(self, text: list[int], left: int) -> Conditions:
        drafter = self._drafter
        return Conditions(
            left,
            len(text),
            drafter.unread(text) if drafter else len(text),
            drafter.ready(text) if drafter else 0,
            time.monotonic(),
            self.version,
            self._temperature,
            self._surroundings(),
        )

    def _commit(self, said: Said) -> Piece:
        """Adds what fits to the text."""
        accepted = said.accepted[: self._left]
        own = said.own[: self._left - len(accepted)]
        self._left -= len(accepted) + len(own)
        if self._drafter:
            self._drafter.see(self.ids, accepted + own)
            self._drafter.learn(accepted + own, self.version)
        self.ids += accepted + own
        if not self._left:
            # A text that ends exactly at its limit has ended by itself all the same.
            whole = len(accepted) + len(own) == len(said.accepted) + len(said.own)
            self.finish = said.frame.finish if whole and said.frame.finish else "length"
        if self._alone and self._alone.tail:
            over = bool(self.finish or said.frame.finish)
            self._alone.verify(accepted + own, over=over)
            self.statistics.withdrawn = self._alone.withdrawn
        return Piece(accepted, own, list(self.unverified))

    def _attempts(self) -> int:
        """Grows with every connection and every repetition, of other texts over the same client too."""
        return self._client.retries + self._client.meter.opened

    def _count_bytes(self) -> tuple[int, int]:
        sent, received = self._client.meter.take()
        self.statistics.bytes_sent += sent
        self.statistics.bytes_received += received
        return sent, received
