"""What verified text says of the next token, and how far to believe it.

The memory proposes one token: what followed where the text's end stood before, in the same text or in earlier ones. The
chance that it is the target's is a logistic regression on the draft's own probability of it, on how long the match is
and where from, which learns from every verified token whether the memory was right: so a draft that is good is left
alone, and one that a new target has left behind is helped. `Guesser` then gives the token that chance in the draft's
distribution, and draws with the shared noise as ever.

Everything is a function of the texts heard, in their order.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import deque

from edge_runtime.ngram_cache.index import BOUNDARY, LONGEST, Match, Trace
from edge_runtime.ngram_cache.store import Record, Store
from edge_runtime.protocol.sampling import accepted_length

# Tokens of earlier texts that are kept (2.3 MB), and of the text itself, at most.
TOKENS = 1 << 16
OWN_TOKENS = 1 << 14
# Target versions of which there are weights; texts that a longer one may begin with, such as a conversation's.
VERSIONS, RECENT = 16, 8
# Of 1, log odds in the draft, length, length >= 8, length >= 16, share, of an earlier text, of another version's: as
# fitted to what the example family's target v1 writes. How much one token changes them; where they end.
PRIOR = (-1.4, 0.5, 1.3, -0.15, 0.65, 1.1, -0.2, -0.5)
RATE, MOST = 0.02, 8.0
MOST_NATS = 9.0


class Hint:
    """The token that the memory proposes for one position; `chance_beside` is asked once.

    Attributes:
        token: which.
        tail: the text's last tokens, for which it holds.
    """

    def __init__(self, match: Match, tail: list[int], earlier: bool, foreign: bool, weights: list[float]) -> None:
        length = match.length
        self.token, self.tail = match.token, tail
        self.chance = 0.0
        self.facts = [1.0, 0.0, length / 8, float(length >= 8), float(length >= 16), match.share, earlier, foreign]
        self._weights = weights

    def chance_beside(self, probability: float) -> float:
        """That it is the target's token, where the draft gives it `probability`; less than 1."""
        odds = max(probability, 1e-9) / max(1.0 - probability, 1e-9)
        self.facts[1] = min(MOST_NATS, max(-MOST_NATS, math.log(odds)))
        score = sum(weight * fact for weight, fact in zip(self._weights, self.facts, strict=True))
        self.chance = 1.0 / (1.0 + math.exp(-min(MOST_NATS, max(-MOST_NATS, score))))
        return self.chance


class Memory:
    """What all texts of a process said, by target version, and on disk where there is a `Store`. For any thread."""

    def __init__(self, vocabulary_size: int, store: Store | None = None, capacity: int = TOKENS) -> None:
        """Reads what `store` has."""
        self._size = vocabulary_size
        self._store = store
        self._capacity = capacity
        self._lock = threading.Lock()
        self._forget()
        for record in store.read() if store else ():
            if len(record.weights) == len(PRIOR) and all(token < vocabulary_size for token in record.ids):
                self._take(record)

    @property
    def tokens(self) -> int:
        """How many it holds."""
        return min(self._trace.end, self._capacity)

    @property
    def failures(self) -> int:
        """How often the disk failed it, damaged records included."""
        return self._store.failures + self._store.damaged if self._store else 0

    def hint(self, own: Trace, tail: list[int], version: str) -> Hint | None:
        """What to expect behind `tail`, the last tokens of a text of which `own` has the verified ones."""
        match, earlier, foreign = own.find(tail), False, False
        with self._lock:
            other = self._trace.find(tail)
            if other is not None and (match is None or other.length > match.length):
                match, earlier = other, True
                foreign = self._versions[bisect_left(self._starts, other.place) - 1] != (version or self._latest)
            weights = self._weights.get(version) or self._weights[self._latest]
        return Hint(match, tail, earlier, foreign, weights) if match else None

    def calibrate(self, version: str, hint: Hint, right: bool) -> None:
        """Learns whether a hint was right."""
        error = RATE * (right - hint.chance)
        with self._lock:
            weights = self._weights.get(version) or self._weights[self._latest]
            # A new list: hints hold the old one.
            self._know(version, [w + error * fact for w, fact in zip(weights, hint.facts, strict=True)])

    def add(self, version: str, ids: list[int]) -> None:
        """Remembers a text, prompt and all, that `version` has verified."""
        with self._lock:
            common = max((accepted_length(known, ids) for known in self._recent), default=0)
            self._recent.append(ids)
            # What was said again is no more likely for that; a few tokens lead to what is new.
            new = ids[max(0, common - LONGEST) :]
            record = Record(version, new, self._weights.get(version) or self._weights[self._latest])
        if self._store and self._store.append(record):
            with self._lock:
                self._forget()
        with self._lock:
            self._take(record)

    def _take(self, record: Record) -> None:
        self._know(record.version, record.weights)
        self._starts.append(self._trace.end)
        self._versions.append(record.version)
        while len(self._starts) > 1 and self._starts[1] < self._trace.end - 2 * self._capacity:
            del self._starts[0], self._versions[0]
        self._trace.add([BOUNDARY, *record.ids])

    def _know(self, version: str, weights: list[float]) -> None:
        self._weights.pop(version, None)
        self._weights[version] = [min(MOST, max(-MOST, weight)) for weight in weights]
        self._latest = version
        if len(self._weights) > VERSIONS:
            del self._weights[next(iter(self._weights))]

    def _forget(self) -> None:
        self._trace = Trace(self._capacity)
        self._starts: list[int] = []
        self._versions: list[str] = []
        self._recent: deque[list[int]] = deque(maxlen=RECENT)
        # The version heard of last is the last one.
        self._weights: dict[str, list[float]] = {"": list(PRIOR)}
        self._latest = ""


class Recall:
    """The memory at work for one text. Not for concurrent use."""

    def __init__(self, memory: Memory, context: int) -> None:
        """
        Args:
            context: tokens of the longest text.
        """
        self._memory = memory
        self._own = Trace(min(context, OWN_TOKENS))
        self._text: list[int] = []
        self._version = ""
        self._hints: dict[int, Hint] = {}

    def hint(self, ids: list[int]) -> Hint | None:
        """What to expect behind `ids`, the text and perhaps guesses behind it."""
        hint = self._memory.hint(self._own, ids[-LONGEST:], self._version)
        if hint:
            self._hints[len(ids)] = hint
        return hint

    def learn(self, ids: list[int], version: str = "") -> None:
        """The text goes on with `ids`: the prompt, or what `version` has verified."""
        self._version = version
        for token in ids:
            hint = self._hints.pop(len(self._text), None)
            # It may have been made for another text, or never been asked.
            if hint and hint.chance and hint.tail == self._text[-LONGEST:]:
                self._memory.calibrate(version, hint, token == hint.token)
            self._text.append(token)
        self._own.add(ids)
        if len(self._hints) > 2 * LONGEST:
            self._hints = {at: hint for at, hint in self._hints.items() if at >= len(self._text)}

    def end(self) -> None:
        """The text is over: from now on it is one of the earlier ones, if any of it was verified."""
        if self._version:
            self._memory.add(self._version, self._text)
