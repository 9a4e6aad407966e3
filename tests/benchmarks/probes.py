"""CPU cost of the probes: `python -m tests.benchmarks.probes`.

Prints the CPU seconds of each probe, including those of the programs that it runs, and their share of one core at the
default periods. On the recorded boards each program is replaced by a process that prints the recorded output, so it
costs as much as starting a small program on this machine. The real programs (iw, nmcli, mmcli, vcgencmd) cost more; if
this machine has them, a second table shows how much.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import rich
from rich.console import Console
from rich.table import Table

from edge_runtime.probes.reader import PROGRAM_PATH, Reader, Roots, run_program
from edge_runtime.probes.snapshot import PERIOD_SECONDS, PROGRAM_PERIOD_SECONDS, Prober

BOARDS = Path(__file__).parent.parent / "edge_runtime" / "probes" / "boards"
# Goal: share of one core that all probes together may use; chosen.
MAX_CORE_SHARE = 0.005
REPEATS = 200
PROGRAM_REPEATS = 20


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


def measure_probes(roots: Roots) -> dict[str, tuple[float, float]]:
    """Return by probe: (CPU seconds of one reading, its period)."""
    prober = Prober(roots)
    costs = {}
    for name, slot in prober.slots.items():
        repeats = PROGRAM_REPEATS if slot.period else REPEATS
        costs[name] = (
            measure_cpu_seconds(lambda slot=slot: slot.probe(Reader(roots, 0.0)), repeats),
            slot.period or PERIOD_SECONDS,
        )
    return costs


def main() -> None:
    names = sorted(path.name for path in BOARDS.iterdir())
    measured = {"this machine": measure_probes(Roots())}
    for name in names:
        board = BOARDS / name
        measured[name] = measure_probes(Roots(board / "sysfs", board / "procfs", replay_programs(board)))
    table = Table("probe", "period", *measured, title="CPU µs of one reading, programs included")
    for probe, (_, period) in measured["this machine"].items():
        table.add_row(
            probe, f"{period:.0f} s", *(f"{1e6 * board_costs[probe][0]:.0f}" for board_costs in measured.values())
        )
    shares = [sum(seconds / period for seconds, period in board_costs.values()) for board_costs in measured.values()]
    table.add_section()
    table.add_row("share of a core", "", *(f"{share:.4%}" for share in shares))
    Console(width=150).print(table)
    rich.print(f"goal: less than {MAX_CORE_SHARE:.1%} of a core; worst here {max(shares):.4%}")
    _print_program_costs()


def _print_program_costs() -> None:
    commands = {
        "iw": ("iw", "dev", "wlan0", "link"),
        "nmcli": ("nmcli", "-g", "GENERAL.METERED", "device", "show", "wlan0"),
        "mmcli": ("mmcli", "-m", "any", "-J"),
        "vcgencmd": ("vcgencmd", "pmic_read_adc"),
    }
    table = Table("program", "CPU ms of one run", f"share of a core, once per {PROGRAM_PERIOD_SECONDS:.0f} s")
    for name, command in commands.items():
        if shutil.which(name, path=PROGRAM_PATH):
            seconds = measure_cpu_seconds(lambda command=command: run_program(command), PROGRAM_REPEATS)
            table.add_row(name, f"{1e3 * seconds:.1f}", f"{seconds / PROGRAM_PERIOD_SECONDS:.4%}")
    if table.row_count:
        rich.print(table)


if __name__ == "__main__":
    main()
