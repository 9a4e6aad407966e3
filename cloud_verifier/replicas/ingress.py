"""The door of several replicas: boards speak HTTP/2, TLS and tokens with it as with one verifier, and Ray Serve carries
each request to the replica that has its session.

No table says which one that is. A session's id begins with a mark of the key that it was opened with (`wire.mark_of`);
the mark's place on Ray's ring of consistent hashes names the replica, for the opening and for all its rounds. When a
replica comes or goes, only the sessions of its own part of the ring move, and are opened again as lost ones. So an
ingress remembers nothing.
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
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from cloud_verifier.api.codec import body_of, media_type_of, refuse
from cloud_verifier.engine.admission import Counted, InFlight
from cloud_verifier.engine.auth import Doors, Role
from cloud_verifier.model.limits import VerifierLimits
from edge_runtime.protocol import messages as wire
from edge_runtime.protocol.errors import VerifierRefused
from edge_runtime.protocol.messages import ErrorCode

log = logging.getLogger(__name__)

SESSIONS = "/v1/sessions"
MARK_CHARACTERS = len(wire.mark_of(""))
# How often something that can be repeated is tried when replicas die under it.
ATTEMPTS = 3
RETRY_SECONDS = 1
# For all replicas to say something.
ALL_SECONDS = 10.0
# Of an ASGI scope: what a replica needs, and can be carried there.
CARRIED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "client", "server")


class Replicas(Protocol):
    """What an ingress stands before; see `scaling.Fleet`."""

    handle: DeploymentHandle[Any] | None
    failure: BaseException | None

    @property
    def running(self) -> int:
        """How many replicas there are that can be asked."""

    async def run(self) -> None:
        """Brings them up, and keeps an eye on them until cancelled."""

    def status(self) -> str:
        """What they do now, in a line."""


class Ingress:
    """An ASGI application, `app`, that is the verifier's, over its replicas."""

    # Their work is their own: Ray looks after them.
    stalled_seconds = 0.0

    def __init__(self, replicas: Replicas, limits: VerifierLimits, doors: Doors) -> None:
        self.doors = doors
        self.in_flight = InFlight(float("inf"))
        self._replicas = replicas
        self._limits = limits
        self.app = Starlette(
            routes=[
                Route("/healthz", self._health),
                Route("/readyz", self._ready),
                Route("/metrics", self._metrics),
                Mount("", app=self._forward),
            ],
            middleware=[Middleware(Counted, self.in_flight)],
            lifespan=self._lifespan,
        )
        self.app.router.redirect_slashes = False

    @property
    def loaded(self) -> bool:
        """Whether a replica can be asked."""
        return self._replicas.running > 0

    @property
    def failure(self) -> BaseException | None:
        """Why there is none, and will be none."""
        return self._replicas.failure

    @property
    def in_use(self) -> bool:
        """Whether boards may be about to ask for their next round."""
        return self.loaded

    def status(self) -> str:
        """What it does now, in a line."""
        return self._replicas.status() + (", about to end" if self.in_flight.draining else "")

    def reload(self) -> None:
        """Has everyone read the tokens again. Raises InputError, and then everything stays as it was."""
        self.doors.reload()
        if self._replicas.handle is not None:
            self._replicas.handle.broadcast("reload").results(timeout_s=ALL_SECONDS)
        log.info("%d tokens", len(self.doors))

    async def drain(self, seconds: float) -> bool:
        """From now on plays nothing new; whether what is being played was over within `seconds`."""
        return await self.in_flight.drain(seconds)

    def abandon(self) -> None:
        """Its lifespan has not been left, and need not be."""

    async def _health(self, request: Request) -> Response:
        return Response("ok\n", media_type="text/plain")

    async def _ready(self, request: Request) -> Response:
        try:
            self._handle()
            self.in_flight.check(opening=True)
        except VerifierRefused as error:
            return refuse(request, error)
        return Response("ready\n", media_type="text/plain")

    async def _metrics(self, request: Request) -> Response:
        """All replicas' figures, each with the label of its replica: only they can be added up."""
        try:
            self.doors.admit(request, Role.MONITOR)
            pages = await self._handle().broadcast("page").results_async(timeout_s=ALL_SECONDS)
        except VerifierRefused as error:
            return refuse(request, error)
        except (RayError, RayServeException, TimeoutError) as error:
            log.warning("not all replicas told their figures: %s", error)
            return refuse(request, VerifierRefused(ErrorCode.OVERLOADED, "a replica did not tell its figures", 503))
        return Response(merged(dict(pages), self._replicas.running), media_type="text/plain; version=0.0.4")

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Any other request, to a replica and back."""
        # Mounted applications have their own idea of where they are.
        scope = scope | {"root_path": "", "path": scope["path"]}
        request = Request(scope, receive)
        began = False
        try:
            if scope["method"] == "POST":
                self.in_flight.check(opening=True)
            body = await body_of(request, self._limits.max_body)
            async for message in self._asked(request, body):
                began = True
                await send(message)
        except ClientDisconnect:
            return
        except VerifierRefused as error:
            if not began:
                await refuse(request, error)(scope, receive, send)
            else:
                # A round that fails in mid-stream ends there: its last frame still says `more`.
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _asked(self, request: Request, body: bytes) -> AsyncIterator[Message]:
        """What a replica answers. Raises VerifierRefused, and ClientDisconnect when the client has gone before that."""
        mark = affinity(request.method, request.url.path, media_type_of(request), body)
        carried = {name: request.scope[name] for name in CARRIED if name in request.scope}
        carried["headers"] = [(bytes(name), bytes(value)) for name, value in request.scope["headers"]]
        round_ = request.url.path.startswith(f"{SESSIONS}/")
        for attempt in range(ATTEMPTS):
            began = over = False
            answer = self._handle().options(method_name="exchange", stream=True, session_id=mark).remote(carried, body)
            watching = asyncio.create_task(_cancel_when_gone(request, answer))
            try:
                async for messages in answer:
                    began = True
                    for message in messages:
                        yield message
                over = True
                return
            except (RequestCancelledError, TaskCancelledError, asyncio.CancelledError) as error:
                if not watching.done():
                    raise
                raise ClientDisconnect from error
            except RayActorError as error:
                log.warning("a replica has ended with a request: %s", str(error).split("\n", 1)[0])
                # An opening is idempotent by its key, and its ring has lost that replica by now.
                if began or round_ or attempt + 1 == ATTEMPTS:
                    raise _lost(round_) from error
            except BackPressureError as error:
                raise VerifierRefused(
                    ErrorCode.OVERLOADED, "too many requests wait for a replica; try again shortly", 503
                ) from error
            except (RayError, RayServeException) as error:
                log.exception("%s %s failed", request.method, request.url.path)
                raise VerifierRefused(ErrorCode.INTERNAL, "a fault of the verifier; its log says more", 500) from error
            finally:
                watching.cancel()
                if not over:
                    answer.cancel()

    def _handle(self) -> DeploymentHandle[Any]:
        """Raises VerifierRefused while there is no replica."""
        if self._replicas.handle is None or not self.loaded:
            raise VerifierRefused(
                ErrorCode.STARTING, "no replica is up yet, or again; try again shortly", 503, retry_after=RETRY_SECONDS
            )
        return self._replicas.handle

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(self._replicas.run())
        yield
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def affinity(method: str, path: str, media_type: str, body: bytes) -> str:
    """What all requests of one session have in common, and few others: its mark. Empty where any replica will do."""
    if path.startswith(f"{SESSIONS}/"):
        return path[len(SESSIONS) + 1 :].partition("/")[0][:MARK_CHARACTERS]
    key = wire.key_of(body, media_type) if (method, path) == ("POST", SESSIONS) else None
    return wire.mark_of(key) if key else ""


def merged(pages: Mapping[str, bytes], running: int) -> bytes:
    """Replicas' pages for Prometheus as one; every sample gets the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, page in sorted(pages.items()):
        for family in text_string_to_metric_families(page.decode()):
            one = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            one.samples += [sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples]
    families["flexspec_replicas"] = GaugeMetricFamily("flexspec_replicas", "Replicas that are up.", value=running)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(families.values()))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


async def _cancel_when_gone(request: Request, answer: Any) -> None:
    """Has the replica told when the client goes before its answer is over."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.cancel()


def _lost(round_: bool) -> VerifierRefused:
    if round_:
        return VerifierRefused(
            ErrorCode.SESSION_LOST, "the replica that held this session has ended; open one with all ids so far", 404
        )
    return VerifierRefused(
        ErrorCode.STARTING, "replicas end faster than this can be told; try again shortly", 503,
        retry_after=RETRY_SECONDS,
    )  # fmt: skip
