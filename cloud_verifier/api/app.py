"""The HTTP surface of the verifier: an ASGI application over one engine.

Every answer but 2xx is a `Refusal` with a typed code (see `wire.ErrorCode`), in the encoding that the client speaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from cloud_verifier.api.access_log import log_request, request_id
from cloud_verifier.api.admin import OPERATIONS, Admin
from cloud_verifier.api.codec import message_of, refuse, reply, respond, while_connected
from cloud_verifier.api.openapi import document
from cloud_verifier.engine.admission import Counted, InFlight
from cloud_verifier.engine.auth import Doors, Principal, Role
from cloud_verifier.engine.metrics import Metrics
from cloud_verifier.engine.rate_limits import check_prompt_length
from cloud_verifier.engine.rollout import Rollout
from cloud_verifier.engine.scheduler import WINDOW_SECONDS, Engine, Make
from cloud_verifier.engine.sessions import SessionStore
from cloud_verifier.engine.submitter import Submitter
from cloud_verifier.model.limits import VerifierLimits, check_opening, check_round
from cloud_verifier.model.speculation import Speculation
from cloud_verifier.model.target import Target
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, Frame, OpenReply, OpenRequest, RoundRequest

log = logging.getLogger(__name__)


class Service:
    """Handlers over one engine. `app` is the ASGI application; it owns the engine's life.

    Args:
        load: makes the target, in the engine's thread.
        speculate: makes the draft beside it, likewise; None goes without.
        doors: who is served; by default everybody is.
        make, window: see `Engine`.
        rollout: makes what leads sessions to versions, of the engine and the sessions; None where there is one target.
        check_options: see `Admin`.
    """

    def __init__(
        self,
        load: Callable[[], Target],
        limits: VerifierLimits,
        speculate: Callable[[Target], Speculation | None] = lambda target: None,
        doors: Doors | None = None,
        rollout: Callable[[Engine, SessionStore], Rollout] | None = None,
        check_options: Sequence[str] = (),
        make: Make | None = None,
        window: float = WINDOW_SECONDS,
    ) -> None:
        self.limits = limits
        self.doors = doors or Doors()
        self.sessions = SessionStore(
            limits.max_sessions,
            limits.max_tokens,
            limits.idle_seconds,
            lambda session: self.engine.release(session),
            limits.page,
        )
        self.in_flight = InFlight(limits.max_queue_seconds)
        self.metrics = _metrics(self)
        self.engine = Engine(load, speculate, lambda: self.sessions.load, limits.max_tokens, self.metrics, window, make)
        self.rollout = rollout(self.engine, self.sessions) if rollout else None
        self._submitter = Submitter(self.engine, self.sessions, self.in_flight, self.metrics)
        # Nobody could use it where nobody is an admin.
        self._administered = self.rollout is not None and self.doors.file is not None
        self.app = Starlette(
            routes=[
                *self._admin_routes(check_options),
                Route("/v1/sessions", self._answering(self.open), methods=["POST"]),
                Route("/v1/sessions/{session}/rounds", self._answering(self.round), methods=["POST"]),
                Route("/v1/sessions/{session}", self._answering(self.close), methods=["DELETE"]),
                Route("/v1/models", self._answering(self.models)),
                Route("/healthz", self._answering(self.health)),
                Route("/readyz", self._answering(self.ready)),
                Route("/metrics", self._answering(self.show_metrics)),
                Route("/openapi.json", self._answering(self.openapi)),
            ],
            middleware=[Middleware(Counted, self.in_flight)],
            exception_handlers={HTTPException: _no_such_route},
            lifespan=self._lifespan,
        )
        self.app.state.doors = self.doors
        self.app.router.redirect_slashes = False

    @property
    def target(self) -> Target | None:
        """What a session gets that asks for no model, canaries aside; None while it is loading."""
        if self.rollout is not None:
            return self.rollout.default if self.rollout.ready else None
        return self.engine.target

    @property
    def loaded(self) -> bool:
        """Whether there is a target."""
        return self.target is not None

    @property
    def failure(self) -> BaseException | None:
        """Why there is none, and will be none."""
        return self.engine.failure or (self.rollout.failure if self.rollout is not None else None)

    @property
    def stalled_seconds(self) -> float:
        """How long the engine has been at one step."""
        return self.engine.stalled_seconds

    @property
    def in_use(self) -> bool:
        """Whether boards may be about to ask for their next round."""
        return len(self.sessions) > 0

    def abandon(self) -> None:
        """Ends the engine where the application's lifespan was not left."""
        self.engine.stop()

    def status(self) -> str:
        """What it does now, in a line."""
        target = self.target
        draining = ", about to end" if self.in_flight.draining else ""
        return f"{target.version if target else 'no target'}, {len(self.sessions)} sessions{draining}"

    def reload(self) -> None:
        """Reads the tokens again; sessions stay. Raises InputError, and then everything stays as it was."""
        self.doors.reload()
        log.info("%d tokens", len(self.doors))

    async def drain(self, seconds: float) -> bool:
        """From now on plays nothing new; whether what is being played was over within `seconds`."""
        return await self.in_flight.drain(seconds)

    async def open(self, request: Request) -> Response:
        """POST /v1/sessions: a session, and its first round."""
        principal = self._admit(request, Role.BOARD)
        opening = await message_of(request, OpenRequest, self.limits.max_body)
        target = self._resolve(opening, principal.name)
        await check_opening(opening, target, self.limits)
        check_prompt_length(principal, opening)
        # From here to `add` nothing waits, so that two requests with one key cannot both open a session.
        session = self.sessions.by_key(opening.key, principal.name)
        if session is not None and not session.closed:
            if session.ids[: len(opening.prompt)] != opening.prompt or session.sampling != opening.sampling:
                raise VerifierRefused(
                    ErrorCode.ROUND_CONFLICT, "this key has opened a session with another prompt", 409
                )
            answer = session.next_round(opening.first)
            if answer is None:
                raise VerifierRefused(
                    ErrorCode.ROUND_OUT_OF_ORDER,
                    "this session is open already; play its rounds at its own address",
                    409,
                    {"expected": session.answer.request.round + 1},
                )
            target = session.target
        else:
            session = self._submitter.open(principal, opening, target)
            answer = session.answer
        request.state.session = opened = session.id

        def introduce(frame: Frame) -> OpenReply:
            return OpenReply(messages.VERSION, opened, target.version, target.context, frame)

        return await reply(request, answer, opening.first.stream, opened, introduce)

    async def round(self, request: Request) -> Response:
        """POST /v1/sessions/{id}/rounds: verify a draft, continue."""
        principal = self._admit(request, Role.BOARD)
        request.state.session = named = request.path_params["session"]
        playing = await message_of(request, RoundRequest, self.limits.max_body, named)
        session = self.sessions.get(named, principal.name)
        running = session.ahead_of(playing)
        if running is not None:
            await while_connected(request, running.over())
            session = self.sessions.get(named, principal.name)
        # From here to `submit` nothing waits: of several rounds that were sent ahead, one is played.
        answer = session.next_round(playing)
        if answer is None:
            check_round(playing, session.target, self.limits)
            answer = self._submitter.play(principal, session, playing)
        return await reply(request, answer, playing.stream, session.id)

    async def close(self, request: Request) -> Response:
        """DELETE /v1/sessions/{id}: frees it; closing a session that is gone is no error."""
        principal = self._admit(request, Role.BOARD)
        # Somebody else's is as gone as any.
        with contextlib.suppress(VerifierRefused):
            self.sessions.remove(self.sessions.get(request.path_params["session"], principal.name).id)
        return Response(status_code=204)

    async def models(self, request: Request) -> Response:
        """GET /v1/models: what can be asked for."""
        self._admit(request, Role.BOARD)
        self._target()
        speculates = self.engine.speculation is not None
        served = self.rollout.models() if self.rollout is not None else {self._target().name: self._target()}
        models = [
            messages.Model(
                name,
                target.version,
                target.vocabulary,
                target.vocabulary_size,
                target.context,
                self.limits.max_draft,
                messages.MOST_NODES - 1,
                speculates=speculates,
            )
            for name, target in served.items()
        ]
        return respond(request, messages.ModelList(models))

    async def health(self, request: Request) -> Response:
        """GET /healthz: the process lives."""
        return Response("ok\n", media_type="text/plain")

    async def ready(self, request: Request) -> Response:
        """GET /readyz: the target is loaded, and new sessions are welcome."""
        self._target()
        if self.in_flight.draining:
            self.in_flight.check(opening=True)
        return Response("ready\n", media_type="text/plain")

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics: for Prometheus."""
        self._admit(request, Role.MONITOR)
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json: this verifier, described."""
        target = self._target()
        described = document(
            target.vocabulary_size,
            target.context,
            self.limits.max_body,
            tokens=self.doors.file is not None,
            admin=self._administered,
        )
        return Response(msgspec.json.encode(described), media_type="application/json")

    def _admit(self, request: Request, *roles: Role) -> Principal:
        principal = self.doors.admit(request, *roles)
        request.state.principal = principal.name
        return principal

    def _target(self) -> Target:
        target = self.target
        if target is None:
            if self.failure:
                raise VerifierRefused(ErrorCode.INTERNAL, f"the target did not load: {self.failure}", 500)
            raise VerifierRefused(ErrorCode.STARTING, "the target is still loading; try again shortly", 503)
        return target

    def _resolve(self, opening: OpenRequest, owner: str) -> Target:
        """The target that the opening's session gets, or has."""
        if self.rollout is not None:
            session = self.sessions.by_key(opening.key, owner)
            if session is not None and not session.closed:
                return session.target
            return self.rollout.resolve(opening.model, opening.key)
        target = self._target()
        if opening.model not in ("", target.name, target.version):
            raise VerifierRefused(
                ErrorCode.UNKNOWN_MODEL,
                f"no model {opening.model[:80]!r} here; there is {target.version}",
                404,
                {"available": [target.version]},
            )
        return target

    def _admin_routes(self, check_options: Sequence[str]) -> list[Route]:
        if self.rollout is None or not self._administered:
            return []
        admin = Admin(self.rollout, list(check_options))
        return [Route(one.path, self._answering(admin.handler(one)), methods=[one.method]) for one in OPERATIONS]

    def _answering(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Turns errors into typed refusals, and writes the log's line."""

        async def answering(request: Request) -> Response:
            began, code = time.perf_counter(), ""
            try:
                response = await handler(request)
            except VerifierRefused as error:
                code, response = error.code, refuse(request, error)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                log.exception("%s %s failed", request.method, handler.__name__)
                error = VerifierRefused(ErrorCode.INTERNAL, "a fault of the verifier; its log says more", 500)
                code, response = error.code, refuse(request, error)
            if code:
                self.metrics.refused(code)
            if named := request_id(request):
                response.headers["x-request-id"] = named
            log_request(request, handler.__name__, response.status_code, code, time.perf_counter() - began)
            return response

        return answering

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        following = asyncio.create_task(self.rollout.run()) if self.rollout is not None else None
        yield
        if following is not None:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following
        self.engine.stop()


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    sentence = f"no {request.method} {request.url.path} here; see the protocol in edge_runtime/protocol/messages.py"
    return refuse(request, VerifierRefused(ErrorCode.UNKNOWN_ROUTE, sentence, status))


def _metrics(service: Service) -> Metrics:
    """Counters, and gauges of what the service holds."""
    metrics, sessions, limits = Metrics(), service.sessions, service.limits
    for name, text, value in (
        ("sessions", "Sessions that are open.", lambda: len(sessions)),
        ("session_limit", "Sessions that there may be.", lambda: limits.max_sessions),
        ("cache_tokens", "Tokens of all sessions, whose keys and values are kept.", lambda: sessions.tokens),
        ("cache_token_limit", "Tokens that there may be.", lambda: limits.max_tokens),
        ("rounds_playing", "Rounds from their arrival to their end.", lambda: len(service.in_flight)),
        ("rounds_waiting", "Of these, those that have no token yet.", lambda: service.in_flight.waiting),
        ("queue_oldest_seconds", "That the oldest of them has waited.", lambda: service.in_flight.queue_seconds),
        ("draining", "1 when it is about to end.", lambda: service.in_flight.draining),
    ):
        metrics.gauge(name, text, value)
    metrics.counter("session_evictions", "Sessions that had to go to make room.", lambda: sessions.evictions)
    return metrics
