"""The runner: one forward over pieces of many texts, and the target's choice behind their rows.

On a CPU a forward has just the rows that there are; on CUDA see `graphs`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from cloud_verifier.model.attention import running
from cloud_verifier.model.batch import Piece, Step
from cloud_verifier.model.kv_cache import Pool, Shape
from cloud_verifier.model.lora import Adapters
from cloud_verifier.model.sampling import Choice, Choices
from edge_runtime.protocol.sampling import Chooser


class Reading(NamedTuple):
    """Ids that are to stand in the cache of a session's text, in pieces as the engine has room."""

    ids: list[int]


class Chosen(Protocol):
    """The target's choices behind a piece, by row."""

    def __getitem__(self, row: int, /) -> Choice: ...


# What a round wants run next; None lets others go first.
Wanted: TypeAlias = Reading | Piece | None


class Runner:
    """One model and its adapters. Several threads may run it, each with a pool of its own.

    Attributes:
        shape: of the pools that it runs with.
        adapters: beside the model.
        most_rows, most_pieces: that one forward can have.
        prompt_rows: of one forward that should be prompts', so that those whose drafts it scores do not wait for long.
        exact: what a row gives does not depend on its company in the last bit either; siblings are not to be scored.
    """

    most_rows = 256
    most_pieces = 1 << 16
    prompt_rows = 128
    exact = False

    def __init__(self, model: Any, shards: int = 1) -> None:
        self.model = model
        self.shape = Shape.of(model, shards)
        self.adapters = Adapters(model)
        self._chooser = Chooser(model.config.vocab_size)

    def run(self, pool: Pool, pieces: Sequence[Piece]) -> list[Chosen | None]:
        """One forward; what the target chooses behind every row of each piece, None for pieces that ask nothing.

        The keys and values of all rows stand behind their texts then, and `Pool.keep` decides which stay.

        Raises:
            PoolFull: nothing was run.
        """
        logits = iter(self.logits(pool, pieces))
        return [
            Choices(next(logits), [place + 1 for place in piece.positions], piece.sampling, self._chooser)
            if piece.sampling
            else None
            for piece in pieces
        ]

    def warm(self, pool: Pool) -> None:
        """Makes ready what the first forwards would have to wait for."""

    def follow(self, pool: Pool) -> None:
        """On CUDA, as one of a team: see `graphs`."""
        raise NotImplementedError

    def end(self) -> None:
        """Lets a team go."""

    @torch.inference_mode()
    def logits(self, pool: Pool, pieces: Sequence[Piece]) -> tuple[torch.Tensor, ...]:
        """One forward; (rows, V) float32 of every piece that asks. Raises PoolFull."""
        pool.settle()
        for piece in pieces:
            pool.reserve(piece.text, piece.text.length + len(piece))
        step = Step.of(pool, list(pieces))
        if any(piece.adapter for piece in pieces):
            step.own_columns = self.adapters.own_columns(
                torch.tensor([piece.adapter for piece in pieces for _ in piece.ids])
            )
        asking = [index for index, piece in enumerate(pieces) if piece.sampling]
        rows = itertools.chain.from_iterable(range(step.starts[i], step.starts[i] + len(pieces[i])) for i in asking)
        with running(step):
            output = self.model(
                input_ids=torch.tensor([list(itertools.chain.from_iterable(piece.ids for piece in pieces))]),
                position_ids=torch.tensor([list(itertools.chain.from_iterable(piece.positions for piece in pieces))]),
                use_cache=False,
                logits_to_keep=torch.tensor(list(rows), dtype=torch.int64),
            )
        return output.logits[0].float().split([len(pieces[index]) for index in asking])
