"""The verifier as an ASGI application: the routes of the protocol over one scheduler.

Every response other than 2xx is an `ErrorReply` with a typed code (see `messages.ErrorCode`), in the client's encoding;
only a client that has left gets none.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeAlias, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from cloud_verifier.api.access_log import log_request, request_id
from cloud_verifier.api.admin import ADMIN_OPERATIONS, AdminApi
from cloud_verifier.api.codec import (
    await_while_connected,
    error_response,
    message_response,
    read_message,
    reply_to_round,
)
from cloud_verifier.api.openapi import build_document
from cloud_verifier.engine.admission import OPENING_SHARE, AdmissionController, InFlightMiddleware
from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.engine.batching import BATCH_WINDOW_SECONDS
from cloud_verifier.engine.metrics import VerifierMetrics
from cloud_verifier.engine.principals import Principal, Role
from cloud_verifier.engine.rate_limits import check_prompt_length
from cloud_verifier.engine.rollout import Rollout
from cloud_verifier.engine.scheduler import Scheduler, TargetFactory
from cloud_verifier.engine.sessions import RoundReply, Session, SessionStore, StoreFull
from cloud_verifier.engine.submitter import RoundSubmitter
from cloud_verifier.model.limits import VerifierLimits, check_opening, check_round, make_constraint
from cloud_verifier.model.speculation import Speculation
from cloud_verifier.model.target import Target
from edge_runtime.common.memory import RELEASE_SECONDS
from edge_runtime.common.openapi import DocumentCache
from edge_runtime.common.tasks import background_task
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, Frame, OpenReply, OpenRequest, RoundRequest

log = logging.getLogger(__name__)

T = TypeVar("T")
Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


class VerifierService:
    """The request handlers and the state of one verifier. Its lifespan starts and stops the scheduler.

    Args:
        load_target: makes the initial target, in the scheduler's thread.
        load_speculation: makes the verifier's own draft model, or None; called in the scheduler's thread.
        authenticator: by default requests need no token.
        make_rollout: makes the rollout for the scheduler and the sessions; None to serve one target only.
        check_options: see `AdminApi`.
        target_factory, window, reuse_prefixes: see `Scheduler`.

    Attributes:
        app: the ASGI application.
    """

    def __init__(
        self,
        load_target: Callable[[], Target],
        limits: VerifierLimits,
        *,
        load_speculation: Callable[[Target], Speculation | None] = lambda target: None,
        authenticator: Authenticator | None = None,
        make_rollout: Callable[[Scheduler, SessionStore], Rollout] | None = None,
        check_options: Sequence[str] = (),
        target_factory: TargetFactory | None = None,
        window: float = BATCH_WINDOW_SECONDS,
        reuse_prefixes: bool = True,
    ) -> None:
        self.limits = limits
        # Compared with None: the authenticator of an empty token file is false, and must refuse every request.
        self.authenticator = Authenticator() if authenticator is None else authenticator
        self.sessions = SessionStore(limits, self._release)
        self.admission = AdmissionController(limits.max_queue_seconds)
        self.metrics = _build_metrics(self)
        self.scheduler = Scheduler(
            load_target,
            load_speculation,
            lambda: self.sessions.load,
            cache_tokens=limits.max_tokens,
            on_capacity=self.sessions.set_max_tokens,
            several=make_rollout is not None,
            metrics=self.metrics,
            window=window,
            target_factory=target_factory,
            reuse_prefixes=reuse_prefixes,
        )
        self.rollout = make_rollout(self.scheduler, self.sessions) if make_rollout else None
        self._documents = DocumentCache(build_document)
        self._submitter = RoundSubmitter(self.scheduler, self.sessions, self.admission, self.metrics)
        # Without tokens there are no admins, so the admin API could not be used.
        self._has_admin_api = self.rollout is not None and self.authenticator.file is not None
        self.app = Starlette(
            routes=[
                *self._admin_routes(check_options),
                Route("/v1/sessions", self._endpoint(self.open), methods=["POST"]),
                Route("/v1/sessions/{session}/rounds", self._endpoint(self.round), methods=["POST"]),
                Route("/v1/sessions/{session}", self._endpoint(self.close), methods=["DELETE"]),
                Route("/v1/models", self._endpoint(self.models)),
                Route("/healthz", self._endpoint(self.health)),
                Route("/readyz", self._endpoint(self.ready)),
                Route("/metrics", self._endpoint(self.show_metrics)),
                Route("/openapi.json", self._endpoint(self.openapi)),
            ],
            middleware=[Middleware(InFlightMiddleware, self.admission)],
            exception_handlers={HTTPException: _unknown_route},
            lifespan=self._lifespan,
        )
        self.app.router.redirect_slashes = False

    @property
    def target(self) -> Target | None:
        """The target for sessions that request no model, apart from canaries; None while it is loading."""
        if self.rollout is not None:
            return self.rollout.default_target if self.rollout.ready else None
        return self.scheduler.target

    @property
    def loaded(self) -> bool:
        return self.target is not None

    @property
    def failure(self) -> BaseException | None:
        """Why the target did not load, or why the scheduler has ended."""
        return self.scheduler.failure or (self.rollout.failure if self.rollout is not None else None)

    @property
    def stalled_seconds(self) -> float:
        """How long the scheduler has been in its current step."""
        return self.scheduler.stalled_seconds

    @property
    def in_use(self) -> bool:
        """Whether boards may be about to send their next round."""
        return len(self.sessions) > 0

    @property
    def requests_waiting_for_room(self) -> int:
        """Requests that wait for room in the session store."""
        return len(self._submitter.places)

    def status(self) -> str:
        """One line about the current state."""
        target = self.target
        draining = ", draining" if self.admission.draining else ""
        return f"{target.version if target else 'no target'}, {len(self.sessions)} sessions{draining}"

    def reload(self) -> None:
        """Read the token file again; sessions stay. On InputError nothing changes."""
        self.authenticator.reload()
        log.info("%d tokens", len(self.authenticator))

    async def open(self, request: Request) -> Response:
        """POST /v1/sessions: open a session and execute its first round."""
        principal = self._authorize(request, Role.BOARD)
        opening = await read_message(request, OpenRequest, self.limits.max_body)
        target = self._resolve_target(opening, principal.name)
        await check_opening(opening, target, self.limits)
        check_prompt_length(principal, opening)
        constraint = await make_constraint(opening, target)

        def find_or_open() -> tuple[Session, RoundReply]:
            # This does not yield to the event loop, so that two requests with one key cannot both open a session.
            session = self.sessions.find_by_key(opening.key, principal.name)
            if session is None:
                session = self._submitter.open_session(principal, opening, target, constraint)
                return session, session.reply
            return session, _recorded_opening(session, opening)

        session, reply = await self._when_there_is_room(request, principal, find_or_open, opening=True)
        target = session.target
        request.state.session = session_id = session.id

        def open_reply(frame: Frame) -> OpenReply:
            return OpenReply(
                messages.PROTOCOL_VERSION,
                session_id,
                target.version,
                target.context,
                frame,
                needs_generated=target.replays_prompt,
                cached=session.cached_tokens,
            )

        return await reply_to_round(
            request, reply, stream=opening.first.stream, session=session_id, open_reply=open_reply
        )

    async def round(self, request: Request) -> Response:
        """POST /v1/sessions/{id}/rounds: verify a draft and continue."""
        principal = self._authorize(request, Role.BOARD)
        request.state.session = session_id = request.path_params["session"]
        round_request = await read_message(request, RoundRequest, self.limits.max_body, session_id)
        session = self.sessions.get(session_id, principal.name)
        running = session.running_predecessor(round_request)
        if running is not None:
            await await_while_connected(request, running.wait_done())
            session = self.sessions.get(session_id, principal.name)

        def find_or_submit() -> RoundReply:
            # This does not yield to the event loop, so that of several rounds that were sent ahead only one is
            # executed.
            session = self.sessions.get(session_id, principal.name)
            reply = session.recorded_reply(round_request)
            if reply is None:
                check_round(round_request, session.target, self.limits)
                reply = self._submitter.submit_round(principal, session, round_request)
            return reply

        reply = await self._when_there_is_room(request, principal, find_or_submit, session=session)
        return await reply_to_round(request, reply, stream=round_request.stream, session=session_id)

    async def _when_there_is_room(
        self,
        request: Request,
        principal: Principal,
        attempt: Callable[[], T],
        *,
        opening: bool = False,
        session: Session | None = None,
    ) -> T:
        """Call `attempt`, again later if it raises `StoreFull`, in its turn among principals; see `PlaceQueue`."""
        places = self._submitter.places
        if not len(places):
            with contextlib.suppress(StoreFull):
                return attempt()
        seconds = self.limits.max_queue_seconds * (OPENING_SHARE if opening else 1.0)
        return await await_while_connected(request, places.wait(principal.name, attempt, seconds, session))

    async def close(self, request: Request) -> Response:
        """DELETE /v1/sessions/{id}: close a session. Closing one that does not exist is not an error."""
        principal = self._authorize(request, Role.BOARD)
        # Sessions of other principals do not exist for this one.
        with contextlib.suppress(VerifierRefused):
            self.sessions.remove(self.sessions.get(request.path_params["session"], principal.name).id)
        return Response(status_code=204)

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the models that sessions can request."""
        self._authorize(request, Role.BOARD)
        default = self._require_target()
        speculates = self.scheduler.speculation is not None
        served = self.rollout.models() if self.rollout is not None else {default.name: default}
        models = [
            messages.ModelCard(
                id=name,
                version=target.version,
                vocabulary=target.vocabulary,
                vocabulary_size=target.vocabulary_size,
                context=target.context,
                max_draft=self.limits.max_draft,
                max_nodes=messages.MAX_TREE_NODES - 1,
                speculates=speculates,
            )
            for name, target in served.items()
        ]
        return message_response(request, messages.ModelList(models))

    async def health(self, request: Request) -> Response:
        """GET /healthz: the process is alive."""
        return Response("ok\n", media_type="text/plain")

    async def ready(self, request: Request) -> Response:
        """GET /readyz: the target is loaded and new sessions are admitted."""
        self._require_target()
        if self.admission.draining:
            self.admission.check(opening=True)
        return Response("ready\n", media_type="text/plain")

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics: for Prometheus."""
        self._authorize(request, Role.MONITOR)
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json: the OpenAPI document of this verifier."""
        target = self._require_target()
        document = await self._documents.get(
            target.vocabulary_size,
            target.context,
            self.limits.max_body,
            self.authenticator.file is not None,
            self._has_admin_api,
        )
        return Response(document, media_type="application/json")

    def _release(self, session: Session) -> None:
        """Free the memory of a session that has left the store, and serve the requests that wait for its place."""
        self.scheduler.release(session)
        if len(self._submitter.places):
            asyncio.get_running_loop().call_soon(self._submitter.places.serve)

    def _authorize(self, request: Request, *roles: Role) -> Principal:
        principal = self.authenticator.authorize(request, *roles)
        request.state.principal = principal.name
        return principal

    def _require_target(self) -> Target:
        target = self.target
        if target is None:
            if self.failure:
                raise VerifierRefused(ErrorCode.INTERNAL, f"the target did not load: {self.failure}")
            raise VerifierRefused(ErrorCode.STARTING, "the target is still loading; try again shortly")
        return target

    def _resolve_target(self, opening: OpenRequest, owner: str) -> Target:
        """The target of the session that `opening` opens, or has opened already."""
        if self.rollout is not None:
            session = self.sessions.find_by_key(opening.key, owner)
            if session is not None:
                return session.target
            return self.rollout.resolve(opening.model, opening.key)
        target = self._require_target()
        if opening.model not in ("", target.name, target.version):
            raise VerifierRefused(
                ErrorCode.UNKNOWN_MODEL,
                f"the model {opening.model[:80]!r} does not exist here; available: {target.version}",
                detail={"available": [target.version]},
            )
        return target

    def _admin_routes(self, check_options: Sequence[str]) -> list[Route]:
        if self.rollout is None or not self._has_admin_api:
            return []
        admin = AdminApi(self.rollout, self.authenticator, check_options)
        return [
            Route(
                operation.path,
                self._endpoint(functools.partial(admin.handle, operation), operation.name),
                methods=[operation.method],
            )
            for operation in ADMIN_OPERATIONS
        ]

    def _endpoint(self, handler: Handler, name: str = "") -> Handler:
        """Wrap a handler: errors become typed replies, and the request is counted, and logged under the name."""
        name = name or handler.__name__

        async def endpoint(request: Request) -> Response:
            started, code = time.perf_counter(), ""
            try:
                response = await handler(request)
            except VerifierRefused as error:
                code, response = error.code, error_response(request, error)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                log.exception("%s %s failed", request.method, name)
                internal = VerifierRefused(ErrorCode.INTERNAL, "internal error of the verifier; see its log")
                code, response = internal.code, error_response(request, internal)
            if code:
                self.metrics.refusals.labels(code).inc()
            if client_id := request_id(request):
                response.headers["x-request-id"] = client_id
            log_request(request, name, response.status_code, code, time.perf_counter() - started)
            return response

        return endpoint

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.scheduler.start()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self.scheduler.stop)
            if self.rollout is not None:
                await stack.enter_async_context(background_task(self.rollout.run()))
            await stack.enter_async_context(background_task(self._release_memory()))
            yield

    async def _release_memory(self) -> None:
        """Evict idle sessions and give unused memory back, until cancelled."""
        while True:
            await asyncio.sleep(RELEASE_SECONDS)
            self.sessions.evict_idle()
            await self.scheduler.release_unused_memory(self.limits.idle_seconds)


