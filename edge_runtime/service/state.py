"""What the local service grants, and what it makes answers with."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from edge_runtime.draft import OnnxDraft
from edge_runtime.ngram_cache import NgramCache
from edge_runtime.planning.board_profile import BoardPower
from edge_runtime.planning.plan import OnLinkLoss, Planner, Surroundings
from edge_runtime.service.chat_template import ChatTemplate


class ServiceLimits(msgspec.Struct, frozen=True):
    """What the service grants.

    Attributes:
        max_concurrent: answers that are written at once.
        max_waiting: requests that wait for that.
        max_new_tokens: of an answer; also what a request gets that does not say.
        max_body: bytes of a request body; to tokenise such a text takes up to 250 times as much memory for a moment.
    """

    max_concurrent: int = 2
    max_waiting: int = 8
    max_new_tokens: int = 1024
    max_body: int = 1 << 18


class BoardRuntime(msgspec.Struct, frozen=True):
    """What answers are made with, once it is loaded; one for the whole process.

    Attributes:
        surroundings: what the probes know now.
        model: which target, where a request names none; empty for the verifier's default.
        power: what a board of its profile draws; None if nobody knows.
        on_link_loss: without a verifier, where a request does not say; see `Generation`.
        memory: of verified text; None for none.
    """

    draft: OnnxDraft
    chat: ChatTemplate
    planner: Planner
    surroundings: Callable[[], Surroundings]
    model: str = ""
    power: BoardPower | None = None
    on_link_loss: OnLinkLoss = "wait"
    memory: NgramCache | None = None
