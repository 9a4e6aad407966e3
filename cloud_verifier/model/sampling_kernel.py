"""Sampling on CUDA in two launches, in Triton: `sampling.sample_tokens` without top-k, top-p and min-p.

The logits are read once, and nothing of the size of the vocabulary is written. The host decides nothing, so that a CUDA
graph can hold it.
"""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` from the annotations.
from typing import Protocol

import torch
import triton
import triton.language as tl

# Logits of one program. Chosen: 16 programs for a row of a small vocabulary, and few partial results for a large one.
BLOCK = 2048


class SamplingInputs(Protocol):
    """How the token after each row is sampled; the parts of `graph_inputs.GraphInputs` that the kernel reads.

    Attributes:
        positions: (rows,) int32 position of the row; the sampled token is at the next one.
        seeds: (rows,) int64 with the bits of the unsigned seeds.
        temperatures: (rows,) float64.
    """

    positions: torch.Tensor
    seeds: torch.Tensor
    temperatures: torch.Tensor


@triton.jit
def _mix(z):
    # `protocol.sampling.MIX_MULTIPLIER_1` and `_2`.
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _best_of_block(
    logits,
    rows,
    seeds,
    positions,
    temperatures,
    best_scores,
    best_ids,
    second_scores,
    row_stride,
    vocabulary,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, block = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + index) if HAS_ROWS else index
    ids = block * BLOCK + tl.arange(0, BLOCK)
    is_id = ids < vocabulary
    scores = tl.load(logits + index.to(tl.int64) * row_stride + ids, mask=is_id, other=float("-inf")).to(tl.float64)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        # `protocol.sampling.GOLDEN_GAMMA`.
        gamma = tl.full([1], 0x9E3779B97F4A7C15, tl.uint64)
        seed = tl.load(seeds + row).to(tl.uint64, bitcast=True)
        position = tl.load(positions + row).to(tl.uint64)
        key = _mix(_mix(seed + gamma) + (position + 2) * gamma)
        bits = _mix(key + (ids + 1).to(tl.uint64) * gamma) >> 12
        uniform = (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16
        scores = scores / temperature - tl.log(-tl.log(uniform))
    best = tl.max(scores, 0)
    # Of equal scores the lowest id counts. Scores that are no numbers equal nothing: the result must be an id all the
    # same.
    chosen = tl.minimum(tl.min(tl.where(scores == best, ids, vocabulary - 1), 0), vocabulary - 1)
    second = tl.max(tl.where(ids == chosen, float("-inf"), scores), 0)
    result = index * tl.num_programs(1) + block
    tl.store(best_scores + result, best)
    tl.store(best_ids + result, chosen)
    tl.store(second_scores + result, second)


@triton.jit
def _best_of_row(best_scores, best_ids, second_scores, out, blocks, vocabulary, BLOCKS: tl.constexpr):
    index, count = tl.program_id(0), tl.num_programs(0)
    block = tl.arange(0, BLOCKS)
    is_block = block < blocks
    scores = tl.load(best_scores + index * blocks + block, mask=is_block, other=float("-inf"))
    ids = tl.load(best_ids + index * blocks + block, mask=is_block, other=0)
    seconds = tl.load(second_scores + index * blocks + block, mask=is_block, other=float("-inf"))
    best = tl.max(scores, 0)
    chosen = tl.minimum(tl.min(tl.where((scores == best) & is_block, ids, vocabulary - 1), 0), vocabulary - 1)
    second = tl.max(tl.where((ids == chosen) & is_block, seconds, scores), 0)
    tl.store(out + index, chosen.to(tl.float64))
    tl.store(out + count + index, best - second)


def sample_plain(logits: torch.Tensor, inputs: SamplingInputs, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Sample the token after each row of logits, as `sampling.sample_tokens` does without top-k, top-p and min-p.

    Args:
        logits: (sampled rows, V), V >= 2.
        rows: (sampled rows,) which rows of `inputs` these are; None if they are the first ones.

    Returns (2, sampled rows) float64: the token ids, and their margins (see `SampledToken`).
    """
    count, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, BLOCK)
    best_scores = logits.new_empty(count, blocks, dtype=torch.float64)
    second_scores = torch.empty_like(best_scores)
    best_ids = logits.new_empty(count, blocks, dtype=torch.int32)
    out = logits.new_empty(2, count, dtype=torch.float64)
    _best_of_block[(count, blocks)](
        logits=logits,
        rows=inputs.positions if rows is None else rows,
        seeds=inputs.seeds,
        positions=inputs.positions,
        temperatures=inputs.temperatures,
        best_scores=best_scores,
        best_ids=best_ids,
        second_scores=second_scores,
        row_stride=logits.stride(0),
        vocabulary=vocabulary,
        HAS_ROWS=rows is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
    _best_of_row[(count,)](
        best_scores=best_scores,
        best_ids=best_ids,
        second_scores=second_scores,
        out=out,
        blocks=blocks,
        vocabulary=vocabulary,
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=1,
    )
    return out
