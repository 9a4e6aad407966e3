"""Published speculation policies, adapted to rounds over a link: baselines for the analytic planner.

Each policy chooses K alone, with n = 1. All send siblings as the fixed plan does, so that they differ only in K.
"""

from __future__ import annotations

import math

import msgspec

from edge_runtime.planning.objective import Objective
from edge_runtime.planning.plan import Conditions, Outcome, Plan

SIBLINGS = 2
MAX_LENGTH = 24


class HuggingFacePlanner:
    """The dynamic schedule of assisted generation in transformers: `num_assistant_tokens_schedule="heuristic"`.

    Starts with 20 tokens; adds two after a round in which all draft tokens were accepted and subtracts one otherwise. A
    draft also stops after a token with a probability below 0.4.
    """

    def __init__(self) -> None:
        self._length = 20

    def plan(self, conditions: Conditions) -> Plan:
        return Plan(self._length, siblings=SIBLINGS, min_confidence=0.4, reason="hf-dynamic")

    def observe(self, outcome: Outcome) -> None:
        if outcome.accepted == outcome.drafted:
            self._length = min(self._length + 2, MAX_LENGTH)
        else:
            self._length = max(self._length - 1, 1)


class ThroughputPlanner:
    """The controller of K in onnxruntime-genai: hill climbing on tokens per second.

    Keeps a moving average of tokens per second for each K with a weight of 0.25 for the newest round. From the current
    K it probes K + 1 and K - 1 in turn; a probe that reaches 97 % of the best average becomes the new K, and one below
    80 % ends at once. After three rounds without an accepted token it drafts a single token for a few rounds.
    """

    EWMA_WEIGHT = 0.25
    KEEP_SHARE, REJECT_SHARE = 0.97, 0.80
    SETTLED_ROUNDS, PROBE_ROUNDS = 8, 4
    EMPTY_ROUNDS, COOLDOWN_ROUNDS = 3, 8

    def __init__(self) -> None:
        self._rates: dict[int, float] = {}
        self._length = 4
        self._probe = 0
        self._rounds = 0
        self._upwards = True
        self._empty = 0
        self._cooldown = 0

    def plan(self, conditions: Conditions) -> Plan:
        if self._cooldown:
            return Plan(1, siblings=SIBLINGS, reason="genai-ewma: cooldown")
        if self._probe:
            return Plan(self._probe, siblings=SIBLINGS, reason="genai-ewma: probing")
        return Plan(self._length, siblings=SIBLINGS, reason="genai-ewma")

    def observe(self, outcome: Outcome) -> None:
        if self._cooldown:
            self._cooldown -= 1
            return
        self._empty = 0 if outcome.accepted else self._empty + 1
        if self._empty >= self.EMPTY_ROUNDS:
            self._empty, self._cooldown, self._probe, self._rounds = 0, self.COOLDOWN_ROUNDS, 0, 0
            return
        seconds = outcome.draft_seconds + outcome.exchange_seconds
        length = outcome.plan.draft
        # Drafts cut short by the end of the text are not representative of K.
        if seconds <= 0.0 or outcome.conditions.left <= length:
            return
        rate = outcome.tokens / seconds
        before = self._rates.get(length, rate)
        self._rates[length] = before + self.EWMA_WEIGHT * (rate - before)
        if length == (self._probe or self._length):
            self._rounds += 1
            self._climb()

    def _climb(self) -> None:
        best = max(self._rates.values())
        if not self._probe:
            if self._rounds >= self.SETTLED_ROUNDS:
                step = 1 if self._upwards or self._length == 1 else -1
                self._probe, self._rounds = min(self._length + step, MAX_LENGTH), 0
            return
        rate = self._rates[self._probe]
        if self._rounds >= self.PROBE_ROUNDS and rate >= self.KEEP_SHARE * best:
            # The probe succeeded; the next one continues in the same direction.
            self._length, self._probe, self._rounds = self._probe, 0, 0
        elif self._rounds >= self.PROBE_ROUNDS or rate < self.REJECT_SHARE * best:
            self._probe, self._rounds, self._upwards = 0, 0, not self._upwards


class _Arm(msgspec.Struct):
    """Totals of one draft length."""

    rounds: int = 0
    tokens: float = 0.0
    cost: float = 0.0


class BanditPlanner:
    """Draft lengths as the arms of a bandit: chooses by the upper confidence bound of tokens per cost (UCB1).

    In the manner of UCB-SpecStop; every K is tried once, then the optimistic estimate decides. Costs are latency and
    verifier time at the objective's prices, as reported by rounds.
    """

    LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
    EXPLORATION = 0.25

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._arms = {length: _Arm() for length in self.LENGTHS}
        self._rounds = 0

    def plan(self, conditions: Conditions) -> Plan:
        # Start from the middle, because both ends are the least likely to be best.
        untried = [length for length, arm in self._arms.items() if not arm.rounds]
        if untried:
            length = min(untried, key=lambda length: abs(length - 4))
            return Plan(length, siblings=SIBLINGS, reason="ucb: not tried yet")
        length = max(self._arms, key=lambda length: self._upper_bound(self._arms[length]))
        return Plan(length, siblings=SIBLINGS, reason="ucb")

    def observe(self, outcome: Outcome) -> None:
        length = outcome.plan.draft
        if length not in self._arms or outcome.conditions.left <= length:
            return
        seconds = outcome.draft_seconds + outcome.exchange_seconds
        arm = self._arms[length]
        arm.rounds += 1
        arm.tokens += outcome.tokens
        arm.cost += self._objective.cost(seconds, outcome.forward_seconds, 0.0, 0.0)
        self._rounds += 1

    def _upper_bound(self, arm: _Arm) -> float:
        rate = arm.tokens / max(arm.cost, 1e-9)
        return rate * (1.0 + self.EXPLORATION * math.sqrt(2.0 * math.log(self._rounds) / arm.rounds))
