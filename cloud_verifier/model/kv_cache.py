"""Paged KV cache: a bounded pool of pages from which sequences take and to which they return memory.

On an accelerator the pool is one allocation made at start, and pages are small so that little memory is left unused in
a sequence's last page. On a CPU a page is allocated when it is first needed, and freed once it has not been needed for
a while (`trim`). CPU pages are so large that most sequences have one: the keys of a sequence are then a view, and
memory past its tokens costs nothing because it is never touched. Live sequences of a CPU pool have no bound of their
own; the session store limits them.

Sequences with a common prefix can share its pages. A page that several sequences hold is never written: a sequence that
is about to write to one takes another page first (copy on write).

All pages belong to the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import psutil
import torch

# Formats of keys and values that take fewer bytes than the model's dtype, by name; on a GPU. Rounding is a part of the
# target's version: every key and value is rounded before anything attends to it.
CACHE_FORMATS = {"fp8": torch.float8_e4m3fn}
# Tokens per page by device type; see the module docstring for the trade-off.
PAGE_TOKENS = {"cuda": 64, "cpu": 512}
# Pages beyond those for the sequences' tokens: the drafts and siblings of a round occupy the cache until verified.
SLACK_PAGES = 64
# Tokens of a CPU page whose memory is touched at allocation. Resident memory then depends on the peak number of
# sessions, and does not creep up with every sequence that is slightly longer than those before.
PRETOUCHED_TOKENS = 96
# A CPU pool keeps prefixes of closed sessions while all its pages take at most this share of the memory that was free
# when it was made. Chosen: a verifier on a CPU shares its machine with other programs.
RETENTION_MEMORY_SHARE = 0.25


# Default capacity in tokens where memory sets no closer limit: the most on a CPU, and that of a tensor-parallel group.
CACHE_TOKENS = 1 << 18
# Share of the free memory that the caches of live sessions may take by default: on an accelerator, which nothing else
# uses; there if further versions are going to be loaded beside the first; and on a CPU. Chosen.
DEVICE_SHARE, DEVICE_SHARE_OF_SEVERAL, CPU_SHARE = 0.92, 0.5, 0.5


def affordable_tokens(shapes: Sequence[CacheShape], *, workspace: int = 0, several: bool = False) -> int:
    """How many tokens all sessions together may have by default, by the memory that is free now: at least 1.

    Args:
        shapes: of the pools that are going to be made with this capacity, all on one device.
        workspace: bytes to leave free besides.
        several: further models are going to be loaded.
    """
    device = shapes[0].device
    bytes_per_token = sum(shape.bytes_per_token for shape in shapes)
    if device.type == "cuda":
        # torch's own reserves are free, too.
        torch.cuda.empty_cache()
        free, share = torch.cuda.mem_get_info(device)[0], DEVICE_SHARE_OF_SEVERAL if several else DEVICE_SHARE
    else:
        free, share = psutil.virtual_memory().available, CPU_SHARE
    if not bytes_per_token:
        return CACHE_TOKENS
    tokens = int(share * free - workspace) // bytes_per_token
    if device.type == "cuda":
        # Whole pages, without those that the pool adds.
        page = PAGE_TOKENS["cuda"]
        return max(page, tokens // page * page - (SLACK_PAGES + 1) * page)
    return max(1, min(tokens, CACHE_TOKENS))


def allocation_granularity(device: str) -> int:
    """Tokens by which a sequence's memory grows on `device`: a page, or 1 on a CPU, where memory is taken on write."""
    return 1 if torch.device(device).type == "cpu" else PAGE_TOKENS["cuda"]


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values in the dtype of the cache: the nearest numbers that it has."""
    if values.dtype == dtype:
        return values
    # torch makes NaN of what is larger.
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def as_stored(values: torch.Tensor) -> torch.Tensor:
    """Numbers of 8 bits as bytes: torch gathers none of them, and Triton's interpreter converts few of them right."""
    return values.view(torch.uint8) if values.dtype.itemsize == 1 else values


