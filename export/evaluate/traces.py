"""Acceptance of one draft along one text, and the rounds of fixed plans that follow from it.

Whether a draft token is accepted is a property of its position (see `edge_runtime.simulation.recorded_texts`), so
rounds can be counted without decoding them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cloud_verifier.acceptance.measure import Passage, RankedTokens
from edge_runtime.planning.plan import UNRANKED
from edge_runtime.simulation import CONTINUATION_TOKENS, RecordedText, accepted_runs
from export.evaluate.loops import find_loops


def rank_of(token: int, candidates: list[int]) -> int:
    """Rank of the target's token among the draft's candidates: 0 is the draft token, NONE is none of them."""
    return candidates.index(token) if token in candidates else UNRANKED


@dataclass(frozen=True)
class AcceptanceTrace:
    """One draft along one text.

    Attributes:
        ranks: for each judged position, the rank of the target's token among the draft's candidates (see `rank_of`).
        confidences: for each position, the draft's probability of its token.
        looped: whether each position only repeats earlier text (`export.evaluate.loops`).
    """

    passage: Passage
    ranks: list[int]
    confidences: list[float]
    looped: list[bool]

    @classmethod
    def from_tokens(cls, passage: Passage, chosen: list[int], drafted: RankedTokens) -> AcceptanceTrace:
        """Compare a draft's tokens with the tokens that the target chose."""
        ranks = [rank_of(token, candidates) for token, candidates in zip(chosen, drafted.candidates, strict=True)]
        return cls(passage, ranks, drafted.confidences, find_loops(passage.ids)[passage.start :].tolist())

    def count_accepted(self, *, looped: bool = False) -> tuple[int, int]:
        """Count accepted positions and all positions: outside loops, or inside them."""
        ranks = [rank for rank, in_loop in zip(self.ranks, self.looped, strict=True) if in_loop == looped]
        return ranks.count(0), len(ranks)

    def count_surviving(self, max_tokens: int) -> list[tuple[int, int]]:
        """For k = 1 to `max_tokens`: number of drafts whose first k tokens are all accepted, and number of drafts.

        A draft starts at every position that is followed by `max_tokens` judged positions outside loops.
        """
        runs = accepted_runs(self.ranks)
        lengths = [runs[start] for start in range(len(self.ranks)) if self._is_clear(start, max_tokens)]
        return [(sum(length >= k for length in lengths), len(lengths)) for k in range(1, max_tokens + 1)]

    def count_round_tokens(self, draft_tokens: int, siblings: int) -> tuple[int, int]:
        """Execute rounds of `draft_tokens` tokens with `siblings` each: number of tokens, and of rounds.

        Rounds that could reach into a loop or beyond the end of the text are executed and not counted. The test looks
        at the start of a round, not at its result, so it favors no draft.
        """
        total, count = 0, 0
        for start, tokens in self._rounds(draft_tokens, siblings):
            if self._is_clear(start, draft_tokens + 1):
                total, count = total + tokens, count + 1
        return total, count

    def to_recorded_text(self, target: str) -> RecordedText | None:
        """Convert to a text for the simulator, up to its first loop; None if there is nothing before the loop.

        Confidences after rejected tokens were not measured, so only plans that do not use them may be simulated.
        """
        length = self.looped.index(True) if True in self.looped else len(self.looped)
        if not length:
            return None
        ranks, sampling = self.ranks[:length], self.passage.sampling
        return RecordedText(
            target=target,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            prompt=self.passage.start,
            confidences=self.confidences[:length],
            ranks=ranks,
            continuations=[[1.0] * CONTINUATION_TOKENS if rank else [] for rank in ranks],
        )

    def _is_clear(self, start: int, count: int) -> bool:
        """Whether `count` positions from `start` on are judged and outside loops."""
        return start + count <= len(self.ranks) and not any(self.looped[start : start + count])

    def _rounds(self, draft_tokens: int, siblings: int) -> Iterator[tuple[int, int]]:
        """Start and number of tokens of each round."""
        runs = accepted_runs(self.ranks)
        start = 0
        while start < len(self.ranks):
            tokens = min(runs[start], draft_tokens) + 1
            rejected = start + runs[start]
            # If a sibling is the target's token, its forward also scored the next position: one more token.
            if runs[start] < draft_tokens and rejected < len(self.ranks) and 0 < self.ranks[rejected] <= siblings:
                tokens += 1
            yield start, tokens
            start += tokens
