"""From token ids to text as it comes, whole characters only."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"


class Detokeniser:
    """Decodes one text, token by token, without special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token: int) -> str:
        """What `token` completes; characters that span tokens come with their last."""
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:  # the library's own, where bytes that were a character turn out to be none
            self._stream = DecodeStream(skip_special_tokens=True)
            return REPLACEMENT + (self._stream.step(self._tokenizer, token) or "")
