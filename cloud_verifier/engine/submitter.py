"""From a round that may be played to the engine; and the books: who may have it, what it brought, what it cost."""

from __future__ import annotations

import time

from cloud_verifier.engine.admission import InFlight
from cloud_verifier.engine.auth import Principal
from cloud_verifier.engine.metrics import Metrics, sibling_hit
from cloud_verifier.engine.rate_limits import Standing, Standings
from cloud_verifier.engine.scheduler import Engine
from cloud_verifier.engine.sessions import Answer, Session, SessionStore
from cloud_verifier.model.target import Target
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, OpenRequest, RoundRequest


class Submitter:
    """Begins sessions and rounds. Everything on the event loop, and nothing here waits."""

    def __init__(self, engine: Engine, sessions: SessionStore, in_flight: InFlight, metrics: Metrics) -> None:
        self._engine = engine
        self._sessions = sessions
        self._in_flight = in_flight
        self._metrics = metrics
        self._standings = Standings()

    def open(self, principal: Principal, opening: OpenRequest, target: Target) -> Session:
        """A session, whose first round is being played. Raises VerifierRefused."""
        standing = self._standing(principal, opening=True)
        self._make_room(principal)
        answer = Answer(opening.first, verified=_worthwhile(opening.first, standing))
        session = Session(list(opening.prompt), opening.sampling, target, answer, principal.name)
        session.draft = opening.draft
        self._sessions.add(opening.key, session)
        self._submit(session, answer, standing, len(opening.prompt))
        standing.pay(0, len(opening.prompt))
        self._metrics.opened(len(opening.prompt))
        return session

    def play(self, principal: Principal, session: Session, playing: RoundRequest) -> Answer:
        """The session's next round. Raises VerifierRefused, and then the session stays as it was."""
        standing = self._standing(principal, opening=False)
        self._sessions.make_room(0, len(playing.draft) + playing.n, session)
        answer = session.begin(playing, verified=_worthwhile(playing, standing, session))
        self._submit(session, answer, standing)
        return answer

    def _standing(self, principal: Principal, *, opening: bool) -> Standing:
        """Of `principal`. Raises VerifierRefused where it may not have a round now."""
        self._in_flight.check(opening=opening)
        standing = self._standings.of(principal)
        standing.check_rate()
        return standing

    def _make_room(self, principal: Principal) -> None:
        """Closes the principal's least recently used sessions where it would have one too many."""
        if principal.max_sessions is None:
            return
        own = self._sessions.owned_by(principal.name)
        idle = [session for session in own if session.answer.done]
        excess = len(own) + 1 - principal.max_sessions
        if excess > len(idle):
            raise VerifierRefused(
                ErrorCode.RATE_LIMITED,
                f"{principal.name} may have {principal.max_sessions} sessions, and all of them are in the middle of a "
                "round; try again shortly",
                429,
                {"max_sessions": principal.max_sessions},
            )
        for session in idle[: max(0, excess)]:
            self._sessions.remove(session.id)

    def _submit(self, session: Session, answer: Answer, standing: Standing, prompt: int = 0) -> None:
        """Has a round played, behind a prompt of so many tokens, and entered into the books when it is over."""
        arrived = time.perf_counter()

        def over() -> None:
            self._in_flight.leave(answer, prompt)
            told, asked = answer.so_far(), answer.request
            verified = answer.played is asked
            standing.pay(told.accepted + len(told.tokens))
            if asked.draft and verified and not told.more:
                rows = len(asked.draft) + sum(map(len, asked.siblings.values()))
                for account in filter(None, (standing.acceptance, session.acceptance)):
                    account.add(rows, told.accepted + sibling_hit(asked, told))
            seconds = time.perf_counter() - arrived
            self._metrics.played(session.target.version, session.draft, session.owner, asked, told, seconds, verified)

        answer.on_end = over
        self._in_flight.enter(answer, prompt)
        self._engine.submit(session, answer)


def _worthwhile(asked: RoundRequest, standing: Standing, session: Session | None = None) -> bool:
    """Whether to verify the round's draft, if it has one. The text is the same either way."""
    accounts = [standing.acceptance, session.acceptance if session else None]
    return not asked.draft or all(account.worthwhile() for account in accounts if account)
