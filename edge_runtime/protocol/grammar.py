"""Grammars: which tokens may follow a text that has to match a JSON schema, a regular expression or a grammar.

`Sampling.grammar` is a grammar in the syntax of llguidance, which both ends run. At every position it masks the logits:
tokens with which no continuation of the text matches get -inf. End tokens are allowed exactly where the text matches.
Where the grammar leaves one token, such as within the key of a JSON object, that token is known without any model.

The mask is a function of the grammar, the tokenizer and the generated ids alone, so `GrammarMatcher` may follow drafts
and roll back. Grammars come from strangers: their size, their nesting and the work for a mask are bounded.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import msgspec
import numpy as np
from tokenizers import Tokenizer

from edge_runtime.protocol.errors import GrammarError
from edge_runtime.protocol.logits_processing import TokenMask, unpack_mask
from edge_runtime.protocol.sampling import common_prefix_length

# 8 MB of memory: imported with the first grammar.
if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits

T = TypeVar("T")

# llguidance's own limits of the work for a mask let it take some 20 ms. A state of the lexer takes 1 to 2 kB; a text of
# an ordinary schema needs hundreds, one with arrays of long strings thousands. All texts of a grammar share them.
MAX_LEXER_STATES = 1 << 15
TOO_COSTLY = "the grammar is too costly: simplify it"
# CPU time that a matcher with a budget may spend at first, before its masks earn more. Chosen: some masks of an
# ordinary grammar take 20 ms, nearly all less than 1 ms.
INITIAL_BUDGET_SECONDS = 0.25
# Masks that are computed when a grammar is compiled, and the CPU time that each may take on average. Chosen: a usual
# one takes 0.1 ms, and four times that on a board.
PROBED_MASKS = 8
PROBED_MASK_SECONDS = 0.05
# A grammar that took longer to compile is not compiled again while a forward waits for its mask. Chosen.
RENEWAL_SECONDS = 0.05
# llguidance may quote a whole grammar in its messages.
MAX_REASON_CHARACTERS = 300
# In llguidance's error for a grammar without any text, such as `root ::= root`.
NO_TEXT_MATCHES = "NoExtensionBias"
# Longest time for compiling a grammar, the wait for other grammars included. Chosen: a usual one takes a millisecond.
COMPILE_SECONDS = 10.0
# llguidance recurses along chains of rules: more than 8 MB for 8,000 of them. Only the part that is used takes memory.
COMPILE_STACK = 256 << 20
# Compiled grammars that are kept for each model: clients repeat the same schema. Chosen: each takes up to megabytes.
CACHED_GRAMMARS = 16


class GrammarTokenizer:
    """The tokens of one model as grammars see them, shared by all texts. Thread-safe.

    Building the first takes half a second and 60 MB for 49,000 tokens, the import of llguidance included.

    Attributes:
        logits: number of ids that a mask covers.
        end_ids: tokens that end a text.
        all_mask, text_mask, end_mask: masks of all ids, of all but the end tokens, and of these.
    """

    def __init__(self, definition: str, logits: int, end_ids: Collection[int]) -> None:
        """
        Args:
            definition: see `define_tokenizer`.
            logits: number of the model's logits. Ids without a token are never allowed, nor tokens without a logit.
            end_ids: those of the model; at least one.

        Raises:
            GrammarError: llguidance cannot take this tokenizer.
        """
        self.logits = logits
        self.end_ids = frozenset(token for token in end_ids if token < logits)
        if not self.end_ids:
            raise GrammarError("this model has no end-of-text token, so no text of it can match a grammar")
        from llguidance import LLTokenizer

        for size in (logits, None):
            try:
                self._tokenizer = LLTokenizer(definition, n_vocab=size, eos_token=sorted(self.end_ids))
                break
            except Exception as error:  # llguidance raises bare ValueError, also for fewer logits than tokens
                reason = error
        else:
            raise GrammarError(f"the tokenizer of this model does not support grammars: {reason}") from None
        self.all_mask = _pack(range(logits), logits)
        self.end_mask = _pack(self.end_ids, logits)
        self.text_mask = self.all_mask & ~self.end_mask

    def trim(self, mask: bytes, possible: TokenMask) -> TokenMask:
        """The tokens of `possible` that a mask of llguidance allows; it has at least one bit more."""
        return np.frombuffer(mask, np.uint8, possible.size) & possible

    def new_matcher(self, grammar: str) -> LLMatcher:
        """llguidance's matcher of `grammar`, before the first token. Raises GrammarError."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_parser_limits())
        _raise_error(matcher)
        return matcher


