"""Accumulates the events of `GET /events` into the state that a dashboard shows."""

from __future__ import annotations

from collections import deque

import msgspec

from edge_runtime.service.monitoring import events

# Gauge samples kept, one per second, and tokens kept of the newest answer; chosen.
MAX_GAUGES = 120
MAX_TOKENS = 2000
# Acceptance rate and draft length are averaged over the rounds of this time; chosen.
ROUNDS_SECONDS = 10.0


class Rates(msgspec.Struct, frozen=True, omit_defaults=True):
    """Rates derived from gauges, over the last second or over recent rounds; None without tokens or rounds to measure.

    Attributes:
        acceptance: acceptance rate, the share of draft tokens that the target accepted.
        draft_length: mean draft length of the rounds that drafted.
    """

    tokens_per_second: float | None = None
    bytes_per_second: float | None = None
    acceptance: float | None = None
    draft_length: float | None = None


class DashboardSummary(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state at one moment, without texts."""

    board: events.BoardInfo | None
    gauges: events.GaugeSample | None
    rates: Rates
    plan: events.PlanChosen | None
    round: events.RoundFinished | None


class DashboardState:
    """The state after all events applied so far.

    Attributes:
        board, plan, round, started, finished: the last event of each type; `started` and `finished` are of answers.
        gauges, rates: history of the last minutes.
        tokens: [kind, text] of each token of the newest answer; kinds are `accepted`, `own`, `corrected`, `withdrawn`
            and `unverified`.
    """

    board: events.BoardInfo | None = None
    plan: events.PlanChosen | None
    round: events.RoundFinished | None
    started: events.AnswerStarted | None
    finished: events.AnswerFinished | None
    tokens: list[list[str]]

    def __init__(self) -> None:
        self.gauges: deque[events.GaugeSample] = deque(maxlen=MAX_GAUGES)
        self.rates: deque[Rates] = deque(maxlen=MAX_GAUGES)
        self._reset()

    def apply(self, event: events.Event) -> None:
        """Update the state with one event."""
        match event:
            case events.BoardInfo():
                if self.board is None or self.board.feed != event.feed:
                    self._reset()
                self.board = event
            case events.GaugeSample():
                self.gauges.append(event)
                self.rates.append(self._compute_rates())
            case events.PlanChosen():
                self.plan = event
            case events.AnswerStarted():
                self.started, self.finished = event, None
                self._reset_tokens()
            case events.TokensAdded() if self.started and event.answer == self.started.answer:
                self._add_tokens(event)
            case events.RoundFinished():
                self.round = event
                if self.started and event.answer == self.started.answer and event.corrected is not None:
                    self._mark_corrected(event.corrected)
            case events.AnswerFinished():
                self.finished = event

    def summary(self) -> DashboardSummary:
        """Return the current state without texts."""
        gauges = self.gauges[-1] if self.gauges else None
        return DashboardSummary(self.board, gauges, self.rates[-1] if self.rates else Rates(), self.plan, self.round)

    def _reset(self) -> None:
        self.plan = self.round = self.started = self.finished = None
        self.gauges.clear()
        self.rates.clear()
        self._reset_tokens()

    def _reset_tokens(self) -> None:
        self.tokens = []
        # The verified tokens in order, without the withdrawn ones between them.
        self._verified: list[list[str]] = []

    def _add_tokens(self, event: events.TokensAdded) -> None:
        tail = [token for token in self.tokens if token[0] == "unverified"]
        confirmed = max(0, len(tail) - len(event.withdrawn))
        self.tokens = [token for token in self.tokens if token[0] != "unverified"]
        verified = [["accepted", text] for text in event.accepted] + [["own", text] for text in event.own]
        self._verified += verified
        withdrawn = [["withdrawn", text] for text in event.withdrawn]
        unverified = [["unverified", text] for text in event.unverified]
        self.tokens += verified[:confirmed] + withdrawn + verified[confirmed:] + unverified
        del self.tokens[:-MAX_TOKENS]

    def _mark_corrected(self, index: int) -> None:
        if index < len(self._verified) and self._verified[index][0] == "own":
            self._verified[index][0] = "corrected"

    def _compute_rates(self) -> Rates:
        now = self.gauges[-1]
        previous = self.gauges[-2] if len(self.gauges) > 1 else now
        seconds = now.at - previous.at
        # Half a second of tolerance for samples that came late.
        earlier = next(gauges for gauges in self.gauges if gauges.at >= now.at - ROUNDS_SECONDS - 0.5)
        drafted, drafts = now.drafted - earlier.drafted, now.drafts - earlier.drafts
        transferred = now.sent + now.received - previous.sent - previous.received
        return Rates(
            round((now.tokens - previous.tokens) / seconds, 2) if seconds > 0 else None,
            round(transferred / seconds, 1) if seconds > 0 else None,
            round((now.accepted - earlier.accepted) / drafted, 4) if drafted else None,
            round(drafted / drafts, 2) if drafts else None,
        )
