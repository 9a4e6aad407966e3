"""Paged KV cache: a bounded pool of pages from which sequences take and to which they return memory.

On an accelerator the pool is one allocation made at start, and pages are small so that little memory is left unused in
a sequence's last page. On a CPU a page is allocated when it is first needed. CPU pages are so large that most sequences
have one: the keys of a sequence are then a view, and memory past its tokens costs nothing because it is never touched.
The CPU pool has no bound of its own; the session store limits it.

All pages belong to the engine's thread.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

# Tokens per page by device type; see the module docstring for the trade-off.
PAGE_TOKENS = {"cuda": 64, "cpu": 512}
# Pages beyond those for the sequences' tokens: the drafts and siblings of a round occupy the cache until verified.
SLACK_PAGES = 64
# Tokens of a CPU page whose memory is touched at allocation. Resident memory then depends on the peak number of
# sessions, and does not creep up with every sequence that is slightly longer than those before.
PRETOUCHED_TOKENS = 96


def allocation_granularity(device: str) -> int:
    """Tokens by which a sequence's memory grows on `device`: a page, or 1 on a CPU, where memory is taken on write."""
    return 1 if torch.device(device).type == "cpu" else PAGE_TOKENS["cuda"]


class KVCacheFull(Exception):
    """The pool has too few free pages."""


class CachePool(Protocol):
    """What the scheduler needs of a pool: the caches of sequences in the fast tier, or those in the general tier."""

    def keep(self, sequence: CachedSequence, rows: list[int]) -> None: ...

    def release(self, sequence: CachedSequence) -> None: ...


class CacheShape(Protocol):
    """What the scheduler needs of the shape of a pool, by which it finds the pool."""

    @property
    def bytes_per_token(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def make_pool(self, tokens: int) -> CachePool: ...


class KVCacheShape(NamedTuple):
    """The properties of a model that determine the layout of its KV cache.

    Attributes:
        heads: most KV heads of a layer.
        head_size: size of the largest key or value.
    """

    layers: int
    heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.heads * self.head_size * self.dtype.itemsize

    def make_pool(self, tokens: int) -> KVCachePool:
        """A pool of `tokens` tokens."""
        return KVCachePool(self, tokens)


class CachedSequence:
    """The pages of one sequence: `length` tokens in `pages`, of which the last is usually not full.

    Attributes:
        prompt_length: how many of the tokens are the prompt; 0 if all that are prefilled before the first round.
        long_rope: its keys are rotated by the second set of frequencies; see `rope.LengthScaledRope`.
    """

    def __init__(self) -> None:
        self.prompt_length = 0
        self.pages: list[int] = []
        self.length = 0
        self.long_rope = False


class KVCachePool:
    """Allocates pages of keys and values to sequences.

    Args:
        tokens: capacity on an accelerator, rounded up to whole pages.

    Attributes:
        page_tokens: tokens per page.
        capacity_pages: pages that an accelerator's pool can give to sequences.
        slabs: tensors (pages, layers, 2, heads, page, head size); index 0 of the third dimension holds keys, 1 values.
            One slab on an accelerator; on a CPU one for every page allocated so far.
    """

    def __init__(self, shape: KVCacheShape, tokens: int) -> None:
        self.shape = shape
        self.page_tokens = PAGE_TOKENS.get(shape.device.type, PAGE_TOKENS["cuda"])
        self._preallocated = shape.device.type != "cpu"
        self.capacity_pages = -(-tokens // self.page_tokens) + SLACK_PAGES
        self._free: list[int] = []
        self._moves: list[tuple[int, int, int, int]] = []
        self.slabs: list[torch.Tensor] = []
        if self._preallocated:
            # Page 0 belongs to no sequence and is never read: padding rows of a batch are written there.
            self.slabs.append(self._allocate(self.capacity_pages + 1))
            self._free = list(range(self.capacity_pages, 0, -1))

    def _allocate(self, pages: int) -> torch.Tensor:
        shape = self.shape
        size = (pages, shape.layers, 2, shape.heads, self.page_tokens, shape.head_size)
        slab = torch.empty(size, dtype=shape.dtype, device=shape.device)
        if not self._preallocated:
            slab[..., :PRETOUCHED_TOKENS, :] = 0
        return slab

    @property
    def used_pages(self) -> int:
        """Pages that sequences hold."""
        return (self.capacity_pages if self._preallocated else len(self.slabs)) - len(self._free)

    def reserve(self, sequence: CachedSequence, length: int) -> None:
        """Give `sequence` the pages for `length` tokens.

        Raises:
            KVCacheFull: too few pages are free; nothing changed.
        """
        missing = -(-length // self.page_tokens) - len(sequence.pages)
        if self._preallocated and missing > len(self._free):
            raise KVCacheFull
        for _ in range(missing):
            if not self._free:
                self.slabs.append(self._allocate(1))
                self._free.append(len(self.slabs) - 1)
            sequence.pages.append(self._free.pop())

    def release(self, sequence: CachedSequence) -> None:
        """Take back all pages of `sequence`, which is empty afterwards."""
        self._free += reversed(sequence.pages)
        sequence.pages, sequence.length = [], 0

    def view(self, page: int) -> torch.Tensor:
        """Keys and values of one page: (layers, 2, heads, page, head size)."""
        return self.slabs[0][page] if self._preallocated else self.slabs[page][0]

    def keep(self, sequence: CachedSequence, rows: list[int]) -> None:
        """Extend `sequence` by the given rows of the last forward, and roll back the others.

        Kept rows are compacted towards the old end of the sequence before the next forward; its length changes at once.

        Args:
            rows: indices of rows written after the sequence, ascending.
        """
        for index, row in enumerate(rows):
            if row != index:
                source, destination = sequence.length + row, sequence.length + index
                self._moves.append((*self._locate(sequence, source), *self._locate(sequence, destination)))
        sequence.length += len(rows)

    def take_moves(self) -> list[tuple[int, int, int, int]]:
        """Return and clear the pending row moves, as (source page, source row, destination page, destination row).

        The caller must perform them before the next forward.
        """
        moves, self._moves = self._moves, []
        return moves

    @torch.inference_mode()
    def apply_moves(self) -> None:
        """Perform the pending row moves. CPU only; on CUDA the forward itself performs them."""
        # In order: a destination row has already been read if any move reads it.
        for from_page, from_row, to_page, to_row in self.take_moves():
            self.view(to_page)[..., to_row, :] = self.view(from_page)[..., from_row, :]

    def _locate(self, sequence: CachedSequence, position: int) -> tuple[int, int]:
        return sequence.pages[position // self.page_tokens], position % self.page_tokens
