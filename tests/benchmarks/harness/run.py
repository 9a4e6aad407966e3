"""Takes the samples of benchmarks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edge_runtime.protocol.errors import InputError
from tests.benchmarks.harness.benchmark import Benchmark
from tests.benchmarks.harness.samples import RunInfo, Sample, SampleFile


def take_samples(
    benchmarks: Sequence[Benchmark], directory: Path, *, quick: bool, again: bool = False, only: str = ""
) -> list[Path]:
    """Run benchmarks one after the other. Returns the files of their samples.

    Repetitions are interleaved (every scenario once, then every scenario again), so that a machine that becomes slower
    or busier does so for all. Samples of an earlier run of the same commit, machine and versions count: a killed run
    goes on.

    Args:
        directory: of the files.
        quick: take few samples.
        again: start over.
        only: take samples of scenarios with this text in their key.
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
            asyncio.run(_take(benchmark, file, progress, quick=quick, only=only))
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


async def _take(benchmark: Benchmark, file: SampleFile, progress: Progress, *, quick: bool, only: str) -> None:
    repetitions = benchmark.quick_repetitions if quick else benchmark.repetitions
    taken = {(sample.scenario, sample.repetition) for sample in file.samples}
    missing = [
        (scenario, repetition)
        for repetition in range(repetitions)
        for scenario in benchmark.scenarios
        if (scenario.key, repetition) not in taken and only in scenario.key and (scenario.quick or not quick)
        if scenario.samples is None or repetition < scenario.samples
    ]
    task = progress.add_task(benchmark.name, total=len(missing))
    if not missing:
        return
    async with benchmark.running() as measure:
        for scenario, repetition in missing:
            progress.update(task, description=f"{benchmark.name}: {scenario.key}")
            values = await measure(scenario, repetition)
            file.add(Sample(scenario.key, repetition, dict(values)))
            progress.advance(task)
    progress.update(task, description=benchmark.name)
