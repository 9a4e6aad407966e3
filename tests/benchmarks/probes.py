"""CPU time of the probes: `python -m tests.benchmarks run probes`.

Seconds of CPU of one reading, including those of the programs that a probe runs, and their share of one core at the
default periods. On the recorded boards each program is replaced by a process that prints the recorded output, so it
costs as much as starting a small program on this machine. The real programs (iw, nmcli, mmcli, vcgencmd) cost more.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path

from edge_runtime.probes.reader import Reader, Roots, run_program
from edge_runtime.probes.snapshot import PERIOD_SECONDS, Prober
from tests.benchmarks.harness.benchmark import Benchmark, Quantity, Scenario, Values

BOARDS = Path(__file__).parent.parent / "edge_runtime" / "probes" / "boards"
THIS_MACHINE = "this machine"
REPEATS, PROGRAM_REPEATS = 50, 10

# The goal is chosen.
SHARE = Quantity("all probes, share of a core", "%", digits=4, goal=0.5)
READING = Quantity("reading files once", "us of CPU", digits=0)
PROGRAMS = Quantity("running programs once", "us of CPU", digits=0)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the programs that it has run."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measure_cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the mean CPU seconds of one call."""
    work()
    started = cpu_seconds()
    for _ in range(repeats):
        work()
    return (cpu_seconds() - started) / repeats


def replay_programs(board: Path) -> Callable[[tuple[str, ...]], bytes | None]:
    """Return a function that runs a process which prints the recorded output of the board's program."""

    def run(arguments: tuple[str, ...]) -> bytes | None:
        recorded = board / "bin" / "_".join(arguments)
        return run_program(("cat", str(recorded))) if recorded.exists() else None

    return run


async def measure_probes(scenario: Scenario, _repetition: int) -> Values:
    board = BOARDS / scenario.labels["board"]
    is_recorded = scenario.labels["board"] != THIS_MACHINE
    roots = Roots(board / "sysfs", board / "procfs", replay_programs(board)) if is_recorded else Roots()
    share, reading, programs = 0.0, 0.0, 0.0
    for slot in Prober(roots).slots.values():
        repeats = PROGRAM_REPEATS if slot.period else REPEATS
        seconds = measure_cpu_seconds(lambda slot=slot: slot.probe(Reader(roots, 0.0)), repeats)
        share += seconds / (slot.period or PERIOD_SECONDS)
        # Those with a period of their own run programs.
        programs += seconds if slot.period else 0.0
        reading += 0.0 if slot.period else seconds
    return {SHARE.name: 100 * share, READING.name: 1e6 * reading, PROGRAMS.name: 1e6 * programs}


BENCHMARK = Benchmark(
    name="probes",
    title="What the probes cost",
    scenarios=tuple(
        Scenario({"board": name}, (SHARE, READING, PROGRAMS))
        for name in (THIS_MACHINE, *sorted(path.name for path in BOARDS.iterdir()))
    ),
    running=lambda: contextlib.nullcontext(measure_probes),
    repetitions=5,
    quick_repetitions=2,
)
