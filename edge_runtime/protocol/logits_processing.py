"""Logits processing: how bias, penalties, minimum length and grammar change the logits before a token is chosen.

Every processor is part of the target's distribution p of the sampling rule (`sampling`), and a function of the ids of
the text so far and of where its prompt ended. Verifier, board, server-side drafts and the reference therefore compute
the same in any round, batch and plan, and after a lost session is reopened. The order is that of transformers'
`generate`; for the logit x_i of token i, in float32 and rounded after every operation:

    1. logit_bias            x_i + bias_i
    2. repetition_penalty    x_i * penalty if x_i < 0 else x_i / penalty, if i occurs in the prompt or was generated
    3. presence_penalty and  x_i - (frequency_penalty * n_i + presence_penalty), if i was generated n_i > 0 times; the
       frequency_penalty     subtrahend is computed in float64 and rounded once. OpenAI's definition
    4. min_tokens            -inf for every token that ends the text, while fewer than min_tokens were generated
    5. grammar               -inf for every token with which the generated text cannot match; see `grammar`. Where only
                             tokens that end the text match, step 4 does not apply, so that some token always remains
    6. temperature, top-k, top-p, min-p, noise, argmax: see `sampling`

The tokens that end the text are the target's own, unless `ignore_eos`, and `Sampling.stop_ids`. Log-probabilities that
a client asks for are those of the model's own distribution, before all of this.

Test vectors: text 5 7 | 7 9 7 (prompt | generated), logits x_i = 0.5 i - 2 for the ids 0 to 9, logit_bias {3: 1.25},
repetition_penalty 1.3, presence_penalty 0.4, frequency_penalty 0.3, end token 8, min_tokens 4:

    processed   -2, -1.5, -1, 0.75, 0, 0.38461539149284363, 1, 0.1538461446762085, -inf, 1.2230770587921143
    choice      9 at temperature 0; at temperature 1: 7 with seed 0, 5 with seed 1; with min_p 0.6: 9 and 6
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edge_runtime.protocol.sampling import Ids, Sampling, common_prefix_length

Logits = npt.NDArray[np.float32]
# One bit per token id, least significant first, padded with zeros.
TokenMask = npt.NDArray[np.uint8]

# Tokens for which memory is reserved at first. Chosen; it doubles on demand.
INITIAL_TOKENS = 64


class TokenConstraint(Protocol):
    """What restricts the next token of a text: `grammar.GrammarMatcher`."""

    def allowed(self, generated: list[int], /) -> TokenMask | None:
        """The tokens that may follow `generated`; None if that text itself is not allowed, or everything is."""

    def forced(self, generated: list[int], limit: int, /) -> list[int]:
        """The next tokens after `generated` as far as only one is allowed at each position, at most `limit`."""


class LogitChanges(NamedTuple):
    """How the logits at one position are changed: the processors' effect there.

    Attributes:
        ids: (m,) int64, distinct token ids; the logits of all others are changed by `allowed` alone.
        bias: (m,) float32, added first.
        penalties: (m,) float32, by which the result is divided if positive, else multiplied; 1 changes nothing.
        subtracted: (m,) float32, subtracted last; infinite for tokens that must not follow.
        allowed: mask of the tokens that may follow; None if all may.
    """

    ids: Ids
    bias: Logits
    penalties: Logits
    subtracted: Logits
    allowed: TokenMask | None = None

    def below(self, size: int) -> LogitChanges:
        """The changes of ids below `size`."""
        if not self.ids.size or int(self.ids.max()) < size:
            return self
        known = self.ids < size
        ids, bias, penalties, subtracted, allowed = self
        return LogitChanges(ids[known], bias[known], penalties[known], subtracted[known], allowed)

    def apply(self, logits: Logits, head_ids: npt.NDArray[np.integer] | None = None) -> Logits:
        """Return a processed copy of `logits` (n,).

        Args:
            head_ids: (n,) the ids that the logits are for, ascending; None if they are 0, 1, 2, ...
        """
        processed = logits.copy()
        if head_ids is None:
            ids, bias, penalties, subtracted, _ = self.below(logits.size)
        else:
            ids = head_ids.searchsorted(self.ids)
            ids[ids == head_ids.size] = 0
            known = head_ids[ids] == self.ids
            ids, bias = ids[known], self.bias[known]
            penalties, subtracted = self.penalties[known], self.subtracted[known]
        x = processed[ids] + bias
        processed[ids] = np.where(x < 0, x * penalties, x / penalties) - subtracted
        if self.allowed is not None:
            bits = unpack_mask(self.allowed)
            covered = bits[: logits.size] if head_ids is None else bits[head_ids[: head_ids.searchsorted(bits.size)]]
            processed[: covered.size][~covered] = -np.inf
            processed[covered.size :] = -np.inf
        return processed


class SequenceProcessor:
    """Computes the changes of the logits after any prefix of one text. Not thread-safe.

    It counts tokens as they are appended and truncated, so that a token costs the same in a long text as in a short
    one.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_length: int,
        end_ids: Collection[int] = (),
        constraint: TokenConstraint | None = None,
    ) -> None:
        """
        Args:
            prompt_length: number of tokens of the text that were not generated.
            end_ids: the target's own end-of-text tokens.
            constraint: matcher of `sampling.grammar`.
        """
        self.sampling = sampling
        self.prompt_length = prompt_length
        self._constraint = constraint
        self._end_ids = end_ids_of(sampling, end_ids)
        self._text: list[int] = []
        # Every token that the text contains or the parameters name has a slot: an index of the arrays below.
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(INITIAL_TOKENS, np.int64)
        self._bias = np.zeros(INITIAL_TOKENS, np.float32)
        self._occurrences = np.zeros(INITIAL_TOKENS, np.int64)
        self._generated = np.zeros(INITIAL_TOKENS, np.int64)
        for token, bias in sampling.logit_bias.items():
            slot = self._slot(token)
            self._bias[slot] = bias
        self._end_slots = [self._slot(token) for token in self._end_ids] if sampling.min_tokens else []
        self._penalizes_generated = bool(sampling.presence_penalty or sampling.frequency_penalty)

    @property
    def length(self) -> int:
        """Number of tokens of the text."""
        return len(self._text)

    def sync_to(self, ids: list[int]) -> None:
        """Make `ids` the text."""
        self.truncate(common_prefix_length(self._text, ids))
        self.extend(ids[len(self._text) :])

    def extend(self, tokens: Sequence[int]) -> None:
        """Append `tokens` to the text."""
        start = len(self._text)
        self._text += tokens
        self._count(start, 1)

    def truncate(self, length: int) -> None:
        """Drop all tokens of the text after the first `length`."""
        if length < len(self._text):
            self._count(length, -1)
            del self._text[length:]

    def changes(self) -> LogitChanges:
        """The changes of the logits after the text."""
        sampling, used = self.sampling, len(self._slots)
        penalties = np.ones(used, np.float32)
        if sampling.repetition_penalty != 1.0:
            penalties[self._occurrences[:used] > 0] = sampling.repetition_penalty
        subtracted = np.zeros(used, np.float32)
        if self._penalizes_generated:
            counts = self._generated[:used]
            subtracted += sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
        generated = len(self._text) - self.prompt_length
        allowed = self._constraint.allowed(self._text[self.prompt_length :]) if self._constraint else None
        if generated < sampling.min_tokens and (allowed is None or self._leaves_others(allowed)):
            subtracted[self._end_slots] = np.inf
        return LogitChanges(self._ids[:used].copy(), self._bias[:used].copy(), penalties, subtracted, allowed)

    def changes_after(self, ids: list[int]) -> LogitChanges:
        """Make `ids` the text, and return the changes of the logits after it."""
        self.sync_to(ids)
        return self.changes()

    def forced_after(self, ids: list[int], limit: int) -> list[int]:
        """The next tokens after the text `ids` as far as the grammar leaves no choice, at most `limit`."""
        return self._constraint.forced(ids[self.prompt_length :], limit) if self._constraint else []

    def _leaves_others(self, allowed: TokenMask) -> bool:
        """Whether a token may follow that does not end the text."""
        rest = allowed.copy()
        for token in self._end_ids:
            if token // 8 < rest.size:
                rest[token // 8] &= ~np.uint8(1 << token % 8)
        return bool(rest.any())

    def _count(self, start: int, sign: int) -> None:
        """Count the tokens of the text from `start` on, or with sign -1 no longer."""
        if self.sampling.repetition_penalty != 1.0:
            for token, count in Counter(self._text[start:]).items():
                slot = self._slot(token)
                self._occurrences[slot] += sign * count
        if self._penalizes_generated:
            for token, count in Counter(self._text[max(start, self.prompt_length) :]).items():
                slot = self._slot(token)
                self._generated[slot] += sign * count

    def _slot(self, token: int) -> int:
        """The slot of `token`; the arrays may be new ones afterwards."""
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = len(self._slots)
            if slot == self._ids.size:
                for name in ("_ids", "_bias", "_occurrences", "_generated"):
                    column = getattr(self, name)
                    setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
            self._ids[slot] = token
        return slot


def unpack_mask(mask: TokenMask, count: int | None = None) -> npt.NDArray[np.bool_]:
    """The mask as one boolean for each of the first `count` ids, or for all its bits. (bytes,) -> (count,)."""
    return np.unpackbits(mask, count=count, bitorder="little").view(np.bool_)


def end_ids_of(sampling: Sampling, target_end_ids: Collection[int]) -> frozenset[int]:
    """The tokens that end a text: the target's own, unless `ignore_eos`, and `stop_ids`."""
    return frozenset(sampling.stop_ids).union(() if sampling.ignore_eos else target_end_ids)


def make_processor(
    sampling: Sampling,
    prompt_length: int,
    end_ids: Collection[int] = (),
    constraint: TokenConstraint | None = None,
) -> SequenceProcessor | None:
    """The processor of a text, or None if its logits are not processed. Arguments as for `SequenceProcessor`."""
    return SequenceProcessor(sampling, prompt_length, end_ids, constraint) if sampling.processes_logits else None
