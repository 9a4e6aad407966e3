"""Takes the samples of benchmarks."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import multiprocessing
import queue
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edge_runtime.protocol.errors import InputError
from tests.benchmarks.harness.benchmark import Benchmark, Scenario
from tests.benchmarks.harness.samples import RunInfo, Sample, SampleFile

# Scenarios and numbers of their repetitions, in the order in which samples are taken.
SampleList: TypeAlias = Sequence[tuple[Scenario, int]]
# How often it is noticed that a process has ended without its samples.
WATCH_SECONDS = 1.0


def take_samples(
    benchmarks: Sequence[Benchmark],
    directory: Path,
    *,
    quick: bool,
    again: bool = False,
    only: str = "",
    without: str | None = None,
    processes: int = 1,
) -> list[Path]:
    """Run benchmarks one after the other. Returns the files of their samples.

    Repetitions are interleaved (every scenario once, then every scenario again), so that a machine that becomes slower
    or busier does so for all. Samples of an earlier run of the same commit, machine and versions count: a killed run
    goes on.

    Args:
        directory: of the files.
        quick: take few samples.
        again: start over.
        only, without: take samples of scenarios with this text in their key, and not of those with that one.
        processes: how many processes take samples of a benchmark at once, those of one table always in the same. Only
            for machines on which they do not disturb each other.

    Raises:
        RuntimeError: one of several processes has failed.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    paths = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for benchmark in benchmarks:
            path = directory / f"{benchmark.name}.jsonl"
            file = open_samples(benchmark, path, again=again)
            missing = _missing_samples(benchmark, file, quick=quick, only=only, without=without)
            task = progress.add_task(benchmark.name, total=len(missing))

            def keep(sample: Sample, file: SampleFile = file, task: Any = task) -> None:
                file.add(sample)
                progress.update(task, advance=1, description=f"{file.info.benchmark}: {sample.scenario}")

            if processes > 1:
                _take_in_processes(benchmark, missing, processes, keep)
            elif missing:
                asyncio.run(_take(benchmark, missing, keep))
            paths.append(path)
    return paths


def open_samples(benchmark: Benchmark, path: Path, *, again: bool) -> SampleFile:
    """Continue the file at `path` if it is of the same commit, machine and versions; otherwise begin a new one."""
    info = RunInfo.of_this_machine(benchmark.name)
    if not again and path.is_file():
        try:
            earlier = SampleFile.load(path)
        except InputError:
            return SampleFile.create(path, info)
        # A tree with changes may have other ones than before.
        if earlier.info == info and not info.commit.endswith("+"):
            earlier.save()
            return earlier
    return SampleFile.create(path, info)


def _missing_samples(
    benchmark: Benchmark, file: SampleFile, *, quick: bool, only: str, without: str | None
) -> SampleList:
    repetitions = benchmark.quick_repetitions if quick else benchmark.repetitions
    taken = {(sample.scenario, sample.repetition) for sample in file.samples}
    return [
        (scenario, repetition)
        for repetition in range(repetitions)
        for scenario in benchmark.scenarios
        if (scenario.key, repetition) not in taken and (scenario.quick or not quick)
        if only in scenario.key and (without is None or without not in scenario.key)
        if scenario.samples is None or repetition < scenario.samples
    ]


async def _take(benchmark: Benchmark, samples: SampleList, keep: Callable[[Sample], object]) -> None:
    async with benchmark.running() as measure:
        for scenario, repetition in samples:
            values = await measure(scenario, repetition)
            keep(Sample(scenario.key, repetition, dict(values)))


def _take_in_processes(
    benchmark: Benchmark, samples: SampleList, processes: int, keep: Callable[[Sample], object]
) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Sample] = context.Queue()
    children = [
        context.Process(target=_take_share, args=(benchmark.name, share, results), daemon=True)
        for share in _split_by_table(samples, processes)
    ]
    for child in children:
        child.start()
    for _ in samples:
        while True:
            try:
                keep(results.get(timeout=WATCH_SECONDS))
                break
            except queue.Empty:
                if failed := [child.exitcode for child in children if child.exitcode]:
                    raise RuntimeError(f"a process of the benchmark ended with exit code {failed[0]}") from None
    for child in children:
        child.join()


def _split_by_table(samples: SampleList, processes: int) -> list[list[tuple[str, int]]]:
    """Keys of scenarios and numbers of repetitions, for each of at most `processes` processes."""
    tables: dict[str, list[tuple[str, int]]] = {}
    for scenario, repetition in samples:
        tables.setdefault(scenario.table, []).append((scenario.key, repetition))
    shares: list[list[list[tuple[str, int]]]] = [[] for _ in range(min(processes, len(tables)))]
    for table in sorted(tables.values(), key=len, reverse=True):
        min(shares, key=lambda share: sum(map(len, share))).append(table)
    # One repetition of all tables after the other.
    return [sorted(itertools.chain.from_iterable(share), key=lambda sample: sample[1]) for share in shares]


def _take_share(name: str, samples: Sequence[tuple[str, int]], results: multiprocessing.Queue[Sample]) -> None:
    """Take samples of the benchmark `name`, in a process of its own."""
    benchmark: Benchmark = importlib.import_module(f"tests.benchmarks.{name}").BENCHMARK
    scenarios: Mapping[str, Scenario] = {scenario.key: scenario for scenario in benchmark.scenarios}
    asyncio.run(_take(benchmark, [(scenarios[key], repetition) for key, repetition in samples], results.put))
