"""The analytic planner: estimates what each part of a round costs and how far drafts get, and takes the cheapest plan.

Before each round it compares two ways to finish the text:

- streaming: leave the rest to the verifier (K = 0, n = all remaining tokens);
- drafting: drafted rounds at their best cost per token (`search`), averaged over the text's stages
  (`acceptance_table`).

The executed option teaches its own cost, and mostly that of the other one as well: while the verifier streams, the
draft model predicts the streamed tokens in shadow and drafted rounds are replayed on them (`counterfactual`), and a
drafted round shows how many forwards its tokens would have taken. Beyond that, the planner tries the other option if
its expected improvement, given the uncertainty of the estimates, exceeds the cost of the trial, and now and then within
a budget for exploration. The total loss of drafting against streaming is bounded by a regret budget (`regret_budget`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from edge_runtime.planning.acceptance_model import AcceptanceModel, AcceptanceModels
from edge_runtime.planning.acceptance_table import AcceptanceTable
from edge_runtime.planning.cost_calibration import CostCalibration
from edge_runtime.planning.cost_model import FRAME_BYTES, ID_BYTES, CostModel
from edge_runtime.planning.counterfactual import replay_rounds
from edge_runtime.planning.device_model import DeviceModel, heat_factor
from edge_runtime.planning.energy_budget import EnergyBudget, EnergyQueue
from edge_runtime.planning.estimators import MAX_X
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import Conditions, Outcome, Plan
from edge_runtime.planning.planner_state import PlannerState
from edge_runtime.planning.regret_budget import RegretBudget, RoundReservation
from edge_runtime.planning.round_rules import PREFILL_CHUNK_TOKENS
from edge_runtime.planning.search import DraftedRound, RoundPrices, RoundSearch
from edge_runtime.protocol.messages import MAX_CONTINUATION_TOKENS, MAX_TREE_NODES, STREAM_FRAME_SECONDS

log = logging.getLogger("edge_runtime.planning")

# All constants are chosen; `python -m tests.benchmarks run planning` shows their effect in simulation.

# Own tokens of the very first round, which measures link and verifier, and of later trials of streaming.
FIRST_ROUND_TOKENS = 7
STREAMING_TRIAL_TOKENS = 16
# Number of tokens that a trial of drafting takes to show the acceptance.
DRAFTING_TRIAL_TOKENS = 24.0
# A trial may cost what it is expected to gain over this many future tokens.
TRIAL_HORIZON_TOKENS = 300.0
# Share of the error of the drafting cost that a speculative verifier's streaming cost does not share: both follow the
# acceptance.
UNSHARED_ERROR = 0.5
# Exploration without an expected gain: share of all time that it may take, minimum number of rounds between two trials,
# and maximum ratio of the option's estimated cost to that of the best one.
EXPLORATION_SHARE = 0.004
EXPLORATION_INTERVAL_ROUNDS = 24
MAX_EXPLORATION_RATIO = 3.0
# The draft shadows a stream if drafting seems at most this many times more expensive than streaming.
MAX_SHADOW_RATIO = 1.5
# Minimum prices of a token id and of a byte of a round's fixed payload, in seconds of waiting, so that siblings that
# gain nothing are not sent, and a link without delay is not filled with rounds that hardly save time.
MIN_ID_SECONDS = 2e-5
MIN_BYTE_SECONDS = 8e-6
# The last search result remains valid while all prices differ by less than this share.
PRICE_TOLERANCE = 0.08
# Quantile of the link time that drafting ahead counts on.
FLIGHT_QUANTILE = 0.4
# A draft that does not fit into the regret budget is shortened down to this share of its expected yield.
MIN_YIELD_SHARE = 0.5
# Quantile of the link time that a round is assumed to take in the worst case. The few above it are outliers.
SLOW_LINK_QUANTILE = 0.9
# Share of the heat factor's excess that is applied to a draft step's time as well: a hot board is about to slow down.
HEAT_TIME_SHARE = 0.25
# Streaming while the draft prefills is considered if the prefill takes longer than this.
MIN_PREFILL_SECONDS = 0.02
# Assumed forward time of an unknown verifier: an upper bound.
UNKNOWN_FORWARD_SECONDS = 0.1
# Assumed forward time of an unknown verifier: a lower bound, for what another exchange may lose. A 7B model on one H200
# takes 6 ms.
FASTEST_FORWARD_SECONDS = 0.005
# Lower bound of the cost of a streamed token, for objectives to which time is free.
MIN_FURTHER_COST = 1e-9
# Lower bound of a measured forward time, as a guard against clock resolution.
MIN_FORWARD_SECONDS = 1e-6


class CostComparison(msgspec.Struct, frozen=True, kw_only=True):
    """The two ways to finish a text and their cost, in the objective's seconds.

    Attributes:
        left: remaining tokens.
        round: the best drafted round.
        prefill: of the draft, once.
        prefill_stream: tokens to stream while the draft prefills; 0 if it is cheaper to prefill first.
        drafted: all tokens in drafted rounds.
        drafted_better_link: the same once the link has returned to its better regime.
        link_change: probability that the link's regime has changed since it was measured.
        link_seconds: expected duration of the link's current regime, in seconds.
        first: a streaming round of one token.
        further: every further token of it.
        optimistic_further: a lower bound of what that may turn out to be.
        tokens_per_forward: expected yield of a speculative verifier's forward.
        calibration: factor of the predicted costs of drafted rounds, included in all of the above.
    """

    left: int
    round: DraftedRound
    prefill: float
    prefill_stream: int
    drafted: float
    drafted_better_link: float
    link_change: float
    link_seconds: float
    first: float
    further: float
    optimistic_further: float
    tokens_per_forward: float
    calibration: float

    @property
    def streamed(self) -> float:
        """All tokens in one streaming round."""
        return self.first + (self.left - 1) * self.further


class _UnitPrices(NamedTuple):
    """Prices of a second of waiting, of drafting, in flight and of a verifier's forward, and of a byte."""

    waiting: float
    drafting: float
    flight: float
    forward: float
    byte: float


