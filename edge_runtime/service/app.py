"""The routes of the local service, from a request's body to the last event of its stream."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from edge_runtime.decoding import Generation
from edge_runtime.draft import OnnxDraft
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import DraftError, FlexSpecError, VerifierUnreachable
from edge_runtime.service import dashboard, openai_schema
from edge_runtime.service.access_log import log_answer
from edge_runtime.service.admission import AdmissionQueue
from edge_runtime.service.answer import Answer, AnswerAbandoned, AnswerRequest
from edge_runtime.service.auth import RequestGuard
from edge_runtime.service.errors import BRIEF_RETRY_SECONDS, SERVER_ERROR, ApiError, to_api_error
from edge_runtime.service.monitoring.hub import MonitoringHub
from edge_runtime.service.monitoring.prometheus import DRAFT_FAILED, SWITCHED_OFF, ObservedPlanner, ServiceMetrics
from edge_runtime.service.monitoring.reporter import AnswerReporter
from edge_runtime.service.openapi import build_document
from edge_runtime.service.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    get_prompt,
    get_sampling,
    get_stop_strings,
    parse_request,
)
from edge_runtime.service.sse import EventStream, stream_answer, wait_for_disconnect
from edge_runtime.service.state import BoardRuntime, ServiceLimits
from edge_runtime.verifier import VerifierClient

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

# What is told of answers that the cloud writes by itself.
ALONE = {
    SWITCHED_OFF: "the request switched speculation off",
    DRAFT_FAILED: "the draft failed, and the cloud goes on alone",
}

# Seconds after which a stream begins even with nothing to say: from then on a refusal has no status of its own.
FIRST_SECONDS = 10.0
# Seconds that a list of models may take, and a body to arrive.
MODELS_SECONDS = 5.0
BODY_SECONDS = 30.0
# Seconds that an answer which nobody wants may take to learn its session's name, so that it can be closed.
OPENING_SECONDS = 5.0


class Service:
    """Handlers over one verifier and one draft. `app` is the ASGI application.

    Attributes:
        metrics: what Prometheus is told.
    """

    def __init__(
        self, client: VerifierClient, limits: ServiceLimits, keys: frozenset[str], *, local: bool = True
    ) -> None:
        """
        Args:
            keys, local: see `RequestGuard`.
        """
        self._client = client
        self._limits = limits
        self._keys = bool(keys)
        self._local = local
        self._callers = RequestGuard(keys, local)
        self._queue = AdmissionQueue(limits.max_concurrent, limits.max_waiting)
        self._telling = MonitoringHub(self._queue, client, limits.max_new_tokens)
        self.metrics = ServiceMetrics(self._queue, client, self._telling.pulse)
        # One text at a time, in one thread: each would keep memory of its own.
        self._tokenising = ThreadPoolExecutor(1, "tokenising")
        self._board: BoardRuntime | None = None
        self._models: openai_schema.OpenAIModelList | None = None
        self._stopping = False
        self._writing: set[asyncio.Task[None]] = set()
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._answering(self.complete), methods=["POST"]),
                Route("/v1/chat/completions", self._answering(self.chat), methods=["POST"]),
                Route("/v1/models", self._answering(self.models)),
                Route("/v1/models/{model:path}", self._answering(self.model)),
                Route("/healthz", self._answering(self.health)),
                Route("/readyz", self._answering(self.ready)),
                Route("/metrics", self._answering(self.show_metrics)),
                Route("/openapi.json", self._answering(self.openapi)),
                Route("/events", self._answering(self.watch)),
                *(Route(path, self._answering(dashboard.serve_file)) for path in dashboard.PAGE_FILES),
            ],
            exception_handlers={HTTPException: _no_such_route},
        )
        self.app.router.redirect_slashes = False

    def activate(self, board: BoardRuntime) -> None:
        """From now on there are answers."""
        self._board = board
        self._telling.open(board.surroundings, board.power)
        if board.memory:
            self.metrics.add_memory(board.memory)

    def reconfigure(self, limits: ServiceLimits, keys: frozenset[str], board: BoardRuntime) -> None:
        """From now on other limits, keys and means; answers that are being written go on with the old ones."""
        self._board = board
        self._limits = limits
        self._keys = bool(keys)
        self._callers = RequestGuard(keys, self._local)
        self._queue.resize(limits.max_concurrent, limits.max_waiting)
        self._telling.change(board.power, limits.max_new_tokens)

    async def drain(self, seconds: float) -> None:
        """From now on no answer begins; those that are being written have `seconds` to end."""
        self._stopping = True
        if self._writing:
            await asyncio.wait(self._writing, timeout=seconds)
        for task in list(self._writing):
            task.cancel()
        await asyncio.gather(*self._writing, return_exceptions=True)
        self._telling.close()

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions: continues a text."""
        board = self._ready_board()
        asked = parse_request(await self._body(request), CompletionRequest)
        prompt = get_prompt(asked)
        ids = prompt if isinstance(prompt, list) else await self._encode(board, prompt, True)
        echo = ""
        if asked.echo:
            echo = prompt if isinstance(prompt, str) else board.draft.tokenizer.decode(prompt)
        form = openai_schema.CompletionFormatter(echo, _wants_usage(asked))
        return await self._answer(request, asked, self._order(board, asked, ids, [], asked.max_tokens), form)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions: the next message of a conversation."""
        board = self._ready_board()
        asked = parse_request(await self._body(request), ChatRequest)
        text = board.chat.text([{"role": message.role, "content": message.text} for message in asked.messages])
        # The template writes the special tokens itself.
        ids = await self._encode(board, text, False)
        order = self._order(board, asked, ids, board.chat.stops, asked.max_completion_tokens or asked.max_tokens)
        return await self._answer(request, asked, order, openai_schema.ChatFormatter(_wants_usage(asked)))

    async def models(self, request: Request) -> Response:
        """GET /v1/models: what the verifier serves, or served when it was last heard of."""
        return _json(await self._model_list())

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}: one of them, by its id or exact version."""
        wanted = request.path_params["model"]
        for model in (await self._model_list()).data:
            if wanted in (model.id, model.version):
                return _json(model)
        raise ApiError(404, f"no model {wanted[:80]!r} here", param="model", code="model_not_found")

    async def health(self, request: Request) -> Response:
        """GET /healthz: the process lives."""
        return Response("ok\n", media_type="text/plain")

    async def ready(self, request: Request) -> Response:
        """GET /readyz: the draft is loaded, and answers can begin."""
        self._ready_board()
        return Response("ready\n", media_type="text/plain")

    async def show_metrics(self, request: Request) -> Response:
        """GET /metrics: for Prometheus."""
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json: this service, described."""
        size = self._board.draft.manifest.architecture.vocabulary_size if self._board else 1 << 31
        described = build_document(self._limits.max_body, self._keys, size)
        return Response(msgspec.json.encode(described), media_type="application/json")

    async def watch(self, request: Request) -> Response:
        """GET /events: what the board did of late, and does."""
        return self._telling.respond(request)

    def _ready_board(self) -> BoardRuntime:
        if self._stopping or self._board is None:
            raise ApiError(
                503,
                "the service is stopping" if self._stopping else "the draft is still loading; try again shortly",
                kind=SERVER_ERROR,
                code="stopping" if self._stopping else "starting",
                retry_after=BRIEF_RETRY_SECONDS,
            )
        return self._board

    async def _encode(self, board: BoardRuntime, text: str, special: bool) -> list[int]:
        def encode() -> list[int]:
            ids: list[int] = board.draft.tokenizer.encode(text, add_special_tokens=special).ids
            return ids

        return await asyncio.get_running_loop().run_in_executor(self._tokenising, encode)

    def _order(
        self, board: BoardRuntime, asked: GenerationRequest, ids: list[int], stops: list[str], max_tokens: int | None
    ) -> AnswerRequest:
        most = self._limits.max_new_tokens
        return AnswerRequest(
            ids,
            get_sampling(asked, secrets.randbits(63)),
            min(max_tokens or most, most),
            stops + get_stop_strings(asked),
            asked.model or board.model,
            asked.speculation is not False,
            asked.on_link_loss or board.on_link_loss,
        )

    async def _answer(
        self, request: Request, asked: GenerationRequest, order: AnswerRequest, form: openai_schema.ResponseFormatter
    ) -> Response:
        """Has `order` written, as long as somebody listens."""
        board = self._ready_board()
        answer = Answer(order, board.draft.tokenizer)
        # The answer goes on whether or not it is read: a slow reader holds neither a place nor a session.
        writing = asyncio.create_task(self._write(answer, board))
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        gone = asyncio.create_task(wait_for_disconnect(request))
        gone.add_done_callback(lambda _: _abandon(answer, writing))
        try:
            if asked.stream:
                # Awaited here, so that a refusal still has its own status.
                await answer.begun(FIRST_SECONDS)
                return EventStream(stream_answer(answer, form, _wants_usage(asked)), gone)
            return _json(form.whole(answer, await answer.whole()))
        finally:
            if answer.error or not asked.stream:
                gone.cancel()

    async def _write(self, answer: Answer, board: BoardRuntime) -> None:
        """Writes `answer` when its turn comes. Never raises: what goes wrong is the answer's."""
        outcome = "cancelled"
        error: Exception | None = ClientDisconnect()
        reporter = self._telling.reporter(answer, board.draft.tokenizer)
        try:
            async with self._queue.slot():
                reporter.begin()
                await self._play(answer, board, reporter)
            outcome, error = answer.finish, None
        except (asyncio.CancelledError, AnswerAbandoned):
            if self._stopping:
                error = ApiError(503, "the service was stopped", kind=SERVER_ERROR, code="stopping")
        except Exception as problem:
            if not isinstance(problem, (FlexSpecError, ApiError)):
                log.exception("an answer failed")
            error = problem
            outcome = to_api_error(problem).body.error.code or "invalid_request"
        finally:
            answer.end(error)
            self.metrics.add_answer(answer, outcome)
            reporter.end(outcome)
            log_answer(answer, outcome, board.draft.tokenizer)

    async def _play(self, answer: Answer, board: BoardRuntime, reporter: AnswerReporter) -> None:
        order, alone = answer.request, SWITCHED_OFF
        if order.speculation:
            generation = self._generation(order, board, board.draft, reporter)
            try:
                return await answer.write(generation, reporter.hear)
            except DraftError as error:
                # The text does not depend on who drafts it, so the cloud can finish it.
                log.warning("the cloud goes on alone: %s", error)
                left = order.max_new_tokens - (len(generation.ids) - len(order.prompt))
                model = generation.version or order.model
                order = msgspec.structs.replace(order, prompt=generation.ids, max_new_tokens=left, model=model)
                alone = DRAFT_FAILED
        reporter.alone(ALONE[alone], order.max_new_tokens)
        generation = self._generation(order, board, None, reporter)
        try:
            return await answer.write(generation, reporter.hear)
        finally:
            self.metrics.add_alone(generation.statistics, alone)

    def _generation(
        self, order: AnswerRequest, board: BoardRuntime, draft: OnnxDraft | None, reporter: AnswerReporter
    ) -> Generation:
        return Generation(
            draft,
            self._client,
            order.prompt,
            order.sampling,
            max_new_tokens=order.max_new_tokens,
            planner=ObservedPlanner(board.planner, self.metrics, reporter),
            model=order.model,
            surroundings=board.surroundings,
            on_link_loss=order.on_link_loss,
            ngram_cache=board.memory,
        )

    async def _model_list(self) -> openai_schema.OpenAIModelList:
        try:
            async with asyncio.timeout(MODELS_SECONDS):
                listed = await self._client.models()
        except (VerifierUnreachable, TimeoutError):
            if self._models is None:
                raise VerifierUnreachable(
                    f"no answer from {self._client.url} within {MODELS_SECONDS:g} s; is it running, is the link up?"
                ) from None
        else:
            self._models = _models(listed)
        return self._models

    async def _body(self, request: Request) -> bytes:
        """The body. Raises Refusal: it is no JSON by its type, too long, or too slow."""
        # A web page elsewhere may send anything but this type without asking first.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send the body as JSON, with the header content-type: application/json")
        limit, body, size = self._limits.max_body, bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                # Read to the end even so: a client that is still writing would not read our answer.
                async for piece in request.stream():
                    size += len(piece)
                    if size <= limit:
                        body += piece
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
        if size > limit:
            raise ApiError(413, f"the body is over {limit} bytes", code="body_too_large")
        return bytes(body)

    def _answering(self, handler: Handler) -> Handler:
        """Turns errors into OpenAI's."""

        async def answering(request: Request) -> Response:
            try:
                self._callers.check(request)
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                if not isinstance(error, (FlexSpecError, ApiError)):
                    log.exception("%s %s failed", request.method, request.scope["path"])
                return _refused(to_api_error(error))

        return answering


def _abandon(answer: Answer, writing: asyncio.Task[None]) -> None:
    """Ends `answer`, if it has not ended; its session is closed, too."""
    if answer.opening and not answer.done:
        answer.unwanted = True
        asyncio.get_running_loop().call_later(OPENING_SECONDS, writing.cancel)
    else:
        writing.cancel()


def _wants_usage(asked: GenerationRequest) -> bool:
    return bool(asked.stream and asked.stream_options and asked.stream_options.include_usage)


def _models(listed: messages.ModelList) -> openai_schema.OpenAIModelList:
    created = int(time.time())
    return openai_schema.OpenAIModelList(
        [openai_schema.OpenAIModel(model.id, created, model.version, model.context) for model in listed.data]
    )


def _json(message: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(message), status, media_type="application/json")


def _refused(refusal: ApiError) -> Response:
    response = _json(refusal.body, refusal.status)
    if refusal.retry_after is not None:
        response.headers["retry-after"] = str(refusal.retry_after)
    if refusal.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = f"no {request.method} {request.scope['path'][:80]} here; see /openapi.json"
    response = _refused(ApiError(error.status_code, sentence, code="unknown_route"))
    response.headers.update(error.headers or {})
    return response
