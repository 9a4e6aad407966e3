"""Answers while things go wrong: `python -m tests.benchmarks.faults [--answers 200] [--fault NAME ...]`. An hour.

A real verifier and a real board, in network namespaces with an emulated link of 20 ms between them, and four who ask:
streamed and whole, greedy and sampled, with drafts and without. One row for each fault. What is promised, whatever
happens: the target's own text or a typed error, in time; nothing unverified that is not marked so; and no memory and
no files lost. Exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.emulator.asking import Kind, cases
from tests.emulator.faults import FAULTS, Row, run
from tests.emulator.network import Network, lacking
from tests.emulator.scene import TARGET, Scene, Which

DEFAULT = [name for name in FAULTS if name != "cable-4s"]


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="answers under faults")
    for column in (
        "fault",
        "answers",
        "right",
        "unverified (chars taken back)",
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
        errors = ", ".join(f"{count} {code}" for code, count in row.codes.items()) if counts[Kind.ERROR] else "0"
        kinds = (Kind.LOST, Kind.HUNG, Kind.DIFFERENT, Kind.PASSED_OFF)
        table.add_row(
            f"[red]{row.name}[/red]" if row.broken else row.name,
            str(counts.total()),
            str(counts[Kind.RIGHT]),
            f"{counts[Kind.UNVERIFIED]} ({row.withdrawn})",
            errors,
            *(str(counts[kind]) for kind in kinds),
            f"{row.strikes} ({row.hit})",
            *(f"{seconds:.2f}" for seconds in (row.median, row.quantile(0.95), row.seconds[-1])),
            *(growth(row, which) for which in ("board", "verifier")),
        )
    console.print(table)
    for row in rows:
        for sentence in row.broken:
            console.print(f"[red]broken under {row.name}[/red]: {sentence}")
        for detail in row.details[:3]:
            console.print(f"{row.name}: {detail}", markup=False)


def growth(row: Row, which: Which) -> str:
    if which not in row.after:
        return "killed"
    before, after = row.before[which], row.after[which]
    grown = (after.resident - before.resident) / 2**20
    return f"{before.resident >> 20} {grown:+.0f}, {before.files} {after.files - before.files:+}"


async def measure(network: Network, options: argparse.Namespace, console: Console) -> list[Row]:
    answers, path = options.answers, options.json
    known = cases(TARGET)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    async with Scene(network) as scene:
        with Progress(*columns, console=console) as progress:
            for name in options.fault:
                task = progress.add_task(name, total=answers)
                row = await run(
                    scene, name, known, answers, lambda task=task: progress.advance(task), options=options.board
                )
                rows.append(row)
                # An hour is long: what is known is said, and on disk.
                counted = ", ".join(f"{count} {kind}" for kind, count in row.answers.items())
                progress.console.print(f"{name}: {counted}; broken: {'; '.join(row.broken) or 'nothing'}", markup=False)
                if path:
                    path.write_text(json.dumps([summary(row) for row in rows], indent=1))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=200, help="under each fault (default: %(default)s)")
    parser.add_argument("--fault", nargs="+", choices=FAULTS, default=DEFAULT, metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument(
        "--board", nargs=argparse.REMAINDER, default=[], metavar="OPTION", help="for edge-runtime serve"
    )
    options = parser.parse_args()
    console = Console(width=170)
    reason = lacking()
    if reason:
        console.print(f"no emulator: {reason}")
        return 2
    with Network(seed=1) as network, network.inside("board"):
        rows = asyncio.run(measure(network, options, console))
    show(rows, console)
    return 1 if any(row.broken for row in rows) else 0


def summary(row: Row) -> dict[str, object]:
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