def _recorded_opening(session: Session, opening: OpenRequest) -> RoundReply:
    """The reply to the first round of a session that a request with the same key has opened.

    Raises:
        VerifierRefused: `opening` is not that request, or the session has gone on.
    """
    same_text = session.ids[: len(opening.prompt)] == opening.prompt
    if not same_text or (session.sampling, session.logprobs) != (opening.sampling, opening.logprobs):
        raise VerifierRefused(ErrorCode.ROUND_CONFLICT, "this key has opened a session with another prompt")
    reply = session.recorded_reply(opening.first)
    if reply is None:
        raise VerifierRefused(
            ErrorCode.ROUND_OUT_OF_ORDER,
            "this session is already open; send its rounds to its own URL",
            detail={"expected": session.reply.request.round + 1},
        )
    return reply


async def _unknown_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    sentence = (
        f"this verifier has no route {request.method} {request.url.path}; "
        "see the protocol in edge_runtime/protocol/messages.py"
    )
    return error_response(request, VerifierRefused(ErrorCode.UNKNOWN_ROUTE, sentence, status))


def _build_metrics(service: VerifierService) -> VerifierMetrics:
    """Counters, and gauges of the service's state."""
    metrics, sessions, limits = VerifierMetrics(), service.sessions, service.limits
    for name, text, value in (
        ("sessions", "Open sessions.", lambda: len(sessions)),
        ("session_limit", "Most sessions that can be open.", lambda: limits.max_sessions),
        ("cache_tokens", "Tokens of all sessions in the KV cache.", lambda: sessions.tokens),
        ("cache_token_limit", "Most tokens in the KV cache.", lambda: sessions.max_tokens),
        (
            "prefix_cache_tokens",
            "Tokens of closed sessions, kept for reuse.",
            lambda: service.scheduler.retained_tokens,
        ),
        ("rounds_running", "Rounds from their arrival to their end.", lambda: len(service.admission)),
        ("rounds_waiting", "Rounds in progress that have no token yet.", lambda: service.admission.waiting),
        (
            "requests_waiting_for_room",
            "Requests that wait until the sessions of others end.",
            lambda: service.requests_waiting_for_room,
        ),
        (
            "queue_oldest_seconds",
            "Longest time that a round without a token has waited.",
            lambda: service.admission.queue_seconds,
        ),
        ("draining", "1 while the verifier drains before it stops.", lambda: service.admission.draining),
    ):
        metrics.add_gauge(name, text, value)
    metrics.add_counter("session_evictions", "Sessions evicted to make room.", lambda: sessions.evictions)
    metrics.add_counter(
        "prefix_cache_evictions",
        "Closed sessions whose KV caches were given up because memory was needed.",
        lambda: service.scheduler.prefix_cache_evictions,
    )
    return metrics
