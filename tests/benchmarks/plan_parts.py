"""The parts that plans have, each of which a benchmark can leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from edge_runtime.planning.plan import Conditions, Outcome, Plan, Planner

# Fields of a plan without a part.
PLAN_PARTS: dict[str, dict[str, Any]] = {
    "siblings": {"siblings": 0},
    "drafting ahead": {"draft_ahead": 0, "in_flight": 1},
    "guessing along with streams": {"shadow": False},
    "confidence stop": {"min_confidence": 0.0, "min_survival": 0.0},
}


class ChangedPlanner:
    """Hands on to a planner, whose plans it changes.

    Args:
        changes: fields of plans that are replaced.
    """

    def __init__(self, planner: Planner, changes: Mapping[str, Any]) -> None:
        self.planner = planner
        self._changes = changes

    def plan(self, conditions: Conditions) -> Plan:
        return msgspec.structs.replace(self.planner.plan(conditions), **self._changes)

    def observe(self, outcome: Outcome) -> None:
        self.planner.observe(outcome)
