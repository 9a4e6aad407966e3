"""What one forward is made of: pieces of several texts, their rows one behind the other.

A row sees the text before its piece, the first so many rows of its piece, and itself: that is enough for a chain, and
for siblings beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cloud_verifier.model.kv_cache import Pool, Text
from cloud_verifier.model.tree import Tree
from edge_runtime.protocol.sampling import Sampling


@dataclass(slots=True)
class Piece:
    """Some tokens behind one text.

    Attributes:
        text: what stands before them in the pool.
        ids, positions: one for each row.
        limits: how many rows of the piece, from its first, each row sees beside itself.
        sampling: how the token behind each row is chosen; None where nobody asks.
        adapter: slot of the adapter that these rows go through; 0 is none.
        stays: the text goes on with these rows at once, see `Pool.keep`; else whoever asked for them says which stay.
        runner: that it is for; None is the one of the session's target.
    """

    text: Text
    ids: list[int]
    positions: list[int]
    limits: list[int]
    sampling: Sampling | None = None
    adapter: int = 0
    stays: bool = False
    runner: Any = None

    @classmethod
    def of_tree(cls, text: Text, tree: Tree, sampling: Sampling, adapter: int = 0) -> Piece:
        return cls(text, tree.ids, tree.positions, tree.limits, sampling, adapter)

    @classmethod
    def of_chain(cls, text: Text, ids: list[int], adapter: int = 0) -> Piece:
        """`ids` as they follow the text, only to be read."""
        length = text.length
        return cls(text, ids, list(range(length, length + len(ids))), list(range(len(ids))), None, adapter, stays=True)

    def __len__(self) -> int:
        return len(self.ids)

    def visibility(self) -> torch.Tensor:
        """(rows, text and rows) bool: what each row sees."""
        rows = len(self.ids)
        columns = torch.arange(rows)
        own = (columns < torch.tensor(self.limits)[:, None]) | torch.eye(rows, dtype=torch.bool)
        return torch.cat([torch.ones(rows, self.text.length, dtype=torch.bool), own], 1)


@dataclass(slots=True)
class Step:
    """One forward on a CPU.

    Attributes:
        starts: the first row of each piece.
        masks: what the rows of each piece see; None where that is everything.
        own_columns: which adapter each row goes through (see `adapters.Adapters`); None where none does.
    """

    pool: Pool
    pieces: list[Piece]
    starts: list[int]
    masks: list[torch.Tensor | None]
    own_columns: torch.Tensor | None = None

    @classmethod
    def of(cls, pool: Pool, pieces: list[Piece]) -> Step:
        starts, rows = [], 0
        for piece in pieces:
            starts.append(rows)
            rows += len(piece)
        return cls(pool, pieces, starts, [None if len(piece) == 1 else piece.visibility() for piece in pieces])
