"""The planner's interface: the conditions before a round, the plan, and the outcome that the planner learns from."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

# What a generation does while no verifier can be reached; see `decoding.Generation`.
OnLinkLoss = Literal["wait", "draft", "fail"]

# Shadow drafting: the draft model's prediction for one token that the verifier streamed, as (confidence in its first
# guess, rank of the streamed token among its candidates). Rank 0: the guess was right; r: the r-th sibling was right;
# UNRANKED: none of the candidates that were looked at.
ShadowGuess = tuple[float, int]
UNRANKED = 255


class Plan(msgspec.Struct, frozen=True):
    """One round's decision.

    Attributes:
        draft: K, the maximum number of tokens to draft on the board; 0 leaves the round to the cloud.
        continuation: n, the number of tokens that the target generates after the accepted ones, at least 1.
        siblings: alternative candidates to send along with a draft token.
        sibling_confidence: send siblings only with tokens of at most this draft probability: a token that the draft is
            sure of is nearly always accepted, and sibling ids cost bytes and verifier width.
        min_confidence: stop drafting after a token whose draft probability is below this.
        min_survival: stop drafting after a token at which the prefix survival (the probability that all tokens up to
            it are accepted, the product of their calibrated confidences) is below this.
        calibration: acceptance probability by confidence, in equal bins of [0, 1]; empty: the confidence itself.
        draft_ahead: while the round is in flight, guess the target's own token and draft this many tokens after it;
            only with continuation = 1. 0 drafts nothing ahead, not even the guess. With draft = 0, any other value lets
            the draft model prefill the text meanwhile, so that it is up to date when it is needed.
        in_flight: maximum number of rounds in flight. With 2, the next round is sent as soon as its tokens have been
            drafted ahead, before the first is answered; it is void unless the first comes out as guessed.
        shadow: with draft = 0, run the draft in shadow: it reads the streamed text and predicts each of the target's
            tokens once that token has arrived, with `siblings` alternatives, to measure what drafting would achieve.
            No reply waits for it.
        reason: short explanation for logs and events.
    """

    draft: int
    continuation: int = 1
    siblings: int = 0
    sibling_confidence: float = 0.8
    min_confidence: float = 0.0
    min_survival: float = 0.0
    calibration: tuple[float, ...] = ()
    draft_ahead: int = 0
    in_flight: int = 1
    shadow: bool = False
    reason: str = ""

    @property
    def drafts_ahead(self) -> bool:
        """Whether the board guesses the bonus token and drafts the next round's tokens while this one is in flight."""
        return self.draft > 0 and self.draft_ahead > 0 and self.continuation == 1

    @property
    def shadows_stream(self) -> bool:
        """Whether the draft model prefills the text, and with `shadow` predicts it, while the cloud generates."""
        return not self.draft and (self.draft_ahead > 0 or self.shadow)


def calibrated_acceptance(confidence: float, calibration: tuple[float, ...]) -> float:
    """Return the acceptance probability of a draft token of this confidence (see `Plan.calibration`)."""
    if not calibration:
        return confidence
    return calibration[min(int(confidence * len(calibration)), len(calibration) - 1)]


def apply_stop_rule(plan: Plan, survival: float, confidence: float) -> tuple[float, bool]:
    """Extend a draft by one token: return its new prefix survival, and whether drafting stops after this token.

    Args:
        survival: prefix survival before the token.
        confidence: draft probability of the token.
    """
    survival *= calibrated_acceptance(confidence, plan.calibration)
    return survival, confidence < plan.min_confidence or survival < plan.min_survival


class Surroundings(msgspec.Struct, frozen=True):
    """Probe readings of the board and its link; None if the board has no such sensor.

    Attributes:
        rtt_seconds: the kernel's smoothed round-trip time of the connection in use.
        joules_left: energy left in the battery.
        watts: current power draw of the board.
        on_battery: whether the board runs on battery.
        throttled: whether the board is throttled because of heat or low voltage.
        celsius: processor temperature.
        metered: whether traffic on this link is billed by volume.
        battery_percent: charge of the batteries; not used for planning.
    """

    rtt_seconds: float | None = None
    joules_left: float | None = None
    watts: float | None = None
    on_battery: bool | None = None
    throttled: bool | None = None
    celsius: float | None = None
    metered: bool | None = None
    battery_percent: float | None = None


