"""What the feed hears of answers: their tokens as text, plans, rounds, and ends."""

from __future__ import annotations

import time

import msgspec
from tokenizers import Tokenizer

from edge_runtime.decoding import CONTEXT_TOKENS, Detokenizer, VerifiedTokens, decode_after
from edge_runtime.planning.plan import Outcome, Plan
from edge_runtime.protocol.errors import VerifierUnreachable
from edge_runtime.protocol.sampling import accepted_length
from edge_runtime.service.answer import Answer
from edge_runtime.service.monitoring import events
from edge_runtime.service.monitoring.event_log import EventLog

# Tokens at the end of a prompt that are shown.
PROMPT_TOKENS = 300
ALONE = "none can be reached; the draft goes on alone, and what it says is to be verified yet"


class ServiceTotals(msgspec.Struct):
    """What is told of all answers together, from the start of the process; see `news.GaugeSample`."""

    answers: int = 0
    tokens: int = 0
    rounds: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    fault: str = ""


class AnswerReporter:
    """Tells the feed of one answer."""

    def __init__(self, feed: EventLog, totals: ServiceTotals, answer: Answer, tokenizer: Tokenizer) -> None:
        # Given when it begins: some never do.
        self._number = 0
        self._asked = time.perf_counter()
        self._feed = feed
        self._totals = totals
        self._answer = answer
        self._text = Transcript(tokenizer)
        self._unverified: list[int] = []
        # Index of the first token of the target's own in the round that is being told.
        self._first_own: int | None = None

    def begin(self) -> None:
        """It has its place."""
        self._totals.answers += 1
        self._number = self._totals.answers
        # What is kept must not keep the answer, with the draft's keys and values: no `self` in what makes news.
        order, at, tokenizer, number = self._answer.request, time.time(), self._text.tokenizer, self._number
        queued_seconds = round(time.perf_counter() - self._asked, 4)
        end, count = order.prompt[-PROMPT_TOKENS:], len(order.prompt)
        most, sampling, speculation = order.max_new_tokens, order.sampling, order.speculation
        self._feed.add(
            lambda: events.AnswerStarted(
                at=at,
                answer=number,
                prompt=("… " if count > len(end) else "") + tokenizer.decode(end),
                prompt_tokens=count,
                max_new_tokens=most,
                temperature=sampling.temperature,
                seed=sampling.seed,
                speculation=speculation,
                queued_seconds=queued_seconds,
            )
        )

    def hear(self, piece: VerifiedTokens) -> None:
        """It grew, verified or not."""
        text, at, tail, number = self._text, time.time(), self._unverified, self._number
        start, middle = len(text.ids), len(text.ids) + len(piece.accepted)
        text.ids += piece.accepted + piece.own
        end = len(text.ids)
        self._totals.tokens += end - start
        if end > start:
            self._totals.fault = ""
        elif piece.unverified:
            self._totals.fault = ALONE
        if piece.own and self._first_own is None:
            self._first_own = middle
        self._unverified = list(piece.unverified)
        withdrawn = tail[accepted_length(tail, text.ids[start:] + self._unverified) :]
        unverified = self._unverified
        self._feed.add(
            lambda: events.TokensAdded(
                at=at,
                answer=number,
                accepted=text.between(start, middle),
                own=text.between(middle, end),
                # What they look like depends on what was before them then.
                withdrawn=text.behind(start + len(tail) - len(withdrawn), withdrawn),
                unverified=text.behind(end, unverified),
            )
        )

    def plan(self, plan: Plan) -> None:
        """A round was planned."""
        planned = events.PlanChosen(
            at=time.time(),
            answer=self._number,
            draft=plan.draft,
            own=plan.own,
            reason=plan.reason,
            siblings=plan.siblings,
            ahead=plan.ahead,
            watch=plan.watch,
        )
        self._feed.add(lambda: planned)

    def observe(self, outcome: Outcome) -> None:
        """A round is over; its tokens have been told."""
        totals = self._totals
        totals.rounds += 1
        totals.drafts += outcome.drafted > 0
        totals.drafted += outcome.drafted
        totals.accepted += outcome.accepted
        totals.draft_seconds += outcome.draft_seconds
        corrected = self._first_own if outcome.accepted < outcome.drafted else None
        self._first_own = None
        round_ = events.RoundFinished(
            at=time.time(),
            answer=self._number,
            planned=outcome.plan.draft,
            drafted=outcome.drafted,
            accepted=outcome.accepted,
            own=outcome.own,
            draft_seconds=round(outcome.draft_seconds, 5),
            link_seconds=round(max(0.0, outcome.exchange_seconds - outcome.verifier_seconds), 5),
            verifier_seconds=round(outcome.verifier_seconds, 5),
            sent=outcome.sent,
            received=outcome.received,
            sibling=outcome.sibling,
            ready=outcome.ready,
            corrected=corrected,
        )
        self._feed.add(lambda: round_)

    def alone(self, reason: str, tokens: int) -> None:
        """The cloud writes by itself, without planning."""
        self.plan(Plan(0, own=tokens, reason=reason))

    def end(self, outcome: str) -> None:
        """It is over, if it ever began."""
        answer = self._answer
        if isinstance(answer.error, VerifierUnreachable):
            self._totals.fault = str(answer.error)
        if not self._number:
            return
        ended = events.AnswerFinished(
            at=time.time(),
            answer=self._number,
            outcome=outcome,
            tokens=answer.tokens,
            drafted=answer.drafted,
            accepted=answer.accepted,
            rounds=answer.rounds,
            seconds=round(answer.seconds, 4),
            message=str(answer.error) if answer.error else "",
        )
        self._feed.add(lambda: ended)


class Transcript:
    """A text whose tokens become text when somebody reads them.

    Attributes:
        ids: all tokens; grows.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._detokeniser = Detokenizer(tokenizer)
        self._texts: list[str] = []

    def between(self, start: int, end: int) -> list[str]:
        """What each of these tokens adds."""
        for token in self.ids[len(self._texts) : end]:
            self._texts.append(self._detokeniser.step(token))
        return self._texts[start:end]

    def behind(self, end: int, tail: list[int]) -> list[str]:
        """What each token of `tail` would add behind the first `end` tokens."""
        if not tail:
            return []
        return decode_after(self.tokenizer, self.ids[max(0, end - CONTEXT_TOKENS) : end], tail)
