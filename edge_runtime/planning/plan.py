"""What a planner decides, what it learns from, and the planner that always decides the same."""

from __future__ import annotations

from typing import Protocol

import msgspec


class Plan(msgspec.Struct, frozen=True):
    """One round's decision.

    Attributes:
        draft: K, tokens to draft on the board; 0 leaves the round to the cloud.
        own: n, tokens that the target says by itself behind the accepted ones, at least 1.
        siblings: alternatives to name beside a draft token.
        sibling_confidence: name them beside tokens of at most this probability: a token that the draft is sure of is
            accepted nearly always, and ids cost bytes and verifier width.
        min_confidence: stop drafting behind a token whose probability is below this.
        reason: why, in a few words.
    """

    draft: int
    own: int = 1
    siblings: int = 0
    sibling_confidence: float = 0.8
    min_confidence: float = 0.0
    reason: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """What one round came to; times in seconds.

    Attributes:
        drafted: tokens that were drafted.
        accepted: how many of them the target accepted.
        own: tokens that the target said itself.
        draft_seconds: drafting, prefilling what the cloud had sent included.
        exchange_seconds: from sending the round to its last frame.
        verifier_seconds: of these, what the verifier reports for queue and forward.
    """

    drafted: int
    accepted: int
    own: int
    draft_seconds: float
    exchange_seconds: float
    verifier_seconds: float


class Planner(Protocol):
    """Decides before every round and hears afterwards what came of it. One planner serves one text."""

    def plan(self) -> Plan:
        """The next round's plan."""

    def observe(self, outcome: Outcome) -> None:
        """What the last plan came to."""


class FixedPlanner:
    """The same plan every round."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self) -> Plan:
        return self._plan

    def observe(self, outcome: Outcome) -> None:
        """Learns nothing."""
