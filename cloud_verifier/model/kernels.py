"""Attention over the paged KV cache on CUDA, in Triton: keys and values are read in place, page by page.

The result of a row depends on its own sequence and the size of the forward, not on its other rows. Keys are taken in
the order of the sequence, in tiles of one page and in spans, whose results are combined in order (compare flash
decoding, Dao et al. 2023). A fixed number of programs share the spans of all sequences among them, so that short
sequences beside long ones, or room for long ones, cost nothing.
"""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` from the annotations.
import functools
from typing import Protocol

import torch
import triton
import triton.language as tl

from cloud_verifier.model.kv_cache import as_stored

# Keys of one span: at least so many for each row of the forward, between these bounds; more where a sequence would have
# more spans than that. Chosen: a forward of a few rows has few sequences, whose spans must occupy the GPU; one of many
# rows has enough work. Combining takes a microsecond for a few spans.
SPAN_TOKENS_PER_ROW, LEAST_SPAN_TOKENS, MOST_SPAN_TOKENS, MAX_SPANS = 16, 128, 2048, 16
# Programs for each multiprocessor. Rounds of a 7B model on an H200 take 4.8, 6.4 and 14.8 ms with 2 (1, 16 and 64
# sessions of 512 tokens), 4.8, 6.2 and 14.2 with 4, and 5.0, 6.3 and 14.2 with 8.
PROGRAMS_PER_PROCESSOR = 4
# Heads that one program combines. Chosen: most forwards of many rows have nothing to combine, and start few programs.
COMBINED_HEADS = 4
# Most tiles of keys and values in flight. Chosen; the figures in tests/benchmarks/README.md were taken with it.
MAX_STAGES = 3
WARPS = 4
# Share of the shared memory for these tiles; the rest is for the queries and for Triton's own use. Chosen so that
# float32 tiles of head size 128 still have three stages on an H200.
STAGES_SHARE = 0.85
# Softmax is computed with base 2, for which the GPU has an instruction.
LOG2_E = 1.4426950408889634


class AttentionInputs(Protocol):
    """The parts of `graph_inputs.GraphInputs` that the kernels read."""

    positions: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    visible_prefix: torch.Tensor
    row_spans: torch.Tensor
    blocks: torch.Tensor
    work: torch.Tensor
    work_counts: torch.Tensor
    segments: torch.Tensor
    page_table: torch.Tensor
    block_rows: int
    max_spans: int


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
    parts,
    log_sums,
    slab,
    layer,
    work,
    work_count,
    blocks,
    segments,
    page_table,
    positions,
    visible_prefix,
    row_spans,
    sinks,
    scale,
    heads,
    query_head,
    query_row,
    out_row,
    part_span,
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
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    FP8: tl.constexpr,
):
    index = tl.arange(0, TILE)
    lanes, value_lanes = tl.arange(0, KEY_LANES), tl.arange(0, VALUE_LANES)
    page_rows = tl.arange(0, PAGE)
    layer_base = slab + tl.load(layer).to(tl.int64) * layer_stride
    for item in range(tl.program_id(0), tl.load(work_count) * heads, tl.num_programs(0)):
        head = item % heads
        block, span = tl.load(work + 2 * (item // heads)), tl.load(work + 2 * (item // heads) + 1)
        segment = tl.load(blocks + 3 * block)
        first, rows = tl.load(blocks + 3 * block + 1), tl.load(blocks + 3 * block + 2)
        past, start = tl.load(segments + 4 * segment), tl.load(segments + 4 * segment + 1)
        total = past + tl.load(segments + 4 * segment + 2)
        # Queries of the tile: the rows of the block times the query heads that share this KV head.
        row, group_head = first + index // GROUP, index % GROUP
        is_query = index < rows * GROUP
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
        span_pages = tl.load(segments + 4 * segment + 3)
        first_page = span * span_pages
        if WINDOW > 0:
            # Keys from here on are visible. Those before a row's segment, and those of its chain, are at their
            # positions.
            position = tl.load(positions + row, mask=is_query, other=2147483647)
            first_key = position - position % WINDOW if CHUNKED else position - WINDOW + 1
            first_page = tl.maximum(first_page, tl.min(first_key, 0) // PAGE)
        base = layer_base + head * head_stride
        last_page = tl.minimum((span + 1) * span_pages, tl.cdiv(total, PAGE))
        for number in tl.range(first_page, last_page, num_stages=STAGES):
            page = base + tl.load(page_table + segment * page_table_stride + number).to(tl.int64) * page_stride
            key_index = number * PAGE + page_rows
            is_key = (key_index < total)[:, None]
            keys = tl.load(
                page + page_rows[:, None] * SIZE + lanes[None, :], mask=is_key & (lanes < KEY_SIZE)[None, :], other=0
            )
            if FP8:
                keys = keys.to(tl.float8e4nv, bitcast=True).to(queries.dtype)
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
                other=0,
            )
            if FP8:
                values = values.to(tl.float8e4nv, bitcast=True).to(queries.dtype)
            accumulator = accumulator * rescale[:, None] + tl.dot(
                weights.to(values.dtype), values, input_precision=PRECISION
            )
            running_max = new_max
        column = head * GROUP + group_head
        is_whole = True
        if HAS_PARTS:
            is_whole = tl.load(row_spans + first) == 1
        if HAS_SINKS:
            # 1.44... is log2(e), see LOG2_E. Where a sequence has several spans, `_combine` adds them.
            sink = tl.load(sinks + column).to(tl.float32) * 1.4426950408889634
            sink = tl.where(is_whole, sink, float("-inf"))
            new_max = tl.maximum(running_max, sink)
            finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            rescale = tl.exp2(running_max - finite_max)
            running_sum = running_sum * rescale + tl.exp2(sink - finite_max)
            accumulator = accumulator * rescale[:, None]
            running_max = new_max
        accumulator = accumulator / tl.where(running_sum > 0, running_sum, 1.0)[:, None]
        offsets = row[:, None] * out_row + column[:, None] * VALUE_SIZE + value_lanes[None, :]
        is_value = is_query[:, None] & (value_lanes < VALUE_SIZE)[None, :]
        if HAS_PARTS:
            # A span without keys has nothing that `_combine` reads.
            part = parts + span.to(tl.int64) * part_span
            tl.store(part + offsets, accumulator, mask=is_value & ((running_sum > 0)[:, None] & (is_whole == 0)))
            log_sum = tl.where(
                running_sum > 0, running_max + tl.log2(tl.where(running_sum > 0, running_sum, 1.0)), float("-inf")
            )
            log_sum_of = log_sums + span * log_sum_span + row * heads * GROUP + column
            tl.store(log_sum_of, log_sum, mask=is_query & (is_whole == 0))
            tl.store(out + offsets, accumulator.to(out.dtype.element_ty), mask=is_value & is_whole)
        else:
            tl.store(out + offsets, accumulator.to(out.dtype.element_ty), mask=is_value)


@triton.jit
def _combine(
    parts,
    log_sums,
    row_spans,
    sinks,
    out,
    heads,
    part_span,
    log_sum_span,
    HAS_SINKS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
):
    row, lanes = tl.program_id(0), tl.arange(0, LANES)
    spans = tl.load(row_spans + row)
    if spans == 1:
        # It is in its place already.
        return
    for head in range(tl.program_id(1) * HEADS, tl.minimum((tl.program_id(1) + 1) * HEADS, heads)):
        column = row * heads + head
        largest = tl.full([], float("-inf"), tl.float32)
        for span in range(0, spans):
            largest = tl.maximum(largest, tl.load(log_sums + span * log_sum_span + column))
        # Every row attends at least to itself, except padding rows, which have no spans.
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        total = 0.0
        if HAS_SINKS:
            sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            largest = tl.maximum(largest, sink)
            total += tl.exp2(sink - largest)
        accumulator = tl.zeros([LANES], tl.float32)
        for span in range(0, spans):
            weight = tl.exp2(tl.load(log_sums + span * log_sum_span + column) - largest)
            # Where nothing was written the buffers may hold NaN, so weight 0 or NaN must not be multiplied in.
            if weight > 0:
                total += weight
                accumulator += weight * tl.load(
                    parts + tl.cast(span, tl.int64) * part_span + column * SIZE + lanes, mask=lanes < SIZE, other=0.0
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
    slab = as_stored(slab)
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
    """Write keys and values (1, heads, rows, size) of one layer to the pages that `inputs` assigns to the rows.

    They are of the slab's dtype.
    """
    key, value, slab = map(as_stored, (key, value, slab))
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


def min_span_tokens(rows: int) -> int:
    """Keys of one span in forwards of `rows` rows, if the sequence has no more than `MAX_SPANS` of them."""
    return max(LEAST_SPAN_TOKENS, min(SPAN_TOKENS_PER_ROW * rows, MOST_SPAN_TOKENS))


@functools.cache
def _shared_memory(device: int) -> int:
    """Bytes of shared memory of one multiprocessor of a GPU. Asking for it takes a millisecond."""
    size: int = triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]
    return size


def _stages(query: torch.Tensor, tile_elements: int) -> int:
    """How many tiles of keys and values one program holds at once, so that they fit the shared memory of the GPU."""
    if not query.is_cuda:
        return MAX_STAGES
    memory = _shared_memory(query.device.index)
    return max(1, min(MAX_STAGES, int(STAGES_SHARE * memory) // (tile_elements * query.element_size())))


def _programs(query: torch.Tensor, inputs: AttentionInputs, heads: int) -> int:
    """How many programs share the work of one layer."""
    most = inputs.work.shape[0] * heads
    if not query.is_cuda:
        return min(most, 4)
    processors: int = torch.cuda.get_device_properties(query.device).multi_processor_count
    return min(most, PROGRAMS_PER_PROCESSOR * processors)


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
    without_chunks: bool = False,
) -> torch.Tensor:
    """Attention of one layer: (1, query heads, rows, key size) -> (1, rows, query heads, value size).

    Each row attends to what `inputs` makes visible to it.

    Args:
        span, chunked: see `batch.AttentionSpan`.
        softcap: see `attention.attend`; 0 for none.
        sinks: (query heads,) see `attention.attend`.
        without_chunks: `query` has only the rows before the long prefill chunks.
    """
    _, query_heads, rows, key_size = query.shape
    is_fp8, slab = slab.dtype == torch.float8_e4m3fn, as_stored(slab)
    page, size = slab.shape[4:]
    page_stride, layer_stride, kind_stride, head_stride, *_ = slab.stride()
    out = torch.empty(1, rows, query_heads, value_size, dtype=query.dtype, device=query.device)
    parts = log_sums = out
    if inputs.max_spans > 1:
        # Combined in float32.
        parts = torch.empty(inputs.max_spans, rows, query_heads, value_size, dtype=torch.float32, device=query.device)
        log_sums = torch.empty(inputs.max_spans, rows, query_heads, dtype=torch.float32, device=query.device)
    tile_elements = page * (triton.next_power_of_2(key_size) + triton.next_power_of_2(value_size))
    _attend[(_programs(query, inputs, kv_heads),)](
        query=query,
        out=out,
        parts=parts,
        log_sums=log_sums,
        slab=slab,
        layer=layer,
        work=inputs.work,
        work_count=inputs.work_counts[int(not without_chunks) :],
        blocks=inputs.blocks,
        segments=inputs.segments,
        page_table=inputs.page_table,
        positions=inputs.positions,
        visible_prefix=inputs.visible_prefix,
        row_spans=inputs.row_spans,
        sinks=log_sums if sinks is None else sinks,
        scale=scaling / softcap if softcap else scaling * LOG2_E,
        heads=kv_heads,
        query_head=query.stride(1),
        query_row=query.stride(2),
        out_row=out.stride(1),
        part_span=parts.stride(0),
        log_sum_span=log_sums.stride(0),
        page_stride=page_stride,
        layer_stride=layer_stride,
        kind_stride=kind_stride,
        head_stride=head_stride,
        page_table_stride=inputs.page_table.stride(0),
        GROUP=query_heads // kv_heads,
        TILE=max(16, triton.next_power_of_2(inputs.block_rows * (query_heads // kv_heads))),
        SIZE=size,
        KEY_SIZE=key_size,
        KEY_LANES=triton.next_power_of_2(key_size),
        VALUE_SIZE=value_size,
        VALUE_LANES=triton.next_power_of_2(value_size),
        PAGE=page,
        WINDOW=span,
        CHUNKED=chunked,
        CAP=softcap * LOG2_E,
        HAS_SINKS=sinks is not None,
        HAS_PARTS=inputs.max_spans > 1,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        STAGES=_stages(query, tile_elements),
        FP8=is_fp8,
        num_warps=WARPS,
    )
    if inputs.max_spans > 1:
        _combine[(rows, triton.cdiv(query_heads, COMBINED_HEADS))](
            parts=parts,
            log_sums=log_sums,
            row_spans=inputs.row_spans,
            sinks=log_sums if sinks is None else sinks,
            out=out,
            heads=query_heads,
            part_span=parts.stride(0),
            log_sum_span=log_sums.stride(0),
            HAS_SINKS=sinks is not None,
            HEADS=COMBINED_HEADS,
            SIZE=value_size,
            LANES=triton.next_power_of_2(value_size),
            num_warps=1,
        )
    return out
