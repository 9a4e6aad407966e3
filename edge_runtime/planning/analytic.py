"""The analytic planner: knows what each part of a round costs and what drafts are worth, and takes the cheapest plan.

Before each round it compares two ways to finish the text: leaving it to the cloud (K = 0, n = all that is left), or
drafted rounds at their best cost per token (`search`), for the part of it that runs on by itself and for the rest.
Whichever is used teaches what it costs itself, and mostly what the other would have cost: the draft guesses along while
the cloud speaks (`replay`), and a drafted round says how many forwards its tokens would have taken. Beyond that, the
other is tried where the improvement that may be expected of it, all doubts weighed, is worth more than the trial; and
now and then, as far as the expected loss stays within what exploring may cost. What drafting may lose against the cloud
alone in all is bounded (`stake`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import msgspec

from edge_runtime.planning.acceptance_model import Survival, Survivals
from edge_runtime.planning.acceptance_table import Table
from edge_runtime.planning.cost_calibration import Bias
from edge_runtime.planning.cost_model import FRAME_BYTES, FRAME_SECONDS, ID_BYTES, Costs
from edge_runtime.planning.counterfactual import Way, replay
from edge_runtime.planning.device_model import Device, heat_of
from edge_runtime.planning.energy_budget import Budget, EnergyQueue
from edge_runtime.planning.estimators import WIDEST
from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import Conditions, Outcome, Plan
from edge_runtime.planning.regret_budget import Stake
from edge_runtime.planning.search import Draft, Prices, best_draft

log = logging.getLogger("edge_runtime.planning")

# Own tokens of the very first round, which shows what the link and the verifier cost; and of later trials.
FIRST = 7
TRIAL = 16
# A trial may cost what it gains on so many tokens to come, be it of drafts or of the cloud alone.
HORIZON = 300.0
# Tokens after which a trial of drafts has shown what they are like.
SHOWN = 24.0
# Share of the doubt about drafts that does not concern a verifier's own as well.
SHARED_DOUBT = 0.5
# Share of all time that may be spent on trials without much hope, every so many rounds, of what is not much dearer.
SPARED = 0.004
PAUSE = 24
HOPELESS = 3.0
# The draft guesses along where drafting seems at most so many times dearer than what the cloud is left to.
WATCHED = 1.5
# Least worth of an id's way over the link, so that siblings are not named for nothing.
ID_SECONDS = 2e-5
# And of a byte of a round's own, so that a link of no length is not filled with rounds that hardly save time.
BYTE_SECONDS = 8e-6
# Prices that moved by less than this share leave the last search's result in force.
MOVED = 0.08
# Share of rounds that are faster on the link than what is counted on for drafting ahead.
QUICK = 0.4
# A hot board drafts less: its seconds count more by such a share of what its joules do, because it will be slower soon.
HEAT_SECONDS = 0.25
# Reading that takes less than this is not worth a round of its own.
LEAST_READING = 0.02
# A verifier's forward that nobody has seen is at most this long.
SLOWEST_FORWARD = 0.1
# None takes less, whatever a clock says.
SHORTEST_FORWARD = 1e-6


class Choice(msgspec.Struct, frozen=True):
    """Two ways to finish a text and what they cost, in the objective's seconds.

    Attributes:
        left: tokens to go.
        draft: the best drafted round.
        prefill: of the draft, once.
        reading: tokens to stream while the draft reads, so that nobody waits for it; 0 where it had better read first.
        drafted: all tokens in drafted rounds.
        better: the same once the link is on its better side.
        leaving: the chance that it is there by now.
        stays: how many seconds the link stays as it is.
        first: a streaming round of one token.
        each: every further token of it.
        hoped: the least that this could turn out to be.
        bringing: tokens that a forward of a verifier that speculates brings.
        bias: how many times more drafted rounds cost than their tables say; all of the above is with it.
    """

    left: int
    draft: Draft
    prefill: float
    reading: int
    drafted: float
    better: float
    leaving: float
    stays: float
    first: float
    each: float
    hoped: float
    bringing: float
    bias: float

    @property
    def streamed(self) -> float:
        """All tokens in one streaming round."""
        return self.first + (self.left - 1) * self.each


class AnalyticPlanner:
    """Plans by expected cost. One serves all texts of a process."""

    def __init__(
        self,
        objective: Objective,
        device: Device,
        *,
        acceptance: Mapping[str, float] | None = None,
        budget: Budget | None = None,
    ) -> None:
        """
        Args:
            objective: prices.
            device: the board, as far as it is known.
            acceptance: as in the bundle's manifest.
            budget: of energy.
        """
        self._queue = EnergyQueue(budget, device) if budget else None
        self._objective = objective
        self._device = device
        self._costs = Costs(device)
        self._survivals = Survivals(acceptance or {})
        self._credit = 0.0
        self._since_trial = 0
        self._bias = Bias()
        # Rounds of which it is not clear yet whether the link has changed.
        self._odd: list[tuple[Outcome, Prices, Choice]] = []
        self._changes = 0
        self._stake = Stake()
        self._prices: Prices | None = None
        # The best drafted rounds at these prices, by the tables that they are for.
        self._found = WeakKeyDictionary[Table, Draft]()
        # What was chosen from last, and the end of the text in which the cloud alone was tried last.
        self._choice: Choice | None = None
        self._tried = 0

    def plan(self, conditions: Conditions) -> Plan:
        """The cheapest plan for the rest of the text, as far as anybody knows."""
        self._costs.listen(conditions)
        if self._queue:
            self._queue.advance(conditions.now, conditions.surroundings)
        survival = self._survivals.of(conditions.version, conditions.temperature)
        survival.follow(conditions)
        table = survival.table()
        choice = self._choice = self._choose(conditions, table, survival)
        plan = self._decide(conditions, choice, table, survival)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "K=%d n=%d: %.1f ms a token drafted, %.1f streamed, %d left, %.0f tokens to lose: %s",
                plan.draft, plan.own, 1e3 * choice.drafted / choice.left, 1e3 * choice.streamed / choice.left,
                choice.left, self._stake.tokens, plan.reason,
            )  # fmt: skip
        return plan

    def observe(self, outcome: Outcome) -> None:
        """Learns from a round."""
        conditions = outcome.conditions
        survival = self._survivals.of(conditions.version, conditions.temperature)
        self._costs.observe(outcome, survival.speculated(conditions.left))
        if self._queue:
            self._queue.observe(outcome, self._costs.joules_of(outcome))
        if outcome.watched and self._prices is not None:
            self._replay(outcome, survival, self._prices)
        survival.observe(outcome)
        self._since_trial += 1
        if self._prices is not None and self._choice is not None:
            self._observe_cost(outcome, self._prices, self._choice)
        self._credit += SPARED * (outcome.draft_seconds + outcome.exchange_seconds)

    def _choose(self, conditions: Conditions, table: Table, survival: Survival) -> Choice:
        """Both ways to go on, at today's prices."""
        costs, device, objective = self._costs, self._device, self._objective
        second = objective.latency + objective.joule * device.idle_watts
        joule = objective.joule
        if self._queue:
            second, scarce = self._queue.waiting(second)
            joule += scarce
        on_air = second + joule * device.radio_watts
        heat = heat_of(conditions.surroundings)
        drafting = second * (1.0 + HEAT_SECONDS * (heat - 1.0)) + joule * (device.busy_watts - device.idle_watts) * heat
        worked = on_air + objective.verifier
        byte = objective.byte + joule * device.joules_per_byte
        single = costs.forward.at(1.0) if costs.forward.known else SLOWEST_FORWARD
        link = costs.link.at(conditions.now)
        exchange = (link + costs.queue.value) * on_air + device.overhead_seconds * second
        exchange += costs.round_bytes.value * (byte + BYTE_SECONDS * second)
        step = costs.step_seconds(conditions.position)
        widths, forwards = costs.forward.knots if costs.forward.known else ([1.0, WIDEST], [single, 2.0 * single])
        prices = Prices(
            exchange=exchange,
            step=step * drafting,
            identity=ID_BYTES * byte + ID_SECONDS * second,
            second=on_air,
            worked=worked,
            ahead=step * (drafting - second),
            void=costs.round_bytes.value * (byte + BYTE_SECONDS * second),
            step_seconds=step,
            flight_seconds=min(costs.link_quantile(QUICK), link) + single,
            overhead_seconds=device.overhead_seconds,
            queue_seconds=costs.queue.value,
            widths=widths,
            forwards=forwards,
        )
        if self._prices is None or not prices.near(self._prices, MOVED):
            self._found.clear()
            self._prices = prices
        draft = self._search(table, prices)
        # The rest of the text will run on for a part of it.
        share = survival.running(conditions.left)
        fresh, running = (self._search(one, prices).cost for one in (survival.fresh_table(), survival.running_table()))
        drafting_on = share * running + (1.0 - share) * fresh
        if costs.speculates:
            # A verifier with the same draft shows what that is worth, for as long as the board has seen little of it.
            drafting_on /= 1.0 + (costs.brings.value - 1.0) * survival.unsure
        bringing = survival.speculated(conditions.left)
        own = max(costs.own_seconds(bringing), SHORTEST_FORWARD) if costs.forward.known else SLOWEST_FORWARD
        framed = FRAME_BYTES * byte / max(1.0, FRAME_SECONDS / own) + ID_BYTES * byte
        prefill = costs.prefill_seconds(conditions.unread) * drafting
        # Most of the rounds will come later, when the link may be what it usually is.
        left = conditions.left
        later = costs.link.at(conditions.now + 0.5 * left * min(drafting_on, own * worked))
        bias = self._bias.factor(draft.cost * draft.tokens)
        each = drafting_on * bias + (later - link) * on_air / draft.chained
        # A text's last round yields more than is left, by half a round on average.
        rounds = left + 0.5 * (draft.tokens - 1.0)
        better = each - max(0.0, later - costs.link.other) * on_air / draft.chained
        first, further = exchange + single * worked, own * worked + framed
        drafted, reading = prefill + each * rounds, 0
        if not conditions.ready and costs.prefill_seconds(conditions.unread) > LEAST_READING:
            # What the board reads during a stream it need not read later, but for the tokens that are streamed.
            count = 1 + int(max(0.0, prefill - first) / further)
            later = costs.prefill_seconds(count + 1) * drafting
            beside = first + (count - 1) * further + later + each * (rounds - count)
            if count < left // 2 and beside < 0.99 * drafted:
                drafted, reading = beside, count
        return Choice(
            left=left,
            draft=draft,
            prefill=prefill,
            reading=reading,
            drafted=drafted,
            better=drafted + (better - each) * rounds,
            leaving=1.0 - costs.link.still(conditions.now),
            stays=costs.link.stays,
            first=first,
            each=further,
            hoped=costs.own_hoped(bringing) * worked + framed,
            bringing=bringing,
            bias=bias,
        )

    def _observe_cost(self, outcome: Outcome, prices: Prices, choice: Choice) -> None:
        """Compares what a round cost with what it was to cost, and with what the cloud alone would have."""
        link = self._costs.link.now
        if link.changes > self._changes:
            # What was told, and chosen, was of another link.
            self._changes = link.changes
            self._odd.clear()
        self._odd.append((outcome, prices, choice))
        if link.doubtful:
            return
        for outcome, prices, choice in self._odd:
            cost = prices.second * outcome.exchange_seconds + (prices.worked - prices.second) * outcome.forward_seconds
            cost += outcome.draft_seconds * prices.step / prices.step_seconds
            worth = self._costs.streamed(outcome, choice.bringing)
            self._stake.observe(outcome, worth, cost, choice.first, choice.each)
            if outcome.drafted and not outcome.repeated:
                self._bias.observe(cost - choice.prefill, choice.draft.cost * outcome.tokens)
            elif not outcome.drafted and not outcome.watched:
                self._bias.fade(outcome.tokens)
        self._odd.clear()

    def _replay(self, outcome: Outcome, survival: Survival, prices: Prices) -> None:
        """What drafted rounds would have cost where the cloud alone was left to it."""
        fresh, running = (
            Way(self._search(table, prices), table) for table in (survival.fresh_table(), survival.running_table())
        )
        played = replay(outcome.watched, survival.streak, fresh, running, prices)
        if played.tokens:
            survival.run_on(played.running * len(outcome.watched) / played.tokens)
            self._bias.watch(played.tokens, played.cost, played.told)

    def _search(self, table: Table, prices: Prices) -> Draft:
        """The best drafted round, from the last search where nothing has moved."""
        draft = self._found.get(table)
        if draft is None:
            draft = self._found[table] = best_draft(table, prices)
        return draft

    def _decide(self, conditions: Conditions, choice: Choice, table: Table, survival: Survival) -> Plan:
        left, draft = choice.left, choice.draft
        streamed, drafted = choice.streamed, choice.drafted * self._stake.doubt
        told = f"{1e3 * drafted / left:.0f} ms a token drafted, {1e3 * streamed / left:.0f} streamed"
        if not self._costs.forward.known:
            if left <= FIRST or streamed < drafted:
                return Plan(0, own=left, reason="drafting would not pay with any verifier")
            return Plan(0, own=FIRST, reason="nothing is known of link and verifier yet")
        if left < 2 or streamed <= drafted:
            if left > 2 * draft.tokens and self._stake.tokens > 0.0 and self._worth_drafting(choice, survival):
                return self._plan(conditions, draft, table, f"trying a draft: {told}")
            own = self._stretch(choice)
            watch = self._worth_watching(choice, own)
            return Plan(0, own=own, siblings=draft.siblings, watch=watch, reason=f"the cloud alone: {told}")
        end = conditions.position + left
        if left > TRIAL and not conditions.ready and self._tried != end and self._worth_streaming(choice):
            self._tried = end
            # Where that is hardly dearer, all of the rest: to come back costs an exchange.
            own = left if streamed - drafted < choice.first else TRIAL
            return Plan(0, own=own, reason=f"trying the cloud alone: {told}")
        if choice.reading:
            return Plan(0, own=choice.reading, ahead=1, reason=f"the cloud alone while the draft reads: {told}")
        beside = f" and {draft.siblings} siblings where unsure" if draft.siblings else ""
        ahead = f", {draft.ahead} ahead" if draft.ahead else ""
        return self._plan(conditions, draft, table, f"{draft.length} tokens{beside}{ahead}: {told}")

    def _worth_drafting(self, choice: Choice, survival: Survival) -> bool:
        """Whether to draft some rounds although streaming seems cheaper."""
        draft, left = choice.draft, choice.left
        # If it is not, going back to streaming costs an exchange.
        back = choice.first - choice.each
        loss = choice.prefill + draft.tokens * (draft.cost - choice.each) + back
        if (1.0 - choice.leaving) * loss < choice.leaving * (choice.streamed - choice.better):
            return True
        # An easier text than expected is easier for a verifier that speculates, too.
        each = (choice.drafted - choice.prefill) / left * (SHARED_DOUBT if self._costs.speculates else 1.0)
        dearer = (choice.drafted - choice.streamed) / left
        # Texts may be easier than was learned.
        if choice.prefill + SHOWN * dearer + back < HORIZON * _hope(dearer, survival.doubt * each):
            return True
        return self._worth_a_while(loss, choice.drafted < HOPELESS * choice.streamed)

    def _stretch(self, choice: Choice) -> int:
        """How many tokens to stream: all, or until the link is likely to be better again."""
        left, draft = choice.left, choice.draft
        count = choice.stays * choice.left / max(choice.streamed, 1e-4)
        if choice.better < choice.streamed and count < left - 2 * draft.tokens:
            gain = (choice.streamed - choice.better) / left * (left - count)
            # Two in three that it is by then; coming back costs an exchange.
            if 0.63 * gain > choice.first + choice.prefill:
                return max(2, int(count))
        return left

    def _worth_streaming(self, choice: Choice) -> bool:
        """Whether to stream a few tokens although drafting seems cheaper."""
        loss = choice.first + (TRIAL - 1) * choice.each - TRIAL * choice.draft.cost
        dearer = (choice.streamed - choice.drafted) / choice.left
        if loss < HORIZON * _hope(dearer, choice.each - choice.hoped):
            return True
        return self._worth_a_while(loss, choice.streamed < HOPELESS * choice.drafted)

    def _worth_watching(self, choice: Choice, count: int) -> bool:
        """Whether the draft should guess along with `count` tokens of the cloud's own."""
        if choice.drafted > WATCHED * choice.streamed or self._prices is None:
            return False
        return self._spend(count * self._prices.ahead)

    def _spend(self, loss: float) -> bool:
        """Takes `loss` from what may be spent on trials, if there is so much."""
        if loss > max(0.0, self._credit):
            return False
        self._credit -= max(0.0, loss)
        return True

    def _worth_a_while(self, loss: float, thinkable: bool) -> bool:
        """Whether to try for once in a while what would cost `loss`."""
        if thinkable and self._since_trial > PAUSE and self._spend(loss):
            self._since_trial = 0
            return True
        return False

    def _plan(self, conditions: Conditions, draft: Draft, table: Table, reason: str) -> Plan:
        return Plan(
            max(draft.length, conditions.ready),
            siblings=draft.siblings,
            sibling_confidence=draft.sibling_confidence,
            min_survival=draft.survival,
            calibration=table.calibration,
            ahead=draft.ahead,
            in_flight=draft.in_flight,
            reason=reason,
        )


def _hope(dearer: float, spread: float) -> float:
    """What is gained per token by trying what seems to cost `dearer` more, give or take `spread`, and is kept only if
    it does not: the expected improvement under a normal distribution."""
    if spread <= 0.0:
        return 0.0
    z = -dearer / spread
    return spread * (math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) + 0.5 * z * math.erfc(-z / math.sqrt(2.0)))
