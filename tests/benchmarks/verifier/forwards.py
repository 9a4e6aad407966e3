"""One round of many sessions, relative to the floor of reading weights and KV cache once."""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import time

import torch
from rich.table import Table

from cloud_verifier.model import layer_compilation
from cloud_verifier.model.batch import Segment
from cloud_verifier.model.kv_cache import CACHE_FORMATS, CachedSequence, KVCachePool
from cloud_verifier.model.quantization import quantize_layers
from cloud_verifier.model.target import make_runner
from cloud_verifier.model.tree import TokenTree
from edge_runtime.protocol.sampling import Sampling
from tests.benchmarks.verifier.measuring import DEVICE, measure_bandwidth, median_ms, profile, report
from tests.benchmarks.verifier.random_models import make_random_model

# Milliseconds on an H200: the goal (chosen), and the time of a CUDA graph of transformers' own forward (measured).
GOALS = {("7B", 1): (6.1, 7.9), ("7B", 16): (9.0, 11.2), ("7B", 64): (18.0, 26.0), ("32B", 1): (22.0, 25.5)}
# Largest KV cache of `forwards`.
MAX_POOL_BYTES = 50e9 if DEVICE == "cuda" else 1e9


def make_rounds(pool: KVCachePool, sessions: int, draft: int, context: int) -> list[Segment]:
    """Make one round for each session, after `context` tokens."""
    segments = []
    for _ in range(sessions):
        sequence = CachedSequence()
        pool.reserve(sequence, context + 80)
        sequence.length = context
        tree = TokenTree(7, context + 1, list(range(10, 10 + draft)), {})
        segments.append(Segment.from_tree(sequence, tree, Sampling(1.0, seed=5)))
    return segments


def forwards(options: argparse.Namespace) -> None:
    from cloud_verifier.model.tensor_parallel import TensorParallelGroup

    group = TensorParallelGroup() if "RANK" in os.environ else None
    speed = measure_bandwidth()
    gpus = f"{group.size if group else 1} x {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}"
    variant = "".join(f", {name}" for name in ("exact", "compiled") if getattr(options, name))
    if options.static:
        layer_compilation.DYNAMIC_ROWS = False
        variant += ", for each size"
    if options.quantize:
        variant += f", {options.quantize}"
    if options.kv_cache_dtype:
        variant += f", {options.kv_cache_dtype} cache"
    for each in options.inductor:
        name, _, value = each.partition("=")
        layer_compilation.INDUCTOR_OPTIONS[name] = bool(int(value))
        variant += f", {name}"
    table = Table(title=f"one round, bfloat16, {gpus}{variant}")
    for column in (
        "shape",
        "context",
        "sessions",
        "K",
        "round, ms",
        "floor, ms",
        "round / floor",
        "goal, ms",
        "ready, s",
    ):
        table.add_column(column, justify="right")
    for shape in options.shape:
        model = make_random_model(shape, DEVICE)
        whole = sum(value.nbytes for value in model.parameters())
        if options.quantize:
            quantize_layers(model, options.quantize)
        runner = make_runner(
            model,
            max(options.context) + 160,
            exact=options.exact,
            compiled=options.compiled,
            group=group,
            cache_dtype=CACHE_FORMATS.get(options.kv_cache_dtype),
        )
        local = [value._local_tensor if hasattr(value, "_local_tensor") else value for value in model.parameters()]
        # Those of fused layers are twice among the parameters.
        weights = sum(value.nbytes for value in local) if group else whole
        weights -= model.get_input_embeddings().weight.nbytes
        # Beyond a bound, which leaves memory for the weights of 32B, fewer sessions are measured.
        tokens = max(options.sessions) * (max(options.context) + 160)
        pool = KVCachePool(runner.shape, min(tokens, int(MAX_POOL_BYTES / runner.shape.bytes_per_token)))
        if group and group.rank:
            runner.follow_leader(pool)
            continue
        for context, sessions, draft in itertools.product(options.context, options.sessions, options.draft):
            if sessions * (1 + draft) > runner.max_rows or pool.capacity_pages * 64 < sessions * (context + 160):
                continue
            segments = make_rounds(pool, sessions, draft, context)
            started = time.perf_counter()
            runner.run(pool, segments)
            ready = time.perf_counter() - started
            round_ms = median_ms(functools.partial(runner.run, pool, segments))
            if options.profile:
                profile(functools.partial(runner.run, pool, segments))
            cache = sessions * context * runner.shape.bytes_per_token
            floor = 1e3 * (weights + cache) / speed
            goal, naive = GOALS.get((shape, sessions), (None, None)) if (draft, context) == (5, 512) else (None, None)
            goal_text = f"{goal} (naive graph {naive})" if goal else ""
            row = (str(sessions), str(draft), f"{round_ms:.2f}", f"{floor:.2f}", f"{round_ms / floor:.2f}")
            table.add_row(shape, str(context), *row, goal_text, f"{ready:.1f}")
            for segment in segments:
                pool.release(segment.sequence)
        if group:
            group.stop_followers()
        del runner, model, pool, local
        torch.cuda.empty_cache()
    if group and group.rank:
        return
    report(table, options, bandwidth=speed)
    print(f"memory bandwidth: {speed / 1e12:.2f} TB/s (a copy, reads and writes counted)")
