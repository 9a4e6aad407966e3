"""The HTTP surface of the verifier: an ASGI application over one engine.

Every answer but 2xx is a `Refusal` with a typed code (see `wire.ErrorCode`), in the encoding that the client speaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from cloud_verifier.engine import Engine
from cloud_verifier.sessions import Answer, Session, SessionStore
from cloud_verifier.speculation import Speculation
from cloud_verifier.target import TREE_WIDTHS, Target
from edge_runtime.contract import wire
from edge_runtime.contract.errors import InputError, VerifierRefused
from edge_runtime.contract.wire import ErrorCode, Frame, Message, OpenReply, OpenRequest, RoundRequest

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)


class Limits(msgspec.Struct, frozen=True):
    """What one verifier process grants.

    Attributes:
        max_sessions: concurrent sessions; the least recently used is evicted.
        max_tokens: tokens of all sessions together.
        max_draft: draft tokens per round (K).
        max_own: tokens of the target's own per round (n).
        max_body: bytes of a request body.
        idle_seconds: sessions unused for longer are evicted.
    """

    max_sessions: int = 256
    max_tokens: int = 262_144
    max_draft: int = wire.MOST_DRAFT
    max_own: int = wire.MOST_OWN
    max_body: int = 1 << 20
    idle_seconds: float = 600.0


class Service:
    """Handlers over one engine. `app` is the ASGI application; it owns the engine's life.

    Args:
        load: makes the target, in the engine's thread.
        speculate: makes the draft beside it, likewise; None goes without.
    """

    def __init__(
        self,
        load: Callable[[], Target],
        limits: Limits,
        speculate: Callable[[Target], Speculation | None] = lambda target: None,
    ) -> None:
        self.limits = limits
        self.sessions = SessionStore(limits.max_sessions, limits.max_tokens, limits.idle_seconds)
        self.engine = Engine(load, speculate, lambda: self.sessions.load)
        self.app = Starlette(
            routes=[
                Route("/v1/sessions", self._answering(self.open), methods=["POST"]),
                Route("/v1/sessions/{session}/rounds", self._answering(self.round), methods=["POST"]),
                Route("/v1/sessions/{session}", self._answering(self.close), methods=["DELETE"]),
                Route("/v1/models", self._answering(self.models)),
                Route("/healthz", self._answering(self.health)),
                Route("/readyz", self._answering(self.ready)),
            ],
            exception_handlers={HTTPException: _no_such_route},
            lifespan=self._lifespan,
        )
        self.app.router.redirect_slashes = False

    def status(self) -> str:
        """What it does now, in a line."""
        target = self.engine.target
        return f"{target.version if target else 'no target'}, {len(self.sessions)} sessions"

    async def open(self, request: Request) -> Response:
        """POST /v1/sessions: a session, and its first round."""
        opening = await self._message(request, OpenRequest)
        target = await self._check_opening(opening)
        # From here to `add` nothing waits, so that two requests with one key cannot both open a session.
        session = self.sessions.by_key(opening.key)
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
        else:
            answer = Answer(opening.first)
            session = Session(list(opening.prompt), opening.sampling, target.new_cache(), answer)
            self.sessions.add(opening.key, session)
            self.engine.submit(session, answer)
        opened = session.id

        def introduce(frame: Frame) -> OpenReply:
            return OpenReply(wire.VERSION, opened, target.version, target.context, frame)

        return await _reply(request, answer, opening.first.stream, opened, introduce)

    async def round(self, request: Request) -> Response:
        """POST /v1/sessions/{id}/rounds: verify a draft, continue."""
        named = request.path_params["session"]
        playing = await self._message(request, RoundRequest, named)
        session = self.sessions.get(named)
        running = session.ahead_of(playing)
        if running is not None:
            await _while_connected(request, running.over())
            session = self.sessions.get(session.id)
        # From here to `submit` nothing waits: of several rounds that were sent ahead, one is played.
        answer = session.next_round(playing)
        if answer is None:
            self._check_round(playing, self._target())
            self.sessions.make_room(0, len(playing.draft) + playing.n, session)
            answer = session.begin(playing)
            self.engine.submit(session, answer)
        return await _reply(request, answer, playing.stream, session.id)

    async def close(self, request: Request) -> Response:
        """DELETE /v1/sessions/{id}: frees it; closing a session that is gone is no error."""
        self.sessions.remove(request.path_params["session"])
        return Response(status_code=204)

    async def models(self, request: Request) -> Response:
        """GET /v1/models: what can be asked for."""
        target = self._target()
        model = wire.Model(
            target.name,
            target.version,
            target.vocabulary,
            target.vocabulary_size,
            target.context,
            self.limits.max_draft,
            TREE_WIDTHS[-1] - 1,
            speculates=self.engine.speculation is not None,
        )
        return _response(request, wire.ModelList([model]))

    async def health(self, request: Request) -> Response:
        """GET /healthz: the process lives."""
        return Response("ok\n", media_type="text/plain")

    async def ready(self, request: Request) -> Response:
        """GET /readyz: the target is loaded."""
        self._target()
        return Response("ready\n", media_type="text/plain")

    def _target(self) -> Target:
        if self.engine.target is None:
            if self.engine.failure:
                raise VerifierRefused(ErrorCode.INTERNAL, f"the target did not load: {self.engine.failure}", 500)
            raise VerifierRefused(ErrorCode.STARTING, "the target is still loading; try again shortly", 503)
        return self.engine.target

    async def _check_opening(self, opening: OpenRequest) -> Target:
        target = self._target()
        if opening.model not in ("", target.name, target.version):
            raise VerifierRefused(
                ErrorCode.UNKNOWN_MODEL,
                f"no model {opening.model[:80]!r} here; there is {target.version}",
                404,
                {"available": [target.version]},
            )
        if opening.vocabulary not in ("", target.vocabulary):
            raise VerifierRefused(
                ErrorCode.VOCABULARY_MISMATCH,
                f"the draft's vocabulary {opening.vocabulary[:80]} is not {target.version}'s {target.vocabulary}; "
                "export a draft from this target",
                409,
            )
        # Hashing tensors takes a while the first time; others go on being served.
        if opening.draft and opening.draft != await asyncio.to_thread(target.identity_like, opening.draft):
            raise VerifierRefused(
                ErrorCode.DRAFT_MISMATCH,
                f"the tensors that the draft shares ({opening.draft[:80]}) are not those of {target.version}; "
                "ask for a version that kept them, or export a draft from this one",
                409,
            )
        limit = target.context - 1
        if len(opening.prompt) > limit:
            raise VerifierRefused(
                ErrorCode.CONTEXT_OVERFLOW,
                f"the prompt has {len(opening.prompt)} tokens and {target.version} takes {limit}; shorten it",
                413,
                {"limit": limit},
            )
        _check_ids(opening.prompt, target)
        if opening.first.round != 0:
            raise VerifierRefused(ErrorCode.ROUND_OUT_OF_ORDER, "the first round is round 0", 409, {"expected": 0})
        if opening.first.position != len(opening.prompt):
            raise VerifierRefused(
                ErrorCode.WRONG_POSITION,
                f"position {opening.first.position} is not where the prompt ends ({len(opening.prompt)})",
                409,
                {"expected": len(opening.prompt)},
            )
        if opening.first.expects not in ([], opening.prompt[-1:]):
            raise VerifierRefused(
                ErrorCode.ROUND_VOID, f"the prompt does not end with token {opening.first.expects[0]}", 409
            )
        self._check_round(opening.first, target)
        return target

    def _check_round(self, playing: RoundRequest, target: Target) -> None:
        nodes = 1 + len(playing.draft) + sum(map(len, playing.siblings.values()))
        for what, size, limit in (
            ("draft tokens", len(playing.draft), self.limits.max_draft),
            ("draft tokens and siblings", nodes - 1, TREE_WIDTHS[-1] - 1),
            ("tokens of the target's own", playing.n, self.limits.max_own),
        ):
            if size > limit:
                raise VerifierRefused(
                    ErrorCode.DRAFT_TOO_LONG, f"{size} {what} in one round; at most {limit}", 400, {"limit": limit}
                )
        if any(index >= len(playing.draft) for index in playing.siblings):
            raise VerifierRefused(ErrorCode.MALFORMED, "siblings for a draft token that does not exist", 400)
        _check_ids(playing.draft, target)
        for alternatives in playing.siblings.values():
            _check_ids(alternatives, target)

    async def _message(self, request: Request, kind: type[M], session: str = "") -> M:
        body = await self._body(request)
        try:
            message = wire.decode(body, kind, _media_type(request), session)
        except InputError as error:
            if isinstance(error, wire.Damaged):
                raise VerifierRefused(ErrorCode.DAMAGED, f"{error}; send it again", 400) from None
            self._check_version(wire.version_of(body, _media_type(request)))
            code = ErrorCode.INVALID_SAMPLING if "$.sampling" in str(error) else ErrorCode.MALFORMED
            raise VerifierRefused(code, str(error), 400) from None
        self._check_version(message.v)
        return message

    def _check_version(self, version: int | None) -> None:
        if version not in (None, wire.VERSION):
            raise VerifierRefused(
                ErrorCode.UNSUPPORTED_VERSION,
                f"this verifier speaks protocol {wire.VERSION}; upgrade the older of the two ends",
                400,
            )

    async def _body(self, request: Request) -> bytes:
        limit = self.limits.max_body
        body = bytearray()
        size = 0
        # Read to the end even so: a client that is still writing would not read our answer.
        async for piece in request.stream():
            size += len(piece)
            if size <= limit:
                body += piece
        if size > limit:
            raise VerifierRefused(ErrorCode.TOO_LARGE, f"the body is over {limit} bytes", 413, {"limit": limit})
        return bytes(body)

    def _answering(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Turns errors into typed refusals."""

        async def answering(request: Request) -> Response:
            try:
                return await handler(request)
            except VerifierRefused as error:
                return _refusal(request, error)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception:
                log.exception("%s %s failed", request.method, request.url.path)
                error = VerifierRefused(ErrorCode.INTERNAL, "a fault of the verifier; its log says more", 500)
                return _refusal(request, error)

        return answering

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        yield
        self.engine.stop()


