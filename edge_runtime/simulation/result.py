"""What simulated texts cost. All times are modelled."""

from __future__ import annotations

import msgspec

from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import Outcome


class Result(msgspec.Struct):
    """What texts cost. Grows while they are played.

    Attributes:
        tokens, rounds: of all texts.
        drafted, accepted: tokens by the board.
        sibling_hits: rounds in which a sibling saved a token.
        early: rounds that were sent before the last one was answered, and stood.
        void: those that did not stand.
        latency_seconds: from each text's start to its end, in all.
        first_token_seconds: from each text's start to its first tokens, in all.
        verifier_seconds: the verifier's forwards and its own drafting.
        forwards: of the target.
        draft_seconds: the board's draft at work, ahead of time included.
        joules: of the board while texts were played.
        sent, received: payload bytes.
        log: what each round came to, if asked for.
    """

    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    sibling_hits: int = 0
    early: int = 0
    void: int = 0
    latency_seconds: float = 0.0
    first_token_seconds: float = 0.0
    verifier_seconds: float = 0.0
    forwards: int = 0
    draft_seconds: float = 0.0
    joules: float = 0.0
    sent: int = 0
    received: int = 0
    log: list[Outcome] = []

    def cost(self, objective: Objective) -> float:
        """Cost per token."""
        carried = self.sent + self.received
        return objective.cost(self.latency_seconds, self.verifier_seconds, self.joules, carried) / self.tokens

    @property
    def seconds_per_token(self) -> float:
        return self.latency_seconds / self.tokens

    def __add__(self, other: Result) -> Result:
        names = self.__struct_fields__
        return Result(*(getattr(self, name) + getattr(other, name) for name in names))
