"""Formats answers as responses of `/v1/responses`."""

from __future__ import annotations

import itertools
import secrets
import time

import msgspec
from tokenizers import Tokenizer

from edge_runtime.service.answer import NO_CHANGE, TextChange
from edge_runtime.service.answer_group import AnswerGroup
from edge_runtime.service.errors import ApiError
from edge_runtime.service.response_formatter import describe_origin, finish_reason, make_timings, make_usage
from edge_runtime.service.responses.output_items import OutputItems
from edge_runtime.service.responses.requests import ResponseTask, TextOptions
from edge_runtime.service.responses.schema import (
    IncompleteDetails,
    ResponseCompleted,
    ResponseCreated,
    ResponseIncomplete,
    ResponseInProgress,
    ResponseObject,
    ResponseUsage,
    StreamedEvent,
    StreamFailed,
)
from edge_runtime.service.responses.store import ResponseStore
from edge_runtime.service.sse import AnswerFormatter, ServerEvent
from edge_runtime.service.structured_output import TextFormat


class ResponsesFormatter(AnswerFormatter):
    """Formats the answer of one request, and stores the response at its end unless the request says otherwise."""

    # OpenAI's streams of responses end with response.completed.
    end_mark = b""

    def __init__(self, task: ResponseTask, tokenizer: Tokenizer, store: ResponseStore) -> None:
        self.id = "resp_" + secrets.token_hex(24)
        self._task = task
        self._store = store
        self._created = int(time.time())
        self._sequence = itertools.count()
        self._items = OutputItems(tokenizer, self._sequence)

    def format_response(self, group: AnswerGroup) -> msgspec.Struct:
        for part in (group.answers[0].take() or NO_CHANGE).parts():
            self._items.append(part)
        return self._finish(group)[0]

    def begin_stream(self, group: AnswerGroup) -> list[ServerEvent]:
        response = self._describe(group)
        return _named(
            [
                ResponseCreated(sequence_number=next(self._sequence), response=response),
                ResponseInProgress(sequence_number=next(self._sequence), response=response),
            ]
        )

    def stream_change(self, group: AnswerGroup, index: int, change: TextChange, *, first: bool) -> list[ServerEvent]:
        return _named(self._items.append(change))

    def end_choice(self, group: AnswerGroup, index: int) -> list[ServerEvent]:
        # The only answer is the whole response.
        return []

    def end_stream(self, group: AnswerGroup) -> list[ServerEvent]:
        response, events = self._finish(group)
        last = ResponseCompleted if response.status == "completed" else ResponseIncomplete
        return _named([*events, last(sequence_number=next(self._sequence), response=response)])

    def stream_error(self, error: ApiError) -> ServerEvent:
        body = error.body.error
        event = StreamFailed(
            sequence_number=next(self._sequence),
            code=body.code,
            message=body.message,
            param=body.param,
            error=body,
        )
        return ServerEvent(event, "error")

    def _finish(self, group: AnswerGroup) -> tuple[ResponseObject, list[StreamedEvent]]:
        """Complete the response and store it; return it and the last events of its items."""
        answer = group.answers[0]
        complete = finish_reason(answer) != "length"
        events = self._items.finish(complete=complete)
        usage = make_usage(group)
        response = msgspec.structs.replace(
            self._describe(group),
            status="completed" if complete else "incomplete",
            completed_at=int(time.time()),
            incomplete_details=None if complete else IncompleteDetails(),
            output=self._items.build(),
            usage=ResponseUsage(
                usage.prompt_tokens,
                usage.prompt_tokens_details,
                usage.completion_tokens,
                usage.completion_tokens_details,
                usage.total_tokens,
            ),
            timings=make_timings(group.answers, group.firsts),
            unverified=answer.unverified or msgspec.UNSET,
        )
        if response.store:
            self._store.put(response, [*self._task.messages, self._items.to_message()])
        return response, events

    def _describe(self, group: AnswerGroup) -> ResponseObject:
        """Return the response before any output."""
        request, sampling = self._task.request, group.answers[0].request.sampling
        text = TextOptions((request.text and request.text.format) or TextFormat())
        return ResponseObject(
            id=self.id,
            created_at=self._created,
            status="in_progress",
            **describe_origin(group),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            output=[],
            parallel_tool_calls=request.parallel_tool_calls is not False,
            previous_response_id=request.previous_response_id,
            reasoning={"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            store=request.store is not False,
            temperature=sampling.temperature,
            text=msgspec.to_builtins(text),
            tool_choice=msgspec.to_builtins(request.tool_choice or "auto"),
            tools=request.tools or [],
            top_p=sampling.top_p,
            top_logprobs=request.top_logprobs or 0,
            metadata=request.metadata or {},
        )


def _named(events: list[StreamedEvent]) -> list[ServerEvent]:
    return [ServerEvent(event, str(event.__struct_config__.tag)) for event in events]
