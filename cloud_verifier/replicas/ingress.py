"""The ingress of several replicas: an ASGI application that forwards each request to the replica with its session.

Boards use HTTP/2, TLS and tokens with it as with a single verifier; Ray Serve carries requests to the replicas.

Routing needs no table. A session id begins with a mark derived from the opening key (`messages.session_id_prefix`). The
position of the mark on Ray's consistent hash ring selects the replica, for the opening and for all rounds. When a
replica is added or removed, only the sessions of its part of the ring move; they are lost there and reopened. The
ingress itself is stateless.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from cloud_verifier.api.codec import error_response, read_request_body, request_media_type
from cloud_verifier.engine.admission import AdmissionController, InFlightMiddleware
from cloud_verifier.engine.auth import Authenticator
from cloud_verifier.engine.principals import Role
from cloud_verifier.model.limits import VerifierLimits
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode, peek_session_key, session_id_prefix

log = logging.getLogger(__name__)

SESSIONS_PATH = "/v1/sessions"
MARK_CHARACTERS = len(session_id_prefix(""))
# Attempts for a request that may be repeated, if replicas die while they handle it.
MAX_ATTEMPTS = 3
# Timeout of a call to all replicas.
BROADCAST_SECONDS = 10.0
# The keys of an ASGI scope that a replica needs and that can be pickled.
FORWARDED_SCOPE_KEYS = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "client",
    "server",
)


class ReplicaBackend(Protocol):
    """What the ingress needs of the replicas; see `deployment.ReplicaDeployment`."""

    handle: DeploymentHandle[Any] | None
    failure: BaseException | None

    @property
    def running(self) -> int:
        """Number of replicas that accept requests."""

    async def run(self) -> None:
        """Deploy the replicas and monitor them until cancelled."""

    def status(self) -> str:
        """One line about the current state."""


class Ingress:
    """The verifier's ASGI application, `app`, over its replicas."""

    # Ray watches the replicas; the ingress itself has no scheduler that could stall.
    stalled_seconds = 0.0

    def __init__(self, replicas: ReplicaBackend, limits: VerifierLimits, authenticator: Authenticator) -> None:
        self.authenticator = authenticator
        # Only for draining: each replica sheds load itself.
        self.admission = AdmissionController(float("inf"))
        self._replicas = replicas
        self._limits = limits
        self.app = Starlette(
            routes=[
                Route("/healthz", self._health),
                Route("/readyz", self._ready),
                Route("/metrics", self._metrics),
                Mount("", app=self._forward),
            ],
            middleware=[Middleware(InFlightMiddleware, self.admission)],
            lifespan=self._lifespan,
        )
        self.app.router.redirect_slashes = False

    @property
    def loaded(self) -> bool:
        """Whether a replica accepts requests."""
        return self._replicas.running > 0

    @property
    def failure(self) -> BaseException | None:
        """Why no replica came up."""
        return self._replicas.failure

    @property
    def in_use(self) -> bool:
        """Whether boards may be about to send their next round."""
        return self.loaded

    def status(self) -> str:
        """One line about the current state."""
        return self._replicas.status() + (", draining" if self.admission.draining else "")

    def reload(self) -> None:
        """Read the token file again, here and in all replicas. On InputError nothing changes."""
        self.authenticator.reload()
        if self._replicas.handle is not None:
            self._replicas.handle.broadcast("reload").results(timeout_s=BROADCAST_SECONDS)
        log.info("%d tokens", len(self.authenticator))

    async def _health(self, request: Request) -> Response:
        return Response("ok\n", media_type="text/plain")

    async def _ready(self, request: Request) -> Response:
        try:
            self._require_handle()
            self.admission.check(opening=True)
        except VerifierRefused as error:
            return error_response(request, error)
        return Response("ready\n", media_type="text/plain")

    async def _metrics(self, request: Request) -> Response:
        """The metrics of all replicas, each with a label `replica`."""
        try:
            self.authenticator.authorize(request, Role.MONITOR)
            pages = await self._require_handle().broadcast("page").results_async(timeout_s=BROADCAST_SECONDS)
        except VerifierRefused as error:
            return error_response(request, error)
        except (RayError, RayServeException, TimeoutError) as error:
            log.warning("a replica did not report its metrics: %s", error)
            return error_response(
                request, VerifierRefused(ErrorCode.OVERLOADED, "a replica did not report its metrics")
            )
        page = merge_metrics(dict(pages), self._replicas.running)
        return Response(page, media_type="text/plain; version=0.0.4")

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward any other request to a replica, and its response back."""
        # `Mount` has changed the path of the scope.
        scope = dict(scope) | {"root_path": "", "path": scope["path"]}
        request = Request(scope, receive)
        response_started = False
        try:
            body = b""
            if scope["method"] == "POST":
                self.admission.check(opening=True)
                # The replica checks the role; without a token, there is no reason to read anything.
                self.authenticator.authorize(request, *Role)
                body = await read_request_body(request, self._limits.max_body)
            async for message in self._call_replica(request, body):
                response_started = True
                await send(message)
        except ClientDisconnect:
            return
        except VerifierRefused as error:
            if not response_started:
                await error_response(request, error)(scope, receive, send)
            else:
                # A round that fails ends the stream early; the client notices, since the last frame says `more`.
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _call_replica(self, request: Request, body: bytes) -> AsyncIterator[Message]:
        """Yield a replica's response.

        Raises:
            VerifierRefused: no replica could handle the request.
            ClientDisconnect: the client disconnected first.
        """
        mark = session_mark(request.method, request.url.path, request_media_type(request), body)
        scope = {name: request.scope[name] for name in FORWARDED_SCOPE_KEYS if name in request.scope}
        scope["headers"] = [(bytes(name), bytes(value)) for name, value in request.scope["headers"]]
        is_round = request.url.path.startswith(f"{SESSIONS_PATH}/")
        for attempt in range(MAX_ATTEMPTS):
            started = complete = False
            handle = self._require_handle().options(method_name="exchange", stream=True, session_id=mark)
            # A generator, because of `stream`.
            response: DeploymentResponseGenerator[Any] = handle.remote(scope, body)  # type: ignore[assignment]
            watcher = asyncio.create_task(_cancel_on_disconnect(request, response))
            try:
                async for messages in response:
                    started = True
                    for message in messages:
                        yield message
                complete = True
                return
            except (RequestCancelledError, TaskCancelledError, asyncio.CancelledError) as error:
                if not watcher.done():
                    raise
                raise ClientDisconnect from error
            except RayActorError as error:
                log.warning("a replica died with a request: %s", str(error).split("\n", 1)[0])
                # Only an opening may be repeated: its key makes it idempotent, and the ring has dropped the replica.
                if started or is_round or attempt + 1 == MAX_ATTEMPTS:
                    raise _replica_died_error(is_round) from error
            except BackPressureError as error:
                raise VerifierRefused(
                    ErrorCode.OVERLOADED, "too many requests wait for a replica; try again shortly"
                ) from error
            except (RayError, RayServeException) as error:
                log.exception("%s %s failed", request.method, request.url.path)
                raise VerifierRefused(ErrorCode.INTERNAL, "internal error of the verifier; see its log") from error
            finally:
                watcher.cancel()
                if not complete:
                    response.cancel()  # type: ignore[no-untyped-call]

    def _require_handle(self) -> DeploymentHandle[Any]:
        """Raises VerifierRefused (`starting`) while no replica is running."""
        if self._replicas.handle is None or not self.loaded:
            raise VerifierRefused(ErrorCode.STARTING, "no replica is running yet; try again shortly")
        return self._replicas.handle

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(self._replicas.run())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def session_mark(method: str, path: str, media_type: str, body: bytes) -> str:
    """The routing key that all requests of one session share; empty if any replica can handle the request."""
    if path.startswith(f"{SESSIONS_PATH}/"):
        return path[len(SESSIONS_PATH) + 1 :].partition("/")[0][:MARK_CHARACTERS]
    key = peek_session_key(body, media_type) if (method, path) == ("POST", SESSIONS_PATH) else None
    return session_id_prefix(key) if key else ""


def merge_metrics(pages: Mapping[str, bytes], running: int) -> bytes:
    """Merge the replicas' Prometheus pages, by replica id, into one. Every sample gets the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, page in sorted(pages.items()):
        for family in text_string_to_metric_families(page.decode()):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [
                sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples
            ]
    families["flexspec_replicas"] = GaugeMetricFamily("flexspec_replicas", "Running replicas.", value=running)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_FixedCollector(families.values()))
    return generate_latest(registry)


class _FixedCollector(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


async def _cancel_on_disconnect(request: Request, response: Any) -> None:
    """Cancel the call to the replica when the client disconnects before the response is complete."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    response.cancel()


def _replica_died_error(is_round: bool) -> VerifierRefused:
    if is_round:
        return VerifierRefused(
            ErrorCode.SESSION_LOST, "the replica of this session has died; open a new one with all ids so far"
        )
    return VerifierRefused(ErrorCode.STARTING, "replicas die repeatedly with this request; try again shortly")
