"""Cost of simulated generations; all times are modeled."""

from __future__ import annotations

import msgspec

from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import Outcome
from edge_runtime.planning.round_rules import RoundTotals


class SimulationResult(RoundTotals):
    """Cost of one or several simulated texts.

    Attributes:
        tokens: total length of the texts.
        void_rounds: rounds that were sent early and turned out void.
        latency_seconds: from each text's start to its end, in total.
        first_token_seconds: from each text's start to its first tokens, in total.
        verifier_seconds: the verifier's forwards and its server-side drafting.
        draft_seconds: time in which the board drafts, drafting ahead included.
        joules: energy of the board during the texts.
        sent, received: TCP payload bytes.
        log: outcome of each round, if requested.
    """

    tokens: int = 0
    void_rounds: int = 0
    latency_seconds: float = 0.0
    first_token_seconds: float = 0.0
    verifier_seconds: float = 0.0
    forwards: int = 0
    draft_seconds: float = 0.0
    joules: float = 0.0
    sent: int = 0
    received: int = 0
    log: list[Outcome] = msgspec.field(default_factory=list)

    def add_round(self, outcome: Outcome) -> None:
        super().add_round(outcome)
        self.forwards += 1 + outcome.further_forwards
        self.sent += outcome.sent
        self.received += outcome.received

    def cost(self, objective: Objective) -> float:
        """Return the cost per token."""
        traffic = self.sent + self.received
        return objective.cost(self.latency_seconds, self.verifier_seconds, self.joules, traffic) / self.tokens

    @property
    def seconds_per_token(self) -> float:
        return self.latency_seconds / self.tokens

    def __add__(self, other: SimulationResult) -> SimulationResult:
        names = self.__struct_fields__
        return SimulationResult(**{name: getattr(self, name) + getattr(other, name) for name in names})