class AnalyticPlanner:
    """Plans by expected cost. One planner serves all generations of a process.

    Attributes:
        regret: what drafting may still lose against streaming, and has lost so far.
    """

    def __init__(
        self,
        objective: Objective,
        device: DeviceModel,
        *,
        acceptance: Mapping[str, float] | None = None,
        budget: EnergyBudget | None = None,
    ) -> None:
        """
        Args:
            objective: prices.
            device: prior figures of the board.
            acceptance: acceptance rates by evaluation, as in the bundle's manifest.
            budget: energy budget.
        """
        self._energy_queue = EnergyQueue(budget, device) if budget else None
        self._objective = objective
        self._device = device
        self._costs = CostModel(device)
        self._acceptance = AcceptanceModels(acceptance or {})
        self._calibration = CostCalibration()
        self.regret = RegretBudget()
        self._exploration_seconds = 0.0
        self._rounds_since_exploration = 0
        # Outcomes with the prices and the comparison at their time, held back while it is uncertain whether the link
        # has changed.
        self._pending: list[tuple[Outcome, RoundPrices, CostComparison]] = []
        self._link_changes = 0
        # The prices that searches were last made for, and what they found.
        self._prices: RoundPrices | None = None
        self._search = RoundSearch(PRICE_TOLERANCE)
        self._comparison: CostComparison | None = None
        self._unit = _UnitPrices(1.0, 1.0, 1.0, 1.0, 0.0)
        # End position of the text in which streaming was last tried.
        self._streaming_trial_end = 0

    @property
    def comparison(self) -> CostComparison | None:
        """The comparison of drafting and streaming that the last plan followed; None before the first."""
        return self._comparison

    def plan(self, conditions: Conditions) -> Plan:
        """Return the cheapest plan for the rest of the text according to the current estimates."""
        self._costs.use_kernel_rtt(conditions)
        if self._energy_queue:
            self._energy_queue.advance(conditions.now, conditions.surroundings)
        acceptance = self._acceptance.get(conditions.version, conditions.temperature)
        acceptance.follow(conditions)
        table = acceptance.table()
        comparison = self._comparison = self._compare(conditions, table, acceptance)
        plan = self._limit_regret(self._decide(conditions, comparison, table, acceptance), conditions, comparison)
        if log.isEnabledFor(logging.DEBUG):
            drafted, streamed = (1e3 * cost / comparison.left for cost in (comparison.drafted, comparison.streamed))
            log.debug(
                f"{drafted:.1f} ms/token drafted, {streamed:.1f} streamed, {comparison.left} left, regret budget "
                f"{self.regret.tokens:.0f} tokens"
            )
        return plan

    def observe(self, outcome: Outcome) -> None:
        """Learn from a round."""
        conditions = outcome.conditions
        acceptance = self._acceptance.get(conditions.version, conditions.temperature)
        self._costs.observe(outcome, acceptance.tokens_per_forward(conditions.left))
        if self._energy_queue:
            self._energy_queue.observe(outcome, self._costs.round_joules(outcome))
        if outcome.shadow_guesses and self._prices is not None:
            self._observe_shadow(outcome, acceptance, self._prices)
        acceptance.observe(outcome)
        self._rounds_since_exploration += 1
        if self._prices is not None and self._comparison is not None:
            self.regret.observe(
                outcome,
                equivalent=self._costs.streaming_equivalent(outcome, self._comparison.tokens_per_forward),
                cost=_measured_cost(outcome, self._prices),
                first=self._prices.flight_second * (outcome.wait_seconds + outcome.first_seconds)
                + (self._unit.forward - self._unit.flight) * self._costs.forward.at(1.0),
            )
            self._observe_cost(outcome, self._prices, self._comparison)
        self._exploration_seconds += EXPLORATION_SHARE * (outcome.draft_seconds + outcome.exchange_seconds)

    def state(self) -> PlannerState:
        """Return what has been learned, to be restored in another process."""
        return PlannerState(self.regret.tokens, self._acceptance.records())

    def restore(self, state: PlannerState) -> None:
        """Continue from what another planner for the same draft has learned."""
        self.regret = RegretBudget(state.regret_tokens)
        self._acceptance.restore(state.acceptance)

    def _unit_prices(self, conditions: Conditions) -> _UnitPrices:
        device, objective = self._device, self._objective
        waiting = objective.latency + objective.joule * device.idle_watts
        joule = objective.joule
        if self._energy_queue:
            waiting, budget_joule = self._energy_queue.prices(waiting)
            joule += budget_joule
        flight = waiting + joule * device.radio_watts
        heat = heat_factor(conditions.surroundings)
        drafting = waiting * (1.0 + HEAT_TIME_SHARE * (heat - 1.0))
        drafting += joule * (device.busy_watts - device.idle_watts) * heat
        byte = objective.byte + joule * device.joules_per_byte
        return _UnitPrices(waiting, drafting, flight, flight + objective.verifier, byte)

    def _round_prices(self, conditions: Conditions, unit: _UnitPrices, link: float) -> RoundPrices:
        """Return the prices of a round's parts; `link` is the expected link time in seconds."""
        costs, overhead = self._costs, self._device.overhead_seconds
        payload = costs.round_bytes.value * (unit.byte + MIN_BYTE_SECONDS * unit.waiting)
        exchange = (link + costs.queue.value) * unit.flight + overhead * unit.waiting
        step = costs.step_seconds(conditions.position)
        if costs.forward.known:
            nodes, forwards = costs.forward.knots
        else:
            nodes, forwards = [1.0, MAX_X], [UNKNOWN_FORWARD_SECONDS, 2.0 * UNKNOWN_FORWARD_SECONDS]
        return RoundPrices(
            exchange=exchange + payload,
            step=step * unit.drafting,
            id=ID_BYTES * unit.byte + MIN_ID_SECONDS * unit.waiting,
            flight_second=unit.flight,
            forward_second=unit.forward,
            step_ahead=step * (unit.drafting - unit.waiting),
            void=payload,
            step_seconds=step,
            flight_seconds=min(costs.link_quantile(FLIGHT_QUANTILE), link) + forwards[0],
            overhead_seconds=overhead,
            queue_seconds=costs.queue.value,
            forward_nodes=nodes,
            forward_seconds=forwards,
        )

    def _compare(self, conditions: Conditions, table: AcceptanceTable, acceptance: AcceptanceModel) -> CostComparison:
        """Return the cost of both options at the current prices."""
        costs, now, left = self._costs, conditions.now, conditions.left
        unit = self._unit = self._unit_prices(conditions)
        link = costs.link.forecast(now)
        prices = self._round_prices(conditions, unit, link)
        self._prices = self._search.update(prices)
        best = self._search.best(table, prices)
        # A part of the remaining text will be in the last stage.
        share = acceptance.last_stage_share(left)
        in_first_stage = self._search.best(acceptance.first_stage_table(), prices).cost
        in_last_stage = self._search.best(acceptance.last_stage_table(), prices).cost
        predicted = share * in_last_stage + (1.0 - share) * in_first_stage
        if costs.verifier_speculates:
            # As long as the board has little evidence of its own, the yield of a verifier with the same draft is
            # evidence of the acceptance.
            predicted /= 1.0 + (costs.yield_ratio.value - 1.0) * acceptance.prior_weight
        tokens_per_forward = acceptance.tokens_per_forward(left)
        own_seconds = UNKNOWN_FORWARD_SECONDS
        if costs.forward.known:
            own_seconds = max(costs.own_token_seconds(tokens_per_forward), MIN_FORWARD_SECONDS)
        # A frame carries the tokens of a frame interval, at least one.
        traffic = FRAME_BYTES * unit.byte / max(1.0, STREAM_FRAME_SECONDS / own_seconds) + ID_BYTES * unit.byte
        first = prices.exchange + prices.forward_seconds[0] * unit.forward
        further = own_seconds * unit.forward + traffic
        # Most rounds will take place later, when the link may be back at its long-run mean.
        later = costs.link.forecast(now + 0.5 * left * min(predicted, own_seconds * unit.forward))
        calibration = self._calibration.factor(best.cost * best.tokens)
        per_token = predicted * calibration + (later - link) * unit.flight / best.chain_tokens
        better_link = per_token - max(0.0, later - costs.link.other_level) * unit.flight / best.chain_tokens
        # The last round of a text yields more than what is left, by half a round on average.
        tokens = left + 0.5 * (best.tokens - 1.0)
        prefill_seconds = costs.prefill_seconds(conditions.unread)
        prefill = prefill_seconds * unit.drafting
        drafted, prefill_stream = prefill + per_token * tokens, 0
        if not conditions.ready and prefill_seconds > MIN_PREFILL_SECONDS:
            # Prefill during a stream costs no time, except that of the streamed tokens themselves.
            count = 1 + int(max(0.0, prefill - first) / further)
            rest = costs.prefill_seconds(count + 1) * unit.drafting
            mixed = first + (count - 1) * further + rest + per_token * (tokens - count)
            if count < left // 2 and mixed < 0.99 * drafted:
                drafted, prefill_stream = mixed, count
        return CostComparison(
            left=left,
            round=best,
            prefill=prefill,
            prefill_stream=prefill_stream,
            drafted=drafted,
            drafted_better_link=drafted + (better_link - per_token) * tokens,
            link_change=1.0 - costs.link.persistence(now),
            link_seconds=costs.link.expected_duration,
            first=first,
            further=further,
            optimistic_further=costs.optimistic_own_token_seconds(tokens_per_forward) * unit.forward + traffic,
            tokens_per_forward=tokens_per_forward,
            calibration=calibration,
        )

    def _observe_cost(self, outcome: Outcome, prices: RoundPrices, comparison: CostComparison) -> None:
        """Calibrate the predicted costs of drafted rounds by a measured one, once the link is known to be the same."""
        link = self._costs.link.now
        if link.changes > self._link_changes:
            # The predictions for the pending outcomes were for another link.
            self._link_changes = link.changes
            self._pending.clear()
        self._pending.append((outcome, prices, comparison))
        if link.uncertain:
            return
        for outcome, prices, comparison in self._pending:
            cost = _measured_cost(outcome, prices)
            if outcome.drafted and not outcome.repeated:
                self._calibration.observe(cost - comparison.prefill, comparison.round.cost * outcome.tokens)
            elif not outcome.drafted and not outcome.shadow_guesses:
                self._calibration.fade(outcome.tokens)
        self._pending.clear()

    def _observe_shadow(self, outcome: Outcome, acceptance: AcceptanceModel, prices: RoundPrices) -> None:
        """Learn what drafted rounds would have cost for streamed tokens."""
        replayed = replay_rounds(
            outcome.shadow_guesses,
            streak=acceptance.streak,
            first_stage=self._search.best(acceptance.first_stage_table(), prices),
            last_stage=self._search.best(acceptance.last_stage_table(), prices),
            prices=prices,
        )
        if replayed.tokens:
            acceptance.add_last_stage(replayed.last_stage_tokens * len(outcome.shadow_guesses) / replayed.tokens)
            self._calibration.observe_counterfactual(replayed.tokens, replayed.cost, replayed.predicted_cost)

    def _decide(
        self, conditions: Conditions, comparison: CostComparison, table: AcceptanceTable, acceptance: AcceptanceModel
    ) -> Plan:
        left, best = comparison.left, comparison.round
        streamed, drafted = comparison.streamed, comparison.drafted
        costs = f"{1e3 * drafted / left:.0f} ms/token drafted, {1e3 * streamed / left:.0f} streamed"
        if not self._costs.forward.known:
            if left <= FIRST_ROUND_TOKENS or streamed < drafted:
                milliseconds = 1e3 * UNKNOWN_FORWARD_SECONDS
                reason = f"streaming: drafting would not pay off with forwards of up to {milliseconds:.0f} ms"
                return Plan(0, continuation=left, reason=reason)
            return Plan(
                0, continuation=FIRST_ROUND_TOKENS, reason="streaming: link and verifier have not been measured yet"
            )
        if left < 2 or streamed <= drafted:
            if left > 2 * best.tokens and self._should_try_drafting(comparison, acceptance):
                return drafting_plan(conditions, best.plan, f"exploring drafting: {costs}")
            own = self._stream_length(comparison)
            watch = self._should_shadow(comparison, own)
            return Plan(0, continuation=own, siblings=best.plan.siblings, shadow=watch, reason=f"streaming: {costs}")
        end = conditions.position + left
        first_trial = left > STREAMING_TRIAL_TOKENS and not conditions.ready and self._streaming_trial_end != end
        if first_trial and self._should_try_streaming(comparison):
            self._streaming_trial_end = end
            # Stream all of the rest if that costs less than the exchange that the return to drafting takes.
            own = left if streamed - drafted < comparison.first else STREAMING_TRIAL_TOKENS
            watch = self._should_shadow(comparison, own)
            reason = f"exploring streaming: {costs}"
            return Plan(0, continuation=own, siblings=best.plan.siblings, shadow=watch, reason=reason)
        if comparison.prefill_stream:
            return Plan(
                0,
                continuation=comparison.prefill_stream,
                draft_ahead=1,
                reason=f"streaming during draft prefill: {costs}",
            )
        plan = best.plan
        number = f"{plan.siblings} sibling{'s' if plan.siblings > 1 else ''}"
        siblings = f" with {number} where unsure" if plan.siblings else ""
        ahead = f", {plan.draft_ahead} ahead" if plan.draft_ahead else ""
        return drafting_plan(conditions, plan, f"drafting up to {plan.draft} tokens{siblings}{ahead}: {costs}")

    def _limit_regret(self, plan: Plan, conditions: Conditions, comparison: CostComparison) -> Plan:
        """Return `plan` if what it may lose against streaming fits into the regret budget, else a cheaper one.

        The plan that is returned holds its share of the budget until its outcome is known.
        """
        assert self._prices is not None
        available, new_text = self.regret.available(conditions), self.regret.begins_text(conditions)
        further = comparison.further if self._costs.forward.known else FASTEST_FORWARD_SECONDS * self._unit.forward
        first_forward = self._prices.forward_seconds[0] * self._unit.forward if self._costs.forward.known else further
        # The void round's price is that of the payload: a minimum price and no time.
        further = max(further, MIN_FURTHER_COST)
        exchange = max(0.0, (self._prices.exchange - self._prices.void + first_forward) / further - 1.0)
        reservation = RoundReservation(
            position=conditions.position, time=conditions.now, exchange=exchange, further=further
        )
        if plan.draft:
            for affordable in _cheaper_rounds(plan, comparison.round.tokens):
                cost = self._worst_cost(affordable, conditions, comparison.prefill)
                loss = cost / further - self._costs.least_equivalent(affordable.draft, comparison.tokens_per_forward)
                loss = max(0.0, loss if new_text else loss + exchange)
                if loss <= available:
                    self.regret.reserve(conditions, msgspec.structs.replace(reservation, loss=loss, cost=cost))
                    return affordable
            reason = f"streaming: a drafted round may lose {loss:.1f} tokens, {available:.1f} are left: {plan.reason}"
            watch = self._should_shadow(comparison, comparison.left)
            plan = Plan(0, continuation=comparison.left, siblings=plan.siblings, shadow=watch, reason=reason)
        elif plan.continuation < min(comparison.left, MAX_CONTINUATION_TOKENS):
            loss = exchange if new_text else 2.0 * exchange
            if plan.shadows_stream:
                # The next round waits for the chunk of prefill that is under way.
                chunk = self._costs.prefill_seconds(min(conditions.unread, PREFILL_CHUNK_TOKENS))
                loss += max(self._prices.step, chunk * self._unit.drafting) / further
            if loss <= available:
                reservation = msgspec.structs.replace(reservation, loss=loss)
            else:
                reason = f"streaming: another exchange may lose {loss:.1f} tokens, {available:.1f} are left"
                plan = msgspec.structs.replace(plan, continuation=comparison.left, reason=reason)
        self.regret.reserve(conditions, reservation)
        return plan

    def _worst_cost(self, plan: Plan, conditions: Conditions, prefill: float) -> float:
        """Return the cost of a round of the maximum length, with siblings for every token, on a slow link."""
        prices, costs = self._prices, self._costs
        assert prices is not None
        nodes = min(1 + plan.draft * (1 + plan.siblings), MAX_TREE_NODES)
        slow_link = max(0.0, costs.link_quantile(SLOW_LINK_QUANTILE) - costs.link.forecast(conditions.now))
        # The step that is under way when the reply arrives is finished first.
        steps = max(0, plan.draft - conditions.ready) + (plan.draft_ahead > 0)
        forward = float(prices.forward(nodes))
        cost = prices.exchange + slow_link * prices.flight_second + prefill + steps * prices.step
        return cost + prices.id * (nodes - 1) + prices.forward_second * forward

    def _should_try_drafting(self, comparison: CostComparison, acceptance: AcceptanceModel) -> bool:
        """Return whether to draft some rounds although streaming seems cheaper."""
        best, left = comparison.round, comparison.left
        # After a failed trial, the return to streaming costs an exchange.
        exchange = comparison.first - comparison.further
        loss = comparison.prefill + best.tokens * (best.cost - comparison.further) + exchange
        link_gain = comparison.streamed - comparison.drafted_better_link
        if (1.0 - comparison.link_change) * loss < comparison.link_change * link_gain:
            return True
        # Texts may be easier than estimated. An easier text is easier for a speculative verifier, too.
        per_token = (comparison.drafted - comparison.prefill) / left
        error = per_token * (UNSHARED_ERROR if self._costs.verifier_speculates else 1.0)
        excess = (comparison.drafted - comparison.streamed) / left
        gain = TRIAL_HORIZON_TOKENS * _expected_improvement(excess, acceptance.cost_error * error)
        if comparison.prefill + DRAFTING_TRIAL_TOKENS * excess + exchange < gain:
            return True
        return self._should_explore(loss, comparison.drafted < MAX_EXPLORATION_RATIO * comparison.streamed)

    def _stream_length(self, comparison: CostComparison) -> int:
        """Return how many tokens to stream: all, or as many as until the link is likely to be better again."""
        left, best = comparison.left, comparison.round
        count = comparison.link_seconds * left / max(comparison.streamed, 1e-4)
        if comparison.drafted_better_link < comparison.streamed and count < left - 2 * best.tokens:
            gain = (comparison.streamed - comparison.drafted_better_link) / left * (left - count)
            # The regime has ended by then with probability 1 - 1/e; the return to drafting costs an exchange.
            if 0.63 * gain > comparison.first + comparison.prefill:
                return max(2, int(count))
        return left

    def _should_try_streaming(self, comparison: CostComparison) -> bool:
        """Return whether to stream a few tokens although drafting seems cheaper."""
        count = STREAMING_TRIAL_TOKENS
        loss = comparison.first + (count - 1) * comparison.further - count * comparison.round.cost
        excess = (comparison.streamed - comparison.drafted) / comparison.left
        error = comparison.further - comparison.optimistic_further
        if loss < TRIAL_HORIZON_TOKENS * _expected_improvement(excess, error):
            return True
        return self._should_explore(loss, comparison.streamed < MAX_EXPLORATION_RATIO * comparison.drafted)

    def _should_shadow(self, comparison: CostComparison, count: int) -> bool:
        """Return whether the draft should shadow a stream of `count` tokens."""
        if comparison.drafted > MAX_SHADOW_RATIO * comparison.streamed or self._prices is None:
            return False
        return self._spend_exploration(count * self._prices.step_ahead)

    def _should_explore(self, loss: float, plausible: bool) -> bool:
        """Return whether to try an option without an expected gain.

        Args:
            loss: cost of the trial.
            plausible: whether the option's estimated cost is within `MAX_EXPLORATION_RATIO` of the other one's.
        """
        due = self._rounds_since_exploration > EXPLORATION_INTERVAL_ROUNDS
        if plausible and due and self._spend_exploration(loss):
            self._rounds_since_exploration = 0
            return True
        return False

    def _spend_exploration(self, loss: float) -> bool:
        """Take `loss` from the exploration budget if that suffices."""
        if loss > max(0.0, self._exploration_seconds):
            return False
        self._exploration_seconds -= max(0.0, loss)
        return True


