"""Streaming detokenizer: turns token ids into text as they arrive, in whole characters.

The pieces of a text, `flush` included, are together what `tokenizer.decode` makes of all ids at once, and the work is
linear in their number. Two things make this more than decoding token by token:

- Context. Many tokenizers drop the space before a text's first word, so a continuation must be decoded after the last
  token of its prompt.
- Bytes. A character may span tokens. Where every token stands for bytes (byte-level BPE: Llama 3, Qwen, GPT-2), a
  UTF-8 decoder holds back the incomplete character. Where only some do (byte fallback: Llama 2, Gemma, Phi-3),
  `tokenizer.decode` looks at a whole run of such tokens and replaces every byte of an invalid one, so a run is held
  back until it ends.
"""

from __future__ import annotations

import codecs
import copy
import functools
import json
import re
from collections.abc import Collection, Iterable, Sequence, Set
from typing import Protocol

from tokenizers import Tokenizer

REPLACEMENT_CHARACTER = "\ufffd"
# What SentencePiece writes for a space.
WORD_MARK = "\u2581"
# Tokens of context that determine how the following tokens decode, special tokens and held-back bytes not counted: the
# longest character has four bytes.
CONTEXT_TOKENS = 4
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer:
    """Decodes one text token by token, without special tokens.

    Args:
        prompt: what the text continues; it is not part of the text.
        visible: ids of special tokens that are shown nevertheless, such as the marker of a tool call.
        hidden: ids of other tokens that are not shown: `Sampling.stop_ids`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        visible: Set[int] = frozenset(),
        hidden: Collection[int] = (),
    ) -> None:
        self._special = _special_ids(tokenizer)
        self._hidden = self._special.union(hidden) - visible
        self._visible: dict[int, str] = {token: tokenizer.id_to_token(token) for token in visible}
        self._decoder: _TokenDecoder = _ByteDecoder(tokenizer) if _is_byte_level(tokenizer) else _RunDecoder(tokenizer)
        context: list[int] = []
        for token in reversed(prompt):
            if token in self._special:
                continue
            context.append(token)
            if len(context) >= CONTEXT_TOKENS and not self._decoder.is_open(token):
                break
        self._decoder.start(context[::-1])

    def step(self, token: int) -> str:
        """Append `token` and return the text that it completes; a character that spans tokens comes with its last."""
        if token in self._visible:
            return self._decoder.flush() + self._visible[token]
        return "" if token in self._hidden else self._decoder.step(token)

    def flush(self) -> str:
        """Return what was held back; to be called at the end of the text."""
        return self._decoder.flush()

    def preview(self, tail: Iterable[int]) -> list[str]:
        """Return the text that each token of `tail` would add now, without appending it."""
        clone = copy.copy(self)
        clone._decoder = self._decoder.copy()
        return [clone.step(token) for token in tail]


def decode_continuation(
    tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterable[int], hidden: Collection[int] = ()
) -> str:
    """Return the text of `ids` as the continuation of `prompt`; for `hidden` see `Detokenizer`."""
    detokenizer = Detokenizer(tokenizer, prompt, hidden=hidden)
    return "".join(map(detokenizer.step, ids)) + detokenizer.flush()


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Return the bytes that a token stands for: special tokens as they are written, none for an unknown id."""
    content = tokenizer.id_to_token(token)
    if _is_byte_level(tokenizer):
        return _token_bytes(content)
    if content and BYTE_TOKEN.fullmatch(content):
        return bytes([int(content[3:5], 16)])
    return (content or "").replace(WORD_MARK, " ").encode()


class _TokenDecoder(Protocol):
    """Decodes the tokens of one text that are not special."""

    def start(self, context: list[int]) -> None:
        """Begin after these tokens."""

    def is_open(self, token: int) -> bool:
        """Whether the text of this token may depend on the tokens around it."""

    def step(self, token: int) -> str:
        """Append one token and return the text that is complete."""

    def flush(self) -> str:
        """Return the rest of the text."""

    def copy(self) -> _TokenDecoder:
        """Return an independent decoder in the same state."""


