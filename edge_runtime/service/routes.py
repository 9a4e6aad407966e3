"""The HTTP API of the local service: routes, request bodies, and error responses."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from edge_runtime.common.metrics import CONTENT_TYPE
from edge_runtime.common.openapi import DocumentCache
from edge_runtime.common.request_body import read_body
from edge_runtime.protocol.errors import BodyRefused, FlexSpecError, VerifierError, VerifierUnreachable
from edge_runtime.protocol.sampling import MASK_64
from edge_runtime.service import dashboard
from edge_runtime.service.admission import Place
from edge_runtime.service.answer import AnswerRequest
from edge_runtime.service.answer_group import AnswerGroup
from edge_runtime.service.answer_runner import AnswerRunner
from edge_runtime.service.auth import RequestGuard
from edge_runtime.service.conversation import get_conversation
from edge_runtime.service.errors import LINK_RETRY_SECONDS, ApiError, to_api_error
from edge_runtime.service.field_policy import IGNORED_HEADER, log_unknown, show_names
from edge_runtime.service.middleware import REQUEST_ID_KEY
from edge_runtime.service.openapi import build_document
from edge_runtime.service.parameters import (
    ChoicePlan,
    check_prompt,
    context_overflow,
    get_chat_options,
    get_choices,
    get_logprobs,
    get_max_tokens,
    get_prompts,
    get_sampling,
    get_stop_strings,
    limit_answer,
)
from edge_runtime.service.prompt_tokenizer import PromptTokenizer, PromptTooLong, encode_prompt
from edge_runtime.service.requests import ChatRequest, CompletionRequest, GenerationRequest, parse_request
from edge_runtime.service.response_formatter import ChatFormatter, CompletionFormatter
from edge_runtime.service.responses.formatter import ResponsesFormatter
from edge_runtime.service.responses.requests import ResponsesRequest, ResponseTask, rename_fields, to_chat
from edge_runtime.service.responses.schema import DeletedResponse
from edge_runtime.service.responses.store import ResponseStore
from edge_runtime.service.sse import AnswerFormatter, EventStream, stream_answers, wait_for_disconnect
from edge_runtime.service.state import BoardRuntime, ServiceState
from edge_runtime.service.structured_output import FREE_TEXT, OutputConstraint, compile_constraint, get_constraint
from edge_runtime.service.tool_calls.output_format import (
    PLAIN_TEXT,
    OutputFormat,
    find_forms,
    get_allowed_calls,
    make_grammar,
    make_output_format,
)
from edge_runtime.service.tool_calls.prompt import render_prompt

log = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]

# All chosen. A stream waits this long for its first text before it sends status 200: until then, an error still has a
# status of its own.
FIRST_TEXT_SECONDS = 10.0
# How often the link is looked at while a complete answer is awaited.
LINK_POLL_SECONDS = 0.5
# Chosen: reading a body of this size takes up to 2 ms on a slow core, one of a mebibyte up to 23.
LARGE_BODY_BYTES = 64 << 10


class Admission(msgspec.Struct, frozen=True):
    """What a request holds, from before its prompts are tokenized until its answers end.

    Attributes:
        places: one in the queue for each answer.
        disconnected: a task that ends when the client disconnects.
    """

    places: list[Place]
    disconnected: asyncio.Task[None]


class AnswerOrder(msgspec.Struct, frozen=True):
    """A request as the endpoints have understood it, ready to be answered.

    Attributes:
        prompts: token ids.
        ignored: fields of the request without effect.
        stop_strings: those of the chat template.
        output: how the text is read.
        constraint: what it must match.
    """

    board: BoardRuntime
    prompts: list[list[int]]
    choices: ChoicePlan
    formatter: AnswerFormatter
    ignored: list[str]
    stop_strings: list[str] = []
    output: OutputFormat = PLAIN_TEXT
    constraint: OutputConstraint = FREE_TEXT


class Routes:
    """Request handlers.

    Attributes:
        app: the ASGI application.
        guard: checks every request; replaced when the access rules change.
    """

    def __init__(self, state: ServiceState, runner: AnswerRunner) -> None:
        self.guard = RequestGuard(state.access)
        self._state = state
        self._runner = runner
        self._prompt_tokenizer = PromptTokenizer()
        self._responses = ResponseStore()
        self._documents = DocumentCache(build_document)
        # msgspec resolves the annotations of a type when it is first used: tens of milliseconds on a small board, which
        # the first request of each kind would spend on the event loop.
        for kind in (CompletionRequest, ChatRequest, ResponsesRequest):
            msgspec.json.Decoder(kind)
        posts: dict[str, Handler] = {
            "/v1/completions": self._complete,
            "/v1/chat/completions": self._chat,
            "/v1/responses": self._respond,
            "/v1/embeddings": self._refuse_embeddings,
        }
        gets: dict[str, Handler] = {
            "/v1/models": self._list_models,
            "/v1/models/{model:path}": self._get_model,
            "/v1/responses/{id}": self._get_response,
            "/healthz": self._get_health,
            "/health": self._get_health,
            "/readyz": self._get_readiness,
            "/metrics": self._get_metrics,
            "/openapi.json": self._get_openapi,
            "/events": self._stream_events,
            **dict.fromkeys(dashboard.PAGE_FILES, dashboard.serve_file),
        }
        deletes: dict[str, Handler] = {"/v1/responses/{id}": self._delete_response}
        routes = [
            Route(path, self._guarded(handler), methods=[method])
            for method, handlers in (("POST", posts), ("GET", gets), ("DELETE", deletes))
            for path, handler in handlers.items()
        ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _unknown_route})
        self.app.router.redirect_slashes = False

    async def _complete(self, request: Request) -> Response:
        """POST /v1/completions: continue texts."""
        board = self._state.require_board()

        def read(content: bytes) -> tuple[CompletionRequest, list[str], ChoicePlan, list[str | list[int]], int]:
            body, ignored = parse_request(content, CompletionRequest)
            return body, ignored, get_choices(body), get_prompts(body), get_logprobs(body)

        body, ignored, choices, prompts, logprobs = await self._read_request(request, read)
        tokenizer, special = board.draft.tokenizer, body.add_special_tokens is not False
        await self._refuse_long_prompts(body, board, prompts)

        def encode(_limit: int) -> tuple[list[list[int]], list[str], OutputConstraint]:
            constraint = get_constraint(body)
            ids = [
                encode_prompt(tokenizer, each, special=special)[0] if isinstance(each, str) else each
                for each in prompts
            ]
            for each_ids in ids:
                check_prompt(each_ids, board.draft.manifest.architecture.vocabulary_size)
            if not body.echo:
                return ids, [""] * len(prompts), constraint
            # Unlike `Tokenizer.decode`, this leaves other threads running.
            echoes = [each if isinstance(each, str) else tokenizer.decode_batch([each])[0] for each in prompts]
            return ids, echoes, constraint

        async with self._admit(request, len(prompts) * choices.candidates) as admission:
            ids, echoes, constraint = await self._encode(body, board, admission, encode)
            formatter = CompletionFormatter(tokenizer, logprobs, _wants_usage(body), echoes, choices.returned)
            order = AnswerOrder(board, ids, choices, formatter, ignored, constraint=constraint)
            return await self._answer(request, body, order, admission)

    async def _chat(self, request: Request) -> Response:
        """POST /v1/chat/completions: generate the next message of a conversation."""
        board = self._state.require_board()
        body, ignored = await self._read_request(request, functools.partial(parse_request, kind=ChatRequest))
        formatter = ChatFormatter(board.draft.tokenizer, get_logprobs(body), _wants_usage(body))
        return await self._answer_chat(request, body, board, formatter, ignored)

    async def _respond(self, request: Request) -> Response:
        """POST /v1/responses: the same in another form, with a memory of earlier responses."""
        board = self._state.require_board()

        def read(content: bytes) -> tuple[ResponseTask, list[str]]:
            body, ignored = parse_request(content, ResponsesRequest)
            return to_chat(body, self._responses), ignored

        task, ignored = await self._read_request(request, read)
        formatter = ResponsesFormatter(task, board.draft.tokenizer, self._responses)
        try:
            return await self._answer_chat(request, task.chat, board, formatter, ignored)
        except ApiError as error:
            raise rename_fields(error) from None

    async def _get_response(self, request: Request) -> Response:
        """GET /v1/responses/{id}: a response that is kept."""
        if request.query_params.get("stream") == "true":
            raise ApiError(400, "a response is kept whole: leave out stream", param="stream")
        response_id = request.path_params["id"]
        stored = self._responses.get(response_id)
        if stored is None:
            raise _unknown_response(response_id)
        return Response(stored.body, media_type="application/json")

    async def _delete_response(self, request: Request) -> Response:
        """DELETE /v1/responses/{id}: forget a response."""
        response_id = request.path_params["id"]
        if not self._responses.delete(response_id):
            raise _unknown_response(response_id)
        return _json_response(DeletedResponse(response_id))

    async def _refuse_embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: there are none."""
        message = "this service generates text and has no embeddings: ask a server with an embedding model for them"
        raise ApiError(404, message, code="no_embeddings")

    async def _list_models(self, request: Request) -> Response:
        """GET /v1/models: the verifier's models, or the last known ones while it cannot be reached."""
        return _json_response(await self._state.models.fetch(self._configured_model()))

    async def _get_model(self, request: Request) -> Response:
        """GET /v1/models/{model}: one model by its id or exact version."""
        wanted = request.path_params["model"]
        for model in (await self._state.models.fetch(self._configured_model())).data:
            if wanted in (model.id, model.version):
                return _json_response(model)
        raise ApiError(404, f"no model {wanted[:80]!r} here", param="model", code="model_not_found")

    async def _get_health(self, request: Request) -> Response:
        """GET /healthz and /health: the process is alive."""
        return Response("ok\n", media_type="text/plain")

    async def _get_readiness(self, request: Request) -> Response:
        """GET /readyz: the draft model is loaded, and a verifier answers or the draft may go on alone.

        Without a verifier the systemd unit stays active and /healthz succeeds: the process works. Only this fails.
        """
        # Errors are returned and not raised, because a raised one is logged, and this is polled.
        try:
            board, link = self._state.require_board(), self._state.client.link_state
        except ApiError as error:
            return _error_response(error)
        if link.problem is None:
            return Response("ready\n", media_type="text/plain")
        if board.on_link_loss == "draft":
            return Response(f"ready, from the draft model alone: {link.reason}\n", media_type="text/plain")
        return _error_response(ApiError(503, link.reason, code=link.problem.code, retry_after=LINK_RETRY_SECONDS))

    async def _get_metrics(self, request: Request) -> Response:
        """GET /metrics: Prometheus metrics."""
        return Response(self._state.metrics.render(), media_type=CONTENT_TYPE)

    async def _get_openapi(self, request: Request) -> Response:
        """GET /openapi.json: the description of this service."""
        board = self._state.board
        vocabulary_size = board.draft.manifest.architecture.vocabulary_size if board else 1 << 31
        has_template = board is None or not board.chat_template.is_plain
        document = await self._documents.get(
            self._state.limits.max_body, bool(self._state.access.keys), vocabulary_size, has_template
        )
        return Response(document, media_type="application/json")

    async def _stream_events(self, request: Request) -> Response:
        """GET /events: recent and live events of the board."""
        return self._state.monitoring.respond(request)

    @contextlib.asynccontextmanager
    async def _admit(self, request: Request, answers: int) -> AsyncIterator[Admission]:
        """Reserve places before there is any work for a request; if it fails, its answers end and leave them.

        Raises:
            ApiError: (429) the queue is full.
        """
        places = self._state.queue.reserve(answers)
        disconnected = asyncio.create_task(wait_for_disconnect(request))
        try:
            yield Admission(places, disconnected)
        except BaseException:
            disconnected.cancel()
            for place in places:
                place.leave()
            raise

    async def _refuse_long_prompts(
        self, body: CompletionRequest, board: BoardRuntime, prompts: Sequence[str | list[int]]
    ) -> None:
        """Refuse prompts that certainly do not fit the context, before they take a place in the queue.

        Raises:
            ApiError: (400) one does not fit.
        """
        model = body.model or board.model
        context = self._state.models.context_of(model)
        if not context or get_max_tokens(body) == 0:
            return
        texts = [each for each in prompts if isinstance(each, str)]
        ids = max((len(each) for each in prompts if not isinstance(each, str)), default=0)
        tokens = ids or await self._prompt_tokenizer.count_at_least(board.draft.tokenizer, texts, context)
        # Unless the context has grown meanwhile.
        context = await self._find_context(model, tokens)
        if context and tokens >= context:
            raise context_overflow(body, context, f"{tokens} tokens" if ids else f"at least {tokens} tokens")

    async def _encode(
        self, body: GenerationRequest, board: BoardRuntime, admission: Admission, encode: Callable[[int], T]
    ) -> T:
        """Return `encode(limit)`, run by the tokenizer's thread.

        Args:
            encode: raises PromptTooLong if a prompt certainly has `limit` tokens or more; 0 is no limit.

        Raises:
            ApiError: (400) a prompt does not fit the context, or is invalid.
        """

        async def run(limit: int) -> T:
            return await self._prompt_tokenizer.run(lambda: encode(limit), admission.disconnected)

        model = body.model or board.model
        try:
            return await run(self._state.models.context_of(model) if get_max_tokens(body) != 0 else 0)
        except PromptTooLong as error:
            # Unless the context has grown meanwhile.
            context = await self._find_context(model, error.tokens)
            if context and error.tokens >= context:
                raise context_overflow(body, context, f"at least {error.tokens} tokens") from None
            return await run(0)

    async def _answer_chat(
        self, request: Request, body: ChatRequest, board: BoardRuntime, formatter: AnswerFormatter, ignored: list[str]
    ) -> Response:
        """Render and tokenize a conversation, find out what its answer may be, and answer it."""
        template, tokenizer = board.chat_template, board.draft.tokenizer
        conversation, options, choices = get_conversation(body.messages), get_chat_options(body), get_choices(body)
        forms = find_forms(template, board.tool_call_form, board.reasoning_form)

        def encode(limit: int) -> tuple[list[int], OutputFormat, OutputConstraint]:
            # Large schemas take long, too.
            calls = get_allowed_calls(body.tools, body.tool_choice, body.parallel_tool_calls)
            constraint = get_constraint(body)
            prompt = render_prompt(template, conversation, options, forms.tool_calls)
            ids = template.encode(tokenizer, prompt, limit)
            output = make_output_format(
                forms, calls, tokenizer, prompt=prompt, conversation=conversation, options=options
            )
            grammar = make_grammar(output, calls, tokenizer, constraint.grammar)
            return ids, output, OutputConstraint(grammar, "tools" if calls.tools else constraint.field)

        async with self._admit(request, choices.candidates) as admission:
            ids, output, constraint = await self._encode(body, board, admission, encode)
            order = AnswerOrder(
                board,
                [ids],
                choices,
                formatter,
                ignored,
                stop_strings=template.stop_strings,
                output=output,
                constraint=constraint,
            )
            return await self._answer(request, body, order, admission)

    def _make_answer_requests(
        self, body: GenerationRequest, order: AnswerOrder, context: int, request_id: str
    ) -> list[AnswerRequest]:
        """Return what to generate: the candidates of the first prompt, then those of the next."""
        board, choices = order.board, order.choices
        sampling = get_sampling(body, board.sampling)
        if order.constraint.grammar:
            sampling = msgspec.structs.replace(sampling, grammar=order.constraint.grammar)
        logprobs = get_logprobs(body)
        if choices.candidates > choices.returned:
            # The best are chosen by the log-probabilities of their tokens.
            logprobs = max(logprobs, 1)
        maximum = self._state.limits.max_new_tokens
        model = body.model or board.model
        if get_max_tokens(body) == 0:
            # No verifier is asked, so none says which model it is.
            model = model or self._state.models.default()
        return [
            AnswerRequest(
                prompt=prompt,
                sampling=msgspec.structs.replace(sampling, seed=(sampling.seed + index) & MASK_64),
                max_new_tokens=limit_answer(body, len(prompt), context=context, maximum=maximum),
                output=order.output,
                stop_strings=[*order.stop_strings, *get_stop_strings(body)],
                include_stop=bool(body.include_stop_str_in_output),
                model=model,
                speculation=body.speculation is not False,
                on_link_loss=body.on_link_loss or board.on_link_loss,
                logprobs=logprobs,
                id=order.formatter.id,
                request_id=request_id,
            )
            for prompt in order.prompts
            for index in range(choices.candidates)
        ]

    async def _answer(
        self, request: Request, body: GenerationRequest, order: AnswerOrder, admission: Admission
    ) -> Response:
        """Run answers and return them whole or as a stream; they are abandoned when the client disconnects."""
        context = await self._find_context(body.model or order.board.model, max(map(len, order.prompts)))
        await compile_constraint(order.board.draft, order.constraint)
        requests = self._make_answer_requests(body, order, context, request.scope[REQUEST_ID_KEY])
        formatter, disconnected = order.formatter, admission.disconnected
        group = self._runner.start(requests, order.choices, admission.places, disconnected)
        if body.stream:
            await group.wait_for_text(FIRST_TEXT_SECONDS)
            stream = stream_answers(group, formatter)
            response: Response = EventStream(stream, disconnected)
        else:
            await self._wait_until_done(group)
            # The log-probabilities of a long answer take long to describe.
            has_logprobs = get_logprobs(body) > 0
            response = await asyncio.to_thread(_format, formatter, group) if has_logprobs else _format(formatter, group)
            disconnected.cancel()
        if order.ignored:
            log_unknown(order.ignored)
            response.headers[IGNORED_HEADER] = show_names(order.ignored)
        return response

    async def _find_context(self, model: str, prompt_tokens: int) -> int:
        """Return the model's context in tokens, 0 if unknown; asks the verifier if the prompt seems to be too long."""
        context = self._state.models.context_of(model)
        if not context or prompt_tokens < context:
            return context
        with contextlib.suppress(VerifierError):
            await self._state.models.fetch()
        return self._state.models.context_of(model)

    async def _wait_until_done(self, group: AnswerGroup) -> None:
        """Wait for complete answers. Raises the error of one, and VerifierUnreachable without a verifier for long."""
        begun = time.time()
        while True:
            state = self._state.client.link_state
            # A verifier that is slow, but can be reached, is no reason to give up, and the draft may go on without one.
            if state.problem is not None and group.answers[0].request.on_link_loss == "wait":
                waited = time.time() - max(begun, state.problem.since)
                if waited >= self._state.limits.unreachable_seconds:
                    error = VerifierUnreachable(state.reason, state.problem.code)
                    for answer in group.answers:
                        answer.given_up = error
                    raise error
            with contextlib.suppress(TimeoutError):
                return await group.wait_until_done(LINK_POLL_SECONDS)

    def _configured_model(self) -> str:
        return self._state.board.model if self._state.board else ""

    async def _read_request(self, request: Request, read: Callable[[bytes], T]) -> T:
        """Read the body, and return what `read` makes of it: in another thread if that would hold the event loop."""
        content = await self._read_body(request)
        return read(content) if len(content) < LARGE_BODY_BYTES else await asyncio.to_thread(read, content)

    async def _read_body(self, request: Request) -> bytes:
        """Read the body. Raises ApiError if it is not JSON, compressed, too long, or takes too long."""
        # Browsers send this content type across origins only after a CORS preflight, which allowed origins pass.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send the body as JSON, with the header content-type: application/json")
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise ApiError(415, f"send the body uncompressed, not with content-encoding: {ascii(encoding[:40])[1:-1]}")
        try:
            return await read_body(request, self._state.limits.max_body)
        except BodyRefused as error:
            raise ApiError(error.status, str(error)) from None

    def _guarded(self, handler: Handler) -> Handler:
        """Wrap a handler: check access first, and convert errors to OpenAI's error responses."""

        async def handle(request: Request) -> Response:
            try:
                self.guard.check(request)
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                request_id = request.scope[REQUEST_ID_KEY]
                if not isinstance(error, (FlexSpecError, ApiError)):
                    log.exception("%s %s failed (request %s)", request.method, request.scope["path"], request_id)
                answer = to_api_error(error)
                if answer.status >= 500:
                    log.warning("request %s: %d, %s", request_id, answer.status, answer.body.error.message)
                return _error_response(answer)

        return handle


def _unknown_response(response_id: str) -> ApiError:
    message = f"no response {response_id[:80]!r} here: it was not stored, or dropped for newer ones or at a restart"
    return ApiError(404, message, param="id", code="response_not_found")


def _wants_usage(body: GenerationRequest) -> bool:
    return bool(body.stream and body.stream_options and body.stream_options.include_usage)


def _format(formatter: AnswerFormatter, group: AnswerGroup) -> Response:
    return _json_response(formatter.format_response(group))


def _json_response(message: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(message), status, media_type="application/json")


def _error_response(error: ApiError) -> Response:
    response = _json_response(error.body, error.status)
    if error.retry_after:
        response.headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _unknown_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"no {request.method} {request.scope['path'][:80]} here; see /openapi.json"
    response = _error_response(ApiError(error.status_code, message, code="unknown_route"))
    response.headers.update(error.headers or {})
    return response
