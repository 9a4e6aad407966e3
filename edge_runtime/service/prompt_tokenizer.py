"""Tokenizes prompts off the event loop, one at a time, and recognizes by its length a text that cannot fit the context.

A tokenizer takes up to 250 times the size of a text in memory while it works, so only one thread tokenizes. Every
request holds a place in the admission queue before it gets here, which bounds how many texts wait.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from starlette.requests import ClientDisconnect
from tokenizers import Tokenizer

from edge_runtime.common.memory import release_freed_memory
from edge_runtime.decoding import token_bytes

T = TypeVar("T")

# Texts from this size on (in characters) leave so much freed memory behind that it is worth returning. Chosen.
LARGE_TEXT = 1 << 14
# Steps of tokenizers after which every byte of the text still belongs to a token.
KEEPING_NORMALIZERS = {"Prepend", "Replace"}
KEEPING_PRE_TOKENIZERS = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"}
# Unicode normalization composes at most four characters to one (unicode.org/faq/normalization.html: the longest
# canonical decomposition has four), and leaves ASCII as it is.
UNICODE_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}
LONGEST_DECOMPOSITION = 4
WORD_MARK = "\u2581"


class PromptTooLong(Exception):
    """A text has at least `tokens` tokens, more than the limit."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class PromptTokenizer:
    """The thread that renders and tokenizes prompts, and one that recognizes texts that are too long."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._counter = ThreadPoolExecutor(1, "prompt-length")

    async def count_at_least(self, tokenizer: Tokenizer, texts: list[str], limit: int) -> int:
        """Return a lower bound of the tokens of the longest text; 0 if all are too short to have `limit` tokens.

        Texts that are being tokenized delay this at most a little.
        """
        long = [text for text in texts if may_have(text, limit)]
        if not long:
            return 0
        return await asyncio.get_running_loop().run_in_executor(
            self._counter, lambda: max(count_at_least(tokenizer, text) for text in long)
        )

    async def run(self, work: Callable[[], T], disconnected: asyncio.Future[None]) -> T:
        """Return the result of `work()`, run in the thread after what is queued before it.

        Args:
            disconnected: if this ends first, the client has left: `work` is not begun any more.

        Raises:
            ClientDisconnect: the client has left.
        """
        running = asyncio.wrap_future(self._thread.submit(work))
        awaited: set[asyncio.Future[Any]] = {running, disconnected}
        try:
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                raise ClientDisconnect
            return running.result()
        finally:
            running.cancel()


def encode_prompt(tokenizer: Tokenizer, text: str, *, special: bool, limit: int = 0) -> tuple[list[int], list[int]]:
    """Return the ids of a text, and for each whether the tokenizer added it as a special token (1 or 0).

    Unlike `Tokenizer.encode`, this leaves other threads running.

    Args:
        special: let the tokenizer add special tokens.
        limit: the text must have fewer tokens; 0 for any number.

    Raises:
        PromptTooLong: the length of the text shows that it has not. A text that passes may still have too many.
    """
    if limit and may_have(text, limit) and (tokens := count_at_least(tokenizer, text)) >= limit:
        raise PromptTooLong(tokens)
    encoding = tokenizer.encode_batch_fast([text], add_special_tokens=special)[0]
    ids, added = encoding.ids, encoding.special_tokens_mask
    del encoding
    if len(text) >= LARGE_TEXT:
        release_freed_memory()
    return ids, added


def may_have(text: str, tokens: int) -> bool:
    """Whether a text is long enough, in characters, that it might have this many tokens."""
    return len(text) >= tokens // LONGEST_DECOMPOSITION


def count_at_least(tokenizer: Tokenizer, text: str) -> int:
    """Return a lower bound of the number of tokens of a text, from how often each byte occurs in it.

    Where every byte of a text belongs to one token, and a token contains no byte that is not of the text, let L(b) be
    the length of the longest token that contains byte b. A token of n bytes consists of bytes with L >= n, so the sum
    of 1 / L over its bytes is 1 at most, and the sum over the bytes of the text is at most the number of its tokens.
    This takes a thousandth of the time of tokenizing. It is 0 for tokenizers that may drop text or have a token for
    unknown text of any length.
    """
    weights = _byte_weights(tokenizer)
    if weights is None:
        return 0
    if not text.isascii() and any(step["type"] in UNICODE_NORMALIZERS for step in _steps(tokenizer.normalizer)):
        # What is left after normalization has a quarter of the characters at least, and each character has a byte below
        # 0xC0: all others begin characters of several bytes.
        return int(len(text) / LONGEST_DECOMPOSITION * weights[:0xC0].min())
    if _has_byte_fallback(tokenizer):
        text = text.replace(WORD_MARK, " ")
    counts = np.bincount(np.frombuffer(text.encode(errors="replace"), np.uint8), minlength=256)
    # Less what rounding may add.
    return int(counts @ weights * (1 - 1e-9))


# A board has one tokenizer, or two while a bundle is replaced.
@functools.lru_cache(maxsize=2)
def _byte_weights(tokenizer: Tokenizer) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Return 1 / L of each byte, see `count_at_least`; None if this tokenizer may drop text."""
    if not _keeps_text(tokenizer):
        return None
    longest = np.zeros(256)
    tokens = sorted({token_bytes(tokenizer, index) for index in range(tokenizer.get_vocab_size())}, key=len)
    unseen = set(range(256))
    for token in reversed(tokens):
        for byte in unseen.intersection(token):
            longest[byte] = len(token)
        unseen.difference_update(token)
    # A byte without a token of its own may be dropped.
    kept = np.isin(np.arange(256), [token[0] for token in tokens if len(token) == 1])
    return np.divide(1.0, longest, out=np.zeros(256), where=kept)


def _keeps_text(tokenizer: Tokenizer) -> bool:
    """Whether every byte of a text certainly belongs to a token that contains it."""
    if tokenizer.truncation is not None or not hasattr(tokenizer.model, "byte_fallback"):
        return False
    if any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values()):
        return False
    for step in _steps(tokenizer.normalizer):
        if step["type"] not in KEEPING_NORMALIZERS | UNICODE_NORMALIZERS:
            return False
        if step["type"] == "Replace" and len(step["pattern"].get("String", "")) != len(step["content"]):
            return False
    steps = list(_steps(tokenizer.pre_tokenizer))
    if any(step["type"] not in KEEPING_PRE_TOKENIZERS or step.get("behavior") == "Removed" for step in steps):
        return False
    # Otherwise an unknown character is dropped, or becomes part of an unknown token.
    return _has_byte_fallback(tokenizer) != any(step["type"] == "ByteLevel" for step in steps)


def _has_byte_fallback(tokenizer: Tokenizer) -> bool:
    return bool(tokenizer.model.byte_fallback) and all(
        tokenizer.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)
    )


def _steps(component: Any) -> Iterator[dict[str, Any]]:
    """Yield the settings of a normalizer or pre-tokenizer, or of each part of a sequence of them."""
    parts = [] if component is None else [json.loads(component.__getstate__())]
    while parts:
        part = parts.pop(0)
        if part["type"] == "Sequence":
            parts = [*part.get("normalizers", []), *part.get("pretokenizers", []), *parts]
        else:
            yield part
