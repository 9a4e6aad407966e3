"""Everything that the board tells those who watch it, in one place: the feed, who reports to it, and its pulse."""

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
from edge_runtime.service.monitoring import events
from edge_runtime.service.monitoring.event_log import SEND_TIMEOUT_SECONDS, EventLog
from edge_runtime.service.monitoring.gauges import GaugeSampler, classify_privacy
from edge_runtime.service.monitoring.reporter import AnswerReporter, ServiceTotals
from edge_runtime.service.sse import EventStream, wait_for_disconnect
from edge_runtime.verifier import VerifierClient


class MonitoringHub:
    """What `GET /events` says, for one service.

    Attributes:
        pulse: the gauges.
    """

    def __init__(self, queue: AdmissionQueue, client: VerifierClient, max_new_tokens: int) -> None:
        self._client = client
        self._max_new_tokens = max_new_tokens
        self._feed, self._totals = EventLog(), ServiceTotals()
        self.pulse = GaugeSampler(self._feed, self._totals, queue, client)
        self._beating: asyncio.Task[None] | None = None

    def open(self, surroundings: Callable[[], Surroundings], power: BoardPower | None) -> None:
        """From now on the gauges are told once a second; see `GaugeSampler` for the arguments."""
        self.pulse.surroundings, self.pulse.power = surroundings, power
        self._beating = asyncio.create_task(self.pulse.run())

    def change(self, power: BoardPower | None, max_new_tokens: int) -> None:
        """From now on these; and who watches shows a key again, which may be needed or void now."""
        self.pulse.power, self._max_new_tokens = power, max_new_tokens
        self._feed.dismiss()

    def close(self) -> None:
        """Ends all streams."""
        self._feed.close()
        if self._beating:
            self._beating.cancel()

    def reporter(self, answer: Answer, tokenizer: Tokenizer) -> AnswerReporter:
        """Who tells of `answer`."""
        return AnswerReporter(self._feed, self._totals, answer, tokenizer)

    def respond(self, request: Request) -> Response:
        """The stream of one watcher. Raises Refusal (429): there are too many."""
        self._feed.check_room()
        greeting = events.BoardInfo(
            at=time.time(),
            feed=self._feed.name,
            version=importlib.metadata.version("flexspec"),
            ready=self._beating is not None,
            verifier=self._client.url,
            privacy=classify_privacy(self._client.url),
            max_new_tokens=self._max_new_tokens,
        )
        gone = asyncio.create_task(wait_for_disconnect(request))
        stream = self._feed.stream(greeting, request.headers.get("last-event-id", ""), gone)
        return EventStream(stream, gone, SEND_TIMEOUT_SECONDS)
