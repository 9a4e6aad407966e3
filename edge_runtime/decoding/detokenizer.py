"""From token ids to text as it comes, whole characters only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"
# Tokens that say how a text behind them begins: no character spans more.
CONTEXT = 8


class Detokeniser:
    """Decodes one text, token by token, without special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._last: deque[int] = deque(maxlen=CONTEXT)

    def step(self, token: int) -> str:
        """What `token` completes; characters that span tokens come with their last."""
        self._last.append(token)
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:  # the library's own, where bytes that were a character turn out to be none
            self._stream = DecodeStream(skip_special_tokens=True)
            return REPLACEMENT + (self._stream.step(self._tokenizer, token) or "")

    def behind(self, tail: list[int]) -> list[str]:
        """What each token of `tail` would add now."""
        return texts_behind(self._tokenizer, self._last, tail)


def texts_behind(tokenizer: Tokenizer, before: Iterable[int], tail: list[int]) -> list[str]:
    """What each token of `tail` adds behind a text that ends with `before`, of which CONTEXT tokens are enough."""
    text = Detokeniser(tokenizer)
    for token in before:
        text.step(token)
    return [text.step(token) for token in tail]
