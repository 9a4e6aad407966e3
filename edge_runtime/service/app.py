"""The local service: builds its parts, exposes them as an ASGI application, and manages its lifecycle.

The HTTP side is in `routes`, the execution of answers in `answer_runner`. Everything runs on one event loop.
"""

from __future__ import annotations

from edge_runtime.service.answer_runner import AnswerRunner
from edge_runtime.service.auth import RequestGuard
from edge_runtime.service.routes import Routes
from edge_runtime.service.state import BoardRuntime, ServiceLimits, ServiceState
from edge_runtime.verifier import VerifierClient


class Service:
    """A service over one verifier client and one draft model.

    It answers 503 until `activate` is called and after `drain`.

    Attributes:
        app: the ASGI application.
        state: limits, keys and board, which change.
        client, queue, monitoring, metrics: see `ServiceState`.
    """

    def __init__(
        self, client: VerifierClient, limits: ServiceLimits, keys: frozenset[str], *, local: bool = True
    ) -> None:
        """
        Args:
            keys, local: see `RequestGuard`.
        """
        self.state = state = ServiceState(client, limits, keys)
        self.client, self.queue, self.monitoring, self.metrics = client, state.queue, state.monitoring, state.metrics
        self._local = local
        self._runner = AnswerRunner(state)
        self._routes = Routes(state, RequestGuard(keys, local), self._runner)
        self.app = self._routes.app

    def activate(self, board: BoardRuntime) -> None:
        """Start to accept answers with `board`; called once."""
        self.state.board = board
        self.monitoring.start(board.surroundings, board.power)
        if board.ngram_cache:
            self.metrics.add_ngram_cache(board.ngram_cache)

    def reconfigure(self, limits: ServiceLimits, keys: frozenset[str], board: BoardRuntime) -> None:
        """Apply new limits, keys and board to all further requests; running answers continue with the old ones."""
        self.state.board, self.state.limits, self.state.keys = board, limits, keys
        self._routes.guard = RequestGuard(keys, self._local)
        self.queue.resize(limits.max_concurrent, limits.max_waiting)
        self.monitoring.reconfigure(board.power, limits.max_new_tokens)

    async def drain(self, seconds: float) -> None:
        """Refuse new answers, wait up to `seconds` for the running ones, cancel the rest, and end all event streams."""
        self.state.stopping = True
        await self._runner.drain(seconds)
        self.monitoring.close()
