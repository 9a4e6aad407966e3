"""`edge-runtime probe`: show the readings of all sensors, live in a terminal or as JSON."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.cli.planner_options import read_sensor_lines
from edge_runtime.cli.settings_options import add_settings
from edge_runtime.common.options import add_flag, add_option
from edge_runtime.common.terminal import new_console
from edge_runtime.protocol.errors import InputError

# Imported by every command; these are slow to import.
if TYPE_CHECKING:
    from edge_runtime.probes import Prober
    from edge_runtime.verifier import VerifierClient

HELP = "show sensor readings: link, energy, temperature, processor"
DESCRIPTION = """\
Shows the readings of the board's probes: link, energy, temperature, processor. A sensor that the board does not have is
not shown.

examples:
  edge-runtime probe                                       # live, until ^C
  edge-runtime probe --once --verifier https://verifier.example
  edge-runtime probe --json | jq .surroundings             # the inputs of the planner
  edge-runtime probe --json --watch                        # one object per period
  edge-runtime probe --path.sysfs board/sysfs --path.procfs board/procfs --path.recorded board/bin
"""

# Between the two readings that rates, load and energy counters need. Chosen: short enough to wait for.
FIRST_INTERVAL_SECONDS = 0.5
MAX_PERIOD_SECONDS = 3600.0
SYSFS, PROCFS = Path("/sys"), Path("/proc")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_flag(parser, "--json", "print one JSON object instead of tables")
    mode = parser.add_mutually_exclusive_group()
    add_flag(mode, "--watch", "repeat until ^C (default on a terminal, unless --json is given)")
    add_flag(mode, "--once", "read once and exit (default otherwise)")
    add_option(parser, "--period SECONDS", "time between two readings", default=5.0)
    text = "also connect to this verifier, and show the kernel's TCP statistics of the connection"
    add_option(parser, "--verifier URL", text)
    add_option(parser, "--path.sysfs DIR", "sysfs to read", default=SYSFS, dest="sysfs")
    add_option(parser, "--path.procfs DIR", "procfs to read", default=PROCFS, dest="procfs")
    text = (
        "read the output of iw, nmcli, mmcli and vcgencmd from files such as DIR/vcgencmd_get_throttled "
        "instead of running them (default: run them, unless --path.sysfs or --path.procfs is given)"
    )
    add_option(parser, "--path.recorded DIR", text, type=Path, dest="recorded")
    add_settings(parser, "planner.profile")
    parser.set_defaults(run=_run)


async def _run(options: argparse.Namespace) -> int:
    from edge_runtime.probes import Prober, RecordedPrograms, Roots, run_program
    from edge_runtime.verifier import VerifierClient

    if not 0 < options.period <= MAX_PERIOD_SECONDS:
        raise InputError(f"--period {options.period:g}: must be more than 0 and at most {MAX_PERIOD_SECONDS:g} seconds")
    for name in ("sysfs", "procfs", "recorded"):
        path = getattr(options, name)
        if path is not None and not path.is_dir():
            raise InputError(f"--path.{name} {path}: no such directory")
    roots = Roots(options.sysfs, options.procfs, run_program)
    if options.recorded is not None:
        roots = Roots(options.sysfs, options.procfs, RecordedPrograms(options.recorded))
    elif (options.sysfs, options.procfs) != (SYSFS, PROCFS):
        # The files are another machine's, and this machine's programs know nothing about that.
        roots = Roots(options.sysfs, options.procfs, lambda _: None)
    async with contextlib.AsyncExitStack() as stack:
        client = None
        if options.verifier is not None:
            client = await stack.enter_async_context(VerifierClient(options.verifier))
            await client.models()
        peer = client.meter.peer if client is not None else None
        lines = read_sensor_lines(vars(options).get("planner.profile", ""))
        prober = Prober(roots, options.period, host=None if peer is None else ipaddress.ip_address(peer), lines=lines)
        # The second reading, after the interval, has rates.
        await asyncio.to_thread(prober.take)
        await asyncio.sleep(min(FIRST_INTERVAL_SECONDS, options.period))
        watch = options.watch or (not (options.once or options.json) and sys.stdout.isatty())
        await _show(prober, client, options.json, watch)
    return 0


async def _show(prober: Prober, client: VerifierClient | None, as_json: bool, watch: bool) -> None:
    import msgspec
    from rich.live import Live

    from edge_runtime.cli.probe_view import render_snapshot

    console = new_console()
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
                screen.update(render_snapshot(snapshot, tcp), refresh=True)
            else:
                console.print(render_snapshot(snapshot, tcp))
            if not watch:
                return
            await asyncio.sleep(prober.period)
            if client is not None:
                # The kernel does not update the round-trip time of an idle connection.
                await client.models()
