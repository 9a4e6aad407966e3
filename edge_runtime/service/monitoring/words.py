"""The words that the web page, `edge-runtime top` and `edge-runtime chat` share; the page loads the same file."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from edge_runtime.service.monitoring.events import PlanChosen, RoundFinished

WORDS_FILE = Path(__file__).parents[1] / "static" / "words.json"


class GaugeWords(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A gauge of both live views.

    Attributes:
        digits: decimals shown.
        scale: least value of the top of its curve.
    """

    name: str
    unit: str
    digits: int = 0
    scale: float = 1.0


class ViewWords(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The words by place. Names in braces stand for values; counts come with their noun (`count`).

    Attributes:
        tokens: meaning of each kind of token.
        plans: what a round will do: with a draft, without one, and before the first.
        reasons: reasons of plans that say too little by themselves.
        times: parts of a round's duration.
        states: of the connection to the service.
        answers, board: parts of the status line.
        outcomes: how an answer ended, for finish reasons.
        waiting: what an answer that is being written waits for.
        key: the API key of a request is missing or wrong.
        remedies: what to do about an error, by its code.
    """

    tokens: dict[str, str]
    plans: dict[str, str]
    reasons: dict[str, str]
    round: str
    times: dict[str, str]
    gauges: dict[str, GaugeWords]
    privacy: dict[str, str]
    states: dict[str, str]
    answers: dict[str, str]
    board: dict[str, str]
    outcomes: dict[str, str]
    waiting: dict[str, str]
    key: str
    remedies: dict[str, str]

    def plan(self, plan: PlanChosen | None) -> str:
        """Say what a plan does."""
        if plan is None:
            return self.plans["none"]
        form = self.plans["draft" if plan.draft else "stream"]
        return form.format(draft=count(plan.draft, "token"), own=count(plan.own, "token"))

    def reason(self, plan: PlanChosen) -> str:
        """Say why the planner chose a plan."""
        return self.reasons.get(plan.reason, plan.reason)

    def outcome_of(self, round_: RoundFinished) -> str:
        """Say how much of a round's draft was accepted; empty for a round without a draft."""
        if not round_.drafted:
            return ""
        return self.round.format(accepted=round_.accepted, draft=count(round_.drafted, "draft token"))


@cache
def load_words() -> ViewWords:
    """Return the words."""
    return msgspec.json.decode(WORDS_FILE.read_bytes(), type=ViewWords)


def capitalize(sentence: str) -> str:
    """Return a sentence that begins with a capital; error messages begin without, to follow a colon."""
    return sentence[:1].upper() + sentence[1:]


def count(number: int, noun: str) -> str:
    """Return a number with its noun: `1 token`, `2 tokens`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
