"""Counters of a generation: acceptance, bytes, and where the time went."""

from __future__ import annotations

import msgspec

from edge_runtime.planning.plan import Outcome
from edge_runtime.planning.round_rules import RoundTotals


class GenerationStatistics(RoundTotals):
    """What one generation has cost so far; times in seconds.

    The four times draft, verifier, link and loop add up to the wall-clock time.

    Attributes:
        tokens: new verified tokens.
        accepted_at: for each draft index, how often the token there was accepted.
        drafted_at: for each draft index, how often a token was drafted there.
        drafted_ahead: draft tokens that had been drafted while the previous round was in flight.
        bytes_sent, bytes_received: TCP payload, all framing included; 0 if the kernel does not report it.
        draft_seconds: drafting, prefill included.
        verifier_seconds: queueing and forwards, as the verifier reports them.
        link_seconds: the rest of the time between sending a round and its last frame.
        loop_seconds: everything else, mostly the decoding loop itself.
        first_token_seconds: from the start to the first verified token.
        unverified: draft tokens at the end of the text that no verifier has checked.
        withdrawn: draft tokens that were shown as unverified and then rejected.
        cached_prompt_tokens: tokens of the prompt that the verifier did not prefill, since it had their KV cache.
        recoveries: sessions that were lost and reopened.
        retries: requests that were repeated.
        close_calls: (position, margin) of each token that the verifier reports as decided by a small margin.
    """

    tokens: int = 0
    accepted_at: list[int] = msgspec.field(default_factory=list)
    drafted_at: list[int] = msgspec.field(default_factory=list)
    drafted_ahead: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    draft_seconds: float = 0.0
    verifier_seconds: float = 0.0
    link_seconds: float = 0.0
    loop_seconds: float = 0.0
    first_token_seconds: float = 0.0
    unverified: int = 0
    withdrawn: int = 0
    cached_prompt_tokens: int = 0
    recoveries: int = 0
    retries: int = 0
    close_calls: list[tuple[int, float]] = msgspec.field(default_factory=list)

    @property
    def acceptance(self) -> float | None:
        """Share of draft tokens that were accepted; None if none was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def bytes_total(self) -> int:
        return self.bytes_sent + self.bytes_received

    @property
    def seconds(self) -> float:
        """Wall-clock time of the generation, once it has ended."""
        return self.draft_seconds + self.verifier_seconds + self.link_seconds + self.loop_seconds

    def add_round(self, outcome: Outcome) -> None:
        super().add_round(outcome)
        self.drafted_ahead += outcome.ready
        missing = outcome.drafted - len(self.drafted_at)
        self.drafted_at += [0] * missing
        self.accepted_at += [0] * missing
        for index in range(outcome.drafted):
            self.drafted_at[index] += 1
            self.accepted_at[index] += index < outcome.accepted
        self.draft_seconds += outcome.draft_seconds
        self.verifier_seconds += outcome.verifier_seconds
        self.link_seconds += max(0.0, outcome.exchange_seconds - outcome.verifier_seconds)
