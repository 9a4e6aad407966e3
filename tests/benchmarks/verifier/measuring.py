"""Times, rates of the device, and tables."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure_bandwidth() -> float:
    """Return the bytes per second of this GPU's memory for a copy, reads and writes counted."""
    source = torch.empty(1 << (30 if DEVICE == "cuda" else 24), dtype=torch.int64, device=DEVICE)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / min(time_each(lambda: copy.copy_(source), 5))


def measure_matrix_rate() -> float:
    """Return the operations per second of this device for large bfloat16 matrices with random values."""
    size = 8192 if DEVICE == "cuda" else 512
    left, right = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    return 2 * size**3 / statistics.median(time_each(lambda: left @ right, 12)[2:])


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def time_each(work: Callable[[], object], repeats: int) -> list[float]:
    """The seconds of each of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def median_ms(work: Any, seconds: float = 1.5) -> float:
    """The median of the milliseconds of calls for so many seconds, after as many more in which a clock settles."""
    repeats = max(5, round(seconds / statistics.median(time_each(work, 5))))
    return 1e3 * statistics.median(time_each(work, 2 * repeats)[repeats:])


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def profile(work: Any) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            work()
        torch.cuda.synchronize()
    print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=70))


def report(table: Table, options: argparse.Namespace, **facts: Any) -> None:
    """Print a table, and add it to the JSON lines of `--json`."""
    Console(width=140).print(table)
    if options.json is None:
        return
    columns = [list(column.cells) for column in table.columns]
    rows = [
        dict(zip((str(c.header) for c in table.columns), cells, strict=True)) for cells in zip(*columns, strict=True)
    ]
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    entry = {"title": str(table.title), "device": device, "torch": torch.__version__, "rows": rows, **facts}
    with options.json.open("a") as file:
        file.write(json.dumps(entry) + "\n")
