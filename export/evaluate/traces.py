"""Rounds of a fixed plan over a text of which every guess is known: which are accepted, and what a round brings.

Whether a guess is right is a fact of its position (see `edge_runtime.simulation.recorded_texts`), so rounds need not be
decoded to be counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge_runtime.simulation.recorded_texts import BEHIND, NONE, Text, runs
from export.evaluate.loops import looped
from export.evaluate.proposers import Guesses, Passage


@dataclass(frozen=True)
class Trace:
    """One draft along one text.

    Attributes:
        passage: the text.
        ranks: for each judged position, the place of the target's token among the draft's: 0 is its guess, NONE none.
        confidences: for each position, the draft's probability of its guess.
        looped: which positions only repeat what stands before them (`export.evaluate.loops`).
    """

    passage: Passage
    ranks: list[int]
    confidences: list[float]
    looped: list[bool]

    @classmethod
    def of(cls, passage: Passage, truth: list[int], guesses: Guesses) -> Trace:
        """What `guesses` are worth where the target says `truth`."""
        ranks = [
            candidates.index(token) if token in candidates else NONE
            for token, candidates in zip(truth, guesses.candidates, strict=True)
        ]
        return cls(passage, ranks, guesses.confidences, looped(passage.ids)[passage.start :].tolist())

    def accepted(self, *, looped: bool = False) -> tuple[int, int]:
        """Right guesses, and all: outside loops, or inside."""
        ranks = [rank for rank, inside in zip(self.ranks, self.looped, strict=True) if inside == looped]
        return ranks.count(0), len(ranks)

    def surviving(self, most: int) -> list[tuple[int, int]]:
        """For k = 1 to `most`: how many drafts have their first k tokens accepted, and of how many.

        A draft begins at every position from which on `most` positions are judged and outside loops.
        """
        run = runs(self.ranks)
        begun = [run[start] for start in range(len(self.ranks)) if self._clear(start, most)]
        return [(sum(r >= k for r in begun), len(begun)) for k in range(1, most + 1)]

    def round_tokens(self, draft: int, siblings: int) -> tuple[int, int]:
        """Tokens, and rounds that brought them: `draft` guesses and `siblings` beside each, one after the other.

        Rounds that could reach into a loop, or beyond the end of the text, are played and not counted; that is told by
        where they begin, not by how they end, so it favours no draft.
        """
        total, count = 0, 0
        for start, tokens in self._rounds(draft, siblings):
            if self._clear(start, draft + 1):
                total, count = total + tokens, count + 1
        return total, count

    def _clear(self, start: int, count: int) -> bool:
        """Whether `count` positions from `start` on are judged and outside loops."""
        return start + count <= len(self.ranks) and not any(self.looped[start : start + count])

    def _rounds(self, draft: int, siblings: int) -> Iterator[tuple[int, int]]:
        """Where each round begins, and the tokens that it brings."""
        run = runs(self.ranks)
        start = 0
        while start < len(self.ranks):
            tokens = min(run[start], draft) + 1
            missed = start + run[start]
            # A sibling that is the target's token was scored too, and what the target says behind it is known.
            if run[start] < draft and missed < len(self.ranks) and 0 < self.ranks[missed] <= siblings:
                tokens += 1
            yield start, tokens
            start += tokens

    def recorded(self, target: str) -> Text | None:
        """For the simulator: the text up to its first loop; None where nothing stands before that.

        Confidences behind wrong guesses are unknown, so only plans that do not ask for them may be played.
        """
        length = self.looped.index(True) if True in self.looped else len(self.looped)
        if not length:
            return None
        ranks, sampling = self.ranks[:length], self.passage.sampling
        return Text(
            target,
            sampling.temperature,
            sampling.top_p,
            sampling.seed,
            self.passage.start,
            self.confidences[:length],
            ranks,
            [[1.0] * BEHIND if rank else [] for rank in ranks],
        )
