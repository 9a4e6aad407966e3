"""Answers under injected faults: `python -m tests.benchmarks.faults [--answers 200] [--fault NAME ...]`. One hour.

Runs a real verifier and a real board in network namespaces, joined by an emulated link of 20 ms, and four clients that
request answers streamed and whole, greedy and sampled, with and without drafts. Prints one row per fault. The
guarantees
under every fault: the target's own text or a typed error, in time; unverified text is marked as such; no leak of memory
or open files. Exit code 1 if a guarantee was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.emulator.answer_checker import AnswerKind, make_cases
from tests.emulator.faults import FAULTS, FaultResult, run_fault
from tests.emulator.network import Network, missing_requirement
from tests.emulator.test_bed import TARGET, ProcessName, TestBed

DEFAULT_FAULTS = [name for name in FAULTS if name != "cable-4s"]


def print_results(rows: list[FaultResult], console: Console) -> None:
    table = Table(title="answers under faults")
    for column in (
        "fault",
        "answers",
        "right",
        "unverified (chars withdrawn)",
        "typed errors",
        "lost",
        "hung",
        "differing",
        "passed off",
    ):
        table.add_column(column, justify="left" if column in ("fault", "typed errors") else "right")
    for column in ("strikes (hit)", "p50, s", "p95, s", "max, s", "board MB, files", "verifier MB, files"):
        table.add_column(column, justify="right")
    for row in rows:
        counts = row.answers
        errors = ", ".join(f"{count} {code}" for code, count in row.codes.items()) if counts[AnswerKind.ERROR] else "0"
        kinds = (AnswerKind.LOST, AnswerKind.HUNG, AnswerKind.DIFFERENT, AnswerKind.PASSED_OFF)
        table.add_row(
            f"[red]{row.name}[/red]" if row.broken else row.name,
            str(counts.total()),
            str(counts[AnswerKind.RIGHT]),
            f"{counts[AnswerKind.UNVERIFIED]} ({row.withdrawn})",
            errors,
            *(str(counts[kind]) for kind in kinds),
            f"{row.strikes} ({row.hit})",
            *(f"{seconds:.2f}" for seconds in (row.median, row.quantile(0.95), row.seconds[-1])),
            *(describe_growth(row, which) for which in ("board", "verifier")),
        )
    console.print(table)
    for row in rows:
        for sentence in row.broken:
            console.print(f"[red]broken under {row.name}[/red]: {sentence}")
        for detail in row.details[:3]:
            console.print(f"{row.name}: {detail}", markup=False)


def describe_growth(row: FaultResult, which: ProcessName) -> str:
    if which not in row.after:
        return "killed"
    before, after = row.before[which], row.after[which]
    grown = (after.resident - before.resident) / 2**20
    return f"{before.resident >> 20} {grown:+.0f}, {before.files} {after.files - before.files:+}"


async def measure(network: Network, options: argparse.Namespace, console: Console) -> list[FaultResult]:
    answers, path = options.answers, options.json
    cases = make_cases(TARGET)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    async with TestBed(network) as test_bed:
        with Progress(*columns, console=console) as progress:
            for name in options.fault:
                task = progress.add_task(name, total=answers)
                row = await run_fault(
                    test_bed, name, cases, answers, lambda task=task: progress.advance(task), options=options.board
                )
                rows.append(row)
                # The whole run takes an hour, so print and save the results of each fault at once.
                counted = ", ".join(f"{count} {kind}" for kind, count in row.answers.items())
                progress.console.print(
                    f"{name}: {counted}; broken guarantees: {'; '.join(row.broken) or 'none'}", markup=False
                )
                if path:
                    path.write_text(json.dumps([summary(row) for row in rows], indent=1))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--answers", type=int, default=200, help="number of answers under each fault (default: %(default)s)"
    )
    parser.add_argument(
        "--fault", nargs="+", choices=FAULTS, default=DEFAULT_FAULTS, metavar="NAME", help=", ".join(FAULTS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parser.add_argument(
        "--board", nargs=argparse.REMAINDER, default=[], metavar="OPTION", help="options for edge-runtime serve"
    )
    options = parser.parse_args()
    console = Console(width=170)
    reason = missing_requirement()
    if reason:
        console.print(f"the emulator cannot run: {reason}")
        return 2
    with Network(seed=1) as network, network.inside("board"):
        rows = asyncio.run(measure(network, options, console))
    print_results(rows, console)
    return 1 if any(row.broken for row in rows) else 0


def summary(row: FaultResult) -> dict[str, object]:
    return {
        "fault": row.name,
        "answers": dict(row.answers),
        "codes": dict(row.codes),
        "strikes": row.strikes,
        "hit": row.hit,
        "p50": row.median,
        "p95": row.quantile(0.95),
        "broken": row.broken,
        "withdrawn": row.withdrawn,
        "resident": {which: [row.before[which].resident, usage.resident] for which, usage in row.after.items()},
        "files": {which: [row.before[which].files, usage.files] for which, usage in row.after.items()},
        "details": row.details,
    }


if __name__ == "__main__":
    raise SystemExit(main())
