"""What one who watches a board knows of it: the feed's events, added up."""

from __future__ import annotations

from collections import deque

import msgspec

from edge_runtime.service.monitoring import events

# Gauges that are kept, one a second; tokens of the newest answer that are.
MAX_GAUGES = 120
MAX_TOKENS = 2000
# Seconds of rounds that acceptance and draft length are means of.
ROUNDS_SECONDS = 10.0


class Rates(msgspec.Struct, frozen=True, omit_defaults=True):
    """What gauges come to: over the last second, or over the rounds of the last ten; None where there were none.

    Attributes:
        acceptance: share of drafted tokens that the target accepted.
        draft_length: mean of the rounds that drafted.
    """

    tokens_per_second: float | None = None
    bytes_per_second: float | None = None
    acceptance: float | None = None
    draft_length: float | None = None


class DashboardSummary(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known at one moment."""

    board: events.BoardInfo | None
    gauges: events.GaugeSample | None
    rates: Rates
    plan: events.PlanChosen | None
    round: events.RoundFinished | None


class DashboardState:
    """Grows with every event.

    Attributes:
        board, plan, round, begun, ended: the last of its kind.
        gauges, rates: the last minutes.
        tokens: [kind, text] of the newest answer's tokens; kinds are `accepted`, `own`, `corrected`, `withdrawn`,
            `unverified`.
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
        self._forget()

    def apply(self, event: events.Event) -> None:
        """Adds what `encode_log_event` says."""
        match event:
            case events.BoardInfo():
                if self.board is None or self.board.feed != event.feed:
                    self._forget()
                self.board = event
            case events.GaugeSample():
                self.gauges.append(event)
                self.rates.append(self._rates())
            case events.PlanChosen():
                self.plan = event
            case events.AnswerStarted():
                self.started, self.finished = event, None
                self._clear()
            case events.TokensAdded() if self.started and event.answer == self.started.answer:
                self._grow(event)
            case events.RoundFinished():
                self.round = event
                if self.started and event.answer == self.started.answer and event.corrected is not None:
                    self._correct(event.corrected)
            case events.AnswerFinished():
                self.finished = event

    def summary(self) -> DashboardSummary:
        """All of it, but for texts."""
        gauges = self.gauges[-1] if self.gauges else None
        return DashboardSummary(self.board, gauges, self.rates[-1] if self.rates else Rates(), self.plan, self.round)

    def _forget(self) -> None:
        self.plan = self.round = self.started = self.finished = None
        self.gauges.clear()
        self.rates.clear()
        self._clear()

    def _clear(self) -> None:
        self.tokens = []
        # The verified ones, in order, whatever was withdrawn between them.
        self._verified: list[list[str]] = []

    def _grow(self, event: events.TokensAdded) -> None:
        tail = [token for token in self.tokens if token[0] == "unverified"]
        confirmed = max(0, len(tail) - len(event.withdrawn))
        self.tokens = [token for token in self.tokens if token[0] != "unverified"]
        verified = [["accepted", text] for text in event.accepted] + [["own", text] for text in event.own]
        self._verified += verified
        struck = [["withdrawn", text] for text in event.withdrawn]
        unverified = [["unverified", text] for text in event.unverified]
        self.tokens += verified[:confirmed] + struck + verified[confirmed:] + unverified
        del self.tokens[:-MAX_TOKENS]

    def _correct(self, index: int) -> None:
        if index < len(self._verified) and self._verified[index][0] == "own":
            self._verified[index][0] = "corrected"

    def _rates(self) -> Rates:
        now = self.gauges[-1]
        before = self.gauges[-2] if len(self.gauges) > 1 else now
        seconds = now.at - before.at
        earlier = next(gauges for gauges in self.gauges if gauges.at >= now.at - ROUNDS_SECONDS - 0.5)
        drafted, drafts = now.drafted - earlier.drafted, now.drafts - earlier.drafts
        moved = now.sent + now.received - before.sent - before.received
        return Rates(
            round((now.tokens - before.tokens) / seconds, 2) if seconds > 0 else None,
            round(moved / seconds, 1) if seconds > 0 else None,
            round((now.accepted - earlier.accepted) / drafted, 4) if drafted else None,
            round(drafted / drafts, 2) if drafts else None,
        )
