"""The contents of one forward: segments of several sequences, their rows concatenated.

A row attends to the cached sequence before its segment, to a prefix of the rows of its segment, and to itself. That
expresses both a chain of tokens and a chain with sibling tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from cloud_verifier.model.kv_cache import CachedSequence, CacheShape, KVCachePool
from cloud_verifier.model.sampling import RowSampling, SampledTokens
from cloud_verifier.model.tree import TokenTree
from edge_runtime.protocol.logits_processing import SequenceProcessor
from edge_runtime.protocol.sampling import Sampling


def do_nothing() -> None:
    """What the host does while a forward runs, if there is nothing to do."""


class SegmentRunner(Protocol):
    """What the scheduler needs of a model runner; see `runner.TargetRunner`. Pools are made by `shape.make_pool`."""

    @property
    def shape(self) -> CacheShape: ...

    max_rows: int
    max_round_rows: int
    max_segments: int
    max_prefill_rows: int
    runs_ahead: bool
    exact: bool

    def run(
        self,
        pool: Any,
        segments: Sequence[Segment],
        meanwhile: Callable[[], object] = do_nothing,
        continues: bool = False,
    ) -> Sequence[SampledTokens | None]: ...

    def warm_up(self, pool: Any) -> None: ...

    def measure_workspace(self) -> int: ...


class AttentionSpan(NamedTuple):
    """How far back a layer attends.

    Attributes:
        size: 0 for full attention; otherwise tokens of the sliding window, the row itself included, or of a chunk.
        chunked: a row attends to the tokens of its own chunk (Llama 4), rather than to the last `size` tokens.
    """

    size: int = 0
    chunked: bool = False

    def first_visible(self, position: int) -> int:
        """The first position that a row at `position` attends to; not above 0 if it attends to all."""
        if not self.size:
            return 0
        return position - position % self.size if self.chunked else position - self.size + 1


FULL_SPAN = AttentionSpan()


@dataclass(slots=True)
class Segment:
    """Tokens that follow one cached sequence.

    Attributes:
        sequence: the cached tokens before the segment.
        ids, positions: token id and absolute position of each row.
        visible_prefix: how many leading rows of the segment each row attends to, in addition to itself.
        sampling: how the token after each row is sampled; None if no sampling is wanted (prefill).
        adapter_slot: LoRA slot that the rows go through; 0 is the base model.
        keep_all: extend the sequence by all rows right after the forward (see `KVCachePool.keep`). Otherwise the
            submitter of the segment decides which rows stay.
        runner: the runner of the model that the segment is for; None is that of the session's target.
        next_id: the token that follows the segment, if known, which a runner may read ahead.
    """

    sequence: CachedSequence
    ids: list[int]
    positions: list[int]
    visible_prefix: list[int]
    sampling: RowSampling | None = None
    adapter_slot: int = 0
    keep_all: bool = False
    runner: SegmentRunner | None = None
    next_id: int | None = None

    @classmethod
    def from_tree(
        cls,
        sequence: CachedSequence,
        tree: TokenTree,
        sampling: Sampling,
        adapter_slot: int = 0,
        *,
        processor: SequenceProcessor | None = None,
        logprobs: int = 0,
    ) -> Segment:
        """A segment that scores all nodes of `tree`.

        Args:
            processor: of the text up to and including node 0; None if logits are not processed.
            logprobs: see `RowSampling`.
        """
        return cls(
            sequence=sequence,
            ids=tree.ids,
            positions=tree.positions,
            visible_prefix=tree.visible_prefix,
            sampling=RowSampling(
                sampling,
                [position + 1 for position in tree.positions],
                processor=processor,
                paths=[tree.path(row) for row in range(len(tree))] if processor else (),
                logprobs=logprobs,
            ),
            adapter_slot=adapter_slot,
        )

    @classmethod
    def from_tokens(
        cls,
        sequence: CachedSequence,
        ids: list[int],
        *,
        adapter_slot: int = 0,
        sampling: Sampling | None = None,
        processor: SequenceProcessor | None = None,
        runner: SegmentRunner | None = None,
    ) -> Segment:
        """A segment that extends the sequence by the chain `ids`.

        Args:
            processor: of the text with all of `ids`; only the token after the last row is then sampled correctly.
        """
        positions = list(range(sequence.length, sequence.length + len(ids)))
        unsampled: list[list[int] | None] = [None] * (len(ids) - 1)
        return cls(
            sequence=sequence,
            ids=ids,
            positions=positions,
            visible_prefix=list(range(len(ids))),
            sampling=RowSampling(
                sampling,
                [position + 1 for position in positions],
                processor=processor,
                paths=[*unsampled, []] if processor else (),
            )
            if sampling
            else None,
            adapter_slot=adapter_slot,
            keep_all=True,
            runner=runner,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def attention_mask(self) -> torch.Tensor:
        """(rows, cached tokens + rows) bool: what each row attends to."""
        rows = len(self.ids)
        columns = torch.arange(rows)
        own = (columns < torch.tensor(self.visible_prefix)[:, None]) | torch.eye(rows, dtype=torch.bool)
        return torch.cat([torch.ones(rows, self.sequence.length, dtype=torch.bool), own], 1)


class SegmentCache(NamedTuple):
    """The part of the KV cache that a segment uses in one forward, as views by layer.

    Attributes:
        page_tokens: tokens per page.
        pages: for each page of the sequence and the segment, its tokens by layer: (2, heads, tokens, size) of keys and
            values.
        new_rows: likewise the tokens of the segment, for each page that they are on.
    """

    page_tokens: int
    pages: list[tuple[torch.Tensor, ...]]
    new_rows: list[tuple[torch.Tensor, ...]]

    @classmethod
    def of(cls, pool: KVCachePool, segment: Segment) -> SegmentCache:
        page_tokens, past = pool.page_tokens, segment.sequence.length
        length = past + len(segment)
        pages, new_rows = [], []
        for index, page in enumerate(segment.sequence.pages[: -(-length // page_tokens)]):
            view, begin = pool.view(page), index * page_tokens
            stop = min(page_tokens, length - begin)
            pages.append(view[:, :, :, :stop].unbind(0))
            if past < begin + stop:
                new_rows.append(view[:, :, :, max(0, past - begin) : stop].unbind(0))
        return cls(page_tokens, pages, new_rows)


@dataclass(slots=True)
class ForwardBatch:
    """One forward on a CPU.

    Attributes:
        starts: the first row of each segment.
        padding: rows of the forward after those of the segments, which repeat the last one.
        caches: the KV cache of each segment.
        lora_mask: which adapter columns each row uses (see `lora.LoRAAdapters`); None if no row uses an adapter.
    """

    segments: list[Segment]
    starts: list[int]
    padding: int
    caches: list[SegmentCache]
    lora_mask: torch.Tensor | None = None
    _visible: dict[AttentionSpan, list[tuple[int, torch.Tensor | None]]] = field(default_factory=dict)
    _grouped: dict[tuple[AttentionSpan, int, torch.dtype | None], list[tuple[int, torch.Tensor | None]]] = field(
        default_factory=dict
    )

    @classmethod
    def from_segments(cls, pool: KVCachePool, segments: list[Segment], min_rows: int = 1) -> ForwardBatch:
        """The forward of `segments`, padded to `min_rows`."""
        starts, rows = [], 0
        for segment in segments:
            starts.append(rows)
            rows += len(segment)
        return cls(segments, starts, max(0, min_rows - rows), [SegmentCache.of(pool, segment) for segment in segments])

    def long_rope_rows(self, rows_of: Callable[[Segment], list[bool]]) -> torch.Tensor:
        """(rows,) bool: whether each row uses the second set of RoPE frequencies, by `LengthScaledRope.long_rows`."""
        is_long = [is_long for segment in self.segments for is_long in rows_of(segment)]
        return torch.tensor(is_long + is_long[-1:] * self.padding)

    def visible_keys(self, span: AttentionSpan) -> list[tuple[int, torch.Tensor | None]]:
        """What the rows of each segment attend to in a layer of the given span.

        Returns for each segment the first key that any of its rows attends to, and the attention mask (rows, keys from
        there on); None if all rows attend to all of these.
        """
        known = self._visible.get(span)
        if known is None:
            known = self._visible[span] = [_visible_keys(segment, span) for segment in self.segments]
        return known

    def grouped_masks(
        self, span: AttentionSpan, group: int, dtype: torch.dtype | None
    ) -> list[tuple[int, torch.Tensor | None]]:
        """The masks of `visible_keys` for the rows of `group` query heads, one head after the other.

        Args:
            dtype: of masks of 0 and -inf, which `scaled_dot_product_attention` makes from others; None for bool.
        """
        known = self._grouped.get((span, group, dtype))
        if known is None:
            known = [(first, _grouped_mask(mask, group, dtype)) for first, mask in self.visible_keys(span)]
            self._grouped[span, group, dtype] = known
        return known


def _grouped_mask(mask: torch.Tensor | None, group: int, dtype: torch.dtype | None) -> torch.Tensor | None:
    if mask is None:
        return None
    mask = mask.repeat(group, 1) if group > 1 else mask
    return mask if dtype is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _visible_keys(segment: Segment, span: AttentionSpan) -> tuple[int, torch.Tensor | None]:
    firsts = [span.first_visible(position) for position in segment.positions]
    start = max(0, min(firsts))
    if len(segment) == 1:
        return start, None
    mask = segment.attention_mask()
    if max(firsts) > 0:
        # A cached token is at its own position.
        positions = torch.cat([torch.arange(segment.sequence.length), torch.tensor(segment.positions)])
        mask &= positions >= torch.tensor(firsts)[:, None]
    return start, mask[:, start:]
