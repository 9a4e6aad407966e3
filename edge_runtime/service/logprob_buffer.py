"""Buffers the log-probabilities of an answer's tokens until the text of these tokens is shown."""

from __future__ import annotations

from collections import deque

import msgspec

from edge_runtime.protocol.messages import TokenLogprobs, pack_logprobs


class ShownToken(msgspec.Struct, frozen=True):
    """A verified token of the text and its log-probabilities; `offset` is where its text begins in the answer's."""

    token: int
    offset: int
    logprobs: TokenLogprobs


class LogprobBuffer:
    """Holds back the log-probabilities of tokens whose text is held back, and drops those of text that is cut off.

    Attributes:
        wire_bytes: size of all log-probabilities so far on the wire.
    """

    def __init__(self) -> None:
        self.wire_bytes = 0
        self._sum, self._count = 0.0, 0
        self._length = 0
        # Tokens that are not released yet, with the end of their text. Offsets refer to the text before stop strings
        # are cut off.
        self._held: deque[tuple[ShownToken, int]] = deque()

    @property
    def mean(self) -> float:
        """Mean log-probability of all tokens so far; 0 without any."""
        return self._sum / self._count if self._count else 0.0

    def add(self, token: int, characters: int, logprobs: TokenLogprobs) -> None:
        """Append a token that adds `characters` to the text."""
        self._sum += logprobs.logprob
        self._count += 1
        self.wire_bytes += len(pack_logprobs([logprobs]))
        self._held.append((ShownToken(token, self._length, logprobs), self._length + characters))
        self._length += characters

    def take(self, shown: int) -> tuple[ShownToken, ...]:
        """Release the tokens whose text is complete within the `shown` characters of the text so far.

        A last token without text stays: it may be part of a character, or the end of the text.
        """
        released = []
        while self._held and self._held[0][1] <= shown:
            entry, end = self._held[0]
            if end == entry.offset and len(self._held) == 1:
                break
            released.append(self._held.popleft()[0])
        return tuple(released)

    def finish(self, shown: int, *, stopped: bool) -> tuple[ShownToken, ...]:
        """Release the rest at the end of a text of `shown` characters.

        Args:
            stopped: a stop string, a stop token or the end-of-text token ended the text. What follows the shown text,
                and a last token without text, is not part of it.
        """
        held, self._held = [entry for entry, _ in self._held], deque()
        return tuple(entry for entry in held if not stopped or entry.offset < shown)
