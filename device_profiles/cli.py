"""`device-profile`: board profiles and calibration; images of boards, and their first boot."""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from device_profiles.first_boot import command as first_boot
from device_profiles.flash import command as flash
from device_profiles.image import command as image
from edge_runtime.common.options import add_flag, add_option, add_version_option, number
from edge_runtime.common.program import run_program
from edge_runtime.common.terminal import new_console, print_note
from edge_runtime.planning.board_profile import ProfileError, cache_bytes, find_profile, read_profile, shipped_profiles

if TYPE_CHECKING:
    from rich.console import Console

    from device_profiles.calibrate.calibration import Tick
    from device_profiles.comparison import DraftSize

DESCRIPTION = """\
Board profiles: speed, power, radios, and the source of every figure. Images for boards, and cards with them.

examples:
  device-profile list
  device-profile show raspberry-pi-5 --bundle family/bundle
  device-profile compare raspberry-pi-4 raspberry-pi-5 my-board.toml --bundle family/bundle
  device-profile calibrate --bundle family/bundle --like raspberry-pi-5 --output my-board.toml
  device-profile validate my-board.toml
  device-profile image build --board rpi5 --bundle bundle.tar.gz
  device-profile flash build/flexspec-rpi5.img /dev/sdb --config kitchen.toml
"""
CALIBRATE = """\
Measures this board: memory, the draft over context lengths and threads, heat and clock under sustained load, and power
if there is a sensor. Repeats itself until the figures agree, and says so if they do not. Writes a profile and a chart
(.svg) next to it, and ends with a verdict: tokens a second, the best number of threads, and on which links drafting
pays. Commands with --profile FILE then use what was measured. Ctrl-C stops it without writing anything. Nothing else
should run at the same time.

examples:
  device-profile calibrate --bundle bundle
  device-profile calibrate --bundle bundle --like raspberry-pi-5 --seconds 600     # long enough to see it throttle
  device-profile calibrate --bundle bundle --verifier https://verifier.example --output my-board.toml
"""
MIN_SECONDS, MAX_SECONDS = 1.0, 7200.0
PIPE_WIDTH = 160
# Load per core above which other programs disturb a calibration, chosen.
MAX_LOAD = 0.25


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 2 for a bad profile or argument, or as `edge-runtime`."""
    options = build_parser().parse_args(arguments)
    return run_program("device-profile", lambda: int(options.run(options)))


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="device-profile", description=DESCRIPTION, formatter_class=raw)
    add_version_option(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    output = argparse.ArgumentParser(add_help=False)
    add_flag(output, "--json", "print JSON")
    draft = argparse.ArgumentParser(add_help=False)
    which = draft.add_mutually_exclusive_group()
    add_option(which, "--bundle DIR", "add the cost of this draft bundle", type=Path)
    add_option(which, "--weights FILE", "add the cost of a draft with this weight file", type=Path)
    add_option(draft, "--context N", "cost after N tokens of context", default=512)

    listing = commands.add_parser("list", parents=[output], help="list the shipped profiles")
    listing.set_defaults(run=_list)

    show = commands.add_parser("show", parents=[output, draft], help="show one profile with all its sources")
    show.add_argument("profile", help="name of a shipped profile, or a TOML file")
    show.set_defaults(run=_show)

    compare = commands.add_parser("compare", parents=[output, draft], help="compare profiles side by side")
    compare.add_argument("profiles", nargs="+", metavar="PROFILE", help="names of shipped profiles, or TOML files")
    compare.set_defaults(run=_compare)

    validate = commands.add_parser("validate", parents=[output], help="check TOML files")
    validate.add_argument("files", nargs="+", type=Path, metavar="FILE")
    validate.set_defaults(run=_validate)

    calibrate = commands.add_parser(
        "calibrate", parents=[output], help="measure this board", description=CALIBRATE, formatter_class=raw
    )
    bundle = os.environ.get("FLEXSPEC_BUNDLE")
    calibrate.add_argument(
        "--bundle",
        type=Path,
        default=bundle and Path(bundle),
        required=not bundle,
        metavar="DIR",
        help="draft bundle to measure with (default: $FLEXSPEC_BUNDLE, if that is set)",
    )
    calibrate.add_argument("--verifier", default="", metavar="URL", help="also judge the link to this verifier")
    add_option(calibrate, "--output FILE", "profile to write (default: NAME.toml in the current directory)", type=Path)
    add_option(calibrate, "--name", "profile name, equal to the file name (default: from --output, else the host name)")
    calibrate.add_argument("--title", default="", help="display name (default: the board's model)")
    add_option(calibrate, "--like PROFILE", "copy power, radios and sensors that cannot be measured from this profile")
    text = "duration, at most 7200 (default: %(default)g); a board without a cooler takes minutes to throttle"
    calibrate.add_argument("--seconds", type=number(MIN_SECONDS, MAX_SECONDS), default=180.0, help=text)
    add_flag(calibrate, "--force", "replace existing files")
    calibrate.set_defaults(run=_calibrate)

    for module in (image, flash, first_boot):
        module.add_parser(commands)
    return parser


def _list(options: argparse.Namespace) -> int:
    profiles = shipped_profiles()
    if options.json:
        _print_json([{"name": p.name, "title": p.title, "origin": p.origin} for p in profiles])
        return 0
    for profile in profiles:
        print(f"{profile.name:22} {profile.title:52} {profile.origin}")
    return 0


def _show(options: argparse.Namespace) -> int:
    from device_profiles.comparison import DraftCost, describe_profile

    profile, draft = find_profile(options.profile), _draft(options)
    cost = DraftCost.estimate(profile, draft, options.context) if draft else None
    if options.json:
        _print_json(msgspec.to_builtins(profile) | ({"cost": msgspec.to_builtins(cost)} if cost else {}))
        return 0
    print("\n".join(describe_profile(profile)))
    if cost and draft:
        print(f"\ncost of {draft.name}, {draft.weight_bytes} bytes")
        for name, value in msgspec.to_builtins(cost).items():
            print(f"  {name:28} {value:.6g}" if isinstance(value, float) else f"  {name:28} {value}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from device_profiles.comparison import DraftCost, comparison_table

    profiles, draft = [find_profile(name) for name in options.profiles], _draft(options)
    if options.json:
        costs = [
            {"cost": msgspec.to_builtins(DraftCost.estimate(p, draft, options.context))} if draft else {}
            for p in profiles
        ]
        _print_json([msgspec.to_builtins(profile) | cost for profile, cost in zip(profiles, costs, strict=True)])
        return 0
    _console().print(comparison_table(profiles, draft, options.context))
    return 0


def _validate(options: argparse.Namespace) -> int:
    results = []
    for file in options.files:
        try:
            read_profile(file)
            results.append({"file": str(file), "error": None})
        except ProfileError as error:
            results.append({"file": str(file), "error": str(error)})
    if options.json:
        _print_json(results)
    for result in results:
        if result["error"]:
            print_note(f"device-profile: {result['error']}")
        elif not options.json:
            print(f"{result['file']}: valid")
    return 2 if any(result["error"] for result in results) else 0


def _calibrate(options: argparse.Namespace) -> int:
    import asyncio

    from device_profiles.calibrate import machine, output
    from device_profiles.calibrate.calibration import LINK_SHARE, CalibrationConfig, calibrate, measure_link
    from device_profiles.calibrate.verdict import describe_result
    from device_profiles.calibrate.wattmeter import Wattmeter
    from device_profiles.comparison import describe_profile
    from edge_runtime.protocol.bundle import read_bundle

    name = options.name or (options.output.stem if options.output else _slug(socket.gethostname()))
    path: Path = options.output or Path(f"{name}.toml")
    if path.stem != name:
        raise ProfileError(f"--name {name} and --output {path} differ, but a profile is named after its file: omit one")
    if name != _slug(name):
        raise ProfileError(f"{name!r} is not a valid profile name: use lowercase letters, digits, dots and dashes")
    output.check_writable(path, options.force)
    like = find_profile(options.like) if options.like else None
    model = machine.read_device_tree_model()
    if like is not None and like.is_evidently_other(model):
        _warn(
            f"--like {like.name}: this machine is a {machine.read_board_model()}, so that board's figures are not its"
        )
    if machine.load_average() > MAX_LOAD * machine.count_cores():
        _warn(f"other programs are running (load {machine.load_average():.2g}); figures may be low")
    meter = Wattmeter(lines=like.sensors.lines if like else None)
    config = CalibrationConfig(
        bundle=options.bundle,
        name=name,
        title=options.title,
        seconds=options.seconds,
        like=like,
        sensor=meter.source,
    )
    links: dict[str, float] = {}
    try:
        with _progress(options.seconds) as tick:
            if options.verifier:
                seconds = LINK_SHARE * options.seconds
                links[options.verifier] = asyncio.run(measure_link(options.verifier, seconds, tick))
            profile = calibrate(config, meter, tick)
    except KeyboardInterrupt:
        print_note("device-profile: interrupted; nothing was written")
        raise
    manifest = read_bundle(options.bundle, verify=False).manifest
    output.save(path, profile, output.draft_chart(profile, cache_bytes(manifest)))
    if options.json:
        _print_json(msgspec.to_builtins(profile))
    else:
        print("\n".join(describe_profile(profile)))
        print(f"\nwrote {path} and {path.with_suffix('.svg')}\n")
    # Not part of the JSON: it follows from the profile.
    for line in describe_result(profile, manifest, links):
        print(line, file=sys.stderr if options.json else sys.stdout)
    return 0


def _warn(message: str) -> None:
    print_note(f"device-profile: warning: {message}")


@contextmanager
def _progress(seconds: float) -> Iterator[Tick]:
    """A progress bar with the time left, on a terminal only. Drawn only in `tick`, so between measurements."""
    from rich.progress import BarColumn, Progress

    started = shown = time.monotonic()
    console = new_console(stderr=True)
    columns = (BarColumn(24), "{task.fields[left]:.0f} s left ", "{task.description}")
    with Progress(
        *columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=seconds, left=seconds)

        def tick(note: str) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= 0.2:
                shown, elapsed = now, now - started
                bar.update(task, completed=elapsed, left=max(0.0, seconds - elapsed), description=note, refresh=True)

        yield tick


def _draft(options: argparse.Namespace) -> DraftSize | None:
    from device_profiles.comparison import DraftSize

    if options.bundle:
        return DraftSize.from_bundle(options.bundle)
    return DraftSize.from_weight_file(options.weights) if options.weights else None


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._") or "board"


def _console() -> Console:

    return new_console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _print_json(value: Any) -> None:
    print(msgspec.json.encode(value).decode())


if __name__ == "__main__":
    raise SystemExit(main())