class _ByteDecoder:
    """Every token stands for bytes; invalid ones become U+FFFD by the same rule in Python as in tokenizers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Whether the prompt ends within a character that nothing has followed yet.
        self._after_partial = False

    def start(self, context: list[int]) -> None:
        for token in context:
            self.step(token)
        self._after_partial = bool(self._utf8.getstate()[0])

    def is_open(self, token: int) -> bool:
        return False

    def step(self, token: int) -> str:
        return self._decode(_token_bytes(self._tokenizer.id_to_token(token)))

    def flush(self) -> str:
        return self._decode(b"", final=True)

    def copy(self) -> _ByteDecoder:
        clone = _ByteDecoder(self._tokenizer)
        clone._utf8.setstate(self._utf8.getstate())
        clone._after_partial = self._after_partial
        return clone

    def _decode(self, data: bytes, final: bool = False) -> str:
        text = self._utf8.decode(data, final)
        if text and self._after_partial:
            self._after_partial = False
            # The character was not completed, so its replacement belongs to the prompt.
            return text.removeprefix(REPLACEMENT_CHARACTER)
        return text


class _RunDecoder:
    """Holds back runs of tokens that stand for bytes, and decodes every other token after its predecessor."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        # The run of bytes at the end, its first tokens perhaps those of the prompt.
        self._run: list[int] = []
        self._prompt_run = 0

    def start(self, context: list[int]) -> None:
        for token in context:
            if self.is_open(token):
                self._run.append(token)
            else:
                self._before, self._run = [token], []
        self._prompt_run = len(self._run)

    def is_open(self, token: int) -> bool:
        content = self._tokenizer.id_to_token(token)
        if content is None or BYTE_TOKEN.fullmatch(content):
            return content is not None
        # Decoders that are neither, such as a byte-level one in a sequence.
        return REPLACEMENT_CHARACTER not in content and REPLACEMENT_CHARACTER in self._decode([token])

    def step(self, token: int) -> str:
        if self.is_open(token):
            self._run.append(token)
            return ""
        text = self._take([*self._run, token])
        self._before = [token]
        return text

    def flush(self) -> str:
        run = self._run
        text = self._take(run)
        self._before += run
        return text

    def copy(self) -> _RunDecoder:
        clone = copy.copy(self)
        clone._before, clone._run = list(self._before), list(self._run)
        return clone

    def _take(self, tokens: list[int]) -> str:
        """Return what `tokens`, which begin with the run, add to the text."""
        known = self._decode(self._before + self._run[: self._prompt_run])
        text = self._decode(self._before + tokens)
        self._run, self._prompt_run = [], 0
        if text.startswith(known):
            return text[len(known) :]
        # The prompt ended within a character: it is shown whole, after what both have in common.
        common = 0
        while common < min(len(known), len(text)) and known[common] == text[common]:
            common += 1
        return text[common:]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


# A board has one tokenizer; rebuilding these for every answer would take longer than decoding it.
@functools.lru_cache(maxsize=2)
def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special)


@functools.lru_cache(maxsize=2)
def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether decoding is nothing but mapping characters to bytes."""
    if tokenizer.decoder is None:
        return False
    state = json.loads(tokenizer.decoder.__getstate__())
    while state["type"] == "Sequence" and len(state["decoders"]) == 1:
        state = state["decoders"][0]
    return bool(state["type"] == "ByteLevel")


@functools.lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The byte for which each character of a byte-level vocabulary stands (GPT-2's `bytes_to_unicode`)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def _token_bytes(content: str | None) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary; none for an unknown id."""
    alphabet = _byte_alphabet()
    try:
        return bytes(alphabet[character] for character in content or "")
    except KeyError:
        # An added token is text as it is.
        return (content or "").encode()
