"""Attention over the paged KV cache on CUDA, in Triton: keys and values are read in place, page by page.

The result of one row does not depend on the other rows of the batch. Keys are taken in the order of the sequence, in
tiles of one page and in spans of a fixed length, whose results are combined in order (compare flash decoding, Dao et
al. 2023).
"""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` from the annotations.
from typing import Protocol

import torch
import triton
import triton.language as tl

# Most keys that one program attends to; a longer sequence is shared among several programs.
SPAN_TOKENS = 2048
# Most tiles of keys and values in flight. Chosen; the figures in tests/benchmarks/README.md were taken with it.
MAX_STAGES = 3
# Share of the shared memory for these tiles; the rest is for the queries and for Triton's own use. Chosen so that
# float32 tiles of head size 128 still have three stages on an H200.
STAGES_SHARE = 0.85
# Softmax is computed with base 2, for which the GPU has an instruction.
LOG2_E = 1.4426950408889634


class AttentionInputs(Protocol):
    """The parts of `cuda_graphs.GraphInputs` that the kernels read."""

    positions: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    visible_prefix: torch.Tensor
    blocks: torch.Tensor
    segments: torch.Tensor
    page_table: torch.Tensor
    block_rows: int
    spans: int


@triton.jit
def _store(
    key,
    value,
    slab,
    layer,
    pages,
    offsets,
    key_head,
    key_row,
    value_head,
    value_row,
    page_stride,
    layer_stride,
    kind_stride,
    head_stride,
    SIZE: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    LANES: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, LANES)
    offset = tl.load(pages + row).to(tl.int64) * page_stride + tl.load(layer).to(tl.int64) * layer_stride
    offset += head * head_stride + tl.load(offsets + row) * SIZE
    keys = tl.load(key + head * key_head + row * key_row + lanes, mask=lanes < KEY_SIZE)
    tl.store(slab + offset + lanes, keys, mask=lanes < KEY_SIZE)
    values = tl.load(value + head * value_head + row * value_row + lanes, mask=lanes < VALUE_SIZE)
    tl.store(slab + offset + kind_stride + lanes, values, mask=lanes < VALUE_SIZE)


@triton.jit
def _attend(
    query,
    out,
    log_sums,
    slab,
    layer,
    blocks,
    segments,
    page_table,
    positions,
    visible_prefix,
    sinks,
    scale,
    query_head,
    query_row,
    out_span,
    out_row,
    log_sum_span,
    page_stride,
    layer_stride,
    kind_stride,
    head_stride,
    page_table_stride,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    SIZE: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, head, span = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    segment = tl.load(blocks + 3 * block)
    first, rows = tl.load(blocks + 3 * block + 1), tl.load(blocks + 3 * block + 2)
    if rows == 0:
        return
    past, start = tl.load(segments + 3 * segment), tl.load(segments + 3 * segment + 1)
    total = past + tl.load(segments + 3 * segment + 2)
    # Queries of the tile: the rows of the block times the query heads that share this KV head.
    index = tl.arange(0, TILE)
    row, group_head = first + index // GROUP, index % GROUP
    is_query = index < rows * GROUP
    lanes, value_lanes = tl.arange(0, KEY_LANES), tl.arange(0, VALUE_LANES)
    queries = tl.load(
        query + (head * GROUP + group_head)[:, None] * query_head + row[:, None] * query_row + lanes[None, :],
        mask=is_query[:, None] & (lanes < KEY_SIZE)[None, :],
        other=0.0,
    )
    prefix_end = past + tl.load(visible_prefix + row, mask=is_query, other=0)
    own = past + row - start
    running_max = tl.full([TILE], float("-inf"), tl.float32)
    running_sum = tl.zeros([TILE], tl.float32)
    accumulator = tl.zeros([TILE, VALUE_LANES], tl.float32)
    first_page = span * PAGES
    if WINDOW > 0:
        # Keys from here on are visible. Those before a row's segment, and those of its chain, are at their positions.
        position = tl.load(positions + row, mask=is_query, other=2147483647)
        first_key = position - position % WINDOW if CHUNKED else position - WINDOW + 1
        first_page = tl.maximum(first_page, tl.min(first_key, 0) // PAGE)
    base = slab + tl.load(layer).to(tl.int64) * layer_stride + head * head_stride
    page_rows = tl.arange(0, PAGE)
    for number in range(first_page, tl.minimum((span + 1) * PAGES, tl.cdiv(total, PAGE))):
        page = base + tl.load(page_table + segment * page_table_stride + number).to(tl.int64) * page_stride
        key_index = number * PAGE + page_rows
        is_key = (key_index < total)[:, None]
        keys = tl.load(
            page + page_rows[:, None] * SIZE + lanes[None, :], mask=is_key & (lanes < KEY_SIZE)[None, :], other=0.0
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if CAP > 0:
            # CAP * tanh(scores)
            scores = CAP - 2 * CAP / (tl.exp(2 * scores) + 1)
        visible = key_index[None, :] < prefix_end[:, None]
        if WINDOW > 0:
            visible = visible & (key_index[None, :] >= first_key[:, None])
        visible = visible | (key_index[None, :] == own[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        # The maximum of a row that has attended to nothing yet is -inf; use 0, as -inf - -inf is not a number.
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - finite_max[:, None])
        rescale = tl.exp2(running_max - finite_max)
        running_sum = running_sum * rescale + tl.sum(weights, 1)
        values = tl.load(
            page + kind_stride + page_rows[:, None] * SIZE + value_lanes[None, :],
            mask=is_key & (value_lanes < VALUE_SIZE)[None, :],
            other=0.0,
        )
        accumulator = accumulator * rescale[:, None] + tl.dot(
            weights.to(values.dtype), values, input_precision=PRECISION
        )
        running_max = new_max
    column = head * GROUP + group_head
    if HAS_SINKS:
        # 1.44... is log2(e), see LOG2_E.
        sink = tl.load(sinks + column).to(tl.float32) * 1.4426950408889634
        new_max = tl.maximum(running_max, sink)
        rescale = tl.exp2(running_max - new_max)
        running_sum = running_sum * rescale + tl.exp2(sink - new_max)
        accumulator = accumulator * rescale[:, None]
        running_max = new_max
    accumulator = accumulator / tl.where(running_sum > 0, running_sum, 1.0)[:, None]
    tl.store(
        out + span * out_span + row[:, None] * out_row + column[:, None] * VALUE_SIZE + value_lanes[None, :],
        accumulator.to(out.dtype.element_ty),
        # A span without keys, of which a context of 100,000 tokens has dozens, has nothing that `_combine` reads.
        mask=is_query[:, None]
        & (value_lanes < VALUE_SIZE)[None, :]
        & ((running_sum > 0) | (log_sum_span == 0))[:, None],
    )
    if log_sum_span:
        log_sum = tl.where(
            running_sum > 0, running_max + tl.log2(tl.where(running_sum > 0, running_sum, 1.0)), float("-inf")
        )
        tl.store(log_sums + span * log_sum_span + row * tl.num_programs(1) * GROUP + column, log_sum, mask=is_query)


@triton.jit
def _combine(
    parts,
    log_sums,
    sinks,
    out,
    part_span,
    log_sum_span,
    spans,
    HAS_SINKS: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
):
    column = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    lanes = tl.arange(0, LANES)
    largest = tl.load(log_sums + column)
    for span in range(1, spans):
        largest = tl.maximum(largest, tl.load(log_sums + span * log_sum_span + column))
    # Every row attends at least to itself, except padding rows.
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = 0.0
    if HAS_SINKS:
        sink = tl.load(sinks + tl.program_id(1)).to(tl.float32) * 1.4426950408889634
        largest = tl.maximum(largest, sink)
        total += tl.exp2(sink - largest)
    accumulator = tl.zeros([LANES], tl.float32)
    for span in range(0, spans):
        weight = tl.exp2(tl.load(log_sums + span * log_sum_span + column) - largest)
        # Where nothing was written the buffers may hold NaN, so weight 0 or NaN must not be multiplied in.
        if weight > 0:
            total += weight
            accumulator += weight * tl.load(
                parts + span * part_span + column * SIZE + lanes, mask=lanes < SIZE, other=0.0
            )
    accumulator = accumulator / tl.where(total > 0, total, 1.0)
    tl.store(out + column * SIZE + lanes, accumulator.to(out.dtype.element_ty), mask=lanes < SIZE)


@triton.jit
def _move(
    slab,
    moves,
    page_stride,
    layer_stride,
    head_stride,
    heads,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
):
    move = moves + 4 * tl.program_id(0)
    from_page, from_row = tl.load(move).to(tl.int64), tl.load(move + 1)
    to_page, to_row = tl.load(move + 2).to(tl.int64), tl.load(move + 3)
    if (from_page == to_page) & (from_row == to_row):
        return
    lanes = tl.arange(0, LANES)
    base = slab + tl.program_id(1) * layer_stride + lanes
    # `heads` counts those of keys and of values: a page holds the keys of all heads, then the values.
    for head in range(0, heads):
        row = tl.load(base + from_page * page_stride + head * head_stride + from_row * SIZE, mask=lanes < SIZE)
        tl.store(base + to_page * page_stride + head * head_stride + to_row * SIZE, row, mask=lanes < SIZE)


def move(slab: torch.Tensor, moves: torch.Tensor) -> None:
    """Move rows of all layers within the pool.

    Args:
        slab: see `KVCachePool.slabs`.
        moves: (moves, 4) source page and row, destination page and row. A move of a row to itself is skipped. No
            row may occur twice.
    """
    _, layers, _, heads, _, size = slab.shape
    page_stride, layer_stride, _, head_stride, *_ = slab.stride()
    _move[(moves.shape[0], layers)](
        slab=slab,
        moves=moves,
        page_stride=page_stride,
        layer_stride=layer_stride,
        head_stride=head_stride,
        heads=2 * heads,
        SIZE=size,
        LANES=triton.next_power_of_2(size),
        num_warps=1,
    )


def store(
    key: torch.Tensor, value: torch.Tensor, slab: torch.Tensor, layer: torch.Tensor, inputs: AttentionInputs
) -> None:
    """Write keys and values (1, heads, rows, size) of one layer to the pages that `inputs` assigns to the rows."""
    _, heads, rows, key_size = key.shape
    page_stride, layer_stride, kind_stride, head_stride, *_ = slab.stride()
    _store[(rows, heads)](
        key=key,
        value=value,
        slab=slab,
        layer=layer,
        pages=inputs.pages,
        offsets=inputs.offsets,
        key_head=key.stride(1),
        key_row=key.stride(2),
        value_head=value.stride(1),
        value_row=value.stride(2),
        page_stride=page_stride,
        layer_stride=layer_stride,
        kind_stride=kind_stride,
        head_stride=head_stride,
        SIZE=slab.shape[5],
        KEY_SIZE=key_size,
        VALUE_SIZE=value.shape[3],
        LANES=triton.next_power_of_2(slab.shape[5]),
        num_warps=1,
    )


def _stages(query: torch.Tensor, tile_elements: int) -> int:
    """How many tiles of keys and values one program holds at once, so that they fit the shared memory of the GPU."""
    if not query.is_cuda:
        return MAX_STAGES
    memory: int = triton.runtime.driver.active.utils.get_device_properties(query.device.index)["max_shared_mem"]
    return max(1, min(MAX_STAGES, int(STAGES_SHARE * memory) // (tile_elements * query.element_size())))


def attend(
    query: torch.Tensor,
    slab: torch.Tensor,
    layer: torch.Tensor,
    scaling: float,
    inputs: AttentionInputs,
    *,
    kv_heads: int,
    value_size: int,
    span: int = 0,
    chunked: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    blocks: int | None = None,
) -> torch.Tensor:
    """Attention of one layer: (1, query heads, rows, key size) -> (1, rows, query heads, value size).

    Each row attends to what `inputs` makes visible to it.

    Args:
        span, chunked: see `batch.AttentionSpan`.
        softcap: see `attention.attend`; 0 for none.
        sinks: (query heads,) see `attention.attend`.
        blocks: how many of `inputs.blocks`, the first ones, have rows of `query`; None for all.
    """
    _, query_heads, rows, key_size = query.shape
    page, size = slab.shape[4:]
    page_stride, layer_stride, kind_stride, head_stride, *_ = slab.stride()
    group, spans = query_heads // kv_heads, inputs.spans
    # Partial results of several spans are combined in float32.
    dtype = query.dtype if spans == 1 else torch.float32
    out = torch.empty(spans, rows, query_heads, value_size, dtype=dtype, device=query.device)
    log_sums = torch.empty(spans, rows, query_heads, dtype=torch.float32, device=query.device)
    _attend[(inputs.blocks.shape[0] if blocks is None else blocks, kv_heads, spans)](
        query=query,
        out=out,
        log_sums=log_sums,
        slab=slab,
        layer=layer,
        blocks=inputs.blocks,
        segments=inputs.segments,
        page_table=inputs.page_table,
        positions=inputs.positions,
        visible_prefix=inputs.visible_prefix,
        sinks=log_sums if sinks is None else sinks,
        scale=scaling / softcap if softcap else scaling * LOG2_E,
        query_head=query.stride(1),
        query_row=query.stride(2),
        out_span=out.stride(0),
        out_row=out.stride(1),
        log_sum_span=log_sums.stride(0) if spans > 1 else 0,
        page_stride=page_stride,
        layer_stride=layer_stride,
        kind_stride=kind_stride,
        head_stride=head_stride,
        page_table_stride=inputs.page_table.stride(0),
        GROUP=group,
        TILE=max(16, triton.next_power_of_2(inputs.block_rows * group)),
        SIZE=size,
        KEY_SIZE=key_size,
        KEY_LANES=triton.next_power_of_2(key_size),
        VALUE_SIZE=value_size,
        VALUE_LANES=triton.next_power_of_2(value_size),
        PAGE=page,
        PAGES=SPAN_TOKENS // page,
        WINDOW=span,
        CHUNKED=chunked,
        CAP=softcap * LOG2_E,
        HAS_SINKS=sinks is not None and spans == 1,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=_stages(query, page * (triton.next_power_of_2(key_size) + triton.next_power_of_2(value_size))),
    )
    if spans == 1:
        return out
    combined = torch.empty(1, rows, query_heads, value_size, dtype=query.dtype, device=query.device)
    _combine[(rows, query_heads)](
        parts=out,
        log_sums=log_sums,
        sinks=log_sums if sinks is None else sinks,
        out=combined,
        part_span=out.stride(0),
        log_sum_span=log_sums.stride(0),
        spans=spans,
        HAS_SINKS=sinks is not None,
        SIZE=value_size,
        LANES=triton.next_power_of_2(value_size),
        num_warps=1,
    )
    return combined
