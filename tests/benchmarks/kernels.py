"""The attention kernels against step-by-step attention in PyTorch: `python -m tests.benchmarks.kernels`.

On a GPU, or with TRITON_INTERPRET=1 and `--device cpu --dtype float32` in Triton's interpreter, for minutes. Prints the
largest error of each case, relative to the largest value, and exits with 1 if one exceeds its dtype's tolerance.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from random import Random
from typing import NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from cloud_verifier.model import kernels
from cloud_verifier.model.attention import explicit_attention
from cloud_verifier.model.batch import AttentionSpan, ForwardBatch, Segment
from cloud_verifier.model.chunk_attention import MIN_CHUNK_ROWS, find_chunks
from cloud_verifier.model.graph_attention import GraphContext
from cloud_verifier.model.graph_inputs import GraphInputs
from cloud_verifier.model.kv_cache import PAGE_TOKENS, CachedSequence
from cloud_verifier.model.tree import TokenTree
from edge_runtime.protocol.sampling import Sampling

LAYERS, LAYER = 2, 1
# Rounding of the results, and of the weights before they are multiplied with the values.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


class AttentionCase(NamedTuple):
    """One layer of attention, as a real model has it."""

    name: str
    query_heads: int
    kv_heads: int
    key_size: int
    value_size: int
    span: AttentionSpan = AttentionSpan()
    softcap: float = 0.0
    sinks: bool = False


CASES = (
    AttentionCase("plain (Llama 8B)", 32, 8, 128, 128),
    AttentionCase("no groups, odd size", 4, 4, 80, 80),
    AttentionCase("window (Mistral)", 8, 2, 64, 64, AttentionSpan(100)),
    AttentionCase("window of one token", 4, 2, 16, 16, AttentionSpan(1)),
    AttentionCase("chunks (Llama 4)", 8, 2, 64, 64, AttentionSpan(96, chunked=True)),
    AttentionCase("softcap and window (Gemma 2)", 8, 4, 256, 256, AttentionSpan(128), 5.0),
    AttentionCase("sinks and window (gpt-oss)", 8, 1, 64, 64, AttentionSpan(128), sinks=True),
    AttentionCase("sinks, full", 8, 1, 64, 64, sinks=True),
    AttentionCase("MLA (DeepSeek)", 4, 4, 192, 128),
)


def make_segments(lengths: Sequence[int], random: Random, chunks: int) -> list[Segment]:
    """A chunk of a prefill, single tokens and token trees after sequences of the given lengths.

    Args:
        chunks: how many of the last ones are long chunks of prefills.
    """
    segments = []
    pages = iter(random.sample(range(1, 400), 399))
    for index, length in enumerate(lengths):
        sequence = CachedSequence()
        sequence.length = length
        if index >= len(lengths) - chunks:
            segment = Segment.from_tokens(sequence, [1] * (MIN_CHUNK_ROWS + 11 * index))
        elif index % 3 == 0:
            segment = Segment.from_tokens(sequence, [1] * random.randint(2, 60))
        else:
            draft = [1] * random.randint(0, 9)
            siblings = {i: [2, 3] for i in range(len(draft)) if random.random() < 0.5}
            segment = Segment.from_tree(sequence, TokenTree(1, length + 1, draft, siblings), Sampling())
        sequence.pages = [next(pages) for _ in range(-(-(length + len(segment)) // PAGE_TOKENS["cuda"]))]
        segments.append(segment)
    return segments


def measure_error(
    case: AttentionCase,
    lengths: Sequence[int],
    context: int,
    *,
    device: str,
    dtype: torch.dtype,
    chunks: int,
    longest_span: int | None = None,
) -> float:
    """The largest error of the kernels' result, relative to the largest value.

    Args:
        chunks: of how many segments, the last ones, the attention may be that of `chunk_attention`.
        longest_span: instead of `kernels.MOST_SPAN_TOKENS`.
    """
    random = Random(7)
    torch.manual_seed(7)
    segments = make_segments(lengths, random, chunks)
    rows, page = sum(map(len, segments)), PAGE_TOKENS["cuda"]
    group = case.query_heads // case.kv_heads
    # Another layer may have larger groups.
    with patch.object(kernels, "MOST_SPAN_TOKENS", longest_span or kernels.MOST_SPAN_TOKENS):
        inputs = GraphInputs(rows + 5, context, 2 * group, torch.device(device))
    inputs.fill(segments, chunks=chunks)

    def random_heads(heads: int, count: int, size: int) -> torch.Tensor:
        return torch.randn(heads, count, size, device=device).to(dtype)

    size = max(case.key_size, case.value_size)
    # Another layer may have more heads.
    slab = torch.full((400, LAYERS, 2, case.kv_heads + 1, page, size), torch.nan, dtype=dtype, device=device)
    query = random_heads(case.query_heads, rows + 5, case.key_size) * 2
    key = random_heads(case.kv_heads, rows + 5, case.key_size)
    value = random_heads(case.kv_heads, rows + 5, case.value_size)
    sinks = torch.randn(case.query_heads, device=device).to(dtype) * 2 if case.sinks else None
    layer = torch.tensor(LAYER, dtype=torch.int32, device=device)
    cached = [
        (random_heads(case.kv_heads, length, case.key_size), random_heads(case.kv_heads, length, case.value_size))
        for length in lengths
    ]
    for segment, (keys, values) in zip(segments, cached, strict=True):
        for position in range(segment.sequence.length):
            where = slab[segment.sequence.pages[position // page], LAYER, :, :, position % page]
            where[0, : case.kv_heads, : case.key_size] = keys[:, position]
            where[1, : case.kv_heads, : case.value_size] = values[:, position]
    found = find_chunks(segments, page, torch.device(device))
    assert len(found) == chunks
    actual = GraphContext(inputs, rows + 5, slab, None, found).attend(
        query[None],
        key[None],
        value[None],
        layer,
        scaling=case.key_size**-0.5,
        span=case.span.size,
        chunked=case.span.chunked,
        softcap=case.softcap,
        sinks=sinks,
    )[0]
    starts = list(itertools.accumulate(map(len, segments), initial=0))
    batch = ForwardBatch(segments, starts[:-1], 5, [])
    error = largest = 0.0
    for segment, start, (first, mask), (keys, values) in zip(
        segments, batch.starts, batch.visible_keys(case.span), cached, strict=True
    ):
        own = slice(start, start + len(segment))
        keys, values = torch.cat([keys, key[:, own]], 1)[:, first:], torch.cat([values, value[:, own]], 1)[:, first:]
        expected = explicit_attention(
            query[:, own].float(),
            keys.repeat_interleave(group, 0).float(),
            values.repeat_interleave(group, 0).float(),
            None if mask is None else mask.to(device),
            softcap=case.softcap or None,
            sinks=None if sinks is None else sinks[:, None].expand(-1, len(segment)),
        ).transpose(0, 1)
        error = max(error, float((actual[own].float() - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
        if not torch.isfinite(actual[own]).all():
            error = float("inf")
    return error / largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=TOLERANCE)
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name contains this")
    options = parser.parse_args()
    table = Table(title=f"attention kernels against PyTorch, {options.device}: largest relative error")
    for column in ("case", "sequences, tokens", "context", *options.dtype):
        table.add_column(column, justify="right")
    failures = 0
    for case in (each for each in CASES if options.cases in each.name):
        # One span of keys for a sequence, several, and short ones; and long chunks of prompts after the others.
        for lengths, context, chunks, span in (
            ((0, 1, 63, 130, 300, 17), 512, 0, None),
            ((2100, 40, 4000), 4160, 0, None),
            ((0, 1, 700, 130), 1024, 0, 128),
            ((300, 1, 0, 130), 768, 2, None),
        ):
            errors = {}
            for name in options.dtype:
                dtype = getattr(torch, name)
                errors[name] = measure_error(
                    case, lengths, context, device=options.device, dtype=dtype, chunks=chunks, longest_span=span
                )
                failures += not errors[name] <= TOLERANCE[name]
            shown = (f"{error:.1e}{'' if error <= TOLERANCE[name] else ' WRONG'}" for name, error in errors.items())
            table.add_row(case.name, ", ".join(map(str, lengths)), str(context), *shown)
    Console(width=120).print(table)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