async def _while_connected(request: Request, waiting: Coroutine[None, None, None]) -> None:
    """Awaits `waiting`, but no longer than the client does. Raises ClientDisconnect."""
    over, gone = asyncio.ensure_future(waiting), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({over, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not over.done():
            raise ClientDisconnect
    finally:
        over.cancel()
        gone.cancel()


def _check_ids(ids: list[int], target: Target) -> None:
    worst = max(ids, default=0)
    if worst >= target.vocabulary_size:
        raise VerifierRefused(
            ErrorCode.INVALID_TOKEN,
            f"token id {worst} is outside {target.version}'s vocabulary of {target.vocabulary_size}",
            400,
        )


def _media_type(request: Request) -> str:
    return wire.JSON if "json" in request.headers.get("content-type", "") else wire.MSGPACK


def _answer_type(request: Request) -> str:
    """What the client wants to read: what it says, else what it writes; a browser's or curl's GET gets JSON."""
    accepts = request.headers.get("accept", "")
    if "json" in accepts or "msgpack" in accepts:
        return wire.JSON if "json" in accepts else wire.MSGPACK
    if request.method == "GET" and "content-type" not in request.headers:
        return wire.JSON
    return _media_type(request)


async def _reply(
    request: Request,
    answer: Answer,
    stream: bool,
    session: str,
    introduce: Callable[[Frame], OpenReply] | None = None,
) -> Response:
    """The frames of `answer`, one by one or as one, for `session`; `introduce` dresses the first of an opening."""
    if not stream:
        whole = await answer.whole()
        return _response(request, introduce(whole)) if introduce else _response(request, whole, session=session)
    media_type = _answer_type(request)
    frames = answer.frames()
    # The first frame is awaited here, so that a refusal still has its own status.
    first = await anext(frames)

    async def body() -> AsyncIterator[bytes]:
        if introduce:
            yield wire.encode_frame(introduce(first), media_type)
        else:
            yield wire.encode_frame(first, media_type, session)
        # A round that fails from here on ends the body in mid-stream: its last frame still says `more`.
        with contextlib.suppress(VerifierRefused):
            async for frame in frames:
                yield wire.encode_frame(frame, media_type, session)

    return StreamingResponse(body(), media_type=wire.STREAMS[media_type])


def _response(request: Request, message: Message, status: int = 200, session: str = "") -> Response:
    media_type = _answer_type(request)
    # Who names no type, as boards do not, expects msgpack (see `wire`): they pay for every header.
    said = media_type if {"accept", "content-type"} & set(request.headers.keys()) else None
    return Response(wire.encode(message, media_type, session), status, media_type=said)


def _refusal(request: Request, error: VerifierRefused) -> Response:
    sentence = str(error).removesuffix(f" [{error.code}]")
    response = _response(request, wire.Refusal(wire.VERSION, error.code, sentence, error.detail), error.status)
    if error.status == 503:
        response.headers["retry-after"] = "1"
    return response


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    sentence = f"no {request.method} {request.url.path} here; see the protocol in edge_runtime/contract/wire.py"
    return _refusal(request, VerifierRefused(ErrorCode.UNKNOWN_ROUTE, sentence, status))
