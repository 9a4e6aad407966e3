"""Other people's policies, as far as they carry over to rounds over a link: what the analytic planner is compared with.

Each decides K alone; n = 1 always. Siblings are named as the fixed plan names them, so that only K makes a difference.
"""

from __future__ import annotations

import math

import msgspec

from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import Conditions, Outcome, Plan

SIBLINGS = 2
LONGEST = 24


class HuggingFacePlanner:
    """The dynamic schedule of assisted generation in transformers: `num_assistant_tokens_schedule="heuristic"`.

    Starts with 20 tokens, two more behind a round whose draft was all accepted, one less otherwise; a draft also stops
    behind a token of less than 0.4.
    """

    def __init__(self) -> None:
        self._count = 20

    def plan(self, conditions: Conditions) -> Plan:
        return Plan(self._count, siblings=SIBLINGS, min_confidence=0.4, reason="hf-dynamic")

    def observe(self, outcome: Outcome) -> None:
        if outcome.accepted == outcome.drafted:
            self._count = min(self._count + 2, LONGEST)
        else:
            self._count = max(self._count - 1, 1)


class ThroughputPlanner:
    """The controller of K in onnxruntime-genai: climbs the hill of tokens per second.

    Keeps a running mean of tokens per second for each K, 0.25 of it the newest. From a settled K it probes K + 1 and
    K - 1 in turn; a probe that reaches 97 % of the best becomes the new K, one below 80 % is given up at once. Behind
    three rounds without an accepted token it drafts one token only for a while.
    """

    SHARE = 0.25
    KEEP, REJECT = 0.97, 0.80
    SETTLED_ROUNDS, PROBE_ROUNDS = 8, 4
    EMPTY_ROUNDS, COOLING_ROUNDS = 3, 8

    def __init__(self) -> None:
        self._rates: dict[int, float] = {}
        self._count = 4
        self._probe = 0
        self._rounds = 0
        self._upwards = True
        self._empty = 0
        self._cooling = 0

    def plan(self, conditions: Conditions) -> Plan:
        if self._cooling:
            return Plan(1, siblings=SIBLINGS, reason="genai-ewma: cooling down")
        if self._probe:
            return Plan(self._probe, siblings=SIBLINGS, reason="genai-ewma: probing")
        return Plan(self._count, siblings=SIBLINGS, reason="genai-ewma")

    def observe(self, outcome: Outcome) -> None:
        if self._cooling:
            self._cooling -= 1
            return
        self._empty = 0 if outcome.accepted else self._empty + 1
        if self._empty >= self.EMPTY_ROUNDS:
            self._empty, self._cooling, self._probe, self._rounds = 0, self.COOLING_ROUNDS, 0, 0
            return
        seconds = outcome.draft_seconds + outcome.exchange_seconds
        count = outcome.plan.draft
        # The end of a text cuts drafts short, which says nothing of K.
        if seconds <= 0.0 or outcome.conditions.left <= count:
            return
        rate = outcome.tokens / seconds
        before = self._rates.get(count, rate)
        self._rates[count] = before + self.SHARE * (rate - before)
        if count == (self._probe or self._count):
            self._rounds += 1
            self._climb()

    def _climb(self) -> None:
        best = max(self._rates.values())
        if not self._probe:
            if self._rounds >= self.SETTLED_ROUNDS:
                step = 1 if self._upwards or self._count == 1 else -1
                self._probe, self._rounds = min(self._count + step, LONGEST), 0
            return
        rate = self._rates[self._probe]
        if self._rounds >= self.PROBE_ROUNDS and rate >= self.KEEP * best:
            # Went well: on in the same direction.
            self._count, self._probe, self._rounds = self._probe, 0, 0
        elif self._rounds >= self.PROBE_ROUNDS or rate < self.REJECT * best:
            self._probe, self._rounds, self._upwards = 0, 0, not self._upwards


class _Arm(msgspec.Struct):
    """What one K has come to: rounds, tokens, and cost."""

    rounds: int = 0
    tokens: float = 0.0
    cost: float = 0.0


class BanditPlanner:
    """Draft lengths as a bandit's arms: the one whose tokens per cost could be highest (UCB1 on the ratio).

    In the manner of UCB-SpecStop; every K is tried once, then the optimistic estimate decides. Costs are latency and
    the verifier's time at the objective's prices, as rounds report them.
    """

    LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
    WIDTH = 0.25

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._arms = {count: _Arm() for count in self.LENGTHS}
        self._rounds = 0

    def plan(self, conditions: Conditions) -> Plan:
        # The middle first: both ends are the least likely to be right.
        untried = [count for count, arm in self._arms.items() if not arm.rounds]
        if untried:
            return Plan(min(untried, key=lambda count: abs(count - 4)), siblings=SIBLINGS, reason="ucb: not tried yet")
        wide = math.log(self._rounds)
        count = max(self._arms, key=lambda count: self._hoped(self._arms[count], wide))
        return Plan(count, siblings=SIBLINGS, reason="ucb")

    def observe(self, outcome: Outcome) -> None:
        count = outcome.plan.draft
        if count not in self._arms or outcome.conditions.left <= count:
            return
        seconds = outcome.draft_seconds + outcome.exchange_seconds
        arm = self._arms[count]
        arm.rounds += 1
        arm.tokens += outcome.tokens
        arm.cost += self._objective.cost(seconds, outcome.forward_seconds, 0.0, 0.0)
        self._rounds += 1

    def _hoped(self, arm: _Arm, wide: float) -> float:
        rate = arm.tokens / max(arm.cost, 1e-9)
        return rate * (1.0 + self.WIDTH * math.sqrt(2.0 * wide / arm.rounds))
