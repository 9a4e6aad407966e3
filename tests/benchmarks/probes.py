"""What watching costs: `python -m tests.benchmarks.probes`.

CPU seconds of each probe, those of the programs that it runs included, and their share of one core at the default
periods. On the recorded boards a program is a real process, which prints what was recorded: it costs what starting a
small program costs here. The true ones (iw, nmcli, mmcli, vcgencmd) cost more; where this machine has them, a second
table shows how much.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import rich
from rich.table import Table

from edge_runtime.probes.roots import PROGRAM_PATH, Reader, Roots, run_program
from edge_runtime.probes.snapshot import PERIOD_SECONDS, PROGRAM_PERIOD_SECONDS, Prober

BOARDS = Path(__file__).parent.parent / "edge_runtime" / "probes" / "boards"
BUDGET = 0.005
REPEATS = 200
PROGRAM_REPEATS = 20


def cpu_seconds() -> float:
    """Of this process and of the programs that it has run."""
    mine, theirs = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime


def cost(work: Callable[[], object], repeats: int) -> float:
    """Mean CPU seconds."""
    work()
    started = cpu_seconds()
    for _ in range(repeats):
        work()
    return (cpu_seconds() - started) / repeats


def printed(board: Path) -> Callable[[tuple[str, ...]], bytes | None]:
    """Runs a process that prints what the board's program printed."""

    def run(arguments: tuple[str, ...]) -> bytes | None:
        recorded = board / "bin" / "_".join(arguments)
        return run_program(("cat", str(recorded))) if recorded.exists() else None

    return run


def costs(roots: Roots) -> dict[str, tuple[float, float]]:
    """By probe: (CPU seconds of a reading, its period)."""
    prober = Prober(roots)
    found = {}
    for name, slot in prober.slots.items():
        repeats = PROGRAM_REPEATS if slot.period else REPEATS
        found[name] = cost(lambda slot=slot: slot.probe(Reader(roots, 0.0)), repeats), slot.period or PERIOD_SECONDS
    return found


def main() -> None:
    names = sorted(path.name for path in BOARDS.iterdir())
    measured = {"this machine": costs(Roots())}
    for name in names:
        board = BOARDS / name
        measured[name] = costs(Roots(board / "sysfs", board / "procfs", printed(board)))
    table = Table("probe", "every", *measured, title="CPU µs of one reading, programs included")
    for probe, (_, period) in measured["this machine"].items():
        table.add_row(probe, f"{period:.0f} s", *(f"{1e6 * one[probe][0]:.0f}" for one in measured.values()))
    shares = [sum(seconds / period for seconds, period in one.values()) for one in measured.values()]
    table.add_section()
    table.add_row("share of a core", "", *(f"{share:.4%}" for share in shares))
    rich.print(table)
    rich.print(f"asked for: less than {BUDGET:.1%} of a core; worst here {max(shares):.4%}")
    _programs()


def _programs() -> None:
    commands = {
        "iw": ("iw", "dev", "wlan0", "link"),
        "nmcli": ("nmcli", "-g", "GENERAL.METERED", "device", "show", "wlan0"),
        "mmcli": ("mmcli", "-m", "any", "-J"),
        "vcgencmd": ("vcgencmd", "pmic_read_adc"),
    }
    table = Table("program", "CPU ms of one run", f"share of a core, once in {PROGRAM_PERIOD_SECONDS:.0f} s")
    for name, command in commands.items():
        if shutil.which(name, path=PROGRAM_PATH):
            seconds = cost(lambda command=command: run_program(command), PROGRAM_REPEATS)
            table.add_row(name, f"{1e3 * seconds:.1f}", f"{seconds / PROGRAM_PERIOD_SECONDS:.4%}")
    if table.row_count:
        rich.print(table)


if __name__ == "__main__":
    main()