class KVCacheFull(Exception):
    """The pool has too few free pages."""


def reclaim_nothing() -> bool:
    """The `CachePool.reclaim` of a pool without a prefix cache."""
    return False


class CachePool(Protocol):
    """What the engine needs of a pool: the caches of sequences in the fast tier, or those in the general tier.

    Attributes:
        preallocated: the pool takes its memory when it is made, and keeps it.
        reclaim: releases one sequence that is kept only for reuse, when the pool needs memory; returns whether there
            was one. Set by the prefix cache.
    """

    preallocated: bool
    reclaim: Callable[[], bool]

    def keep(self, sequence: CachedSequence, rows: list[int]) -> None: ...

    def release(self, sequence: CachedSequence) -> None: ...

    def shareable(self, source: CachedSequence, length: int) -> int:
        """How many of the first `length` tokens of `source` another sequence can share, once they are cached."""

    def share(self, source: CachedSequence, sequence: CachedSequence, length: int) -> None:
        """Let the empty `sequence` begin with the first `length` tokens of `source`, a length that is shareable."""

    def retain(self, sequence: CachedSequence) -> int:
        """Release those tokens of the finished `sequence` that cannot be shared; return how many are left."""

    def trim(self) -> None:
        """Free memory that has not been needed since the last call; the pool allocates it again on demand."""


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
        dtype: of the cached keys and values, which may be smaller than the model's.
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
        capacity_pages: pages that an accelerator's pool can give to sequences. On a CPU, with more pages than these in
            use, no sequence is kept only for reuse.
        preallocated, reclaim: see `CachePool`.
        slabs: tensors (pages, layers, 2, heads, page, head size); index 0 of the third dimension holds keys, 1 values.
            One slab on an accelerator; on a CPU one for every page so far, empty if the page was given back.
    """

    def __init__(self, shape: KVCacheShape, tokens: int) -> None:
        self.shape = shape
        self.page_tokens = PAGE_TOKENS.get(shape.device.type, PAGE_TOKENS["cuda"])
        self.preallocated = shape.device.type != "cpu"
        self.capacity_pages = -(-tokens // self.page_tokens) + SLACK_PAGES
        self.reclaim: Callable[[], bool] = reclaim_nothing
        self._free: list[int] = []
        # On a CPU: pages without memory, and how many of the free ones were never needed since the last `trim`.
        self._given_back: list[int] = []
        self._least_free = 0
        # By page in use: how many sequences hold it.
        self._holders: dict[int, int] = {}
        self._moves: list[tuple[int, int, int, int]] = []
        self.slabs: list[torch.Tensor] = []
        if self.preallocated:
            # Page 0 belongs to no sequence and is never read: padding rows of a batch are written there.
            self.slabs.append(self._allocate(self.capacity_pages + 1))
            self._free = list(range(self.capacity_pages, 0, -1))
        else:
            affordable = int(RETENTION_MEMORY_SHARE * psutil.virtual_memory().available)
            self.capacity_pages = min(self.capacity_pages, affordable // (shape.bytes_per_token * self.page_tokens))

    def _allocate(self, pages: int) -> torch.Tensor:
        shape = self.shape
        size = (pages, shape.layers, 2, shape.heads, self.page_tokens, shape.head_size)
        slab = torch.empty(size, dtype=shape.dtype, device=shape.device)
        if not self.preallocated:
            slab[..., :PRETOUCHED_TOKENS, :] = 0
        return slab

    @property
    def used_pages(self) -> int:
        """Pages that sequences hold."""
        return len(self._holders)

    def reserve(self, sequence: CachedSequence, length: int) -> None:
        """Give `sequence` the pages for `length` tokens, and sole possession of those after its present length.

        Raises:
            KVCacheFull: too few pages are free; nothing changed.
        """
        first, stop = sequence.length // self.page_tokens, -(-length // self.page_tokens)
        if stop <= len(sequence.pages) and all(self._holders[page] == 1 for page in sequence.pages[first:stop]):
            return
        while True:
            shared = self._shared_pages(sequence, length)
            missing = len(shared) + max(0, stop - len(sequence.pages))
            if self.used_pages + missing <= self.capacity_pages or not missing or not self.reclaim():
                break
        if self.preallocated and missing > len(self._free):
            raise KVCacheFull
        for index in shared:
            self._replace(sequence, index)
        while len(sequence.pages) * self.page_tokens < length:
            sequence.pages.append(self._take_page())

    def release(self, sequence: CachedSequence) -> None:
        """Take back all pages of `sequence`, which is empty afterwards."""
        self._drop_pages(sequence, 0)
        sequence.length = 0

    def shareable(self, source: CachedSequence, length: int) -> int:
        """See `CachePool.shareable`: whole pages on an accelerator, so that none has to be copied."""
        return length - length % self.page_tokens if self.preallocated else length

    def share(self, source: CachedSequence, sequence: CachedSequence, length: int) -> None:
        """See `CachePool.share`. The keys must not differ for another reason, see `Target.key_variant`."""
        assert not sequence.pages, "the sequence is not empty"
        assert length <= source.length, "the source has too few tokens"
        sequence.pages = source.pages[: -(-length // self.page_tokens)]
        sequence.length = length
        for page in sequence.pages:
            self._holders[page] += 1

    def retain(self, sequence: CachedSequence) -> int:
        """See `CachePool.retain`."""
        sequence.length = self.shareable(sequence, sequence.length)
        self._drop_pages(sequence, -(-sequence.length // self.page_tokens))
        return sequence.length

    def trim(self) -> None:
        """See `CachePool.trim`."""
        if self.preallocated:
            return
        # The first ones were free for the longest time.
        unneeded, self._free = self._free[: self._least_free], self._free[self._least_free :]
        for page in unneeded:
            self.slabs[page] = torch.empty(0)
        self._given_back += unneeded
        self._least_free = len(self._free)

    def _shared_pages(self, sequence: CachedSequence, length: int) -> list[int]:
        """Indices of those pages of `sequence` that other sequences hold, and that a growth to `length` writes to."""
        indices = range(sequence.length // self.page_tokens, min(-(-length // self.page_tokens), len(sequence.pages)))
        return [index for index in indices if self._holders[sequence.pages[index]] > 1]

    @torch.inference_mode()
    def _replace(self, sequence: CachedSequence, index: int) -> None:
        """Replace a page of `sequence` that others hold by one of its own, with the tokens that it has there."""
        source, page = sequence.pages[index], self._take_page()
        rows = sequence.length - index * self.page_tokens
        if rows > 0:
            # Only on a CPU: whole pages are shared on an accelerator, and tensor-parallel followers would not see this.
            self.apply_moves()
            self.view(page)[..., :rows, :] = self.view(source)[..., :rows, :]
        self._holders[source] -= 1
        sequence.pages[index] = page

    def _take_page(self) -> int:
        if self._free:
            page = self._free.pop()
        elif self._given_back:
            page = self._given_back.pop()
            self.slabs[page] = self._allocate(1)
        else:
            page = len(self.slabs)
            self.slabs.append(self._allocate(1))
        self._least_free = min(self._least_free, len(self._free))
        self._holders[page] = 1
        return page

    def _drop_pages(self, sequence: CachedSequence, count: int) -> None:
        """Take back all but the first `count` pages of `sequence`; those that nothing holds any more are free."""
        for page in reversed(sequence.pages[count:]):
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._free.append(page)
        del sequence.pages[count:]

    def view(self, page: int) -> torch.Tensor:
        """Keys and values of one page: (layers, 2, heads, page, head size)."""
        return self.slabs[0][page] if self.preallocated else self.slabs[page][0]

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