class Conditions(msgspec.Struct, frozen=True):
    """The state that a planner decides on before a round.

    Attributes:
        left: maximum number of tokens that may still be generated, at least 1.
        position: length of the text in tokens, prompt included.
        unread: tokens of the text that the draft model still has to prefill before it can draft.
        ready: tokens that were drafted ahead and are still valid.
        now: seconds on a monotonic clock.
        version: exact target version; empty before the first reply.
        temperature: sampling temperature.
        surroundings: probe readings.
    """

    left: int
    position: int
    unread: int
    ready: int = 0
    now: float = 0.0
    version: str = ""
    temperature: float = 0.0
    surroundings: Surroundings = Surroundings()


class Outcome(msgspec.Struct, frozen=True):
    """The result of one round; times in seconds.

    Attributes:
        conditions: the conditions that the plan was made for.
        accepted: number of draft tokens that the target accepted.
        own_tokens: tokens that the target generated itself; after a sibling hit one more than the plan asked for.
        confidences: the draft probability of each draft token, in order.
        offered: number of siblings sent with each draft token.
        sibling: which sibling of the first rejected token the target chose, from 1; 0 for none.
        ready: draft tokens that had been drafted ahead.
        wait_seconds: waiting before the round for a step of the draft model that shadow drafting had begun.
        draft_seconds: drafting what was not ready, including prefill of the tokens received since the last draft.
        first_seconds: from sending the round to its first tokens.
        exchange_seconds: from sending the round to its last token.
        queue_seconds, forward_seconds: waiting and forward time within these, as reported by the verifier.
        prefill_seconds: prefill time that the verifier reports when the session was opened.
        ahead_seconds: drafting ahead, shadow drafting or prefill while the round was in flight.
        further_forwards: verifier forwards after the first, for the target's further own tokens.
        shadow_guesses: for the first of these tokens (see `Plan.shadow`).
        sent, received: TCP payload bytes.
        repeated: whether the round was retried or moved to a new connection; its times then do not measure the link.
        early: whether it was sent before the previous round was answered. Its times count from that answer and do not
            measure the link either.
    """

    plan: Plan
    conditions: Conditions
    accepted: int = 0
    own_tokens: int = 0
    confidences: list[float] = []
    offered: list[int] = []
    sibling: int = 0
    ready: int = 0
    draft_seconds: float = 0.0
    first_seconds: float = 0.0
    exchange_seconds: float = 0.0
    queue_seconds: float = 0.0
    forward_seconds: float = 0.0
    sent: int = 0
    received: int = 0
    repeated: bool = False
    early: bool = False
    prefill_seconds: float = 0.0
    ahead_seconds: float = 0.0
    further_forwards: int = 0
    shadow_guesses: list[ShadowGuess] = []
    wait_seconds: float = 0.0

    @property
    def drafted(self) -> int:
        """Number of draft tokens in the round."""
        return len(self.confidences)

    @property
    def nodes(self) -> int:
        """Number of tree nodes in the round's verification forward."""
        return 1 + self.drafted + sum(self.offered)

    @property
    def tokens(self) -> int:
        """Number of tokens that the round added to the text."""
        return self.accepted + self.own_tokens

    @property
    def verifier_seconds(self) -> float:
        """Queue, prefill and forward time, as reported by the verifier."""
        return self.queue_seconds + self.prefill_seconds + self.forward_seconds


class Planner(Protocol):
    """Plans each round and learns from its outcome.

    One planner serves all generations of a process, so that what it learns from one text applies to the next. Rounds of
    several generations may interleave; each outcome carries the plan that it belongs to. All calls come from the event
    loop's thread.
    """

    def plan(self, conditions: Conditions) -> Plan:
        """Return the next round's plan."""

    def observe(self, outcome: Outcome) -> None:
        """Learn from the outcome of a round."""


FIXED_PLAN = Plan(draft=5, continuation=1, siblings=2, reason="fixed")


class FixedPlanner:
    """A planner that returns the same plan every round and learns nothing."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self, conditions: Conditions) -> Plan:
        return self._plan

    def observe(self, outcome: Outcome) -> None:
        pass