def _cheaper_rounds(plan: Plan, tokens: float) -> Iterator[Plan]:
    """Yield `plan`, the same without siblings, and shorter ones, down to half of the `tokens` that it should yield."""
    yield plan
    shortest = max(1, math.ceil(MIN_YIELD_SHARE * tokens))
    for draft in range(plan.draft, min(plan.draft, shortest) - 1, -1):
        yield msgspec.structs.replace(plan, draft=draft, siblings=0)


def _measured_cost(outcome: Outcome, prices: RoundPrices) -> float:
    """Return the cost of a round at `prices`."""
    seconds = outcome.wait_seconds + outcome.exchange_seconds
    if outcome.prefill_seconds:
        # A stream would have opened the session as well.
        seconds -= outcome.prefill_seconds + max(0.0, outcome.queue_seconds - prices.queue_seconds)
    cost = prices.flight_second * max(0.0, seconds)
    cost += (prices.forward_second - prices.flight_second) * outcome.forward_seconds
    return cost + outcome.draft_seconds * prices.step / prices.step_seconds


def drafting_plan(conditions: Conditions, plan: Plan, reason: str) -> Plan:
    """Return `plan` with its reason, and with all tokens that are drafted already."""
    return msgspec.structs.replace(plan, draft=max(plan.draft, conditions.ready), reason=reason)


def _expected_improvement(excess: float, error: float) -> float:
    """Return the expected improvement per token of trying an option, which is kept only if it turns out to be cheaper.

    With the cost difference d normally distributed around `excess` with the standard deviation `error`, this is
    E[max(0, -d)] = error * (phi(z) + z * Phi(z)) with z = -excess / error: the acquisition function of Bayesian
    optimization (Jones, Schonlau, Welch, 1998).
    """
    if error <= 0.0:
        return 0.0
    z = -excess / error
    return error * (math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) + 0.5 * z * math.erfc(-z / math.sqrt(2.0)))
