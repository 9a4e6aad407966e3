"""The analytic planner: knows what each part of a round costs and what drafts are worth, and takes the cheapest plan.

Before each round it compares two ways to finish the text: leaving it to the cloud (K = 0, n = all that is left), or
drafted rounds at their best cost per token (`search`). Whichever is used teaches what it costs itself; the other one is
tried now and then, as far as the expected loss stays within SPARED of all that was spent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from edge_runtime.planning.costs import FRAME_BYTES, FRAME_SECONDS, ID_BYTES, Costs
from edge_runtime.planning.device import Device
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import Conditions, Outcome, Plan
from edge_runtime.planning.search import Draft, Prices, best_draft
from edge_runtime.planning.survival import Survivals, Table

log = logging.getLogger("edge_runtime.planning")

# Own tokens of the very first round, which shows what the link and the verifier cost.
FIRST = 5
# Share of all cost that may be spent on trying out what looks dearer.
SPARED = 0.004
# Least worth of an id's way over the link, so that siblings are not named for nothing.
ID_SECONDS = 2e-5
# Prices that moved by less than this share leave the last search's result in force.
MOVED = 0.04


class AnalyticPlanner:
    """Plans by expected cost. One serves all texts of a process."""

    def __init__(self, objective: Objective, device: Device, *, acceptance: Mapping[str, float] | None = None) -> None:
        """
        Args:
            objective: prices.
            device: the board, as far as it is known.
            acceptance: as in the bundle's manifest.
        """
        self._objective = objective
        self._device = device
        self._costs = Costs(device)
        self._survivals = Survivals(acceptance or {})
        self._credit = 0.0
        self._table: Table | None = None
        self._prices = Prices(0.0, 0.0, 0.0)
        self._draft = Draft(0.0, 1, 1.0, 0, 0, 0.0, 1.0, 0.0, 1.0)

    def plan(self, conditions: Conditions) -> Plan:
        """The cheapest plan for the rest of the text, as far as anybody knows."""
        costs, left = self._costs, conditions.left
        costs.listen(conditions)
        if not costs.forward.known:
            return Plan(0, own=min(FIRST, left), reason="nothing is known of link and verifier yet")
        table = self._survivals.of(conditions.version, conditions.temperature).table()
        objective = self._objective
        device = self._device
        second = objective.latency + objective.joule * device.idle_watts
        on_air = second + objective.joule * device.radio_watts
        drafting = second + objective.joule * (device.busy_watts - device.idle_watts)
        worked = on_air + objective.verifier
        byte = objective.byte + objective.joule * device.joules_per_byte
        identity = ID_BYTES * byte + ID_SECONDS * second
        fixed = (costs.link.value + costs.queue.value) * on_air + device.overhead_seconds * second
        fixed += costs.round_bytes.value * byte
        node = costs.forward.slope * worked + identity
        prices = Prices(
            fixed + costs.forward_seconds(1.0) * worked,
            costs.step_seconds(conditions.position) * drafting + node,
            node,
        )
        draft = self._search(table, prices)
        streamed = fixed + costs.single_seconds() * worked
        frame = FRAME_BYTES * byte / max(1.0, FRAME_SECONDS / costs.own_seconds())
        each = costs.own_seconds() * worked + frame + ID_BYTES * byte
        hoped = costs.own_hoped() * worked + frame + ID_BYTES * byte
        prefill = costs.prefill_seconds(conditions.unread) * drafting
        # A text's last round yields more than is left, by half a round on average.
        drafted = prefill + draft.cost * (left + 0.5 * (draft.tokens - 1.0))
        if left < 2 or streamed + (left - 1) * each <= drafted:
            return self._stream(conditions, draft, streamed, each, drafted, table)
        if streamed + (left - 1) * hoped < drafted:
            return Plan(0, own=min(left, 2 * FIRST), reason="finding out how fast the cloud is by itself")
        return self._drafted(conditions, draft, streamed, each, drafted, table)

    def observe(self, outcome: Outcome) -> None:
        """Learns from a round."""
        costs = self._costs
        costs.observe(outcome)
        conditions = outcome.conditions
        self._survivals.of(conditions.version, conditions.temperature).observe(outcome)
        self._credit += SPARED * (outcome.draft_seconds + outcome.exchange_seconds)

    def _search(self, table: Table, prices: Prices) -> Draft:
        """The best drafted round, from the last search where nothing has moved."""
        last = self._prices
        if (
            table is not self._table
            or abs(prices.base - last.base) > MOVED * last.base
            or abs(prices.step - last.step) > MOVED * last.step
            or abs(prices.node - last.node) > 3 * MOVED * last.node
        ):
            self._draft = best_draft(table, prices)
            self._table, self._prices = table, prices
        return self._draft

    def _stream(
        self, conditions: Conditions, draft: Draft, streamed: float, each: float, drafted: float, table: Table
    ) -> Plan:
        left = conditions.left
        whole = streamed + (left - 1) * each
        loss = drafted - whole
        if left > 2 * draft.tokens:
            # One drafted round, and the rest streamed.
            loss = drafted - draft.cost * left + draft.cost * draft.tokens - draft.tokens * each
            if 0.0 < loss < self._credit:
                self._credit -= loss
                return self._plan(draft, table, f"trying a draft: {1e3 * draft.cost:.0f} ms a token, it seems")
        return Plan(
            0,
            own=left,
            reason=f"the cloud alone: {1e3 * whole / left:.0f} ms a token, drafting would be {1e3 * drafted / left:.0f}",
        )

    def _drafted(
        self, conditions: Conditions, draft: Draft, streamed: float, each: float, drafted: float, table: Table
    ) -> Plan:
        left = conditions.left
        loss = streamed + (FIRST - 1) * each - FIRST * draft.cost
        if left > FIRST and loss < self._credit:
            self._credit -= loss
            return Plan(0, own=FIRST, reason="trying the cloud alone")
        whole = streamed + (left - 1) * each
        beside = f", {draft.siblings} siblings where unsure" if draft.siblings else ""
        return self._plan(
            draft,
            table,
            f"{draft.length} tokens{beside}: {1e3 * draft.cost:.0f} ms a token, streaming would be {1e3 * whole / left:.0f}",
        )

    def _plan(self, draft: Draft, table: Table, reason: str) -> Plan:
        return Plan(
            draft.length,
            siblings=draft.siblings,
            sibling_confidence=draft.sibling_confidence,
            min_survival=draft.survival,
            calibration=table.calibration,
            reason=reason,
        )
