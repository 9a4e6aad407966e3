"""Prompts, relative to the device's rate for matrices of their dtype."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from rich.table import Table

from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import CachedSequence, KVCachePool
from cloud_verifier.model.target import make_runner
from tests.benchmarks.verifier.measuring import (
    DEVICE,
    measure_matrix_rate,
    report,
    time_each,
)
from tests.benchmarks.verifier.random_models import MAX_CONTEXT, make_random_model


def prefill(options: argparse.Namespace) -> None:
    rate = measure_matrix_rate()
    table = Table(title="prefill, bfloat16" + (", compiled" if options.compiled else ""))
    for column in ("shape", "prompts", "tokens each", "ms", "TFLOP/s", "share of the matrix rate", "peak memory, GiB"):
        table.add_column(column, justify="right")
    for shape in options.shape:
        model = make_random_model(shape, DEVICE)
        config = model.config
        matrices = sum(layer.weight.numel() for layer in model.model.modules() if isinstance(layer, torch.nn.Linear))
        runner = make_runner(model, MAX_CONTEXT, compiled=options.compiled)
        pool = KVCachePool(runner.shape, 2 * max(each * count for each, count in options.prompts))
        for length, prompts in options.prompts:

            def run(length: int = length, prompts: int = prompts, runner: Any = runner, pool: Any = pool) -> None:
                sequences = [CachedSequence() for _ in range(prompts)]
                for start in range(0, length * prompts, runner.max_prefill_rows):
                    left, segments = min(runner.max_prefill_rows, length * prompts - start), []
                    for sequence in sequences:
                        if rows := min(left, length - sequence.length):
                            segments.append(Segment.from_tokens(sequence, [7] * rows))
                            left -= rows
                    runner.run(pool, segments)
                    for segment in segments:
                        pool.keep(segment.sequence, list(range(len(segment))))
                for sequence in sequences:
                    pool.release(sequence)

            run()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = statistics.median(time_each(run, 5))
            peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
            # Two operations for each weight; and for each pair of a query and a key, of which causality leaves half.
            pairs = length * length / 2 * config.num_hidden_layers * config.num_attention_heads
            operations = prompts * (2 * matrices * length + 4 * pairs * config.head_dim)
            row = (f"{1e3 * seconds:.1f}", f"{operations / seconds / 1e12:.0f}", f"{operations / seconds / rate:.2f}")
            table.add_row(shape, str(prompts), str(length), *row, f"{peak:.1f}")
        del runner, model, pool
    report(table, options, matrix_rate=rate)
    print(f"matrix rate: {rate / 1e12:.0f} TFLOP/s (bfloat16, random values)")
