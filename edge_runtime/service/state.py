"""State that the parts of the service share: limits, access rules, the draft model and what else answers need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_runtime.draft import OnnxDraft
from edge_runtime.planning.board_profile import BoardPower
from edge_runtime.planning.plan import OnLinkLoss, Planner, Surroundings
from edge_runtime.protocol.bundle import SamplingDefaults
from edge_runtime.service.admission import AdmissionQueue
from edge_runtime.service.auth import AccessRules
from edge_runtime.service.chat_template import ChatTemplate
from edge_runtime.service.errors import BRIEF_RETRY_SECONDS, ApiError
from edge_runtime.service.known_models import KnownModels
from edge_runtime.service.monitoring.hub import MonitoringHub
from edge_runtime.service.monitoring.prometheus import ServiceMetrics
from edge_runtime.verifier import VerifierClient


class ServiceLimits(msgspec.Struct, frozen=True):
    """Limits of the service.

    Attributes:
        max_concurrent: answers that run at once.
        max_waiting: answers that wait for one of these to finish.
        max_new_tokens: tokens of one answer; 0 for what the context leaves.
        max_body: bytes of a request body. Tokenizing a text briefly takes up to 250 times its size in memory.
        unreachable_seconds: how long a request that is not streamed waits for a verifier that cannot be reached. Its
            client sees nothing meanwhile, and most clients give up after a minute without learning why.
    """

    max_concurrent: int = 2
    max_waiting: int = 64
    max_new_tokens: int = 0
    max_body: int = 1 << 18
    unreachable_seconds: float = 30.0


class BoardRuntime(msgspec.Struct, frozen=True):
    """What every answer is generated with; loaded once per process, replaced as a whole when the configuration changes.

    Attributes:
        surroundings: returns the current probe readings.
        model: target model of requests that name none; empty for the verifier's default.
        power: power draw of a board of this profile; None if the profile does not say.
        on_link_loss: default of requests that do not say what to do without a verifier; see `Generation`.
        sampling: sampling parameters of requests that name none.
        tool_call_form, reasoning_form: how the target writes calls and reasoning; see `find_forms`.
    """

    draft: OnnxDraft
    chat_template: ChatTemplate
    planner: Planner
    surroundings: Callable[[], Surroundings]
    model: str = ""
    power: BoardPower | None = None
    on_link_loss: OnLinkLoss = "wait"
    sampling: SamplingDefaults = SamplingDefaults()
    tool_call_form: str = "auto"
    reasoning_form: str = "auto"


class ServiceState:
    """What the lifecycle and the request handlers share.

    Attributes:
        access: who may use the service.
        models: the verifier's models, as far as known.
        board: None until the draft model is loaded.
        stopping: the service drains and accepts no new answers.
        queue, monitoring, metrics: one of each for all answers.
    """

    def __init__(
        self, client: VerifierClient, limits: ServiceLimits, access: AccessRules, models_file: Path | None = None
    ) -> None:
        self.client, self.limits, self.access = client, limits, access
        self.models = KnownModels(client, models_file)
        self.queue = AdmissionQueue(limits.max_concurrent, limits.max_waiting)
        self.monitoring = MonitoringHub(self.queue, client, limits.max_new_tokens)
        self.metrics = ServiceMetrics(self.queue, client, self.monitoring.sampler)
        self.board: BoardRuntime | None = None
        self.stopping = False

    def require_board(self) -> BoardRuntime:
        """Return the loaded board. Raises ApiError (503) while the draft model is loading or the service drains."""
        if self.stopping or self.board is None:
            code, message = "starting", "the draft model is still loading; try again shortly"
            if self.stopping:
                code, message = "stopping", "the service is stopping"
            raise ApiError(503, message, code=code, retry_after=BRIEF_RETRY_SECONDS)
        return self.board