class GrammarCompiler:
    """Compiles grammars for one model. Loads the tokenizer at the first one. Thread-safe."""

    def __init__(self, load_tokenizer: Callable[[], Tokenizer], logits: int, end_ids: Collection[int]) -> None:
        """
        Args:
            load_tokenizer: returns the model's tokenizer; may raise an error of this package.
            logits, end_ids: see `GrammarTokenizer`.
        """
        self._load_tokenizer = load_tokenizer
        self._logits, self._end_ids = logits, frozenset(end_ids)
        self._tokenizer: GrammarTokenizer | None = None
        self._compiled: dict[str, CompiledGrammar] = {}
        self._lock = threading.Lock()

    def compile(self, grammar: str) -> CompiledGrammar:
        """Compile `grammar`, or return it as compiled before. Raises GrammarError."""
        # Each dictionary operation is atomic; a known grammar does not wait for the compilation of another.
        compiled = self._compiled.get(grammar)
        if compiled is None:
            with self._lock:
                if self._tokenizer is None:
                    self._tokenizer = self._make_tokenizer(define_tokenizer(self._load_tokenizer()))
                compiled = self._compiled[grammar] = self._compile(self._tokenizer, grammar)
                if len(self._compiled) > CACHED_GRAMMARS:
                    # The oldest.
                    del self._compiled[next(iter(self._compiled))]
        return compiled

    def _make_tokenizer(self, definition: str) -> GrammarTokenizer:
        return GrammarTokenizer(definition, self._logits, self._end_ids)

    def _compile(self, tokenizer: GrammarTokenizer, grammar: str) -> CompiledGrammar:
        """Compile a grammar that is not known."""
        return CompiledGrammar(tokenizer, grammar)

    async def compile_in_thread(self, grammar: str) -> CompiledGrammar:
        """Compile `grammar` while the event loop goes on.

        Grammars of all models are compiled one after the other, so that costly ones occupy one core at most.

        Raises:
            GrammarError: it is invalid, or takes too long.
        """
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(_compile_thread(), self.compile, grammar)
        except TimeoutError:
            raise GrammarError(f"the grammar was not compiled within {COMPILE_SECONDS:g} s: simplify it") from None


