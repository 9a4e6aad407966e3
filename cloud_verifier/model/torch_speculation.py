"""Speculation by a draft in PyTorch, where the target runs: the drafts of all sessions grow together.

The draft is a model like any target, with a runner and a pool of its own; each of its forwards brings every session
that drafts just then one token further. What it says need not be what a board's quantised graph says: the text is the
same.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from cloud_verifier.model.batch import Piece
from cloud_verifier.model.kv_cache import Text
from cloud_verifier.model.runner import Chosen, Runner, Wanted
from cloud_verifier.model.speculation import MOST_ROUNDS, Guesses, Speculation, check_tokens
from cloud_verifier.model.target import Target, runner_of
from edge_runtime.protocol.errors import TargetError
from edge_runtime.protocol.sampling import Sampling


class Drafting(Speculation):
    """A draft that runs as the target does, shared by all sessions."""

    runner: Runner

    def __init__(self, model: Any, target: Target, tokens: int, most_rounds: int = MOST_ROUNDS) -> None:
        """
        Args:
            model: a causal language model of transformers that was loaded for `attention.NAME`, on the CPU.

        Raises:
            InputError: `tokens` is not what one forward can verify.
            TargetError: the draft has another vocabulary.
        """
        check_tokens(tokens)
        size = model.config.vocab_size
        if size != target.vocabulary_size:
            raise TargetError(f"the draft has {size} tokens, {target.version} has {target.vocabulary_size}")
        self.vocabulary = target.vocabulary
        self.tokens = tokens
        self.most_rounds = most_rounds
        self.limit = min(target.context, model.config.max_position_embeddings)
        model = model.to(device=target.device, dtype=target.dtype).eval()
        self.runner = runner_of(model, self.limit)

    def guesses(self) -> Guesses:
        return Growing(self)


class Growing(Guesses):
    """The draft's view of one session's text."""

    def __init__(self, drafting: Drafting) -> None:
        self._drafting = drafting
        self._text = Text()
        # What the pool holds of the text, and of guesses behind it that may have been wrong.
        self._ids: list[int] = []

    @property
    def text(self) -> Text:
        return self._text

    def behind(self, ids: list[int], count: int, sampling: Sampling) -> Generator[Wanted, Chosen | None, list[int]]:
        """Drafts up to `count` tokens behind `ids`, and returns them; fewer where the draft's context ends."""
        count = min(count, self._drafting.limit - len(ids))
        if count < 1:
            return []
        held = min(self._text.length, len(ids) - 1)
        while self._ids[:held] != ids[:held]:
            held -= 1
        self._text.length = held
        self._ids = ids[:held]
        unread = ids[held:]
        most = self._drafting.runner.prompt_rows
        while len(unread) > most:
            yield from self._read(unread[:most], None)
            unread = unread[most:]
        guesses: list[int] = []
        while len(guesses) < count:
            chosen = yield from self._read(unread, sampling)
            assert chosen is not None
            guesses.append(chosen[len(unread) - 1].token)
            unread = guesses[-1:]
        return guesses

    def _read(self, ids: list[int], sampling: Sampling | None) -> Generator[Wanted, Chosen | None, Chosen | None]:
        piece = Piece.of_chain(self._text, ids)
        piece.sampling, piece.runner = sampling, self._drafting.runner
        chosen = yield piece
        self._ids += ids
        return chosen
