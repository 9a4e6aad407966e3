"""The speculative loop: plan, draft, verify, commit, until the text is done.

    while the text is not done:
        plan (K, n)
        draft K tokens, with the same noise that the target will be sampled with
        the verifier accepts those that are its own choice, and says n tokens more

The text is a function of target version, prompt and sampling alone; the draft, the plans and the link decide only how
soon it comes. Nothing here changes a token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import msgspec

from edge_runtime.contract.coupling import Sampling, check_prompt
from edge_runtime.contract.errors import InputError
from edge_runtime.draft import NOTHING, DraftContext, OnnxDraft, Proposal
from edge_runtime.planning.plan import FixedPlanner, Outcome, Plan, Planner
from edge_runtime.statistics import Statistics, verifier_seconds
from edge_runtime.verifier_client import Said, VerifierClient, VerifierSession

DEFAULT_PLAN = Plan(draft=5, own=1, siblings=2, reason="fixed")


class Piece(msgspec.Struct, frozen=True):
    """Verified tokens, in the order of the text.

    Attributes:
        accepted: tokens that the board had drafted.
        own: tokens of the target's own behind them.
    """

    accepted: list[int]
    own: list[int]


class Generation:
    """One answer. Iterate over it for pieces as they are verified; leaving the loop early cancels the rest.

    Attributes:
        ids: prompt and verified tokens so far.
        statistics: what it cost so far.
        finish: `stop` (the target ended the text), `length` (max_new_tokens or the context is full), or empty.
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
    ) -> None:
        """
        Args:
            draft: None leaves everything to the cloud.
            prompt: at least one id.
            planner: None for a fixed plan.
            model: which target; empty for the verifier's default.

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
        self._sampling = sampling
        self._planner = planner or FixedPlanner(DEFAULT_PLAN)
        self._client = client
        self._context: DraftContext | None = draft.context() if draft else None
        self._session: VerifierSession = client.session(
            prompt,
            sampling,
            model=model,
            vocabulary=draft.manifest.vocabulary.hash if draft else "",
            draft=draft.manifest.shared.identity if draft else "",
        )

    @property
    def version(self) -> str:
        return self._session.version

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Pieces of the text, as they are verified. Raises VerifierError and DraftError."""
        started = time.perf_counter()
        retries = self._client.retries
        self._client.meter.take()
        try:
            while not self.finish:
                async for piece in self._round():
                    statistics = self.statistics
                    if not statistics.tokens:
                        statistics.first_token_seconds = time.perf_counter() - started
                    statistics.tokens += len(piece.accepted) + len(piece.own)
                    yield piece
        finally:
            self._session.close()
            self._count_bytes()
            self.statistics.retries = self._client.retries - retries
            self.statistics.recoveries = self._session.recoveries
            known = self.statistics.seconds - self.statistics.loop_seconds
            self.statistics.loop_seconds = time.perf_counter() - started - known

    async def _round(self) -> AsyncIterator[Piece]:
        """Plays one round; yields its pieces."""
        plan = self._planner.plan()
        started = time.perf_counter()
        # With K tokens accepted there are K + 1 at least, so a longer draft could only be thrown away.
        proposal = await self._propose(plan, min(plan.draft, self._left - 1))
        drafted = len(proposal.tokens)
        sent = time.perf_counter()
        accepted = own = 0
        n = max(1, min(plan.own, self._left - drafted))
        async for said in self._session.play(proposal.tokens, siblings=proposal.siblings, n=n, stream=n > 1):
            if said.own and not own and said.own[0] in proposal.siblings.get(accepted + len(said.accepted), ()):
                self.statistics.sibling_hits += 1
            accepted += len(said.accepted)
            own += len(said.own)
            piece = self._commit(said)
            if piece.accepted or piece.own:
                yield piece
        frame = said.frame
        outcome = Outcome(drafted, accepted, own, sent - started, time.perf_counter() - sent, verifier_seconds(frame))
        self.statistics.add_round(outcome)
        self.statistics.close_calls += frame.close_calls
        self._count_bytes()
        self._planner.observe(outcome)
        self.finish = self.finish or self._session.finish

    async def _propose(self, plan: Plan, count: int) -> Proposal:
        context = self._context
        if context is None or count < 1 or len(self.ids) >= context.limit:
            return NOTHING

        def draft() -> Proposal:
            context.follow(self.ids)
            return context.propose(
                count,
                self._sampling,
                siblings=plan.siblings,
                sibling_confidence=plan.sibling_confidence,
                min_confidence=plan.min_confidence,
            )

        return await asyncio.to_thread(draft)

    def _commit(self, said: Said) -> Piece:
        """Adds what fits to the text."""
        accepted = said.accepted[: self._left]
        own = said.own[: self._left - len(accepted)]
        self._left -= len(accepted) + len(own)
        self.ids += accepted + own
        if not self._left:
            # A text that ends exactly at its limit has ended by itself all the same.
            whole = len(accepted) + len(own) == len(said.accepted) + len(said.own)
            self.finish = said.frame.finish if whole and said.frame.finish else "length"
        return Piece(accepted, own)

    def _count_bytes(self) -> None:
        sent, received = self._client.meter.take()
        self.statistics.bytes_sent += sent
        self.statistics.bytes_received += received
