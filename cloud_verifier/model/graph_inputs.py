"""What differs between two forwards on a GPU, as integers: one copy brings them to the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cloud_verifier.model import kernels
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import PAGE_TOKENS
from cloud_verifier.model.rope import LengthScaledRope
from cloud_verifier.model.sampling import GREEDY, as_int64

# As many as a forward of the largest size has rows, so that all streams are in one forward: eight forwards of 128 rows
# take three times as long as one of 1,024.
MAX_SEGMENTS = 1024
# Rows that attend together: so many, if their query heads of one KV head are not fewer or more than these. Chosen:
# tl.dot takes no fewer, and the keys of a round with few tokens are read only once.
MIN_BLOCK_QUERIES, MAX_BLOCK_QUERIES, BLOCK_ROWS = 16, 64, 8


class GraphInputs:
    """The integers that describe one forward of `rows` rows, on the device and, to be filled, in pinned host memory.

    Attributes:
        seeds, temperatures: (rows,) int64 and float64, see `sampling_kernel.SamplingInputs`; 0 for rows that are not
            sampled, or not by that kernel.
        ids, positions: (rows,) token ids and absolute positions.
        pages, offsets: (rows,) where each row's keys and values are written.
        visible_prefix: (rows,) see `Segment`.
        slots: (rows,) LoRA slots.
        long_rope: (rows,) 1 for rows that use the second set of RoPE frequencies, else 0.
        row_spans: (rows,) number of spans of the sequence of each row; 0 for padding rows.
        blocks: (blocks, 3) segment, first row and number of rows of those that attend together.
        work: (blocks x spans, 2) block and span of one piece of attention.
        work_counts: (2,) how many pieces there are: before the first long prefill chunk, and of all segments.
        segments: (segments, 4) cached tokens before the segment, first row, number of rows, pages of a span of keys.
        page_table: (segments, pages of the longest sequence).
        moves: (moves, 4) rows to move in the pool before the forward, see `kernels.move`.
        block_rows: most rows of a block.
        max_spans: most spans of one sequence.
    """

    seeds: torch.Tensor
    temperatures: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    visible_prefix: torch.Tensor
    slots: torch.Tensor
    long_rope: torch.Tensor
    row_spans: torch.Tensor
    blocks: torch.Tensor
    segments: torch.Tensor
    page_table: torch.Tensor
    moves: torch.Tensor
    work_counts: torch.Tensor
    work: torch.Tensor

    def __init__(
        self,
        rows: int,
        context: int,
        group: int,
        device: torch.device,
        *,
        rope: LengthScaledRope | None = None,
        exact: bool = False,
    ) -> None:
        """
        Args:
            context: longest sequence in tokens.
            group: most query heads that share a KV head.
            rope: the rotary embeddings of the model; None if all texts have the same frequencies.
            exact: all sequences have spans of one length, so that a row does not depend on those after it.
        """
        self.rows = rows
        self._rope = rope
        self.block_rows = max(1, MIN_BLOCK_QUERIES // group, min(BLOCK_ROWS, MAX_BLOCK_QUERIES // group))
        max_segments = min(rows, MAX_SEGMENTS)
        blocks = min(rows, max_segments + rows // self.block_rows)
        self._page_tokens = PAGE_TOKENS["cuda"]
        # The tree of a sequence that is nearly full may reach past the context.
        columns = -(-context // self._page_tokens) + 2
        self._span_pages = kernels.min_span_tokens(rows) // self._page_tokens
        self.max_spans = min(kernels.MAX_SPANS, -(-columns // self._span_pages))
        if exact:
            self._span_pages = max(self._span_pages, -(-columns // self.max_spans))
        # First those of 64 bits, so that they are aligned.
        wide = {"seeds": torch.int64, "temperatures": torch.float64}
        shapes = {
            "seeds": (rows, 2),
            "temperatures": (rows, 2),
            "ids": (rows,),
            "positions": (rows,),
            "pages": (rows,),
            "offsets": (rows,),
            "visible_prefix": (rows,),
            "slots": (rows,),
            "long_rope": (rows,),
            "row_spans": (rows,),
            "blocks": (blocks, 3),
            "segments": (max_segments, 4),
            "moves": (max_segments, 4),
            "work_counts": (2,),
            # Last, because only their used parts are copied.
            "page_table": (max_segments, columns),
            "work": (blocks * self.max_spans, 2),
        }
        total = sum(int(np.prod(shape)) for shape in shapes.values())
        self.buffer = torch.zeros(total, dtype=torch.int32, device=device)
        # Two, because the device may not have read the inputs of one forward when those of the next are written.
        self._staged = [torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(2)]
        views: list[dict[str, Any]] = []
        for buffer in (self.buffer, *self._staged):
            parts = torch.split(buffer, [int(np.prod(shape)) for shape in shapes.values()])
            views.append(
                {
                    name: part.view(wide[name]) if name in wide else part.view(shape)
                    for (name, shape), part in zip(shapes.items(), parts, strict=True)
                }
            )
        vars(self).update(views[0])
        self._host: list[dict[str, npt.NDArray[Any]]] = [
            {name: view.numpy() for name, view in staged.items()} for staged in views[1:]
        ]

    def fill(
        self,
        segments: Sequence[Segment],
        moves: Sequence[tuple[int, int, int, int]] = (),
        chunks: int = 0,
        *,
        ahead: int = 0,
    ) -> None:
        """Write the inputs of a forward of `segments` and start their copy to the device.

        Args:
            moves: rows to move in the pool before.
            chunks: how many of the last segments are long prefill chunks.
            ahead: by how many tokens the sequences will be longer than they are now, and the positions higher.
        """
        self._staged.reverse()
        self._host.reverse()
        host = self._host[0]
        lengths = np.array([len(segment.ids) for segment in segments], dtype=np.int32)
        row = int(lengths.sum())
        # Written at once: numpy takes a microsecond for each assignment.
        for name in ("ids", "positions", "visible_prefix"):
            _write(host[name], list(itertools.chain.from_iterable(getattr(segment, name) for segment in segments)))
        plain = [each.sampling.parameters if each.sampling and each.sampling.is_plain else GREEDY for each in segments]
        for name, values in (
            ("slots", [segment.adapter_slot for segment in segments]),
            ("seeds", [as_int64(parameters.seed) for parameters in plain]),
            ("temperatures", [parameters.temperature for parameters in plain]),
        ):
            _write(host[name], np.repeat(values, lengths))
        host["positions"][:row] += ahead
        if self._rope and self._rope.switch:
            _write(host["long_rope"], [is_long for segment in segments for is_long in self._rope.long_rows(segment)])
        pages_of = [segment.sequence.pages for segment in segments]
        host["page_table"][_enumerated(np.array([len(pages) for pages in pages_of], dtype=np.int32))] = list(
            itertools.chain.from_iterable(pages_of)
        )
        extent = np.zeros((len(segments), 3), dtype=np.int32)
        extent[:, 0] = [segment.sequence.length + ahead for segment in segments]
        extent[:, 1], extent[:, 2] = np.cumsum(lengths) - lengths, lengths
        host["moves"][: len(moves)] = np.array(moves, dtype=np.int32).reshape(-1, 4)
        host["moves"][len(moves) :] = 0
        pages = -(-(extent[:, 0] + extent[:, 2]) // self._page_tokens)
        span_pages = np.maximum(self._span_pages, -(-pages // self.max_spans))
        host["segments"][: len(extent), :3], host["segments"][: len(extent), 3] = extent, span_pages
        spans = -(-pages // span_pages)
        owner, number = _enumerated(-(-extent[:, 2] // self.block_rows))
        first = extent[owner, 1] + number * self.block_rows
        blocks = host["blocks"]
        blocks[: len(owner), 0], blocks[: len(owner), 1] = owner, first
        blocks[: len(owner), 2] = np.minimum(self.block_rows, extent[owner, 1] + extent[owner, 2] - first)
        blocks[len(owner) :] = 0
        block, span = _enumerated(spans[owner])
        host["work"][: len(block), 0], host["work"][: len(block), 1] = block, span
        before_chunks = int((owner[block] < len(segments) - chunks).sum())
        host["work_counts"][:] = before_chunks, len(block)
        segment_of_row = np.repeat(np.arange(len(segments)), extent[:, 2])
        cache_index = np.arange(row) - extent[segment_of_row, 1] + extent[segment_of_row, 0]
        host["row_spans"][:row] = spans[segment_of_row]
        host["pages"][:row] = host["page_table"][segment_of_row, cache_index // self._page_tokens]
        host["offsets"][:row] = cache_index % self._page_tokens
        # Padding rows are written to page 0, which is never read.
        host["row_spans"][row:], host["pages"][row:] = 0, 0
        host["offsets"][row:] = np.arange(self.rows - row) % self._page_tokens
        work_start = self.buffer.numel() - host["work"].size
        page_table_start = work_start - host["page_table"].size
        self._copy(0, page_table_start + len(segments) * host["page_table"].shape[1])
        self._copy(work_start, work_start + 2 * len(block))

    def _copy(self, start: int, stop: int) -> None:
        self.buffer[start:stop].copy_(self._staged[0][start:stop], non_blocking=True)


def _write(field: npt.NDArray[Any], values: Sequence[Any] | npt.NDArray[Any]) -> None:
    """Write values to the first rows of a field, and zeros to the others."""
    field[: len(values)], field[len(values) :] = values, 0


def _enumerated(counts: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The owner and the number of each part, where owner i has counts[i] parts."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