class CompiledGrammar:
    """A grammar that some token may begin; see `GrammarCompiler.compile`. Thread-safe."""

    def __init__(self, tokenizer: GrammarTokenizer, grammar: str) -> None:
        self.tokenizer = tokenizer
        self._grammar = grammar
        started = time.thread_time()
        self._first = tokenizer.new_matcher(grammar)
        self._seconds = time.thread_time() - started
        mask = tokenizer.trim(self._first.compute_bitmask(), tokenizer.all_mask)
        _raise_error(self._first)
        if not mask.any():
            raise GrammarError("no token of this model begins a text that matches the grammar")
        self._probe()

    def _probe(self) -> None:
        """Compute the first masks of some text: many a grammar that is too costly fails there."""
        matcher, started = GrammarMatcher(self), time.thread_time()
        ids: list[int] = []
        while len(ids) < PROBED_MASKS and (allowed := matcher.allowed(ids)) is not None:
            texts = np.flatnonzero(unpack_mask(allowed & self.tokenizer.text_mask))
            if not texts.size:
                break
            ids.append(int(texts[texts.size // 2]))
        if time.thread_time() - started > PROBED_MASKS * PROBED_MASK_SECONDS:
            raise GrammarError(TOO_COSTLY)

    def new_matcher(self) -> LLMatcher:
        """llguidance's matcher before the first token. All share the states of one lexer."""
        return self._first.deep_copy()

    def renew(self) -> LLMatcher:
        """Like `new_matcher`, with a new lexer: the texts so far may have brought the old one to its limit.

        Raises:
            GrammarError: compiling it again would take too long.
        """
        if self._seconds > RENEWAL_SECONDS:
            raise GrammarError(TOO_COSTLY)
        self._first = self.tokenizer.new_matcher(self._grammar)
        return self.new_matcher()


class GrammarMatcher:
    """The state of one text under a grammar. Not thread-safe.

    Its methods take all generated ids, without the prompt, and roll back to the prefix that they know: the answer is a
    function of these ids alone.
    """

    def __init__(self, grammar: CompiledGrammar, seconds_per_mask: float = math.inf) -> None:
        """
        Args:
            seconds_per_mask: CPU time that masks may take on average; a costlier grammar fails.
        """
        self._grammar = grammar
        self._seconds_per_mask = seconds_per_mask
        self._budget = INITIAL_BUDGET_SECONDS
        self._tokenizer = grammar.tokenizer
        self._matcher = grammar.new_matcher()
        # The ids of the last call, as far as the grammar allows them.
        self._ids: list[int] = []
        # Index of the first end token, which llguidance is not given; None if there is none.
        self._end: int | None = None

    def allowed(self, generated: list[int]) -> TokenMask | None:
        """The mask of the tokens that may follow `generated`; None if the grammar does not allow `generated` itself.

        After an end token (`ignore_eos`), only end tokens are allowed.

        Raises:
            GrammarError: the grammar is too costly here, or no token of the model continues the text.
        """

        def compute_mask(matcher: LLMatcher) -> TokenMask:
            possible = self._tokenizer.all_mask if matcher.is_accepting() else self._tokenizer.text_mask
            return self._tokenizer.trim(matcher.compute_bitmask(), possible)

        mask = self._after(generated, compute_mask)
        if self._end is not None and len(self._ids) == len(generated):
            return self._tokenizer.end_mask
        if mask is not None and not mask.any():
            raise GrammarError(f"after {len(generated)} tokens no token of this model continues a text that matches")
        return mask

    def forced(self, generated: list[int], limit: int) -> list[int]:
        """The next tokens after `generated` as far as the grammar leaves no choice, at most `limit`.

        Raises:
            GrammarError: the grammar is too costly here.
        """

        def compute_forced(matcher: LLMatcher) -> list[int]:
            end_ids = self._tokenizer.end_ids
            ends = len(end_ids) == 1 and matcher.is_stopped()
            return list(end_ids) if ends else matcher.compute_ff_tokens()

        forced = (self._after(generated, compute_forced) or [])[: max(0, limit)]
        return list(itertools.takewhile(lambda token: token < self._tokenizer.logits, forced))

    def _after(self, generated: list[int], compute: Callable[[LLMatcher], T]) -> T | None:
        """`compute` of the matcher after `generated`; None after an end token or if the grammar does not allow them."""
        result, started = None, time.thread_time()
        for anew in (False, True):
            if anew:
                # Other texts or rejected drafts may have used up a limit.
                self._matcher, self._ids, self._end = self._grammar.renew(), [], None
            if self._follow(generated) and self._end is None:
                result = compute(self._matcher)
            if not self._matcher.is_error():
                spent = time.thread_time() - started
                self._budget = min(INITIAL_BUDGET_SECONDS, self._budget + self._seconds_per_mask - spent)
                if self._budget < 0:
                    raise GrammarError(TOO_COSTLY)
                return result
        _raise_error(self._matcher)
        return None

    def _follow(self, generated: list[int]) -> bool:
        """Bring the matcher to `generated`, as far as the grammar allows it; return whether it allows all of it."""
        known = common_prefix_length(self._ids, generated)
        consumed = len(self._ids) if self._end is None else self._end
        if known < consumed:
            self._matcher.rollback(consumed - known)
        del self._ids[known:]
        if self._end is not None and known <= self._end:
            self._end = None
        for token in generated[known:]:
            if not self._append(token):
                return False
            self._ids.append(token)
        return True

    def _append(self, token: int) -> bool:
        """Take the next token, if the grammar allows it; return whether it does."""
        if token in self._tokenizer.end_ids:
            if self._end is None and self._matcher.is_accepting():
                self._end = len(self._ids)
            return self._end is not None
        if self._end is not None or token >= self._tokenizer.logits:
            return False
        return self._matcher.try_consume_tokens([token]) == 1


def define_tokenizer(tokenizer: Tokenizer) -> str:
    """Return the `tokenizer.json` of `tokenizer`, without padding and truncation, which must not change its tokens."""
    # The large parts stay text.
    parts = msgspec.json.decode(tokenizer.to_str(), type=dict[str, msgspec.Raw])
    parts |= dict.fromkeys(("padding", "truncation"), msgspec.Raw(b"null"))
    return msgspec.json.encode(parts).decode()


def find_problem(grammar: str) -> str:
    """Return why `grammar` is invalid for any tokenizer; empty if it is not."""
    from llguidance import LLMatcher

    problem = LLMatcher.validate_grammar(grammar, limits=_parser_limits())
    return "" if problem.startswith("WARNING") else _shorten(problem)


@functools.cache
def _compile_thread() -> ThreadPoolExecutor:
    thread = ThreadPoolExecutor(1, "grammar")
    usual_size = threading.stack_size(COMPILE_STACK)
    try:
        # Starts the thread.
        thread.submit(int).result()
    finally:
        threading.stack_size(usual_size)
    return thread


def _raise_error(matcher: LLMatcher) -> None:
    """Raise GrammarError if `matcher` has failed."""
    if matcher.is_error():
        if NO_TEXT_MATCHES in matcher.get_error():
            raise GrammarError("no text matches the grammar")
        raise GrammarError(f"the grammar is invalid or too costly: {_shorten(matcher.get_error())}")


def _parser_limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)


def _shorten(reason: str) -> str:
    return " ".join(reason.split())[:MAX_REASON_CHARACTERS]


def _pack(ids: Iterable[int], size: int) -> TokenMask:
    """The mask of `ids` for a vocabulary of `size`."""
    allowed = np.zeros(-(-size // 32) * 32, np.bool_)
    allowed[list(ids)] = True
    return np.packbits(allowed, bitorder="little")
