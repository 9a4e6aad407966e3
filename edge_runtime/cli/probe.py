"""`edge-runtime probe`: what the board knows of its link, its energy and its heat, live in a terminal or as JSON."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.protocol.errors import InputError

# Every command of `edge-runtime` adds this parser; only this one should pay for what it needs.
if TYPE_CHECKING:
    from edge_runtime.probes.snapshot import Prober
    from edge_runtime.verifier.client import VerifierClient

DESCRIPTION = """\
Shows what the board's probes measure: link, energy, heat, speed. A sensor that the board does not have is not shown.

examples:
  edge-runtime probe                                       # live, until ^C
  edge-runtime probe --once --verifier https://verifier.example
  edge-runtime probe --json | jq .surroundings             # what the planner is told
  edge-runtime probe --json --watch                        # one object each period
  edge-runtime probe --path.sysfs board/sysfs --path.procfs board/procfs --path.recorded board/bin
"""

# Between the two readings that one look takes: rates, load and energy counters need two.
LOOK_SECONDS = 0.5
LONGEST_PERIOD = 3600.0
SYSFS, PROCFS = Path("/sys"), Path("/proc")


def add_parser(commands: Any) -> None:
    """Adds `probe` to argparse's sub-parsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "probe",
        help="show what the board's probes measure: link, energy, heat, speed",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    often = parser.add_mutually_exclusive_group()
    often.add_argument("--watch", action="store_true", help="go on until ^C (default on a terminal, without --json)")
    often.add_argument("--once", action="store_true", help="one look (the default elsewhere)")
    parser.add_argument(
        "--period", type=float, default=5.0, metavar="SECONDS", help="between two readings (default: %(default)g)"
    )
    parser.add_argument(
        "--verifier", metavar="URL", help="connect to this verifier, and show the connection as the kernel sees it"
    )
    parser.add_argument(
        "--path.sysfs", dest="sysfs", type=Path, default=SYSFS, metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--path.procfs", dest="procfs", type=Path, default=PROCFS, metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--path.recorded",
        dest="recorded",
        type=Path,
        metavar="DIR",
        help="read what iw, nmcli, mmcli and vcgencmd print from files like DIR/vcgencmd_get_throttled, instead of "
        "running them; with other roots than this machine's they are not run anyway",
    )
    parser.set_defaults(run=probe)


async def probe(options: argparse.Namespace) -> int:
    """Runs the command. Returns the exit code; raises FlexSpecError."""
    from edge_runtime.probes.roots import Recorded, Roots, run_program
    from edge_runtime.probes.snapshot import Prober
    from edge_runtime.verifier.client import VerifierClient

    if not 0 < options.period <= LONGEST_PERIOD:
        raise InputError(f"--period {options.period:g}: must be more than 0 and at most {LONGEST_PERIOD:g} seconds")
    for name in ("sysfs", "procfs", "recorded"):
        path = getattr(options, name)
        if path is not None and not path.is_dir():
            raise InputError(f"--path.{name} {path}: no such directory")
    roots = Roots(options.sysfs, options.procfs, run_program)
    if options.recorded is not None:
        roots = Roots(options.sysfs, options.procfs, Recorded(options.recorded))
    elif (options.sysfs, options.procfs) != (SYSFS, PROCFS):
        # Programs of this machine would say nothing of the one whose files these are.
        roots = Roots(options.sysfs, options.procfs, lambda _: None)
    async with contextlib.AsyncExitStack() as stack:
        client = None
        if options.verifier is not None:
            client = await stack.enter_async_context(VerifierClient(options.verifier))
            await client.models()
        peer = client.meter.peer if client is not None else None
        prober = Prober(roots, options.period, host=None if peer is None else ipaddress.ip_address(peer))
        # The first of two readings; the second has rates.
        await asyncio.to_thread(prober.take)
        await asyncio.sleep(min(LOOK_SECONDS, options.period))
        watch = options.watch or (not (options.once or options.json) and sys.stdout.isatty())
        await _show(prober, client, options.json, watch)
    return 0


async def _show(prober: Prober, client: VerifierClient | None, as_json: bool, watch: bool) -> None:
    import msgspec
    from rich.console import Console
    from rich.live import Live

    from edge_runtime.cli.probe_view import tables

    console = Console()
    with contextlib.ExitStack() as stack:
        screen = None
        if watch and not as_json:
            screen = stack.enter_context(Live(console=console, auto_refresh=False))
        while True:
            snapshot = await asyncio.to_thread(prober.take)
            tcp = client.meter.info if client is not None else None
            if as_json:
                report = {
                    "snapshot": snapshot,
                    "tcp": None if tcp is None else tcp._asdict(),
                    "surroundings": snapshot.surroundings(tcp),
                }
                print(msgspec.json.encode(report).decode(), flush=True)
            elif screen is not None:
                screen.update(tables(snapshot, tcp), refresh=True)
            else:
                console.print(tables(snapshot, tcp))
            if not watch:
                return
            await asyncio.sleep(prober.period)
            if client is not None:
                # An idle connection learns nothing new of its round-trip time.
                await client.models()
