"""The local service: builds its parts, exposes them as an ASGI application, and manages its lifecycle.

The HTTP side is in `routes`, the execution of answers in `answer_runner`. Everything runs on one event loop.
"""

from __future__ import annotations

from pathlib import Path

from edge_runtime.service.answer_runner import AnswerRunner
from edge_runtime.service.auth import AccessRules, RequestGuard
from edge_runtime.service.middleware import Middleware
from edge_runtime.service.routes import Routes
from edge_runtime.service.state import BoardRuntime, ServiceLimits, ServiceState
from edge_runtime.verifier import VerifierClient


class Service:
    """A service over one verifier client and one draft model.

    It answers 503 until `activate` is called and after `drain`.

    Attributes:
        app: the ASGI application.
        state: limits, access rules and board, which change.
        client, queue, monitoring, metrics: see `ServiceState`.
    """

    def __init__(
        self, client: VerifierClient, limits: ServiceLimits, access: AccessRules, *, models_file: Path | None = None
    ) -> None:
        """
        Args:
            models_file: see `KnownModels`.
        """
        self.state = state = ServiceState(client, limits, access, models_file)
        self.client, self.queue, self.monitoring, self.metrics = client, state.queue, state.monitoring, state.metrics
        self._runner = AnswerRunner(state)
        self._routes = Routes(state, self._runner)
        self.app = Middleware(self._routes.app, access)

    def activate(self, board: BoardRuntime) -> None:
        """Start to accept answers with `board`; called once."""
        self.state.board = board
        self.monitoring.start(board.surroundings, board.power)
        self.metrics.add_prefix_cache(board.draft.prefix_cache)

    def reconfigure(self, limits: ServiceLimits, access: AccessRules, board: BoardRuntime) -> None:
        """Apply new limits, rules and board to all further requests; running answers continue with the old ones."""
        self.state.board, self.state.limits, self.state.access = board, limits, access
        self._routes.guard = RequestGuard(access)
        self.app.apply(access)
        self.queue.resize(limits.max_concurrent, limits.max_waiting)
        self.monitoring.reconfigure(board.power, limits.max_new_tokens)

    async def drain(self, seconds: float) -> None:
        """Refuse new answers, wait up to `seconds` for the running ones, cancel the rest, and end all event streams."""
        self.state.stopping = True
        await self._runner.drain(seconds)
        self.monitoring.close()
