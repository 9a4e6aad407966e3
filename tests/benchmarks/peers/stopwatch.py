"""The times at which the tokens of streams arrive."""

# Imported by other interpreters, too: only the standard library.
from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any


class Stopwatch:
    """Collects the tokens of streams, with the time of each arrival and what the engine's own clock shows then."""

    def __init__(self, streams: int = 1, engine_clock: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            engine_clock: returns, in seconds, what the engine's time is measured by. Read at each arrival.
        """
        self._engine_clock = engine_clock
        self._started = time.perf_counter()
        # (seconds, engine seconds, tokens) of each arrival.
        self._arrivals: list[list[tuple[float, float, int]]] = [[] for _ in range(streams)]
        self.texts: list[list[int]] = [[] for _ in range(streams)]

    @property
    def text(self) -> list[int]:
        """The tokens of a single stream."""
        [text] = self.texts
        return text

    def add(self, *tokens: int, stream: int = 0) -> None:
        """Note that tokens of a stream have arrived, together."""
        if tokens:
            elapsed = time.perf_counter() - self._started
            self._arrivals[stream].append((elapsed, self._engine_clock(), len(tokens)))
            self.texts[stream] += tokens

    def result(self, rows: dict[int, float] | None = None) -> dict[str, Any]:
        """What a child process prints.

        Args:
            rows: the engine's time for a forward, by rows.
        """
        return {"arrivals": self._arrivals, "texts": self.texts, "rows": rows or {}}


def first_token_seconds(arrivals: Sequence[Sequence[tuple[float, float, int]]]) -> list[float]:
    """Time to the first token of each stream."""
    return [stream[0][0] for stream in arrivals]


def seconds_per_token(arrivals: Sequence[Sequence[tuple[float, float, int]]]) -> list[float]:
    """The time before each token but those that came first; tokens that arrive together share the time before them."""
    return [
        (after - before) / count
        for stream in arrivals
        for (before, _, _), (after, _, count) in itertools.pairwise(stream)
        for _ in range(count)
    ]


def tokens_per_second(arrivals: Sequence[Sequence[tuple[float, float, int]]]) -> float:
    """Tokens of all streams after the first arrival of each, by the time from the first to the last arrival."""
    tokens = sum(count for stream in arrivals for _, _, count in stream[1:])
    return tokens / (max(stream[-1][0] for stream in arrivals) - min(stream[0][0] for stream in arrivals))


def engine_seconds_per_token(arrivals: Sequence[Sequence[tuple[float, float, int]]]) -> float:
    """The engine's time after the first token of a single stream, by its tokens."""
    [stream] = arrivals
    return (stream[-1][1] - stream[0][1]) / sum(count for _, _, count in stream[1:])
