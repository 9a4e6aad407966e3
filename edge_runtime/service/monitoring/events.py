"""The events of `GET /events`, one struct per type.

The type of an event is its field `type`, the tag of its struct. Times are seconds, sizes are bytes of TCP payload with
all framing included. Fields that equal their default, for example of sensors that the board does not have, are omitted.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Privacy = Literal["tls", "loopback", "clear"]


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    """Base of all events.

    Attributes:
        at: Unix time.
    """

    at: float


class BoardInfo(Event, frozen=True, tag="board"):
    """Identity and settings of the service; the first event of every stream.

    Attributes:
        feed: id of the event log. A new id means that the service was restarted and numbers answers from 1 again.
        version: of this software.
        ready: whether the draft model is loaded.
        verifier: base URL.
        privacy: whether traffic to the verifier is encrypted, stays on this machine, or travels in clear.
        max_new_tokens: limit of one answer; 0 for what the context leaves.
    """

    feed: str
    version: str
    ready: bool
    verifier: str
    privacy: Privacy
    max_new_tokens: int


class AnswerStarted(Event, frozen=True, tag="begun"):
    """An answer got its slot.

    Attributes:
        seed: also in the response, so that a client can tell which answer is its own.
        prompt: text of the end of the prompt.
        prompt_tokens: length of the whole prompt.
        queued_seconds: time in the admission queue.
    """

    answer: int
    prompt: str
    prompt_tokens: int
    max_new_tokens: int
    temperature: float
    seed: int
    speculation: bool
    queued_seconds: float


class PlanChosen(Event, frozen=True, tag="planned"):
    """The planner decided on a round; see `planning.plan.Plan`."""

    answer: int
    draft: int
    own: int
    reason: str
    siblings: int = 0
    ahead: int = 0
    watch: bool = False


class TokensAdded(Event, frozen=True, tag="tokens"):
    """An answer grew. Each string is the text that one token adds; it may be empty.

    Attributes:
        accepted: draft tokens that the target accepted.
        own: the target's own tokens after them.
        withdrawn: unverified tokens of the previous such event that the target rejected; they are removed first.
        unverified: all tokens after the verified text that the draft model generated without a verifier.
    """

    answer: int
    accepted: list[str] = []
    own: list[str] = []
    withdrawn: list[str] = []
    unverified: list[str] = []


class RoundFinished(Event, frozen=True, tag="round"):
    """The outcome of a round; see `planning.plan.Outcome`.

    Attributes:
        corrected: index, among the answer's tokens, of the token that replaced a rejected draft token; None if all
            were accepted or none was drafted.
        link_seconds: from sending the round to its last frame, minus the verifier's own time.
    """

    answer: int
    planned: int
    drafted: int
    accepted: int
    own: int
    draft_seconds: float
    link_seconds: float
    verifier_seconds: float
    sent: int
    received: int
    sibling: int = 0
    ready: int = 0
    corrected: int | None = None


class AnswerFinished(Event, frozen=True, tag="ended"):
    """An answer ended.

    Attributes:
        outcome: its finish reason or an error code.
        message: the error message.
        version: exact target version; empty if no verifier answered.
        unverified: tokens at the end that only the draft model has generated.
        withdrawn: tokens that were shown as unverified and then rejected.
    """

    answer: int
    outcome: str
    tokens: int
    drafted: int
    accepted: int
    rounds: int
    seconds: float
    message: str = ""
    version: str = ""
    unverified: int = 0
    withdrawn: int = 0


class GaugeSample(Event, frozen=True, tag="gauges"):
    """The state of the board, sampled once a second.

    Attributes:
        running, waiting: answers that run, and requests in the admission queue.
        tokens, rounds, drafts, drafted, accepted: totals since the start: tokens of answers, rounds, rounds with a
            draft, draft tokens, and accepted draft tokens.
        unverified, unverified_answers: totals since the start: tokens that no verifier has checked, and the answers
            that ended with such tokens.
        version: exact target version of the newest answer; empty before the first reply.
        sent, received: bytes since the start, over all connections to the verifier.
        verifier, privacy: see `BoardInfo`; the verifier may change.
        fault: why the verifier cannot be reached, or could not be by the last answer; empty once it has answered again.
        joules: energy drawn since the start, as far as known.
        watts: current power draw.
        energy: source of the last two: the board's sensors, or modeled from the figures of its profile.
        battery_joules, on_battery, celsius, throttled, metered: see `planning.plan.Surroundings`.
        battery_percent: charge.
    """

    running: int
    waiting: int
    tokens: int
    rounds: int
    drafts: int
    drafted: int
    accepted: int
    sent: int
    received: int
    verifier: str
    privacy: Privacy
    fault: str = ""
    version: str = ""
    unverified: int = 0
    unverified_answers: int = 0
    rtt_seconds: float | None = None
    joules: float | None = None
    watts: float | None = None
    energy: Literal["", "sensor", "profile"] = ""
    battery_joules: float | None = None
    battery_percent: float | None = None
    on_battery: bool | None = None
    celsius: float | None = None
    throttled: bool | None = None
    metered: bool | None = None


AnyEvent = BoardInfo | AnswerStarted | PlanChosen | TokensAdded | RoundFinished | AnswerFinished | GaugeSample
