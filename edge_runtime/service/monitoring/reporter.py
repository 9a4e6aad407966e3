"""Reports one answer to the event log: its start, tokens as text, plans, rounds, and end."""

from __future__ import annotations

import time

import msgspec
from tokenizers import Tokenizer

from edge_runtime.decoding import Detokenizer, VerifiedTokens
from edge_runtime.planning.plan import Outcome, Plan
from edge_runtime.protocol.errors import VerifierUnreachable
from edge_runtime.protocol.sampling import accepted_length
from edge_runtime.service.answer import Answer
from edge_runtime.service.monitoring import events
from edge_runtime.service.monitoring.event_log import EventLog

# Tokens shown of the end of a prompt; chosen.
SHOWN_PROMPT_TOKENS = 300
OFFLINE_FAULT = "no verifier can be reached; the draft model continues alone, and its text is not yet verified"


class ServiceTotals(msgspec.Struct):
    """Totals of all answers since the start of the process; see `events.GaugeSample`."""

    answers: int = 0
    tokens: int = 0
    rounds: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    fault: str = ""
    version: str = ""
    unverified: int = 0
    unverified_answers: int = 0


class AnswerReporter:
    """Writes the events of one answer.

    The functions that build events must not refer to the reporter: the log keeps them, and would keep the answer and
    the KV cache of its draft model alive.
    """

    def __init__(self, event_log: EventLog, totals: ServiceTotals, answer: Answer, tokenizer: Tokenizer) -> None:
        # Assigned when the answer starts; an answer may end in the queue.
        self._number = 0
        self._created = time.perf_counter()
        self._event_log = event_log
        self._totals = totals
        self._answer = answer
        self._transcript = LazyTranscript(tokenizer, answer.request.prompt[-SHOWN_PROMPT_TOKENS:])
        self._unverified: list[int] = []
        # Index of the first own token of the target in the current round.
        self._first_own: int | None = None

    def report_start(self) -> None:
        """The answer got its slot."""
        self._totals.answers += 1
        self._number = self._totals.answers
        request, at, tokenizer, number = self._answer.request, time.time(), self._transcript.tokenizer, self._number
        queued_seconds = round(time.perf_counter() - self._created, 4)
        end, prompt_tokens = request.prompt[-SHOWN_PROMPT_TOKENS:], len(request.prompt)
        max_new_tokens, sampling, speculation = request.max_new_tokens, request.sampling, request.speculation
        self._event_log.append(
            lambda: events.AnswerStarted(
                at=at,
                answer=number,
                prompt=("… " if prompt_tokens > len(end) else "") + tokenizer.decode(end),
                prompt_tokens=prompt_tokens,
                max_new_tokens=max_new_tokens,
                temperature=sampling.temperature,
                seed=sampling.seed,
                speculation=speculation,
                queued_seconds=queued_seconds,
            )
        )

    def report_tokens(self, tokens: VerifiedTokens) -> None:
        """The text grew, or its unverified tail changed."""
        transcript, at, tail, number = self._transcript, time.time(), self._unverified, self._number
        start, middle = len(transcript.ids), len(transcript.ids) + len(tokens.accepted)
        transcript.ids += tokens.accepted + tokens.own
        end = len(transcript.ids)
        self._totals.tokens += end - start
        if end > start:
            self._totals.fault = ""
        elif tokens.unverified:
            self._totals.fault = OFFLINE_FAULT
        if tokens.own and self._first_own is None:
            self._first_own = middle
        unverified = self._unverified = list(tokens.unverified)
        withdrawn = tail[accepted_length(tail, transcript.ids[start:] + unverified) :]
        self._event_log.append(
            lambda: events.TokensAdded(
                at=at,
                answer=number,
                accepted=transcript.texts(start, middle),
                own=transcript.texts(middle, end),
                # Decoded after the tokens that preceded them when they were shown.
                withdrawn=transcript.decode_after(start + len(tail) - len(withdrawn), withdrawn),
                unverified=transcript.decode_after(end, unverified),
            )
        )

    def report_plan(self, plan: Plan) -> None:
        """A round was planned."""
        event = events.PlanChosen(
            at=time.time(),
            answer=self._number,
            draft=plan.draft,
            own=plan.continuation,
            reason=plan.reason,
            siblings=plan.siblings,
            ahead=plan.draft_ahead,
            watch=plan.shadow,
        )
        self._event_log.append(lambda: event)

    def report_round(self, outcome: Outcome) -> None:
        """A round finished; its tokens have been reported before."""
        totals = self._totals
        totals.rounds += 1
        totals.drafts += outcome.drafted > 0
        totals.drafted += outcome.drafted
        totals.accepted += outcome.accepted
        totals.draft_seconds += outcome.draft_seconds
        totals.version = self._answer.version
        corrected = self._first_own if outcome.accepted < outcome.drafted else None
        self._first_own = None
        event = events.RoundFinished(
            at=time.time(),
            answer=self._number,
            planned=outcome.plan.draft,
            drafted=outcome.drafted,
            accepted=outcome.accepted,
            own=outcome.own_tokens,
            draft_seconds=round(outcome.draft_seconds, 5),
            link_seconds=round(max(0.0, outcome.exchange_seconds - outcome.verifier_seconds), 5),
            verifier_seconds=round(outcome.verifier_seconds, 5),
            sent=outcome.sent,
            received=outcome.received,
            sibling=outcome.sibling,
            ready=outcome.ready,
            corrected=corrected,
        )
        self._event_log.append(lambda: event)

    def report_target_only(self, reason: str, tokens: int) -> None:
        """The target generates up to `tokens` tokens alone, without a planner."""
        self.report_plan(Plan(0, continuation=tokens, reason=reason))

    def report_end(self, outcome: str) -> None:
        """The answer ended with this finish reason or error code; no event if it never started."""
        answer, totals = self._answer, self._totals
        totals.version = answer.version or totals.version
        totals.unverified += answer.unverified_tokens
        totals.unverified_answers += answer.unverified_tokens > 0
        if isinstance(answer.error, VerifierUnreachable):
            totals.fault = str(answer.error)
        if not self._number:
            return
        event = events.AnswerFinished(
            at=time.time(),
            answer=self._number,
            outcome=outcome,
            tokens=answer.tokens,
            drafted=answer.drafted,
            accepted=answer.accepted,
            rounds=answer.rounds,
            seconds=round(answer.seconds, 4),
            message=str(answer.error) if answer.error else "",
            version=answer.version,
            unverified=answer.unverified_tokens,
            withdrawn=answer.withdrawn_tokens,
        )
        self._event_log.append(lambda: event)


class LazyTranscript:
    """The tokens of an answer, decoded only when they are read.

    Attributes:
        ids: all verified tokens so far; appended to by its owner.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._prompt = prompt
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._texts: list[str] = []

    def texts(self, start: int, end: int) -> list[str]:
        """Return the text that each of the tokens from `start` to `end` adds."""
        for token in self.ids[len(self._texts) : end]:
            self._texts.append(self._detokenizer.step(token))
        return self._texts[start:end]

    def decode_after(self, end: int, tail: list[int]) -> list[str]:
        """Return the text that each token of `tail` would add after the first `end` tokens."""
        if not tail:
            return []
        return Detokenizer(self.tokenizer, self._prompt + self.ids[:end]).preview(tail)
