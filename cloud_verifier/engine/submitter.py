"""Admits sessions and rounds, submits them to the scheduler, and accounts for them when they end."""

from __future__ import annotations

import time

from cloud_verifier.engine.admission import AdmissionController
from cloud_verifier.engine.fairness import PlaceQueue
from cloud_verifier.engine.metrics import VerifierMetrics, is_sibling_hit
from cloud_verifier.engine.principals import Principal
from cloud_verifier.engine.rate_limits import PrincipalAccount
from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.engine.sessions import RoundReply, Session, SessionStore
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.logits_processing import TokenConstraint
from edge_runtime.protocol.messages import ErrorCode, OpenRequest, RoundRequest


class RoundSubmitter:
    """Starts sessions and rounds. Runs on the event loop; no method waits."""

    def __init__(
        self, scheduler: Scheduler, sessions: SessionStore, admission: AdmissionController, metrics: VerifierMetrics
    ) -> None:
        self._scheduler = scheduler
        self._sessions = sessions
        self._admission = admission
        self._metrics = metrics
        # By name of the principal. Bounded by the token file: only authorized principals get here.
        self._accounts: dict[str, PrincipalAccount] = {}
        self.places = PlaceQueue(sessions)

    def open_session(
        self, principal: Principal, opening: OpenRequest, target: Target, constraint: TokenConstraint | None = None
    ) -> Session:
        """Create a session and submit its first round. Raises VerifierRefused: `StoreFull` if waiting may help.

        Args:
            constraint: matcher of the grammar of `opening.sampling`.
        """
        account = self._admit(principal, opening=True)
        self._enforce_max_sessions(principal)
        reply = RoundReply(opening.first, verify_draft=_allows_draft(opening.first, account))
        session = Session(
            list(opening.prompt),
            opening.sampling,
            target,
            reply,
            principal.name,
            generated=opening.generated,
            logprobs=opening.logprobs,
            constraint=constraint,
        )
        session.draft_identity = opening.draft
        session.cache.prompt_length = len(opening.prompt) - opening.generated
        self._sessions.add(opening.key, session)
        self._submit(session, reply, account, len(opening.prompt))
        account.charge(0, len(opening.prompt))
        self._metrics.prompt_tokens.inc(len(opening.prompt))
        return session

    def submit_round(self, principal: Principal, session: Session, request: RoundRequest) -> RoundReply:
        """Submit the session's next round. Raises VerifierRefused; the session does not change then.

        That is `StoreFull` if waiting for room may help.
        """
        account = self._admit(principal, opening=False)
        growth = min(len(request.draft) + request.n, session.target.context - len(session.ids))
        self._sessions.make_room(0, growth, session.owner, session)
        reply = session.begin_round(request, verify_draft=_allows_draft(request, account, session))
        self._submit(session, reply, account)
        return reply

    def _admit(self, principal: Principal, *, opening: bool) -> PrincipalAccount:
        """Return the principal's account. Raises VerifierRefused if it may not have a round now."""
        self._admission.check(opening=opening, owner=principal.name)
        if principal.name not in self._accounts:
            self._accounts[principal.name] = PrincipalAccount(principal)
        account = self._accounts[principal.name]
        account.update_limits(principal)
        account.check_rate()
        return account

    def _enforce_max_sessions(self, principal: Principal) -> None:
        """Close the principal's least recently used sessions, so that it may open one more."""
        if principal.max_sessions is None:
            return
        own = self._sessions.owned_by(principal.name)
        idle = [session for session in own if session.reply.done]
        excess = len(own) + 1 - principal.max_sessions
        if excess > len(idle):
            raise VerifierRefused(
                ErrorCode.RATE_LIMITED,
                f"{principal.name} may have {principal.max_sessions} sessions, and each of them has a round in "
                "progress; try again shortly",
                detail={"max_sessions": principal.max_sessions},
            )
        for session in idle[: max(0, excess)]:
            self._sessions.remove(session.id)

    def _submit(self, session: Session, reply: RoundReply, account: PrincipalAccount, prompt_tokens: int = 0) -> None:
        arrived = time.perf_counter()

        def account_for_round() -> None:
            # The last id of a prompt is scored rather than prefilled.
            self._admission.unregister(reply, max(0, prompt_tokens - session.cached_tokens - 1))
            if prompt_tokens:
                # Charged when the session was opened.
                account.charge(0, -session.cached_tokens)
                self._metrics.prefix_cache_hits.inc(session.cached_tokens)
            frame, request = reply.merged(), reply.request
            verified = reply.executed_request is request
            self.places.serve()
            account.charge(frame.accepted + len(frame.tokens))
            if request.draft and verified and not frame.more:
                rows = len(request.draft) + sum(map(len, request.siblings.values()))
                for breaker in filter(None, (account.draft_breaker, session.draft_breaker)):
                    breaker.record(rows, frame.accepted + is_sibling_hit(request, frame))
            self._metrics.observe_round(
                version=session.target.version,
                draft=session.draft_identity,
                principal=session.owner,
                request=request,
                reply=frame,
                seconds=time.perf_counter() - arrived,
                verified=verified,
            )

        reply.on_done = account_for_round
        self._admission.register(reply, prompt_tokens, session.owner)
        self._scheduler.submit(session, reply)


def _allows_draft(request: RoundRequest, account: PrincipalAccount, session: Session | None = None) -> bool:
    """Whether to verify the draft of `request`, if it has one."""
    breakers = [account.draft_breaker, session.draft_breaker if session else None]
    return not request.draft or all(breaker.allows_draft() for breaker in breakers if breaker)
