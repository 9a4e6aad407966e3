"""Streaming detokenizer: turns token ids into text as they arrive, in whole characters."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT_CHARACTER = "\ufffd"
# Tokens of context that determine how the following tokens decode. Chosen: no character spans more tokens.
CONTEXT_TOKENS = 8


class Detokenizer:
    """Decodes one text token by token, without special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._context: deque[int] = deque(maxlen=CONTEXT_TOKENS)

    def step(self, token: int) -> str:
        """Append `token` and return the text that it completes; a character that spans tokens comes with its last."""
        self._context.append(token)
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:  # raised by tokenizers when pending bytes turn out not to be a character
            self._stream = DecodeStream(skip_special_tokens=True)
            return REPLACEMENT_CHARACTER + (self._stream.step(self._tokenizer, token) or "")

    def preview(self, tail: list[int]) -> list[str]:
        """Return the text that each token of `tail` would add now, without appending it."""
        return decode_after(self._tokenizer, self._context, tail)


def decode_after(tokenizer: Tokenizer, context: Iterable[int], tail: list[int]) -> list[str]:
    """Return the text that each token of `tail` adds to a text that ends with `context`.

    Args:
        context: the last CONTEXT_TOKENS tokens of the text are enough.
    """
    detokenizer = Detokenizer(tokenizer)
    for token in context:
        detokenizer.step(token)
    return [detokenizer.step(token) for token in tail]
