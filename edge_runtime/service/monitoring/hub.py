"""Owns the monitoring of one service: the event log, the reporters that write to it, and the gauge sampler."""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from tokenizers import Tokenizer

from edge_runtime.planning.board_profile import BoardPower
from edge_runtime.planning.plan import Surroundings
from edge_runtime.service.admission import AdmissionQueue
from edge_runtime.service.answer import Answer
from edge_runtime.service.monitoring.event_log import SEND_TIMEOUT_SECONDS, EventLog
from edge_runtime.service.monitoring.events import BoardInfo
from edge_runtime.service.monitoring.gauges import GaugeSampler, classify_privacy
from edge_runtime.service.monitoring.reporter import AnswerReporter, ServiceTotals
from edge_runtime.service.sse import EventStream, wait_for_disconnect
from edge_runtime.verifier import VerifierClient


class MonitoringHub:
    """Collects what happens in a service and streams it to `GET /events`."""

    def __init__(self, queue: AdmissionQueue, client: VerifierClient, max_new_tokens: int) -> None:
        self._client = client
        self._max_new_tokens = max_new_tokens
        self._log, self._totals = EventLog(), ServiceTotals()
        self.sampler = GaugeSampler(self._log, self._totals, queue, client)
        self._sampling: asyncio.Task[None] | None = None

    def start(self, surroundings: Callable[[], Surroundings], power: BoardPower | None) -> None:
        """Start to sample gauges; see `GaugeSampler` for the arguments."""
        self.sampler.surroundings, self.sampler.power = surroundings, power
        self._sampling = asyncio.create_task(self.sampler.run())

    def reconfigure(self, power: BoardPower | None, max_new_tokens: int) -> None:
        """Apply new limits and disconnect subscribers, so that they authenticate again with the current keys."""
        self.sampler.power, self._max_new_tokens = power, max_new_tokens
        self._log.disconnect_all()

    def close(self) -> None:
        """Stop sampling and end all streams."""
        self._log.close()
        if self._sampling:
            self._sampling.cancel()

    def reporter_for(self, answer: Answer, tokenizer: Tokenizer) -> AnswerReporter:
        """Create the reporter of `answer`."""
        return AnswerReporter(self._log, self._totals, answer, tokenizer)

    def respond(self, request: Request) -> Response:
        """Return the event stream of a subscriber. Raises ApiError (429) if there are too many."""
        self._log.check_capacity()
        board = BoardInfo(
            at=time.time(),
            feed=self._log.id,
            version=importlib.metadata.version("flexspec"),
            ready=self._sampling is not None,
            verifier=self._client.url,
            privacy=classify_privacy(self._client.url),
            max_new_tokens=self._max_new_tokens,
        )
        disconnected = asyncio.create_task(wait_for_disconnect(request))
        stream = self._log.stream(board, request.headers.get("last-event-id", ""), disconnected)
        return EventStream(stream, disconnected, SEND_TIMEOUT_SECONDS)
