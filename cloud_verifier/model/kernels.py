"""Attention over the pool on CUDA, in Triton: keys and values are read where they lie, page by page.

What one row's result is made of does not depend on the rows beside it: keys are taken in the order of the text, in
tiles of one page, in spans of a fixed length whose results are joined in order (compare flash decoding, Dao et al.
2023).
"""

# No postponed annotations here: Triton reads `tl.constexpr` off them.
import torch
import triton
import triton.language as tl

# A program attends to so many keys at most; longer texts are shared among programs.
SPAN = 2048


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
    LANES: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, LANES)
    mask = lanes < SIZE
    place = tl.load(pages + row).to(tl.int64) * page_stride + tl.load(layer).to(tl.int64) * layer_stride
    place += head * head_stride + tl.load(offsets + row) * SIZE
    tl.store(slab + place + lanes, tl.load(key + head * key_head + row * key_row + lanes, mask=mask), mask=mask)
    values = tl.load(value + head * value_head + row * value_row + lanes, mask=mask)
    tl.store(slab + place + kind_stride + lanes, values, mask=mask)


@triton.jit
def _attend(
    query,
    out,
    peaks,
    slab,
    layer,
    blocks,
    pieces,
    table,
    limits,
    scale,
    query_head,
    query_row,
    out_span,
    out_row,
    peak_span,
    page_stride,
    layer_stride,
    kind_stride,
    head_stride,
    table_stride,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, head, span = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    piece, first, rows = tl.load(blocks + 3 * block), tl.load(blocks + 3 * block + 1), tl.load(blocks + 3 * block + 2)
    if rows == 0:
        return
    past, start = tl.load(pieces + 3 * piece), tl.load(pieces + 3 * piece + 1)
    total = past + tl.load(pieces + 3 * piece + 2)
    # Rows of the block times query heads that share this head's keys.
    index = tl.arange(0, TILE)
    row, shared = first + index // GROUP, index % GROUP
    inside = index < rows * GROUP
    lanes = tl.arange(0, LANES)
    wide = inside[:, None] & (lanes < SIZE)[None, :]
    asked = tl.load(
        query + (head * GROUP + shared)[:, None] * query_head + row[:, None] * query_row + lanes[None, :],
        mask=wide,
        other=0.0,
    )
    limit = past + tl.load(limits + row, mask=inside, other=0)
    own = past + row - start
    best = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    sums = tl.zeros([TILE, LANES], tl.float32)
    base = slab + tl.load(layer).to(tl.int64) * layer_stride + head * head_stride
    within = tl.arange(0, PAGE)
    for number in range(span * PAGES, tl.minimum((span + 1) * PAGES, tl.cdiv(total, PAGE))):
        page = base + tl.load(table + piece * table_stride + number).to(tl.int64) * page_stride
        place = number * PAGE + within
        there = (place < total)[:, None] & (lanes < SIZE)[None, :]
        keys = tl.load(page + within[:, None] * SIZE + lanes[None, :], mask=there, other=0.0)
        scores = tl.dot(asked, tl.trans(keys), input_precision=PRECISION) * scale
        seen = (place[None, :] < limit[:, None]) | (place[None, :] == own[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, 1))
        # Where nothing is seen yet, zero stands for the peak: -inf less -inf is not a number.
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(best - safe)
        mass = mass * shrink + tl.sum(weights, 1)
        values = tl.load(page + kind_stride + within[:, None] * SIZE + lanes[None, :], mask=there, other=0.0)
        sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        best = peak
    sums = sums / tl.where(mass > 0, mass, 1.0)[:, None]
    column = head * GROUP + shared
    tl.store(
        out + span * out_span + row[:, None] * out_row + column[:, None] * SIZE + lanes[None, :],
        sums.to(out.dtype.element_ty),
        mask=wide,
    )
    if peak_span:
        weight = tl.where(mass > 0, best + tl.log2(tl.where(mass > 0, mass, 1.0)), float("-inf"))
        tl.store(peaks + span * peak_span + row * tl.num_programs(1) * GROUP + column, weight, mask=inside)


@triton.jit
def _join(parts, peaks, out, part_span, peak_span, spans, SIZE: tl.constexpr, LANES: tl.constexpr):
    column = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    lanes = tl.arange(0, LANES)
    best = tl.load(peaks + column)
    for span in range(1, spans):
        best = tl.maximum(best, tl.load(peaks + span * peak_span + column))
    # Every row sees itself, but for those that fill a forward up.
    best = tl.where(best == float("-inf"), 0.0, best)
    mass = 0.0
    sums = tl.zeros([LANES], tl.float32)
    for span in range(0, spans):
        weight = tl.exp2(tl.load(peaks + span * peak_span + column) - best)
        # A span behind the end of a text wrote nothing: what stands there need not be a number.
        if weight > 0:
            mass += weight
            sums += weight * tl.load(parts + span * part_span + column * SIZE + lanes, mask=lanes < SIZE, other=0.0)
    sums = sums / tl.where(mass > 0, mass, 1.0)
    tl.store(out + column * SIZE + lanes, sums.to(out.dtype.element_ty), mask=lanes < SIZE)


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
    # Keys of all heads, then values: in a page they follow each other.
    for head in range(0, heads):
        row = tl.load(base + from_page * page_stride + head * head_stride + from_row * SIZE, mask=lanes < SIZE)
        tl.store(base + to_page * page_stride + head * head_stride + to_row * SIZE, row, mask=lanes < SIZE)


def move(slab: torch.Tensor, moves: torch.Tensor) -> None:
    """Moves rows of all layers: (moves, 4) page and row, to page and row; one to itself is none. No row twice."""
    _, layers, _, heads, _, size = slab.shape
    strides = slab.stride()
    _move[(moves.shape[0], layers)](
        slab, moves, strides[0], strides[1], strides[3], 2 * heads, size, triton.next_power_of_2(size), num_warps=1
    )


def store(key: torch.Tensor, value: torch.Tensor, slab: torch.Tensor, layer: torch.Tensor, plan) -> None:
    """Puts the rows' keys and values (1, heads, rows, size) where `plan` says, in `slab` (see `Pool.slabs`)."""
    _, heads, rows, size = key.shape
    strides = slab.stride()
    _store[(rows, heads)](
        key,
        value,
        slab,
        layer,
        plan.pages,
        plan.offsets,
        key.stride(1),
        key.stride(2),
        value.stride(1),
        value.stride(2),
        strides[0],
        strides[1],
        strides[2],
        strides[3],
        size,
        triton.next_power_of_2(size),
        num_warps=1,
    )


def attend(query: torch.Tensor, slab: torch.Tensor, layer: torch.Tensor, scaling: float, plan) -> torch.Tensor:
    """(1, query heads, rows, size) -> (1, rows, query heads, size): every row over what `plan` lets it see."""
    _, query_heads, rows, size = query.shape
    heads, page = slab.shape[3], slab.shape[4]
    strides, group, spans = slab.stride(), query_heads // slab.shape[3], plan.spans
    kind = query.dtype if spans == 1 else torch.float32
    out = torch.empty(spans, rows, query_heads, size, dtype=kind, device=query.device)
    peaks = torch.empty(spans, rows, query_heads, dtype=torch.float32, device=query.device)
    tile = max(16, triton.next_power_of_2(plan.block_rows * group))
    _attend[(plan.blocks.shape[0], heads, spans)](
        query,
        out,
        peaks,
        slab,
        layer,
        plan.blocks,
        plan.pieces,
        plan.table,
        plan.limits,
        # Scores to the base of 2.
        scaling * 1.4426950408889634,
        query.stride(1),
        query.stride(2),
        out.stride(0),
        out.stride(1),
        peaks.stride(0) if spans > 1 else 0,
        strides[0],
        strides[1],
        strides[2],
        strides[3],
        plan.table.stride(0),
        group,
        tile,
        size,
        triton.next_power_of_2(size),
        page,
        SPAN // page,
        "ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=3,
    )
    if spans == 1:
        return out
    joined = torch.empty(1, rows, query_heads, size, dtype=query.dtype, device=query.device)
    _join[(rows, query_heads)](
        out, peaks, joined, out.stride(0), peaks.stride(0), spans, size, triton.next_power_of_2(size), num_warps=1
    )
    return joined
