"""What the board tells those who watch it: one struct for each kind of event of `GET /events`.

An event's `type` is the struct's name in lower case. Times are seconds, sizes are bytes of TCP payload, all framing
included. A field that the board has no sensor for, or that says nothing, is left out.
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
    """Who speaks; the first event of every stream.

    Attributes:
        feed: another one means that the service was started anew, and that answers are numbered from 1 again.
        version: of this software.
        ready: the draft is loaded; false for the time until then.
        verifier: base URL.
        privacy: of the way there: encrypted, on this machine alone, or in clear.
        max_new_tokens: of an answer.
    """

    feed: str
    version: str
    ready: bool
    verifier: str
    privacy: Privacy
    max_new_tokens: int


class AnswerStarted(Event, frozen=True, tag="begun"):
    """An answer is being written.

    Attributes:
        answer: its number.
        prompt: the end of the prompt.
        prompt_tokens: of the whole prompt.
        queued_seconds: that it waited for its place.
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
    """A decision, and why; see `planning.plan.Plan`."""

    answer: int
    draft: int
    own: int
    reason: str
    siblings: int = 0
    ahead: int = 0
    watch: bool = False


class TokensAdded(Event, frozen=True, tag="tokens"):
    """An answer grew. Each string is what one token adds to the text; it may be empty.

    Attributes:
        accepted: drafted on the board, and accepted by the target.
        own: the target's own tokens behind them.
        withdrawn: unverified tokens of the last such event that the target did not agree to; they come off first.
        unverified: what the draft goes on with for now, behind all verified tokens: the whole of it.
    """

    answer: int
    accepted: list[str] = []
    own: list[str] = []
    withdrawn: list[str] = []
    unverified: list[str] = []


class RoundFinished(Event, frozen=True, tag="round"):
    """What a round came to; see `planning.plan.Outcome`.

    Attributes:
        corrected: index among the answer's tokens of the one that replaced a drafted token; none where all were
            accepted, or none was drafted.
        link_seconds: between sending the round and its last frame, without the verifier's own time.
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
    """An answer is over.

    Attributes:
        outcome: its finish reason, or an error's code.
        message: the error's.
    """

    answer: int
    outcome: str
    tokens: int
    drafted: int
    accepted: int
    rounds: int
    seconds: float
    message: str = ""


class GaugeSample(Event, frozen=True, tag="gauges"):
    """How the board does; once a second.

    Attributes:
        running, waiting: requests.
        tokens, rounds, drafts, drafted, accepted: since the start: tokens of answers, rounds, rounds with a draft,
            drafted tokens, and those that were accepted.
        sent, received: since the start, over all connections to the verifier.
        verifier, privacy: see `BoardInfo`; the verifier may change.
        fault: why the last answer or round failed on the way to the verifier; empty once one has worked again.
        joules: that the board drew since the start, as far as known.
        watts: that it draws now.
        energy: where these two come from: the board's own sensors, or its profile's figures, which are modelled.
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
