"""The engine on the toy family: what a batch gains, and whether a text depends on it."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from tokenizers import Tokenizer

from cloud_verifier.engine.scheduler import Scheduler
from cloud_verifier.model.target import Target
from edge_runtime.protocol.sampling import Sampling
from tests.benchmarks.verifier.measuring import report
from tests.benchmarks.verifier.random_models import start_engine
from tests.benchmarks.verifier.serving import generate_text
from tests.toy_family import FAMILY

# Of the targets whose texts are compared: dtype and further options, by device.
TEXT_TARGETS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "cpu": [("float32", {}), ("bfloat16", {}), ("float32", {"quantize": "int8"})],
    "cuda": [
        ("float32", {}),
        *(
            ("bfloat16", quantization | exact)
            for quantization in ({}, {"quantize": "fp8"})
            for exact in ({}, {"exact": True})
        ),
        ("bfloat16", {"cache_format": "fp8", "exact": True}),
    ],
}


PROMPTS = (
    "import os\n\n\ndef main(",
    "class Stack:\n    def __init__(self",
    "def fibonacci(n: int) -> int:\n",
    "for index, line in enumerate(",
    "try:\n    import json\nexcept",
    "    def test_empty(self):\n        ",
    "#!/usr/bin/env python\n# -*- coding",
    "with open(path, 'rb') as",
)


async def generate_texts(
    target: Target,
    jobs: Sequence[tuple[list[int], Sampling]],
    count: int,
    draft: int,
    concurrency: int,
    expected_texts: Any = None,
) -> tuple[list[tuple[list[int], list[tuple[int, float]]]], float]:
    """Generate the texts of all jobs, `concurrency` at once. Return the results and the seconds."""
    engine = Scheduler(lambda: target, lambda _: None, lambda: 0, cache_tokens=64 * 1024)
    await start_engine(engine)
    slots = asyncio.Semaphore(concurrency)

    async def one(index: int) -> tuple[list[int], list[tuple[int, float]]]:
        async with slots:
            prompt, sampling = jobs[index]
            expected = expected_texts[index] if expected_texts else ()
            return await generate_text(engine, target, prompt, sampling, count, draft, index, expected)

    started = time.perf_counter()
    results = await asyncio.gather(*(one(index) for index in range(len(jobs))))
    seconds = time.perf_counter() - started
    await asyncio.to_thread(engine.stop)
    return results, seconds


def make_family_jobs(copies: int, temperature: float) -> list[tuple[list[int], Sampling]]:
    tokenizer = Tokenizer.from_file(str(FAMILY / "target-v1" / "tokenizer.json"))
    samplings = [Sampling(temperature, seed=seed, ignore_eos=True) for seed in range(copies)]
    return [(tokenizer.encode(prompt).ids, sampling) for sampling in samplings for prompt in PROMPTS]


def sharing(options: argparse.Namespace) -> None:
    target = Target(FAMILY / "target-v1", device=options.device, dtype=getattr(torch, options.dtype))
    jobs = make_family_jobs(4, 1.0)
    table = Table(title=f"{len(jobs)} texts of {options.tokens} tokens, {options.device}, {options.dtype}")
    for column in ("drafts", "one by one, tokens/s", "batch of 16, tokens/s", "ratio"):
        table.add_column(column, justify="right")
    expected_texts = [new for new, _ in asyncio.run(generate_texts(target, jobs, options.tokens, 0, 16))[0]]
    for draft in (0, 5):
        rates = []
        for concurrency in (1, 16):
            results, seconds = asyncio.run(
                generate_texts(target, jobs, options.tokens, draft, concurrency, expected_texts)
            )
            assert [new for new, _ in results] == expected_texts or options.dtype != "float32", (
                "a text depends on its batch"
            )
            rates.append(len(jobs) * options.tokens / seconds)
        name = "none (the target generates, n=16)" if not draft else f"K={draft}, 4 of 5 right"
        table.add_row(name, f"{rates[0]:.0f}", f"{rates[1]:.0f}", f"{rates[1] / rates[0]:.2f}")
    report(table, options)


def texts(options: argparse.Namespace) -> None:
    table = Table(
        title=f"texts of {options.tokens} tokens on {options.device}: one by one, and in a batch of 16 with drafts"
    )
    for column in ("dtype", "T", "texts", "differ", "margin at first difference", "close calls per text", "seconds"):
        table.add_column(column, justify="right")
    for dtype, further in TEXT_TARGETS[torch.device(options.device).type]:
        target = Target(FAMILY / "target-v1", device=options.device, dtype=getattr(torch, dtype), **further)
        for temperature in (0.0, 1.0):
            jobs = make_family_jobs(5, temperature)
            reference = [new for new, _ in asyncio.run(generate_texts(target, jobs, options.tokens, 0, 1))[0]]
            results, seconds = asyncio.run(generate_texts(target, jobs, options.tokens, 5, 16, reference))
            margins = []
            for (prompt, _), (new, calls), correct in zip(jobs, results, reference, strict=True):
                index = next((i for i, (a, b) in enumerate(zip(new, correct, strict=True)) if a != b), None)
                if index is not None:
                    margins.append(dict(calls).get(len(prompt) + index, float("inf")))
            shown = f"{min(margins):.3f} to {max(margins):.3f}" if margins else ""
            close = sum(len(calls) for _, calls in results) / len(results)
            name = ", ".join([dtype, *(f"{option}={value}" for option, value in further.items())])
            table.add_row(
                name, f"{temperature:g}", str(len(jobs)), str(len(margins)), shown, f"{close:.1f}", f"{seconds:.1f}"
            )
    report(table, options)
