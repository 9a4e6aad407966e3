"""What rounds wait for while adapters are loaded beside them, one after the other, and get their first session."""

from __future__ import annotations

import argparse
import asyncio
import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.table import Table

from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.model.lora import LoRAWeights
from cloud_verifier.model.target import Target
from tests.benchmarks.verifier.measuring import report
from tests.benchmarks.verifier.random_models import RandomTarget, start_engine
from tests.benchmarks.verifier.serving import stream_text

# Rank of the adapters, which are on the attention's linear layers, and seconds that are watched after each. Chosen.
RANK, WATCHED_SECONDS = 16, 1.5


def make_adapter(target: Target) -> LoRAWeights:
    """Random weights of a LoRA adapter of `target`."""
    model: Any = target.runner.model
    return {
        name: tuple(
            (torch.randn(size) / 100).to(target.device, target.dtype)
            for size in ((RANK, linear.in_features), (linear.out_features, RANK))
        )
        for name, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear) and ".self_attn." in name
    }  # type: ignore[return-value]  # two of each


def make_version(target: Target, name: str) -> Target:
    """A version of `target` with an adapter of its own."""
    version = copy.copy(target)
    version.name, version.version = name, f"{name}@random"
    version._adapter_weights = make_adapter(target)
    return version


def promotion(options: argparse.Namespace) -> None:
    target = RandomTarget(options.shape[0], compiled=options.compiled)
    gaps: list[float] = []
    waits: list[float] = []

    def load(_path: Path, name: str, _others: Sequence[Target]) -> Target:
        return make_version(target, name)

    table = Table(title=f"adapters beside {options.streams} streams, {options.shape[0]}, bfloat16; ms")
    for column in (
        "adapters",
        "load",
        "between tokens, median",
        "longest between frames",
        "first token of the new version",
    ):
        table.add_column(column, justify="right")
    random = Random(1)

    def make_prompt() -> list[int]:
        return [random.randrange(target.vocabulary_size) for _ in range(options.prompt)]

    async def measure() -> None:
        engine = Scheduler(
            lambda: target, lambda _: None, lambda: 0, cache_tokens=0, target_factory=load, reuse_prefixes=False
        )
        await start_engine(engine)

        async def keep_streaming() -> None:
            while True:
                # Of different lengths, so that not all streams begin anew at once.
                await stream_text(
                    engine, target, make_prompt(), random.randint(options.tokens // 2, options.tokens), gaps, waits
                )

        streams = [asyncio.create_task(keep_streaming()) for _ in range(options.streams)]
        await asyncio.sleep(2 * WATCHED_SECONDS)
        for count in range(options.adapters + 1):
            gaps.clear()
            waits.clear()
            seconds = first = 0.0
            if count:
                started = time.perf_counter()
                version = await engine.load(Path(), f"version-{count}")
                seconds = time.perf_counter() - started
                first = await stream_text(engine, version, make_prompt(), 8, [])
            await asyncio.sleep(WATCHED_SECONDS)
            figures = (seconds, statistics.median(gaps), max(waits), first)
            table.add_row(str(count), *(f"{1e3 * each:.0f}" for each in figures))
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        await asyncio.to_thread(engine.stop)

    asyncio.run(measure())
    report(table, options)
