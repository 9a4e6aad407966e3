"""Executes answers: waits for a slot, runs the generation, and falls back to the target alone if the draft fails."""

from __future__ import annotations

import asyncio
import functools
import logging

import msgspec
from starlette.requests import ClientDisconnect

from edge_runtime.decoding import Generation
from edge_runtime.draft import OnnxDraft
from edge_runtime.protocol import messages
from edge_runtime.protocol.errors import DraftError, FlexSpecError
from edge_runtime.protocol.sampling import validate_prompt
from edge_runtime.service.access_log import log_answer
from edge_runtime.service.admission import Place
from edge_runtime.service.answer import Answer, AnswerAbandoned, AnswerRequest
from edge_runtime.service.answer_group import AnswerGroup
from edge_runtime.service.errors import ApiError, to_api_error
from edge_runtime.service.monitoring.prometheus import (
    REASON_DRAFT_FAILED,
    REASON_SWITCHED_OFF,
    ObservedPlanner,
)
from edge_runtime.service.monitoring.reporter import AnswerReporter
from edge_runtime.service.parameters import ChoicePlan
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

    def start(
        self,
        requests: list[AnswerRequest],
        choices: ChoicePlan,
        places: list[Place],
        disconnected: asyncio.Task[None],
    ) -> AnswerGroup:
        """Start the answers of one request, which are abandoned when `disconnected` completes or is cancelled.

        Each needs a slot of its own, because each has a context of the draft model. The further candidates of a prompt
        wait until the verifier has the prompt in its KV cache.

        Args:
            requests: the candidates of the first prompt, then those of the next.
            places: theirs in the queue.

        Raises:
            ApiError: (503) the service is stopping.
        """
        board = self._state.require_board()
        group = AnswerGroup(requests, choices, board.draft.tokenizer)
        for index, (answer, place) in enumerate(zip(group.answers, places, strict=True)):
            task = asyncio.create_task(self._run(answer, board, place, group.first_of_prompt(index)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(functools.partial(_leave, place))
            disconnected.add_done_callback(functools.partial(_abandon, answer, task))
        return group

    async def drain(self, seconds: float) -> None:
        """Wait up to `seconds` for running answers and cancel the rest."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, answer: Answer, board: BoardRuntime, place: Place, first: Answer) -> None:
        """Generate `answer` once `first` has begun and it has a slot. Never raises; errors are stored in the answer."""
        outcome = "cancelled"
        error: Exception | None = ClientDisconnect()
        reporter = self._state.monitoring.reporter_for(answer, board.draft.tokenizer)
        try:
            if first is not answer:
                await first.opened.wait()
            async with place:
                reporter.report_start()
                await self._generate(answer, board, reporter)
            outcome, error = answer.finish, None
        except (asyncio.CancelledError, AnswerAbandoned):
            if self._state.stopping:
                error = ApiError(503, "the service was stopped", code="stopping")
            elif answer.given_up:
                error, outcome = answer.given_up, to_api_error(answer.given_up).body.error.code
        except Exception as problem:
            if not isinstance(problem, (FlexSpecError, ApiError)):
                log.exception("an answer failed")
            error = problem
            outcome = to_api_error(problem).body.error.code
        finally:
            answer.complete(error)
            self._state.metrics.count_answer(answer, outcome)
            reporter.report_end(outcome)
            log_answer(answer, outcome, board.draft.tokenizer)
            self._state.models.notice(answer.version)

    async def _generate(self, answer: Answer, board: BoardRuntime, reporter: AnswerReporter) -> None:
        request, reason, generated = answer.request, REASON_SWITCHED_OFF, 0
        if not request.max_new_tokens:
            validate_prompt(request.prompt, board.draft.manifest.architecture.vocabulary_size)
            answer.finish = "length"
            return None
        if request.speculation:
            generation = self._make_generation(request, board, board.draft, reporter)
            try:
                return await answer.consume(generation, reporter.report_tokens)
            except DraftError as error:
                # The text does not depend on the draft model, so the target can complete it alone.
                log.warning("the target continues alone: %s", error)
                generated = len(generation.ids) - len(request.prompt)
                request = msgspec.structs.replace(
                    request,
                    prompt=generation.ids,
                    max_new_tokens=request.max_new_tokens - generated,
                    model=generation.version or request.model,
                )
                reason = REASON_DRAFT_FAILED
        reporter.report_target_only(
            TARGET_ONLY_REASONS[reason], min(request.max_new_tokens, messages.MAX_CONTINUATION_TOKENS)
        )
        generation = self._make_generation(request, board, None, reporter, generated)
        try:
            return await answer.consume(generation, reporter.report_tokens)
        finally:
            self._state.metrics.count_target_only_rounds(generation.statistics, reason)

    def _make_generation(
        self,
        request: AnswerRequest,
        board: BoardRuntime,
        draft: OnnxDraft | None,
        reporter: AnswerReporter,
        generated: int = 0,
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
            generated=generated,
            logprobs=request.logprobs,
        )


def _leave(place: Place, _: asyncio.Task[None]) -> None:
    place.leave()


def _abandon(answer: Answer, task: asyncio.Task[None], _: asyncio.Task[None]) -> None:
    """End `answer` if it is still running, and close its session."""
    if answer.opening and not answer.done:
        answer.abandoned = True
        asyncio.get_running_loop().call_later(SESSION_ID_SECONDS, task.cancel)
    else:
        task.cancel()
