"""What a planner decides, what it is told before, and what it learns from afterwards."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

# What an answer does without a verifier; see `decoding.Generation`.
OnLinkLoss = Literal["wait", "draft", "fail"]
# A token of the cloud's own that the draft guessed meanwhile: its confidence in its guess, and which of its candidates
# the token was: 0 the guess itself, r the r-th sibling, UNNAMED none that was looked at.
Watched = tuple[float, int]
UNNAMED = 255


class Plan(msgspec.Struct, frozen=True):
    """One round's decision.

    Attributes:
        draft: K, the most tokens to draft on the board; 0 leaves the round to the cloud.
        own: n, tokens that the target says by itself behind the accepted ones, at least 1.
        siblings: alternatives to name beside a draft token.
        sibling_confidence: name them beside tokens of at most this probability: a token that the draft is sure of is
            accepted nearly always, and ids cost bytes and verifier width.
        min_confidence: stop drafting behind a token whose probability is below this.
        min_survival: stop drafting behind a token where the chance that all tokens up to it are accepted, the product
            of their calibrated confidences, is below this.
        calibration: chance of being accepted by confidence, in equal bins of [0, 1]; empty: the confidence itself.
        ahead: while the round is in flight, guess the target's own token and draft this many behind it; only with
            own = 1. 0 drafts nothing ahead, not even the guess. Where draft = 0 too, any other number lets the draft
            read the text meanwhile, so that it need not do so when it is wanted.
        watch: where draft = 0, let the draft read the text meanwhile and guess each of the target's tokens when it is
            there, with `siblings` alternatives, for what drafting would be worth. Nobody waits for it.
        in_flight: most rounds on their way at once; the second is sent when what was drafted ahead is ready before
            the first is answered, and is void unless the first came out as guessed.
        reason: why, in a few words.
    """

    draft: int
    own: int = 1
    siblings: int = 0
    sibling_confidence: float = 0.8
    min_confidence: float = 0.0
    min_survival: float = 0.0
    calibration: tuple[float, ...] = ()
    ahead: int = 0
    in_flight: int = 1
    watch: bool = False
    reason: str = ""


def calibrated(confidence: float, calibration: tuple[float, ...]) -> float:
    """The chance that a token of this confidence is accepted (see `Plan.calibration`)."""
    if not calibration:
        return confidence
    return calibration[min(int(confidence * len(calibration)), len(calibration) - 1)]


class Surroundings(msgspec.Struct, frozen=True):
    """What the probes know; None where this board has no such sensor.

    Attributes:
        rtt_seconds: smoothed round-trip time of the connection in use, as the kernel measures it.
        joules_left: in the battery.
        watts: what the board draws now.
        on_battery: whether it lives on what is in the battery.
        throttled: whether the board runs slower than it could, for heat or voltage.
        celsius: temperature of the processor.
        metered: whether bytes on this link are paid for.
        battery_percent: charge of the batteries; nothing is planned by it.
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
    """What a planner is told before a round.

    Attributes:
        left: tokens that the text may still grow by, at least 1.
        position: tokens in the text, prompt included.
        unread: how many of these the draft has yet to read before it can draft.
        ready: tokens that were drafted ahead and are still good.
        now: seconds on a clock that only goes forward.
        version: exact target version; empty before the first answer.
        temperature: of the sampling.
        surroundings: from the probes.
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
    """What one round came to; times in seconds.

    Attributes:
        plan: what was planned.
        conditions: what the plan was made for.
        accepted: how many drafted tokens the target accepted.
        own: tokens that the target said itself; with a sibling hit one more than it was asked for.
        confidences: the draft's probability of each drafted token, in order: one for each.
        offered: for each drafted token, how many siblings were named beside it.
        sibling: which sibling of the first rejected token was the target's, from 1; 0 if none was.
        ready: how many of the drafted tokens had been drafted ahead.
        draft_seconds: drafting what was not ready, and prefilling what the cloud had sent.
        first_seconds: from sending the round to its first tokens.
        exchange_seconds: from sending the round to its last.
        queue_seconds, forward_seconds: of these, what the verifier reports for waiting and for its forwards.
        prefill_seconds: and for reading the text, when the session was opened.
        ahead_seconds: drafting ahead, or reading, while the round was in flight.
        further: forwards of the verifier behind the first, for the further tokens of its own.
        watched: what the draft made of the first so many of these, where it was to watch (see `Plan.watch`).
        sent, received: TCP payload bytes.
        repeated: whether the round was sent more than once, or over a new connection, so that its times say nothing of
            the link.
        early: whether it was sent before the last one was answered. Its times count from that answer on and say
            nothing of the link either.
    """

    plan: Plan
    conditions: Conditions
    accepted: int
    own: int
    confidences: list[float]
    offered: list[int]
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
    further: int = 0
    watched: list[Watched] = []

    @property
    def drafted(self) -> int:
        """Tokens that were drafted."""
        return len(self.confidences)

    @property
    def tokens(self) -> int:
        """Tokens that the text grew by."""
        return self.accepted + self.own

    @property
    def verifier_seconds(self) -> float:
        """Queue, prefill and forwards, as the verifier reports them."""
        return self.queue_seconds + self.prefill_seconds + self.forward_seconds


class Planner(Protocol):
    """Decides before every round and hears afterwards what came of it.

    One planner serves all texts of a process, so that what one text taught is known to the next. Rounds of several
    texts may interleave; an outcome says itself which plan it came from. Calls come from the event loop only.
    """

    def plan(self, conditions: Conditions) -> Plan:
        """The next round's plan."""

    def observe(self, outcome: Outcome) -> None:
        """What a plan came to."""


FIXED = Plan(draft=5, own=1, siblings=2, reason="fixed")


class FixedPlanner:
    """The same plan every round."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self, conditions: Conditions) -> Plan:
        return self._plan

    def observe(self, outcome: Outcome) -> None:
        """Learns nothing."""
