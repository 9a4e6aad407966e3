"""What one answer cost: rounds, acceptance, bytes, and where the time went."""

from __future__ import annotations

import msgspec

from edge_runtime.planning.plan import Outcome


class Statistics(msgspec.Struct):
    """Grows while an answer is generated; times in seconds.

    Attributes:
        tokens: new tokens of the text.
        rounds: requests that were answered.
        drafted: tokens that the board drafted.
        accepted: how many of them the target accepted.
        accepted_at: for each draft index, how often the token there was accepted.
        drafted_at: for each draft index, how often there was one.
        ready: drafted tokens that had been drafted ahead.
        early: rounds that were sent before the last one was answered, and held.
        sibling_hits: rounds in which a sibling saved a token.
        bytes_sent, bytes_received: payload of the TCP connections, all framing included; None where the kernel does
            not tell.
        draft_seconds: in the draft, prefilling included.
        verifier_seconds: in the verifier, by its own report: queue and forwards.
        link_seconds: the rest of the time between sending a round and its last frame.
        loop_seconds: everything else: the loop's own work.
        first_token_seconds: from the start to the first verified token.
        unverified: tokens at the end of the text that the draft said alone.
        withdrawn: tokens that it had said alone and the target did not.
        recoveries: sessions that were lost and opened again.
        retries: attempts that were repeated.
        close_calls: (position, margin) that the verifier reported as decided by a hair.
    """

    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = msgspec.field(default_factory=list)
    drafted_at: list[int] = msgspec.field(default_factory=list)
    ready: int = 0
    early: int = 0
    sibling_hits: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    draft_seconds: float = 0.0
    verifier_seconds: float = 0.0
    link_seconds: float = 0.0
    loop_seconds: float = 0.0
    first_token_seconds: float = 0.0
    unverified: int = 0
    withdrawn: int = 0
    recoveries: int = 0
    retries: int = 0
    close_calls: list[tuple[int, float]] = msgspec.field(default_factory=list)

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that were accepted; None if none was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def bytes_total(self) -> int:
        return self.bytes_sent + self.bytes_received

    @property
    def seconds(self) -> float:
        """The whole time."""
        return self.draft_seconds + self.verifier_seconds + self.link_seconds + self.loop_seconds

    def add_round(self, outcome: Outcome) -> None:
        """Counts one round."""
        self.rounds += 1
        self.drafted += outcome.drafted
        self.accepted += outcome.accepted
        self.ready += outcome.ready
        grow = outcome.drafted - len(self.drafted_at)
        self.drafted_at += [0] * grow
        self.accepted_at += [0] * grow
        for index in range(outcome.drafted):
            self.drafted_at[index] += 1
            self.accepted_at[index] += index < outcome.accepted
        self.draft_seconds += outcome.draft_seconds
        self.sibling_hits += outcome.sibling > 0
        self.verifier_seconds += outcome.verifier_seconds
        self.link_seconds += max(0.0, outcome.exchange_seconds - outcome.verifier_seconds)
