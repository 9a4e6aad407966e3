"""Executes answers: waits for a slot, runs the generation, and falls back to the target alone if the draft fails."""

from __future__ import annotations

import asyncio
import logging

import msgspec
from starlette.requests import ClientDisconnect

from edge_runtime.decoding import Generation
from edge_runtime.draft import OnnxDraft
from edge_runtime.protocol.errors import DraftError, FlexSpecError
from edge_runtime.service.access_log import log_answer
from edge_runtime.service.answer import Answer, AnswerAbandoned, AnswerRequest
from edge_runtime.service.errors import ApiError, to_api_error
from edge_runtime.service.monitoring.prometheus import (
    REASON_DRAFT_FAILED,
    REASON_SWITCHED_OFF,
    ObservedPlanner,
)
from edge_runtime.service.monitoring.reporter import AnswerReporter
from edge_runtime.service.state import BoardRuntime, ServiceState

log = logging.getLogger(__name__)

# Reasons shown with the plan of answers that the target generates alone.
TARGET_ONLY_REASONS = {
    REASON_SWITCHED_OFF: "the request switched speculation off",
    REASON_DRAFT_FAILED: "the draft model failed, the target continues alone",
}
# How long an abandoned answer may wait for the id of its session, so that the session can be closed; chosen.
SESSION_ID_SECONDS = 5.0


class AnswerRunner:
    """Runs each answer in a task of its own, whose speed does not depend on the reader.

    A slow reader therefore occupies neither a slot nor a session.
    """

    def __init__(self, state: ServiceState) -> None:
        self._state = state
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, request: AnswerRequest, disconnected: asyncio.Task[None]) -> Answer:
        """Start an answer, which is abandoned when `disconnected` completes or is cancelled."""
        board = self._state.require_board()
        answer = Answer(request, board.draft.tokenizer)
        task = asyncio.create_task(self._run(answer, board))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        disconnected.add_done_callback(lambda _: _abandon(answer, task))
        return answer

    async def drain(self, seconds: float) -> None:
        """Wait up to `seconds` for running answers and cancel the rest."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, answer: Answer, board: BoardRuntime) -> None:
        """Generate `answer` once it has a slot. Never raises; errors are stored in the answer."""
        outcome = "cancelled"
        error: Exception | None = ClientDisconnect()
        reporter = self._state.monitoring.reporter_for(answer, board.draft.tokenizer)
        try:
            async with self._state.queue.slot():
                reporter.report_start()
                await self._generate(answer, board, reporter)
            outcome, error = answer.finish, None
        except (asyncio.CancelledError, AnswerAbandoned):
            if self._state.stopping:
                error = ApiError(503, "the service was stopped", code="stopping")
        except Exception as problem:
            if not isinstance(problem, (FlexSpecError, ApiError)):
                log.exception("an answer failed")
            error = problem
            outcome = to_api_error(problem).body.error.code or "invalid_request"
        finally:
            answer.complete(error)
            self._state.metrics.count_answer(answer, outcome)
            reporter.report_end(outcome)
            log_answer(answer, outcome, board.draft.tokenizer)

    async def _generate(self, answer: Answer, board: BoardRuntime, reporter: AnswerReporter) -> None:
        request, reason = answer.request, REASON_SWITCHED_OFF
        if request.speculation:
            generation = self._make_generation(request, board, board.draft, reporter)
            try:
                return await answer.consume(generation, reporter.report_tokens)
            except DraftError as error:
                # The text does not depend on the draft model, so the target can complete it alone.
                log.warning("the target continues alone: %s", error)
                request = msgspec.structs.replace(
                    request,
                    prompt=generation.ids,
                    max_new_tokens=request.max_new_tokens - (len(generation.ids) - len(request.prompt)),
                    model=generation.version or request.model,
                )
                reason = REASON_DRAFT_FAILED
        reporter.report_target_only(TARGET_ONLY_REASONS[reason], request.max_new_tokens)
        generation = self._make_generation(request, board, None, reporter)
        try:
            return await answer.consume(generation, reporter.report_tokens)
        finally:
            self._state.metrics.count_target_only_rounds(generation.statistics, reason)

    def _make_generation(
        self, request: AnswerRequest, board: BoardRuntime, draft: OnnxDraft | None, reporter: AnswerReporter
    ) -> Generation:
        return Generation(
            draft,
            self._state.client,
            request.prompt,
            request.sampling,
            max_new_tokens=request.max_new_tokens,
            planner=ObservedPlanner(board.planner, self._state.metrics, reporter),
            model=request.model,
            surroundings=board.surroundings,
            on_link_loss=request.on_link_loss,
            ngram_cache=board.ngram_cache,
        )


def _abandon(answer: Answer, task: asyncio.Task[None]) -> None:
    """End `answer` if it is still running, and close its session."""
    if answer.opening and not answer.done:
        answer.abandoned = True
        asyncio.get_running_loop().call_later(SESSION_ID_SECONDS, task.cancel)
    else:
        task.cancel()
